"""jllama itself, with the backend that the job names. It is also the reference that checks all others."""

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.peers import NotSupported, Output, Peer
from bench.workloads import DRAWN, SAMPLING, SEED

if TYPE_CHECKING:
    from jllama.config import Quant

CHUNK = 64  # steps per chunk of one prompt; a terminal uses 16 to show text early, which a benchmark does not need
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
Timed = tuple[list[list[int]], float, float]  # the new ids of every row, and the seconds to the first and to the last
PACKAGES = ("jax", "jaxlib", "numpy", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13")


def available() -> None:
    """Always available."""


def open_model(job: dict[str, Any]) -> "Ours":
    """Load ``job["model"]``. Without one, only requests that need no weights work."""
    return Ours(job)


def _sampling(batch: int, sampled: bool) -> Any:
    from jllama import make_sampling

    settings: dict[str, Any] = SAMPLING
    return make_sampling(batch, seed=SEED, **settings) if sampled else None


class Ours:
    """`jllama` as a peer."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.params, self.backends = job, None, {}
        self.mesh = _mesh(job.get("tp", 1), job.get("dp", 1))
        self._traced: dict[tuple[int, ...], dict[str, Any]] = {}  # `jllama.backends` of every kind of batch
        if job.get("compiled") is not None:
            from jllama.compilation import enable_cache

            enable_cache(job["compiled"])
        if job.get("model") is not None:
            self._load(int(next(iter(job["rooms"]))))

    def _load(self, batch: int) -> None:
        """Load the params as the command line does for ``batch`` rows, because stacking depends on the batch."""
        import jax

        from jllama.step import runs_whole

        dtype, room = self.job["dtype"], self.job["rooms"][str(batch)]
        quant: Quant = dtype if dtype in ("int8", "int4") else "none"
        float_dtype = DTYPES.get(dtype) or ("float32" if jax.devices()[0].platform == "cpu" else "bfloat16")
        config, make = opened(self.job["model"], float_dtype, quant, batch, room, self.mesh)
        how: dict[str, Any] = dict(batch=batch, max_len=room, mesh=self.mesh)
        stacked = self.job["backend"] != "xla" and runs_whole(config, float_dtype, quant, **how)
        if self.params is not None and self.params.stacked == stacked:
            return
        self.params = None  # free the old params first, so that the device need not hold both
        self.params = make(stacked=stacked)
        jax.block_until_ready(self.params)

    def generate(self, prompts: list[list[int]], new_tokens: int, *, sampled: bool = False) -> Output:
        """Generate greedily, or with `SAMPLING`. The first token is timed in a run of its own, because in a long run
        later tokens are already under way when the first arrives, and on a CPU may be done."""
        from pallas_kernels import Unsupported

        self._load(len(prompts))
        run = self._stream if len(prompts) == 1 else self._batch
        sampling = _sampling(len(prompts), sampled)
        try:
            ids, first, _ = run(prompts, 1, new_tokens, sampling)
            if new_tokens == 1:
                return Output(ids, first, 0.0)
            ids, arrived, total = run(prompts, new_tokens, new_tokens, sampling)
        except Unsupported as reason:
            raise NotSupported(str(reason)) from None
        least = min(first, arrived)
        return Output(ids, first, total - least if total > least else total)  # noise may hide a short decode

    def _stream(self, prompts: list[list[int]], new: int, most: int, sampling: Any) -> Timed:
        """One prompt, with the `Session` that the command line uses. Its cache has room for ``most`` new tokens."""
        from jllama.stream import Session

        assert self.params is not None
        room = -(-(len(prompts[0]) + most) // 128) * 128
        session = Session(self.params, max_len=room, backend=self.job["backend"], chunk=even_chunk(most - 1))
        ids: list[int] = []
        begin, first = time.perf_counter(), 0.0
        for tokens in session.run(prompts[0], new, sampling):
            first = first or time.perf_counter() - begin
            ids += tokens.ids
        self.backends = session.backends
        return [ids], first, time.perf_counter() - begin

    def _batch(self, prompts: list[list[int]], new: int, most: int, sampling: Any) -> Timed:
        """Several prompts, with `jllama.generate`, whose tokens arrive together."""
        import numpy as np

        import jllama

        assert self.params is not None
        begin, options = time.perf_counter(), {"sampling": sampling, "backend": self.job["backend"]}
        made = jllama.generate(self.params, np.asarray(prompts), max_new_tokens=new, stop_ids=(), **options)
        ids = np.asarray(made.tokens).tolist()
        spent = time.perf_counter() - begin
        batch, prompt, room = sizes = len(prompts), len(prompts[0]), len(prompts[0]) + most
        if (key := (*sizes, sampling is None)) not in self._traced:  # the trace takes seconds
            self._traced[key] = jllama.backends(self.params, batch=batch, prompt=prompt, max_len=room, **options)
        self.backends = self._traced[key]
        return ids, spent, spent

    def peak_bytes(self) -> int:
        """The peak memory of the device; on a CPU, of the process."""
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        return int(stats.get("peak_bytes_in_use") or process_peak())

    def chosen(self) -> dict[str, Any]:
        """Which implementation the last run had for every op of a prefill and of a decode step, and why."""
        return {"choices": {p: {op: [c.impl, c.why] for op, c in ops.items()} for p, ops in self.backends.items()}}

    def hello(self) -> dict[str, Any]:
        """The device, its platform, and the versions that all records carry."""
        import jax

        from bench.record import package_versions

        device = jax.devices()[0]
        name = cpu_name() if device.platform == "cpu" else device.device_kind
        memory = (device.memory_stats() or {}).get("bytes_limit")
        versions = package_versions(PACKAGES)
        return {"device": name, "platform": device.platform, "memory": memory, "versions": versions}

    def ceilings(self, dtype: str, working_set: int) -> dict[str, Any]:
        """Measure the device's ceilings now."""
        from bench.ceilings import measure_ceilings

        return measure_ceilings(dtype if dtype in DTYPES else "bf16", working_set)

    def prepare(self, preset: str, dtype: str, path: str) -> dict[str, Any]:
        """Write random weights of a preset's shape, once, as a directory that all peers read."""
        import jax
        import jax.numpy as jnp

        from jllama.config import preset as find
        from jllama.formats.checkpoint import save
        from jllama.params import init

        target = Path(path)
        if not (target / "config.json").exists():
            params = init(find(preset), jax.random.key(SEED), dtype=jnp.dtype(DTYPES[dtype]))
            partial = target.with_name(f"{target.name}.{os.getpid()}")
            save(params, partial)
            partial.rename(target)
        return {"path": path}

    def shape(self, model: str, tp: int = 1, dp: int = 1) -> dict[str, Any]:
        """The sizes of a checkpoint that floors and prompts need, and why it cannot run on a mesh, if it cannot."""
        from bench.roofline import dims
        from jllama.config import to_hf

        config, _ = opened(model)
        known = {"vocab_size": config.vocab_size, "bos_id": config.bos_id, "max_seq_len": config.max_seq_len}
        known |= {"dims": dims(config), "n_params": config.n_params, "config": to_hf(config, "bfloat16")}
        return known | {"refused": _refused(config, tp, dp)}

    def encode(self, model: str, text: str) -> dict[str, Any]:
        """The ids of a text; None if the model has no tokenizer."""
        from jllama.formats import open_source
        from jllama.text.tokenizer import tokenizer_for

        source = open_source(model)
        ids = None if source.tokenizer is None else tokenizer_for(source).encode(text)
        return {"ids": ids}

    def score(self, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        """How far below the largest logit each of a peer's tokens lies, in standard deviations of the logits, when
        the reference is fed the peer's own text. 0: the reference would have chosen the same."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from jllama.model import forward

        rows = 1 if self.mesh is None else self.mesh.shape["data"]
        tokens = jnp.asarray([prompt + ids[:-1]] * rows, jnp.int32)
        logits, _ = jax.jit(forward, static_argnames="backend")(self.params, tokens, backend="xla")
        new = np.asarray(logits[0, len(prompt) - 1 :])
        gaps = (new.max(axis=1) - new[np.arange(len(ids)), ids]) / new.std(axis=1)
        return {"gaps": [float(g) for g in gaps]}


def _mesh(tp: int, dp: int) -> Any:
    """The mesh that a command makes of ``--tp`` and ``--dp``; None for one device."""
    from jllama.cli.mesh import mesh_of

    return mesh_of(argparse.Namespace(tp=tp, dp=dp))


def _refused(config: Any, tp: int, dp: int) -> str | None:
    from jllama.errors import InputError
    from jllama.mesh.layout import check_mesh

    try:
        if (mesh := _mesh(tp, dp)) is not None:
            check_mesh(config, mesh)
    except InputError as reason:
        return str(reason)
    return None


def opened(
    model: str,
    dtype: str = "float32",
    quant: "Quant" = "none",
    batch: int = 1,
    max_len: int | None = None,
    mesh: Any = None,
) -> tuple[Any, Callable[..., Any]]:
    """The configuration of a checkpoint, or of a preset with random weights, and a function that makes its params."""
    if model.startswith(DRAWN):
        import jax

        from jllama.config import preset
        from jllama.params import init

        config = preset(model.removeprefix(DRAWN))
        if mesh is not None:
            from bench.drawn import draw

            return config, functools.partial(draw, config, mesh, dtype=dtype, quant=quant)
        return config, functools.partial(init, config, jax.random.key(SEED), dtype=jax.numpy.dtype(dtype), quant=quant)
    from jllama.formats import open_source
    from jllama.formats.checkpoint import load

    source = open_source(model)
    how = dict(dtype=dtype, quant=quant, batch=batch, max_len=max_len, mesh=mesh)
    return source.config, functools.partial(load, source, **how)


def even_chunk(steps: int) -> int:
    """The longest chunk up to `CHUNK` that splits ``steps`` into nearly equal parts. Steps past the end of the last
    chunk are thrown away, but would be timed."""
    parts = -(-steps // CHUNK)
    return max(1, -(-steps // max(parts, 1)))


def process_peak() -> int:
    """The peak memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_name() -> str:
    """The processor's name, and the number of cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else 'CPU'}, {cores} core{'s' if cores != 1 else ''}"


PEER = Peer("ours", "ours", available, open_model, PACKAGES)
