"""The benchmark programs, at sizes for a CPU. No test asserts a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import compare, measure, opcases, ops, peers, record, report, roofline, workloads
from bench.peers._llama2c_text import FIRST, from_text, to_text, write_tokenizer
from bench.process import PeerFailed, PeerUnsupported, Worker, find_python

ROOT = Path(__file__).parents[2]

# Peers that fail in different ways. A peer's file must only define `PEER`.
FAKES = {
    "crash": "def generate(self, prompts, n): import os; print('about to die', file=sys.stderr); os.abort()",
    "hang": "def generate(self, prompts, n): import time; time.sleep(600)",
    "memory": "def generate(self, prompts, n): raise MemoryError('cannot hold it')",
    "refuse": "def generate(self, prompts, n): raise NotSupported('not on a Tuesday')",
    "wrong": "def generate(self, prompts, n): return Output([[5 + i % 7 for i in range(n)]], 0.1, 0.1)",
}
FAKE = """
import sys
from bench.peers import NotSupported, Output, Peer
class Fake:
    {method}
    def peak_bytes(self): return 1
PEER = Peer("fake-{name}", "{kind}", lambda: None, lambda job: Fake())
"""

# Peers of operations that fail, in the first round or in a later one.
OP_FAKES = {
    "op_crash": "def run(self, **_): import os; print('about to die', file=sys.stderr); os.abort(); yield",
    "op_late": "def run(self, case, **_):\n        for _ in range(3): yield\n"
    "        if case['context'] == 32: raise MemoryError('late')\n        import time; time.sleep(600)",
    "op_memory": "def run(self, **_): raise MemoryError('cannot hold it'); yield",
    "op_wrong": "def run(self, **_): yield; return dict(error_vs_reference=0.5, peak_bytes=1, samples=[])",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "path" / "fakes"
    folder.mkdir(parents=True)
    for name, method in FAKES.items():
        (folder / f"{name}.py").write_text(FAKE.format(name=name, method=method, kind="model"))
    for name, method in OP_FAKES.items():
        (folder / f"{name}.py").write_text(FAKE.format(name=name, method=method, kind="ops"))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.syspath_prepend(str(folder.parent))


# Measuring


def test_statistics_of_samples() -> None:
    stats = measure.summarise([float(i) for i in range(1, 101)])
    assert (stats.n, stats.min, stats.max, stats.mean, stats.p50) == (100, 1, 100, 50.5, 50.5)
    assert stats.p95 == pytest.approx(95.05)
    assert stats.p99 == pytest.approx(99.01)
    assert stats.std == pytest.approx(np.arange(1, 101).std(ddof=1))
    for bad in ([], [0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="samples"):
            measure.summarise(bad)


def test_inputs_rotate_past_the_cache_within_the_limit() -> None:
    assert measure.sets_needed(10, 100, 10_000) == measure.MAX_SETS
    assert measure.sets_needed(100, 100, 10_000) == 3
    assert measure.sets_needed(100, 100, 150) == 1
    assert measure.sets_needed(1000, 100, 10_000) == 1


def test_workloads_in_the_order_of_what_matters() -> None:
    loads = workloads.grid([1, 8], [128], 256, [(1, 512), (8, 512)], [4000])
    shown = [(w.case, w.batch, w.prompt_len, w.context) for w in loads]
    assert shown == [
        ("decode", 1, 128, 384),
        ("prefill", 1, 512, 513),
        ("prefill", 8, 512, 513),
        ("decode", 8, 128, 384),
        ("decode", 1, 3744, 4000),
    ]
    assert workloads.grid([1, 8], [128], 256, [], [], sampled=True)[2:] == [
        workloads.Workload("sampled", batch, 128, 256) for batch in (1, 8)
    ]


# Floors


def test_the_floor_of_a_7b_step() -> None:
    from jllama.config import preset

    dims = roofline.dims(preset("7b"))
    assert dims["matrix_params"] == preset("7b").n_params - 32000 * 4096 - (2 * 32 + 1) * 4096
    ceilings = roofline.Ceilings(copy=4.13e12, read=4.0e12, matrix=750e12, launch=1e-5, kernel=1e-6)
    assert 1 / roofline.floor_s(roofline.decode_work(dims, "bf16", 1, 128), ceilings) == pytest.approx(312, rel=0.02)
    assert 1 / roofline.floor_s(roofline.decode_work(dims, "int4", 1, 128), ceilings) == pytest.approx(1180, rel=0.05)
    prefill = roofline.prefill_work(dims, "bf16", 1, 2048)
    assert prefill.intensity > ceilings.matrix / ceilings.bandwidth  # bound by arithmetic
    assert roofline.floor_s(prefill, ceilings) == prefill.flops / ceilings.matrix


def test_the_better_of_two_ceilings() -> None:
    a = dict(copy=1.0, read=4.0, matrix=1.0, launch=1.0, kernel=3.0)
    b = dict(copy=2.0, read=3.0, matrix=2.0, launch=2.0, kernel=1.0)
    assert roofline.best_of(a, b) == dict(copy=2.0, read=4.0, matrix=2.0, launch=1.0, kernel=1.0)


def test_the_work_of_operations() -> None:
    sizes = dict(heads=32, kv_heads=32, head_dim=128, dim=4096, hidden=11008, matmuls={"o": dict(out=4096, inner=4096)})
    cases = {op: opcases.cases(op, "7b", sizes, "bf16", [1], [1024])[0] for op in opcases.OPS}
    assert opcases.work(cases["matmul"]) == roofline.Work(2.0 * (2 * 1024 * 4096 + 4096 * 4096), 2.0 * 1024 * 4096**2)
    assert opcases.work(cases["ffn"]).flops == 2 * 3 * 1024 * 4096 * 11008
    assert opcases.work(cases["attention"]).flops == 4 * 32 * 128 * 1024 * 1025 / 2
    assert opcases.work(cases["decode-attention"]).bytes == 2 * 32 * 128 * (2 * 1024 + 2)
    assert opcases.work(cases["draw"]) == roofline.Work(4.0 * (1024 + 1 + 1), 0.0)
    assert opcases.work(cases["paged-decode-attention"]) == opcases.work(cases["decode-attention"])
    assert opcases.unfused_bytes(cases["attention"]) == 4 * 32 * 1024 * 1024
    assert opcases.unfused_bytes(cases["ffn"]) == 2 * 2 * 1024 * 11008
    layer = opcases.work(cases["layer"]).flops
    assert layer == opcases.work(cases["ffn"]).flops + opcases.work(cases["attention"]).flops + 2 * 1024 * 4 * 4096**2


def test_inputs_are_random_and_repeatable() -> None:
    sizes = dict(heads=2, kv_heads=1, head_dim=8, dim=16, hidden=24, matmuls={})
    for op in ("layer", "attention"):
        case = opcases.cases(op, "tiny", sizes, "f32", [1], [4])[0]
        first, again, other = (opcases.arrays(case, variant=v) for v in (0, 0, 1))
        for name, array in first.items():
            assert array.std() > 0
            np.testing.assert_array_equal(array, again[name])
            assert not np.array_equal(array, other[name])


def test_prompts_are_the_same_for_all() -> None:
    load = workloads.Workload("decode", 2, 9, 4)
    rows = workloads.prompts(load, 100, 1, None)
    assert rows == workloads.prompts(load, 100, 1, None)
    assert [len(r) for r in rows] == [9, 9]
    assert rows[0] != rows[1]
    assert all(r[0] == 1 and min(r[1:]) >= 3 and max(r) < 100 for r in rows)
    assert workloads.prompts(load, 100, 1, [1, 7, 8])[0] == [1, 7, 8, 7, 8, 7, 8, 7, 8]


# Peers


def test_every_peer_imports_without_its_library() -> None:
    code = (
        "import sys; from bench import peers; names = peers.discover('model') + peers.discover('ops');"
        "assert len(names) > 10, names; heavy = {'torch', 'jax', 'transformers', 'vllm'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_missing_peer_says_how_to_install_it() -> None:
    for kind in ("model", "ops"):
        for name in peers.discover(kind):
            why = peers.load(name).available()
            assert why is None or any(word in why for word in ("install", "PATH", "reads")), (name, why)


@pytest.mark.parametrize(
    ("name", "limit_s", "error", "says"),
    [
        ("crash", 60, PeerFailed, "SIGABRT: .*about to die|SIGABRT"),
        ("hang", 1, PeerFailed, "no answer within 1 s"),
        ("memory", 60, PeerFailed, "out of memory: cannot hold it"),
        ("refuse", 60, PeerUnsupported, "not on a Tuesday"),
    ],
)
def test_what_goes_wrong_in_a_peer_stays_there(
    fakes: None, name: str, limit_s: float, error: type[Exception], says: str
) -> None:
    with Worker(f"fakes.{name}") as worker:
        worker.ask("open", 60, job={})
        with pytest.raises(error, match=says):
            worker.ask("generate", limit_s, prompts=[[1]], new_tokens=2)
        gone = name in ("crash", "hang")
        assert (worker.dead is not None) == gone
        if gone:
            with pytest.raises(PeerFailed):
                worker.ask("generate", 60, prompts=[[1]], new_tokens=2)


def test_a_python_that_is_none_is_a_reason(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    fake.chmod(0o755)
    python, why = find_python("hf_eager", {"hf": str(fake)})
    assert python is None
    assert why is not None
    assert "exited with 3: broken" in why


def test_no_decode_step_is_computed_for_nothing() -> None:
    from bench.peers.ours import CHUNK, even_chunk

    for steps in range(400):
        chunk = even_chunk(steps)
        assert 1 <= chunk <= CHUNK
        parts = -(-steps // chunk)
        assert parts * chunk - steps < max(parts, 1)
    assert [even_chunk(n) for n in (0, 1, 32, 64, 128, 100)] == [1, 1, 32, 64, 64, 50]


def test_several_prompts_get_the_tokens_that_each_gets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    from bench.peers.ours import Ours, open_model

    monkeypatch.setattr(Ours, "_load", lambda self, batch: None)
    ours, prompts = open_model({"backend": "xla"}), [[1, 5, 7, 9], [1, 8, 4, 4]]
    ours.params = tiny.model(config=tiny.CONFIG.replace(n_layers=1))
    together, alone = ours.generate(prompts, 4), ours.generate(prompts[:1], 4)
    assert together.ids[0] == alone.ids[0]
    assert [len(row) for row in together.ids] == [4, 4]
    assert together.first_s > 0 < together.decode_s
    assert ours.chosen()["choices"]["decode"]["matmul"] == ["xla", "asked for"]


def test_ids_through_llama2c_text(tmp_path: Path) -> None:
    prompt = [1, 9, 4, 9, 5]
    assert to_text(prompt, 9) == f"{chr(FIRST + 4)} {chr(FIRST + 5)}"
    printed = to_text([1, 9, *prompt[2:], 7, 9], 9) + "\n"  # `run` drops the space after the first id
    assert from_text(printed, 9, first_is_space=True) == [9, 4, 9, 5, 7, 9]
    write_tokenizer(tmp_path / "t.bin", 12, 9)
    assert (tmp_path / "t.bin").stat().st_size == 4 + 12 * 8 + 11 * 4 + 1


# The command lines


@pytest.mark.parametrize("module", ["compare", "engine", "ops", "report"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys\nfrom bench import {module}\n"
        f"try:\n    {module}.main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (compare.main, ["--dtype", "f8"], "--dtype: expected any of"),
        (compare.main, ["--batch", "0"], "--batch: expected whole numbers above 0"),
        (compare.main, ["--runs", "0"], "--runs: expected at least 1"),
        (compare.main, ["--peer-python", "hf"], "--peer-python: expected PEER=PATH"),
        (ops.main, ["--op", "conv"], "--op: expected any of"),
        (ops.main, ["--op", "ffn:0/512"], "--op: expected whole numbers above 0"),
        (report.main, ["missing.md"], "missing.md: no such file"),
    ],
)
def test_bad_arguments_are_one_line(main: object, argv: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)  # type: ignore[operator]
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("order", ["turns", "warm-together"])
def test_compare_survives_its_peers(
    fakes: None, quick_workers: None, order: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [
        "--preset",
        "stories260k",
        "--new-tokens",
        "5",
        "--runs",
        "2",
        "--peers",
        "fakes.crash,fakes.wrong,fakes.refuse",
    ]
    argv += ["--cache-dir", str(tmp_path), "--results", str(tmp_path / "out"), "--prefill", "16", "--time-limit", "60"]
    argv += ["--order", order, "--sampled"]
    with pytest.raises(SystemExit) as end:
        compare.main(argv)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    rows = list(record.read(tmp_path / "out"))
    ours = {r["case"]: r for r in rows if r["impl"] == "xla"}
    assert {"decode", "prefill", "ttft-cold", "ttft-warm", "compile", "load", "memory"} <= set(ours)
    assert ours["decode"]["value"] > 0
    assert ours["decode"]["floor"] > 0
    assert ours["decode"]["agreement"] == 1
    assert len(ours["decode"]["samples"]) == 2
    assert len({r["run"] for r in rows}) == 1
    (drawn,) = [r for r in rows if r["case"] == "sampled"]  # our backend only
    assert (drawn["impl"], drawn["agreement"], len(drawn["samples"])) == ("xla", None, 2)
    whys = {r["impl"]: (r["why"], r["failed"]) for r in rows if r["value"] is None and r["case"] == "decode"}
    assert "SIGABRT" in whys["fake-crash"][0]
    assert "its tokens differ" in whys["fake-wrong"][0]
    assert whys["fake-refuse"] == ("not on a Tuesday", False)
    for impl in ("xla", *whys):
        assert impl in shown
    for chart in ("decode-stories260k-f32-cpu-*.png", "roofline-stories260k-f32-cpu-*.png"):
        assert [p.stat().st_size > 5000 for p in (tmp_path / "out" / "plots").glob(chart)] == [True]


def test_ops_check_and_time_and_place_on_the_roofline(
    quick_workers: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [
        "--model",
        "stories260k",
        "--seq",
        "512",  # of fewer, more would be timed in one compiled call, which takes longer to compile
        "--op",
        "attention,decode-attention,paged-decode-attention,ffn,layer,matmul:1,draw:512",
        "--warmup",
        "1",
        "--iterations",
        "3",
        "--peers",
        "none",
    ]
    with pytest.raises(SystemExit) as end:
        ops.main([*argv, "--results", str(tmp_path)])
    assert end.value.code == 0
    rows = list(record.read(tmp_path))
    done = {r["case"]: r for r in rows if r["value"] is not None}
    named = {"attention-prefill", "decode-attention", "paged-decode-attention", "ffn", "layer", "matmul-qkv", "draw"}
    assert named <= set(done)
    for r in done.values():
        assert r["impl"] == "xla"
        assert r["error_vs_reference"] < r["tolerance"]
        assert {"mean", "std", "min", "max", "p50", "p95", "p99"} <= set(r["stats"])
        assert r["speedup"] == {"xla": 1.0}
    assert all("Hopper" in r["why"] or "kernel" in r["why"] for r in rows if r["impl"] == "pallas")
    assert not any(r.get("failed") for r in rows)
    assert {r["seq"] for r in rows if r["case"].startswith("matmul")} == {1}
    assert "memory_reduction" in done["attention-prefill"]
    assert "ffn" in capsys.readouterr().out
    assert len(list((tmp_path / "plots").glob("roofline-ops-f32-cpu-*.png"))) == 1


def test_ops_survive_their_peers(fakes: None, quick_workers: None, tmp_path: Path) -> None:
    argv = ["--model", "stories260k", "--seq", "16,32", "--op", "attention", "--warmup", "1", "--iterations", "3"]
    argv += ["--backends", "xla", "--peers", ",".join(f"fakes.{name}" for name in OP_FAKES), "--time-limit", "8"]
    with pytest.raises(SystemExit) as end:
        ops.main([*argv, "--results", str(tmp_path)])
    assert end.value.code == 0
    rows = list(record.read(tmp_path))
    assert [r["value"] is not None for r in rows if r["impl"] == "xla"] == [True, True]
    why = {
        "op_crash": "SIGABRT",
        "op_late": "no answer within 8 s",
        "op_memory": "out of memory",
        "op_wrong": "error 5.0e-01",
    }
    for name, says in why.items():
        mine = [r for r in rows if r["impl"] == f"fake-{name}"]
        assert len(mine) == 2  # a process that died is started again for the next case
        assert all(r["failed"] for r in mine), mine
        assert [says in r["why"] for r in mine] == [True, name != "op_late"], mine


# The notebook


def test_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    code = (
        "import sys, nbformat, nbclient; book = nbformat.read(sys.argv[1], 4); nbformat.validate(book);"
        "nbclient.NotebookClient(book, timeout=240, kernel_name='python3').execute(cwd=sys.argv[2]);"
        "nbformat.write(book, sys.argv[3])"
    )
    made = tmp_path / "demo.ipynb"
    command = [sys.executable, "-c", code, str(ROOT / "examples" / "demo.ipynb"), str(ROOT / "examples"), str(made)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JLLAMA_BENCH_CHAIN": "3"}  # both compile sooner
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [o for c in json.loads(made.read_text())["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    text = "".join("".join(o.get("text", "")) for o in outputs if o["output_type"] == "stream")
    assert "Once upon a time," in text
    assert not any(o["output_type"] == "error" for o in outputs)
