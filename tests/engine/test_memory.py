"""The cache of an engine and the memory that it finds."""

import jax
import pytest
import tiny
from reference_engine import assert_same

from jllama import Engine, Request
from jllama.config import LlamaConfig
from jllama.engine import device
from jllama.engine.state import EngineState
from jllama.errors import InputError


def test_a_cache_is_smaller_where_free_memory_is_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    room, init_state = 11, device.init_state

    def in_pieces(config: LlamaConfig, slots: int, pages: int, *rest: object, **how: object) -> EngineState:
        if pages > room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
        return init_state(config, slots, pages, *rest, **how)

    monkeypatch.setattr(device, "init_state", in_pieces)
    with pytest.raises(InputError, match=r"pages: expected a number .* in two pieces, found 12"):
        Engine(tiny.model(), slots=2, pages=12)  # so many, or none
    e = Engine(tiny.model(), slots=2, max_len=256)  # as many as fit: by default 2 slots get 8 pages
    assert e.statistics.pages == 8
    room = 7
    e = Engine(tiny.model(), slots=2, max_len=256)
    assert e.statistics.pages == 7
    request = Request(tiny.prompt(9), 5, stop_ids=())
    handle = e.submit(request)
    for _ in e.events():
        pass
    assert_same(tiny.model(), request, handle.completion.ids, handle.completion.logprobs)
