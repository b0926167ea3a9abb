"""Three small tasks of lm-eval from data in this file, with the model ``hf`` of lm-eval and with ours, compared.

    python -m bench.lm_eval_parity run jllama pretrained=MODEL.gguf,dtype=float32 ours.json
    python bench/lm_eval_parity.py run hf pretrained=DIR,gguf_file=MODEL.gguf,dtype=float32 theirs.json
    python bench/lm_eval_parity.py compare theirs.json ours.json

The two runs may be in different environments: ours needs jllama[eval], the other lm-eval, torch, transformers and gguf,
and nothing of this project. Every request of the tasks is compared: the log-likelihood of every choice and whether it
is greedy, the log-likelihood of every text, and every generated text.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

QUESTIONS = [
    ("The capital of France is", [" Paris", " Rome", " a river", " 12"]),
    ("Water freezes at a temperature of zero degrees", [" Celsius", " tall", " music", " Paris"]),
    ("The sun rises in the", [" east", " west", " ocean floor", " kitchen"]),
    ("A triangle has three", [" sides", " wheels", " moons", " parents"]),
    ("The opposite of hot is", [" cold", " fire", " orange", " fast"]),
    ("Two plus two equals", [" four", " nine", " blue", " a house"]),
    ("Dogs and cats are", [" animals", " minerals", " planets", " numbers"]),
    ("The author of Romeo and Juliet is William", [" Shakespeare", " Tell", " Gates", " of Orange"]),
    ("Plants need water and", [" sunlight", " gasoline", " plastic", " silence"]),
    ("There are seven days in a", [" week", " minute", " century", " spoon"]),
]
TEXTS = [
    "The little boat drifted slowly down the river while the children slept.",
    "Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar and oxygen.",
    "In 1969, two astronauts walked on the surface of the Moon; the third one stayed in orbit.",
    'She asked: "Ça va?" Nobody answered, so she wrote 12 + 30 = 42 on the board.',
]
BEGINNINGS = [
    "Question: What is the capital of Italy?\nAnswer:",
    "Once upon a time, there was a",
    "The three primary colours are",
    "To boil an egg, first",
]
DATA = {
    "choose": [{"context": context, "choices": choices} for context, choices in QUESTIONS],
    "roll": [{"text": text} for text in TEXTS],
    "write": [{"context": text} for text in BEGINNINGS],
}
TASKS = {
    "choose": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "roll": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "write": """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "none"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def run(model: str, model_args: str, out: Path) -> None:
    """Run the tasks, and write the answer to every request as JSON."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if model == "jllama":
        from jllama.evaluation import lm_eval_model

        lm_eval_model()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = directory
        for name, task in TASKS.items():
            file = Path(directory, f"{name}.jsonl")
            file.write_text("".join(json.dumps(doc) + "\n" for doc in DATA[name]))
            source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
            Path(directory, f"{name}.yaml").write_text(f"task: {name}\n{source}{task}")
        manager = TaskManager(include_path=directory, include_defaults=False)
        found = simple_evaluate(
            model, model_args=model_args, tasks=list(TASKS), task_manager=manager, batch_size=4, bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip
    answers = {name: [sample["filtered_resps"] for sample in found["samples"][name]] for name in TASKS}
    results = {name: {k: v for k, v in found["results"][name].items() if k.endswith(",none")} for name in TASKS}
    out.write_text(json.dumps({"model": model, "results": results, "answers": answers}, indent=1))
    print(json.dumps(results))


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The largest differences, and how many answers are equal."""
    a, b = theirs["answers"], ours["answers"]
    choices = [pair for x, y in zip(a["choose"], b["choose"], strict=True) for pair in zip(x, y, strict=True)]
    texts = list(zip(_numbers(a["roll"]), _numbers(b["roll"]), strict=True))
    written = list(zip(a["write"], b["write"], strict=True))
    return {
        "choices": len(choices),
        "choices: largest difference of a log-likelihood": max(abs(x[0] - y[0]) for x, y in choices),
        "choices: greedy alike": sum(x[1] == y[1] for x, y in choices),
        "texts": len(texts),
        "texts: largest difference of a log-likelihood": max(abs(x - y) for x, y in texts),
        "generated": len(written),
        "generated alike": sum(x == y for x, y in written),
        "results": {"theirs": theirs["results"], "ours": ours["results"]},
    }


def _numbers(answers: list[Any]) -> list[float]:
    """lm-eval wraps the answer to a rolling request in lists."""
    while isinstance(answers[0], list):
        answers = [answer[0] for answer in answers]
    return [float(answer) for answer in answers]


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 1 if the two models differ by more than rounding."""
    parser = argparse.ArgumentParser(prog="bench.lm_eval_parity", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("model")
    one.add_argument("model_args")
    one.add_argument("out", type=Path)
    two = commands.add_parser("compare")
    two.add_argument("theirs", type=Path)
    two.add_argument("ours", type=Path)
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args.model, args.model_args, args.out)
        return 0
    found = compare(json.loads(args.theirs.read_text()), json.loads(args.ours.read_text()))
    print(json.dumps(found, indent=1))
    largest = max(value for name, value in found.items() if name.endswith("log-likelihood"))
    alike = found["choices: greedy alike"] == found["choices"] and found["generated alike"] == found["generated"]
    return 0 if largest < 1e-2 and alike else 1


if __name__ == "__main__":
    sys.exit(main())
