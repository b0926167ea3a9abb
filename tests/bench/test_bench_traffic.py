"""Mixed traffic: the requests, what the times of their tokens say, and engines under it. No test asserts a time."""

import dataclasses
import itertools
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from tiny import CONFIG

from bench import load, record, traffic
from bench.peers import vllm, vllm_traffic
from bench.traffic import Ask, Timeline, Traffic, draw, drive, rehearsals
from jllama.formats.checkpoint import save
from jllama.params import init

MIXED = Traffic("mixed", requests=1000, prompt=256, longest=1024, least=16, most=512)
SMALL = ["--requests", "6", "--slots", "2", "--prompt", "8", "--longest", "24", "--least", "4", "--most", "12"]


def test_the_requests_are_those_of_the_issue() -> None:
    asks = draw(MIXED, 32000, 1)
    lengths, new = [len(ask.prompt) for ask in asks], [ask.new_tokens for ask in asks]
    assert len(asks) == 1000
    assert 230 < statistics.median(lengths) < 285
    assert max(lengths) == 1024
    assert statistics.stdev(map(math.log, (n for n in lengths if n < 1024))) == pytest.approx(traffic.SIGMA, abs=0.1)
    assert 16 <= min(new) < 20
    assert 508 < max(new) <= 512
    assert {ask.at for ask in asks} == {0.0}
    assert draw(MIXED, 32000, 1) == asks

    later = draw(MIXED.at_rate(20.0), 32000, 1)
    assert [(len(a.prompt), a.new_tokens) for a in later] == list(zip(lengths, new, strict=True))
    assert later[0].prompt != asks[0].prompt  # so that no cache knows it
    gaps = [b.at - a.at for a, b in itertools.pairwise(later)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.15)  # as of a Poisson process

    shared = dataclasses.replace(MIXED, name="shared", samples=8, prefix=1000, rate=16.0)
    asks = draw(shared, 32000, 1)
    assert sum(ask.samples for ask in asks) == 1000
    assert len({tuple(ask.prompt[:1001]) for ask in asks}) == 1
    assert len({tuple(ask.prompt[:1010]) for ask in asks}) == len(asks)
    assert asks[-1].at == pytest.approx(len(asks) / 2, rel=0.3)  # 16 texts are 2 prompts a second


def test_rehearsals_meet_every_size() -> None:
    found = rehearsals(MIXED, 48, 4096)
    assert [len(asks) for asks in found[:7]] == [1, 2, 4, 8, 16, 32, 48]  # rows
    assert [len(ask.prompt) for asks in found[7:-1] for ask in asks] == [1024, 512, 256, 128, 64]
    assert [len(ask.prompt) for ask in found[-1]] == [1024] * 4  # as a turn may feed
    assert {ask.new_tokens for asks in found for ask in asks} == {8}
    assert {ask.new_tokens for asks in rehearsals(MIXED, 48, 4096, 64) for ask in asks} == {64}


def test_statistics_of_a_timeline() -> None:
    timeline = Timeline([Ask(1.0, [1], 5), Ask(2.0, [1], 1)])
    timeline.came = [[(1.5, 2), (1.75, 1), (2.75, 2)], [(2.5, 1)]]
    found = timeline.summary()
    assert (found["tokens"], found["texts"], found["seconds"]) == (6, 2, 1.75)
    assert (found["first"]["n"], found["first"]["p50"]) == (2, 0.5)
    between = found["between"]  # 0.25, and twice half of the second in which two tokens came
    assert (between["n"], between["min"], between["max"], between["p50"]) == (3, 0.25, 0.5, 0.5)
    assert (found["longest"]["n"], found["longest"]["p50"]) == (1, 1.0)
    timeline.came[1].append((2.75, 1))
    with pytest.raises(ValueError, match="text 1: expected 1 tokens, found 2"):
        timeline.summary()


def test_prompts_are_submitted_when_they_are_due() -> None:
    class Slow:
        """Gives each text one token a step."""

        def __init__(self) -> None:
            self.left, self.seen = dict[int, int](), list[int]()

        @property
        def busy(self) -> bool:
            return bool(self.left)

        def submit(self, text: int, ask: Ask) -> None:
            self.seen.append(text)
            self.left |= {text + i: ask.new_tokens for i in range(ask.samples)}

        def step(self) -> list[tuple[int, int]]:
            came = [(text, 1) for text in self.left]
            self.left = {text: n - 1 for text, n in self.left.items() if n > 1}
            return came

    server, asks = Slow(), [Ask(0.0, [1], 3, 2), Ask(0.02, [1], 2), Ask(0.03, [1], 1)]
    timeline = drive(server, asks)
    assert server.seen == [0, 2, 3]
    assert [len(came) for came in timeline.came] == [3, 3, 2, 1]
    assert all(came[0][0] >= ask.at for ask, came in zip(timeline.asked, timeline.came, strict=True))


