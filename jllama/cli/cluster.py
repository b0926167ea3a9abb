"""``--coordinator``, ``--num-processes`` and ``--process-id``: how the processes of a command find one another."""

import argparse
import os
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import jax
from jax.errors import JaxRuntimeError

import jllama
from jllama.errors import RAISED, InputError

PATIENCE = 300.0  # seconds in which all processes must have started
REMIND = 10.0  # after so many, this one says that it waits
AUTO = "auto"
_LONGER = 900  # jax waits for longer than we do: it would abort with the stack of its C++
# Flags that must be the same in all processes: they wait for one another for ever if their programs differ.
_ALIKE = ("tp", "dp", "dtype", "quant", "backend", "max_seq_len", "slots", "pages", "memory", "no_warm_up", "samples")
_ALIKE += ("max_new_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos", "logit_bias")
_ALIKE += ("repetition_penalty", "presence_penalty", "frequency_penalty", "regex", "stride", "windows", "budget")
_PACKAGES = ("jllama", "jax", "jaxlib", "llguidance")


def check(args: argparse.Namespace) -> None:
    """Raise `InputError` for flags that cannot be meant."""
    count, index = args.num_processes, args.process_id
    given = count is not None or index is not None
    if args.coordinator is None:
        if given:
            raise InputError("--num-processes, --process-id: expected --coordinator with them, found none")
    elif args.coordinator == AUTO:
        if given:
            raise InputError("--coordinator auto: expected no --num-processes and --process-id, found some")
    else:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not (port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--coordinator: expected HOST:PORT or auto, found {args.coordinator!r}")
        if count is None or index is None or not 0 <= index < count:
            found = f"{count} and {index}"
            raise InputError(
                f"--coordinator: expected --num-processes and a --process-id from 0 to one less, found {found}"
            )


def alike(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same in all processes: flags, and the versions of packages."""
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in _ALIKE if hasattr(args, name)}
    found = {name: jllama.__version__ if name == "jllama" else _version(name) for name in _PACKAGES}
    return flags | found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def join(args: argparse.Namespace) -> str | None:
    """Wait for the other processes that checked flags name, before any device is used. Returns the host of process 0;
    None: the cluster knows it."""
    where = f"--coordinator {args.coordinator}"
    with ThreadPoolExecutor(1) as pool:  # jax waits in C++, where Ctrl-C does not reach it
        joining = pool.submit(_initialize_in_cluster if args.coordinator == AUTO else _initialize, args)
        try:
            if not wait([joining], REMIND).done and not args.quiet:
                print(f"jllama: waits for the other processes ({where})", file=sys.stderr, flush=True)
            if not wait([joining], PATIENCE - REMIND).done:
                late = f"expected all processes within {PATIENCE:g} seconds, found that some did not start or cannot "
                leave(2, f"jllama: error: {where}: {late}reach process 0")
            joining.result()
        except KeyboardInterrupt:
            leave(130, "jllama: interrupted")
        except JaxRuntimeError as error:
            raise InputError(f"{where}: expected to start or reach process 0, found: {error}") from None
    return None if args.coordinator == AUTO else args.coordinator.rpartition(":")[0]


def leave(code: int, message: str) -> NoReturn:
    """End this process now, without waiting for others."""
    if message:
        print(message, file=sys.stderr, flush=True)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)


def _initialize(args: argparse.Namespace) -> None:
    if args.process_id == 0:  # jax, which listens there, may crash where it cannot
        try:
            socket.create_server(("", int(args.coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            found = f"expected a free port of this host, found: {error.strerror}"
            raise InputError(f"--coordinator {args.coordinator}: {found}") from None
    # Without a look at the cluster's environment: in Slurm, jax would take only one GPU of the host.
    own = {"cluster_detection_method": "deactivate", "initialization_timeout": _LONGER}
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id, **own)


def _initialize_in_cluster(args: argparse.Namespace) -> None:
    with warnings.catch_warnings(record=True, action="always") as warned:  # such as: Kubernetes needs a package
        try:
            jax.distributed.initialize(initialization_timeout=_LONGER)
        except JaxRuntimeError:
            raise
        except (*RAISED, ImportError, OSError) as error:  # from the environment's variables, which jax does not check
            notes = "".join(f"; {warning.message}" for warning in warned)
            expected = "expected Slurm, Open MPI, Kubernetes or a TPU pod, as jax detects it, found "
            raise InputError(f"--coordinator {args.coordinator}: {expected}{_found(error)}{notes}") from None


def _found(error: Exception) -> str:
    """The cluster that jax has not found, or could not use."""
    if not isinstance(error, ValueError) or "be defined" not in str(error):
        return f"one that jax cannot use: {type(error).__name__}: {error}"
    return "a Slurm job without its step (srun starts one)" if "SLURM_JOB_ID" in os.environ else "none"
