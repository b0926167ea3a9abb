"""Text that settles, and the tokens it comes from: any characters, cut anywhere."""

import pytest
from serving import demo

from jllama.serve.text import Names, RowText

WORDS = "Zoë ate 🍣 and Ψωμί — naïve 中文字 e\u0301"


def row(stop: tuple[str, ...] = (), *, logprobs: bool = True) -> RowText:
    return RowText(demo().tokenizer, demo().tokenizer.encode("Then"), stop, logprobs=logprobs)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_no_character_is_cut_and_every_token_is_told_once(size: int) -> None:
    ids = demo().tokenizer.encode(" " + WORDS, bos=False)
    text, tokens, made = "", [], row()
    for at in range(0, len(ids), size):
        some = ids[at : at + size]
        piece, told = made.push(some, [float(i) for i in range(at, at + len(some))], [], last_is_stop=False)
        assert "\ufffd" not in piece
        text, tokens = text + piece, tokens + told
    piece, told = made.finish()
    assert (text + piece).strip() == WORDS
    tokens += told
    assert [token.id for token in tokens] == ids
    assert [token.logprob for token in tokens] == list(range(len(ids)))
    assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_ids_that_are_decoded_together_give_the_text_of_each_by_itself(size: int) -> None:
    ids = [*demo().tokenizer.encode(" " + WORDS, bos=False), *range(3, 120)]  # bytes that are no text, too
    single, several = row(logprobs=False), row(logprobs=False)
    one, many = "", ""
    for at in range(0, len(ids), size):
        some = ids[at : at + size]
        one += "".join(single.push([token], [0.0], [], last_is_stop=False)[0] for token in some)
        many += several.push(some, [0.0] * len(some), [], last_is_stop=False)[0]
        assert many == one  # neither is behind the other
    assert (single.tokens, several.tokens) == (len(ids), len(ids))
    assert many + several.finish()[0] == one + single.finish()[0]


@pytest.mark.parametrize("stop", ["🍣", "naïve", "文字", "and Ψ", "ate", "—"])
def test_a_stop_string_ends_the_text_and_its_tokens(stop: str) -> None:
    ids = demo().tokenizer.encode(" " + WORDS, bos=False)
    made, text, tokens = row((stop,)), "", []
    for token in ids:
        piece, told = made.push([token], [0.0], [], last_is_stop=False)
        text, tokens = text + piece, tokens + told
        if made.stopped:
            break
    piece, told = made.finish()
    assert (text + piece).strip() == WORDS.partition(stop)[0].strip()
    tokens += told
    assert made.tokens < len(ids)
    assert all(token.offset < len(text) for token in tokens)


def test_names_of_tokens_join_to_the_text() -> None:
    names = Names(demo().tokenizer)
    ids = demo().tokenizer.encode("Once upon a time", bos=False)
    assert "".join(map(names.text, ids)).strip() == "Once upon a time"
    assert names.text(demo().tokenizer.bos_id) == "<s>"
    fish = demo().tokenizer.encode("🍣", bos=False)
    assert bytes(b for token in fish for b in names.bytes_of(token)).decode().strip() == "🍣"
    assert names.text(fish[-1]) == "\ufffd"
