"""lm_eval: log-likelihoods through local-completions, answers through local-chat-completions, on a task of its own."""

import json
import os
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
ANSWER = """\
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["."], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""
ROWS = [
    {"question": "Once upon a", "choices": [" time", " zebra"]},
    {"question": "The cat sat on the", "choices": [" floor", " why"]},
]

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choice.yaml").write_text(CHOICE.format(file=file))
    (folder / "answer.yaml").write_text(ANSWER.format(file=file))
    tasks = TaskManager(include_path=name, include_defaults=False)
    os.environ["OPENAI_API_KEY"] = os.environ["KEY"]
    common = f"model={os.environ['MODEL']},num_concurrent=2,max_retries=1,tokenized_requests=False"
    base = f"{common},base_url={os.environ['URL']}/v1/completions,tokenizer={os.environ['TOKENIZER']}"
    found = lm_eval.simple_evaluate("local-completions", base, tasks=["tiny_choice"], task_manager=tasks)
    assert found["results"]["tiny_choice"]["acc,none"] == 1.0, found["results"]
    chat = f"{common},base_url={os.environ['URL']}/v1/chat/completions"
    found = lm_eval.simple_evaluate(
        "local-chat-completions", chat, tasks=["tiny_answer"], task_manager=tasks, apply_chat_template=True
    )
    assert all(sample["resps"][0][0] for sample in found["samples"]["tiny_answer"]), found["samples"]
print("ok")
