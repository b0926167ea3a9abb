"""Settings with which XLA compiles for a CPU quickly: tests compile far longer than they compute."""

import os

FLAGS = (
    # The newer emitters set up MLIR for every fusion, which is more than half of the time that a small program takes to
    # compile. The code of the older ones is up to 1.5 times slower. A version of XLA that does not know the option
    # ignores it.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    # One LLVM module a program: to divide it for several threads is a third of what is left.
    "--xla_cpu_parallel_codegen_split_count=1",
)


def xla_flags(*more: str) -> str:
    """XLA_FLAGS with these added, for a process that compiles longer than it computes."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return " ".join([*given, *(flag for flag in (*FLAGS, *more) if flag not in given)])
