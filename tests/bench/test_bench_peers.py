"""Peers that make their own weights, and vLLM's, with a fake in place of the library."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import compare, peers, record, roofline
from bench.peers import NotSupported, vllm, vllm_fp8
from bench.workloads import DRAWN

JOB = {
    "model": f"{DRAWN}7b",
    "config": {"hidden_size": 4096},
    "dtype": "bf16",
    "platform": "gpu",
    "batch": 12,
    "rooms": {"1": 256, "12": 256},
    "max_len": 4200,
    "context": 4096,
}
DRAWER = """
from bench.peers import Output, Peer
class Fake:
    settings = {{"graphs": "on"}}
    def __init__(self, job): assert job["config"]["hidden_size"] == 64
    def generate(self, prompts, n): return Output([[7] * n for _ in prompts], 0.1, 0.1)
    def peak_bytes(self): return 0  # as vLLM on several GPUs: other processes have them
PEER = Peer("fake-{name}", "model", lambda: None, Fake, dtype="{dtype}", draws={draws}, whole_device=True)
"""


class FakeLLM:
    """`vllm.LLM`, which answers every prompt with its first token."""

    made: list[dict[str, Any]]

    def __init__(self, **options: Any) -> None:
        self.made.append(options | {"config": json.loads(Path(options["model"], "config.json").read_text())})
        config = SimpleNamespace(
            model_config=SimpleNamespace(quantization=options["quantization"]),
            compilation_config=SimpleNamespace(cudagraph_mode="FULL", mode=3, **options["compilation_config"]),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=16384, async_scheduling=True),
            cache_config=SimpleNamespace(
                enable_prefix_caching=options["enable_prefix_caching"],
                cache_dtype="auto",
                num_gpu_blocks=10,
                block_size=16,
            ),
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def generate(self, prompts: list[dict[str, list[int]]], how: Any, *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        assert how.ignore_eos
        count = how.max_tokens - (how.max_tokens == 5)  # a library that ends early
        rows = [[p["prompt_token_ids"][0]] * count for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row))]) for row in rows]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(FakeLLM, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=SimpleNamespace))
    for name in vllm.ENVIRONMENT:
        monkeypatch.setenv(name, "kept")  # so that what the peer sets ends with the test
    return FakeLLM.made


def test_vllm_makes_the_weights_of_a_preset(library: list[dict[str, Any]]) -> None:
    model = peers.load("vllm").open(JOB)
    (options,) = library
    assert (options["load_format"], options["dtype"], options["quantization"]) == ("dummy", "bfloat16", None)
    assert options["config"] == JOB["config"]
    assert options["max_model_len"] == 4096
    assert options["max_num_seqs"] == 12
    assert not options["enable_prefix_caching"]
    assert options["compilation_config"] == {"cudagraph_capture_sizes": [1, 2, 4, 8, 12]}
    assert model.settings["cache_tokens"] == 160
    output = model.generate([[5, 1], [6, 1]], 3)
    assert output.ids == [[5, 5, 5], [6, 6, 6]]
    assert output.first_s > 0
    assert output.decode_s > 0
    with pytest.raises(ValueError, match=r"2 rows of 5 new ids, found 2 rows of \{4\}"):
        model.generate([[5, 1], [6, 1]], 5)


def test_vllm_in_fp8_is_the_same_with_other_weights(library: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    vllm_fp8.PEER.open(JOB | {"model": str(tmp_path), "tp": 4})
    assert library[0]["tensor_parallel_size"] == 4
    assert (library[0]["quantization"], library[0]["load_format"]) == ("fp8", "auto")
    assert (vllm_fp8.PEER.dtype, vllm_fp8.PEER.name) == ("fp8", "vllm-fp8")
    for other in ({"dtype": "int8"}, {"platform": "cpu"}):
        with pytest.raises(NotSupported):
            vllm.PEER.open(JOB | other)
    assert len(library) == 1


def test_products_in_fp8_have_a_higher_ceiling() -> None:
    work, ceilings = roofline.Work(1.0, 1e6), roofline.Ceilings(1.0, 1.0, 1e3, 1.0, 1.0)
    assert roofline.floor_s(work, ceilings, "int8") == 2 * roofline.floor_s(work, ceilings, "fp8") == 1e3


def test_peers_that_make_their_own_weights(
    quick_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are written. A peer that draws its own goes unchecked, and one that needs a file says so."""
    folder = tmp_path / "path" / "drawers"
    folder.mkdir(parents=True)
    for name, dtype, draws in (("own", "fp8", True), ("reads", "", False)):
        (folder / f"{name}.py").write_text(DRAWER.format(name=name, dtype=dtype, draws=draws))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.syspath_prepend(str(folder.parent))
    argv = ["--preset", "stories260k", "--in-memory", "--batch", "2", "--new-tokens", "24", "--runs", "1"]
    argv += ["--backends", "engine", "--peers", "drawers.own,drawers.reads", "--order", "one-by-one"]
    with pytest.raises(SystemExit) as end:
        compare.main([*argv, "--cache-dir", str(tmp_path), "--results", str(tmp_path / "out"), "--plots", "-"])
    assert end.value.code == 0
    rows = {r["impl"]: r for r in record.read(tmp_path / "out") if r["case"] == "decode"}
    assert rows["engine"]["agreement"] == 1
    assert rows["engine"]["value"] > 0
    assert rows["engine"]["settings"]["slots"] == 2
    own = rows["fake-own"]
    assert (own["agreement"], own["dtype"], own["settings"]) == (None, "fp8", {"graphs": "on"})
    assert own["value"] == pytest.approx(2 * 23 / 0.1)
    assert own["floor"] > rows["engine"]["floor"]
    assert "leave out --in-memory" in rows["fake-reads"]["why"]
    assert {p.name for p in tmp_path.iterdir()} == {"path", "out", "compiled"}
