"""The cache of an engine and the memory that it finds."""

from collections.abc import Callable

import jax
import pytest
import tiny
from reference_engine import assert_same

import jllama
from jllama import LM, Engine, Request
from jllama.cli.perplexity import cut, measure
from jllama.config import LlamaConfig
from jllama.engine import device
from jllama.engine.state import EngineState
from jllama.errors import InputError

Room = Callable[[int], None]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Room:
    """Sets how many pages the largest piece of free memory has room for."""
    room, init_state = [0], device.init_state

    def in_pieces(config: LlamaConfig, slots: int, pages: int, *rest: object, **how: object) -> EngineState:
        if pages > room[0]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
        return init_state(config, slots, pages, *rest, **how)

    monkeypatch.setattr(device, "init_state", in_pieces)
    return lambda pages: room.__setitem__(0, pages)


def test_a_cache_is_smaller_where_free_memory_is_in_pieces(pieces: Room) -> None:
    pieces(11)
    with pytest.raises(InputError, match=r"pages: expected a number .* in two pieces, found 12"):
        Engine(tiny.model(), slots=2, pages=12)  # so many, or none
    assert Engine(tiny.model(), slots=2, max_pages=12).statistics.pages == 10  # at most so many
    e = Engine(tiny.model(), slots=2, max_len=256)  # as many as fit: by default 2 slots get 8 pages
    assert e.statistics.pages == 8
    pieces(7)
    e = Engine(tiny.model(), slots=2, max_len=256)
    assert e.statistics.pages == 7
    request = Request(tiny.prompt(9), 5, stop_ids=())
    handle = e.submit(request)
    for _ in e.events():
        pass
    assert_same(tiny.model(), request, handle.completion.ids, handle.completion.logprobs)


def test_several_processes_have_as_many_pages_or_none(pieces: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces(11)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"pages: expected a number .* in two pieces, found 12"):
        Engine(tiny.model(), slots=2, max_pages=12)


def test_texts_and_windows_take_a_smaller_cache(pieces: Room) -> None:
    pieces(11)
    lm = LM(tiny.model(), jllama.load_tokenizer(jllama.DEMO / "tokenizer.model"), 256)
    with lm._engine([9], None) as engine:
        assert engine.statistics.pages == 10  # of 16
    with lm._engine([9], None) as again:
        assert again is engine
    windows = cut(tiny.prompt(60), 21)
    pieces(3)
    whole = measure(tiny.model(), windows, tiny.CONFIG.bos_id)
    pieces(2)
    assert measure(tiny.model(), windows, tiny.CONFIG.bos_id) == whole
