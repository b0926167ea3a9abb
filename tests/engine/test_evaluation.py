"""The requests of an evaluation harness, against results computed directly from a forward."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference_engine import scores

import jllama
from jllama.errors import InputError
from jllama.evaluation import Evaluator, lm_eval_model, open_evaluator, rolling_windows


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return open_evaluator(str(jllama.DEMO), slots=4, max_len=128, dtype="float32")


def by_hand(e: Evaluator, context: list[int], tokens: list[int]) -> tuple[float, bool]:
    logprobs, likeliest = scores(e.engine.params, context, tokens)
    return float(logprobs.sum()), bool((likeliest == tokens).all())


def test_loglikelihood_is_that_of_the_text_tokenised_whole(evaluator: Evaluator) -> None:
    encode = evaluator.tokenizer.encode
    pairs = [
        ("Once upon a", " time"),
        ("Once upon a ", "time"),  # the same
        ("Once upon a", " dog ran home"),
        ("", "The cat"),
    ]
    found = evaluator.loglikelihood(pairs)
    whole = encode("Once upon a time")
    n = len(encode("Once upon a"))
    assert whole[:n] == encode("Once upon a")
    wanted = by_hand(evaluator, whole[:n], whole[n:])
    np.testing.assert_allclose([f[0] for f in found[:2]], wanted[0], atol=1e-3)
    assert found[0][1] is found[1][1] is wanted[1] is True  # what else would a storyteller say
    assert found[2][1] is False
    assert found[2][0] < found[0][0]
    np.testing.assert_allclose(found[3][0], by_hand(evaluator, [1], encode("The cat", bos=False))[0], atol=1e-3)


def test_a_context_too_long_loses_its_beginning(evaluator: Evaluator) -> None:
    text = "The cat saw a dog. " * 40
    ids = evaluator.tokenizer.encode(text.rstrip())
    assert len(ids) > 128
    whole = evaluator.tokenizer.encode(text.rstrip() + " The end")
    wanted = by_hand(evaluator, whole[-128 : len(ids)], whole[len(ids) :])
    np.testing.assert_allclose(evaluator.loglikelihood([(text, "The end")])[0][0], wanted[0], atol=1e-3)


def test_rolling_counts_every_token_once(evaluator: Evaluator) -> None:
    text = "One day, a little girl went to the park. She saw a big dog and was happy. " * 14
    ids = evaluator.tokenizer.encode(text, bos=False)
    assert len(ids) > 2 * 128
    found = evaluator.loglikelihood_rolling([text, "The cat", ""])
    first = by_hand(evaluator, [1], ids[:127])[0]
    rest, at = 0.0, 127
    while at < len(ids):
        end = min(at + 127, len(ids))
        rest += by_hand(evaluator, ids[max(0, end - 128) : at], ids[at:end])[0]
        at = end
    np.testing.assert_allclose(found[0], first + rest, rtol=1e-4)
    assert found[2] == 0
    windows = rolling_windows(list(range(1000)), -1, 128)
    assert [t for _, tokens in windows for t in tokens] == list(range(1000))
    assert all(len(a) + len(b) <= 128 and a for a, b in windows)


def test_text_comes_until_a_string(evaluator: Evaluator) -> None:
    context = "Once upon a time"
    free, cut, none, warm = evaluator.generate_until(
        [
            (context, {"until": [], "max_gen_toks": 40}),
            (context, {"until": ["."], "max_gen_toks": 40}),
            (context, {"until": "no such text", "max_gen_toks": 40}),
            (context, {"until": ["."], "max_gen_toks": 40, "do_sample": True, "temperature": 1.5, "seed": 3}),
        ]
    )
    assert "." in free
    assert cut == free.split(".")[0]
    assert none == free
    assert warm != cut
    assert not evaluator.engine.busy


def test_a_continuation_of_nothing_is_one_line(evaluator: Evaluator) -> None:
    with pytest.raises(InputError, match="continuation: expected at least one token"):
        evaluator.loglikelihood([("Once", "")])


@pytest.mark.peers
def test_lm_eval_asks_the_same() -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    made = lm_eval_model()
    assert get_model("jllama") is made
    model = made(pretrained=str(jllama.DEMO), batch_size=4, max_length=128, dtype="float32")

    def asked(kind: str, *args: object) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=args, idx=0)]

    (score, greedy), *_ = model.loglikelihood(asked("loglikelihood", "Once upon a", " time"))
    assert greedy
    assert -0.2 < score < 0
    assert model.loglikelihood_rolling(asked("loglikelihood_rolling", "The cat"))[0] < -1
    text = model.generate_until(asked("generate_until", "Once upon a time", {"until": ["."], "max_gen_toks": 40}))[0]
    assert text
    assert "." not in text


TASKS = {
    "choose": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: ["time", "dog", "house"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "roll": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "write": """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 30}
metric_list: [{metric: exact_match}]
""",
}


@pytest.mark.peers
def test_lm_eval_runs_tasks_from_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = lm_eval_model()(pretrained=str(jllama.DEMO), batch_size=4, max_length=128, dtype="float32")
    texts = ["Once upon a time there was a cat", "The dog ran home and was happy"]
    docs = [{"context": "Once upon a", "text": text, "answer": "no such text"} for text in texts]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'docs.jsonl'}}}}}\ntest_split: test\n"
    )
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}{task}")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    assert found["choose"]["acc,none"] == 1
    assert found["write"]["exact_match,none"] == 0
    own = open_evaluator(str(jllama.DEMO), slots=4, max_len=128, dtype="float32")
    total = sum(own.loglikelihood_rolling(texts))
    words = sum(len(text.split()) for text in texts)
    np.testing.assert_allclose(found["roll"]["word_perplexity,none"], np.exp(-total / words), rtol=1e-4)
