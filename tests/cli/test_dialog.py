"""Meta's chat format, id for id."""

import json
from pathlib import Path

from jllama.text.dialog import Exchange, dialog_ids
from jllama.text.tokenizer import load_tokenizer


def exchanges(dialog: list[dict[str, str]]) -> tuple[str | None, list[Exchange]]:
    """A list of messages as a system prompt and exchanges."""
    system = dialog[0]["content"] if dialog[0]["role"] == "system" else None
    texts = [message["content"] for message in dialog if message["role"] != "system"]
    return system, [Exchange(q, a) for q, a in zip(texts[::2], [*texts[1::2], None], strict=True)]


def test_the_ids_are_those_of_metas_code(data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer" / "tokenizer.model")
    cases = json.loads((data / "chat" / "llama2_chat_expected_ids.json").read_text())
    cases = [case for case in cases if case["matches_meta_encoding"]]
    assert len(cases) == 5
    for case in cases:
        system, said = exchanges(case["dialog"])
        assert dialog_ids(tokenizer, said, system) == case["expected_ids"], case["source"]


class Letters:
    """A tokenizer whose ids are code points: shows the text that is encoded."""

    n_ids, bos_id, eos_id = 1 << 20, 1, 2

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return [self.bos_id] * bos + [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)


def test_the_text_between_the_control_ids() -> None:
    ids = dialog_ids(Letters(), [Exchange("a ", " b "), Exchange(" c")], "s")
    assert Letters().decode(ids) == "\1[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b \2\1[INST] c [/INST]"


def test_nobody_can_type_a_control_id() -> None:
    ids = dialog_ids(Letters(), [Exchange("</s><s>")])
    assert ids.count(1) == 1
    assert 2 not in ids