def test_our_engine_under_mixed_traffic(in_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(init(CONFIG.replace(n_layers=1), jax.random.key(0)), tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), *SMALL, "--samples", "2", "--prefix", "64", "--budget", "32"]
    with pytest.raises(SystemExit) as end:
        load.main([*argv, "--engines", "vllm,engine", "--results", str(tmp_path / "out")])
    assert end.value.code == 0
    found = {(r["impl"], r["case"]): r for r in record.read(tmp_path / "out")}
    cases = [f"{mix}{arrival}" for mix in ("mixed", "shared") for arrival in ("", "-poisson")]
    for case in cases:
        rate = found["engine", case]
        assert rate["value"] > 0
        assert rate["traffic"]["rate"] is None or rate["traffic"]["rate"] > 0
        assert found["engine", f"{case}, first"]["p99"] >= found["engine", f"{case}, first"]["value"] > 0
    assert found["engine", "mixed"]["counted"][0]["prefix_hits"] == 0
    assert found["engine", "shared"]["counted"][0]["prefix_hits"] >= 5 * 64  # all but the first read the prefix
    assert [found["engine", case]["counted"][0]["compiled"] for case in cases] == [0, 0, 0, 0]
    assert "vllm" in found["vllm", "mixed"]["why"]
    assert "| shared-poisson |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--requests", "0"], "--requests: expected at least 1, found 0"),
        (["--mixes", "salad"], "--mixes: expected any of mixed,shared"),
        (["--least", "30"], "--least: expected at most 24 (--most), found 30"),
        (["--prefix", "400"], "--longest: demo has room for 512 tokens, found 520 in all"),
    ],
)
def test_flags_that_cannot_be_meant(
    in_process: None, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        load.main(argv)
    assert end.value.code == 2
    assert said.replace("mixed,", "mixed, ") in capsys.readouterr().err


class FakeEngine:
    """vLLM's `LLMEngine`: every text gets two tokens a step, the last alone."""

    def __init__(self) -> None:
        self.left: dict[str, list[int]] = {}
        self.asked: list[Any] = []

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def add_request(self, name: str, prompt: dict[str, Any], how: Any) -> None:
        assert prompt["type"] == "token"
        self.asked.append((prompt["prompt_token_ids"], how))
        self.left[name] = [how.max_tokens] * how.n

    def step(self) -> list[Any]:
        outputs = []
        for name, left in list(self.left.items()):
            rows = [SimpleNamespace(index=i, token_ids=[7] * min(2, n)) for i, n in enumerate(left)]
            outputs.append(SimpleNamespace(request_id=name, outputs=rows))
            self.left[name] = [n - 2 for n in left]
            if self.left[name][0] <= 0:
                del self.left[name]
        return outputs


def test_vllm_is_stepped_with_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, options = FakeEngine(), {}
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=None),
        compilation_config=SimpleNamespace(cudagraph_mode="FULL", mode=3, cudagraph_capture_sizes=[1, 2]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, async_scheduling=True),
        cache_config=SimpleNamespace(enable_prefix_caching=True, cache_dtype="auto", num_gpu_blocks=9, block_size=16),
    )
    engine.vllm_config = config  # pyright: ignore[reportAttributeAccessIssue]

    def library(**given: Any) -> Any:
        options.update(given)
        return SimpleNamespace(llm_engine=engine)

    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=library, SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    for name in vllm.ENVIRONMENT:
        monkeypatch.setenv(name, "kept")
    asked = Traffic("shared", requests=6, prompt=8, longest=24, least=3, most=9, samples=2, prefix=20)
    job = {"model": "random:7b", "config": {}, "dtype": "bf16", "platform": "gpu", "batch": 3, "max_len": 64}
    job |= {"context": 4096, "budget": 64, "vocab_size": 300, "bos_id": 1, "traffic": dataclasses.asdict(asked)}
    peer = vllm_traffic.PEER.open(job)
    assert options["enable_prefix_caching"]
    assert (options["max_num_batched_tokens"], options["compilation_config"]) == (64, {})
    engine.asked.clear()
    found = peer.traffic(**dataclasses.asdict(asked))
    expected = draw(asked, 300, 1)
    assert [ids for ids, _ in engine.asked] == [ask.prompt for ask in expected]
    how = engine.asked[0][1]
    assert (how.n, how.temperature, how.ignore_eos, how.output_kind) == (2, 1.0, True, "delta")
    assert found["tokens"] == sum(2 * ask.new_tokens for ask in expected)
