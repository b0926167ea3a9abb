"""Settings with which XLA compiles for a CPU quickly: tests compile far longer than they compute."""

import os

FLAGS = (
    # The newer emitters set up MLIR for every fusion, which is more than half of the time that a small program takes to
    # compile. A version of XLA that does not know the option ignores it.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    # One LLVM module a program: to divide it for several threads is a third of what is left.
    "--xla_cpu_parallel_codegen_split_count=1",
)


def xla_flags(*more: str) -> str:
    """XLA_FLAGS of this process with these added, for one that a test starts."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return " ".join([*given, *(flag for flag in (*FLAGS, *more) if flag not in given)])
