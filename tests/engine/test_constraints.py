"""Constraints in the engine: no masked token is drawn, and no constraint changes the text of a neighbour."""

import random

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference_engine import assert_same
from toy_grammar import BEGIN, At, Walk, walk

from jllama import Engine, Request, SamplingSettings
from jllama.engine import masked, steps
from jllama.engine.constraint import masks_of
from jllama.engine.request import Handle
from jllama.engine.shared import Leader, follow
from jllama.engine.state import init_extras, init_state, rows_of
from jllama.engine.tuning import Tuning
from jllama.errors import InputError

SLOTS, PAGES, MAX_LEN = 2, 8, 192  # few shapes: each is compiled
TUNING = Tuning(piece=32, steps=(4, 4, 16), rows=(SLOTS,), pieces=(2,))
VOCAB = tiny.CONFIG.vocab_size
GRAMMARS = [walk(VOCAB, 1), walk(VOCAB, 2, length=9), None, walk(VOCAB, 3, length=30), None]
SETTINGS = [SamplingSettings(), SamplingSettings(0.8, top_k=20, min_p=0.01)]


def engine(pages: int = PAGES) -> Engine:
    """An engine that may use only ``pages`` of its pool."""
    made = Engine(tiny.model(), slots=SLOTS, pages=PAGES, max_len=MAX_LEN, budget=64, tuning=TUNING)
    made._scheduler.pools[0].take(PAGES - pages)
    return made


def requests(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            tiny.prompt(rng.choice((20, 40, 50)), seed=rng.randrange(3)),
            max_new_tokens=rng.choice((9, 60, 90)),
            sampling=SamplingSettings(**vars(rng.choice(SETTINGS)) | {"seed": rng.randrange(100)}),
            stop_ids=rng.choice(((), (), (), tuple(range(3, 8)))),
            constraint=rng.choice(GRAMMARS),
        )
        for _ in range(count)
    ]


def drain(e: Engine) -> None:
    for _ in e.events():
        pass
    assert not e.busy


def check(handles: list[Handle]) -> None:
    for h in handles:
        assert_same(tiny.model(), h.request, h.completion.ids, h.completion.logprobs)
        grammar = h.request.constraint
        assert grammar is None or grammar.holds(h.completion.ids)


def test_what_a_step_has_read_before_it_fails_comes_with_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    e, came = engine(), []
    handle = e.submit(Request(tiny.prompt(20), 9, stop_ids=(), constraint=GRAMMARS[1]))
    while not (e._unread and e._unread[0].masked and e._unread[0].drawn):  # the next step reads before it plans
        came += e.step()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(e._scheduler, "plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            e.step()
    came += e.events()
    assert [token for event in came for token in event.ids] == handle.completion.ids
    check([handle])


def test_texts_are_those_of_requests_alone_whatever_the_neighbours_arrivals_and_preemptions() -> None:
    e, rng, queue, handles = engine(pages=3), random.Random(4), requests(24, seed=3), []
    while queue or e.busy:
        for _ in range(min(rng.choice((0, 1, 2)), len(queue))):
            handles.append(e.submit(queue.pop()))
        if rng.random() < 0.02:
            e.abort(rng.choice([h for h in handles if not h.finished] or handles))
        e.step()
    check([h for h in handles if h.completion.finish_reason != "abort"])
    assert e.statistics.preemptions > 3
    assert e._scheduler.pools[0].free == 3
    ended = [h for h in handles if h.request.constraint is GRAMMARS[1] and len(h.completion.ids) == 9]
    assert ended
    assert all(h.completion.finish_reason == "stop" for h in ended)  # as the grammar ends, also at the limit


def test_every_setting_holds_beside_a_constraint_also_after_a_preemption() -> None:
    e = engine(pages=3)
    how = dict(
        temperature=1.1, top_p=0.95, presence_penalty=0.4, repetition_penalty=1.1, logit_bias={7: 2.0, 8: -jnp.inf},
        min_tokens=3, bad_words=((7, 7),), top_logprobs=2,
    )  # fmt: skip
    grammar = Walk(VOCAB, {t: range(3, 60) for t in range(BEGIN, VOCAB)})
    asked = [
        Request(tiny.prompt(20 + 5 * i), 90, SamplingSettings(**how, seed=i), (3,), constraint=one)
        for i, one in enumerate((grammar, None, grammar, None, grammar))
    ]
    handles = [e.submit(request) for request in asked]
    drain(e)
    check(handles)
    assert e.statistics.preemptions > 0
    for h in handles:
        assert [len(top) for top in h.completion.top_logprobs] == [2] * len(h.completion.ids)


def test_a_dead_end_ends_its_row_only() -> None:
    e = engine()
    dead = Walk(VOCAB, {BEGIN: (10,), 10: (11, 12), 11: (), 12: ()})
    handles = [e.submit(Request(tiny.prompt(9), 20, stop_ids=(), constraint=c)) for c in (dead, None, GRAMMARS[0])]
    banned = SamplingSettings(logit_bias={10: -jnp.inf})
    handles.append(e.submit(Request(tiny.prompt(9), 20, banned, stop_ids=(), constraint=dead)))
    drain(e)
    assert [h.completion.finish_reason for h in handles] == ["dead_end", "length", "length", "dead_end"]
    assert [len(h.completion.ids) for h in handles] == [2, 20, 20, 0]
    check(handles[1:3])


class Faulty(At):
    """Raises at one of its methods, at the third token."""

    where = ""

    def mask(self) -> np.ndarray:
        if self.where == "mask" and self.count == 2:
            raise MemoryError
        return super().mask()

    def accept(self, token: int) -> None:
        if self.where == "accept" and self.count == 2:
            raise KeyError(token)
        super().accept(token)

    @property
    def done(self) -> bool:
        if self.where == "done" and self.count == 3:
            raise RuntimeError("a bug")
        return super().done


@pytest.mark.parametrize(("where", "count"), [("mask", 2), ("accept", 3), ("done", 3)])
def test_a_constraint_that_raises_ends_its_row_only(where: str, count: int) -> None:
    class Bad(Walk):
        def matcher(self) -> At:
            made = Faulty(self)
            made.where = where
            return made

    e, good = engine(), GRAMMARS[0]
    assert isinstance(good, Walk)
    bad = Bad(VOCAB, good.after)
    handles = [e.submit(Request(tiny.prompt(9), 20, stop_ids=(), constraint=c)) for c in (bad, good, None)]
    drain(e)
    assert [h.completion.finish_reason for h in handles] == ["error", "length", "length"]
    assert [len(h.completion.ids) for h in handles] == [count, 20, 20]
    assert (handles[0].error or "").startswith("the constraint failed: ")
    check(handles[1:])
    with pytest.raises(InputError, match="prompt 0: the constraint failed"):
        e.generate([tiny.prompt(9)], max_new_tokens=9, stop_ids=(), constraint=bad)


def test_samples_of_a_prompt_share_a_constraint() -> None:
    e = engine()
    how = dict(max_new_tokens=12, stop_ids=(), sampling=SamplingSettings(1.0), n=6, constraint=GRAMMARS[0])
    out = e.generate([tiny.prompt(70), tiny.prompt(5)], **how)
    assert all(GRAMMARS[0].holds(c.ids) for c in out)
    assert len({tuple(c.ids) for c in out}) > 6
    assert e.generate([tiny.prompt(70), tiny.prompt(5)], **how) == out


def test_an_interrupt_in_a_step_changes_no_constrained_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("launch", "_look_ahead"):
        e = engine()
        asked = [Request(tiny.prompt(9 + i), 20, SETTINGS[i % 2], (), constraint=GRAMMARS[i]) for i in range(3)]
        handles = [e.submit(request) for request in asked]
        for _ in range(4):
            e.step()
        with monkeypatch.context() as patch:
            patch.setattr(e._device, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                e.step()
        drain(e)
        check(handles)


def test_the_device_looks_ahead_before_the_host_reads_and_a_warm_engine_compiles_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    e, order = engine(), []
    e.warm_up(("greedy",), constraints=True, scores=False)
    assert capsys.readouterr().err == ""
    assert not any(name == "score" for name, *_ in e.programs)
    compiled = [f._cache_size() for f in (masked.jit_look_ahead, masked.jit_draw_allowed, steps.jit_decode)]

    def noted(owner: object, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: order.append(name) or real(*args))

    for owner, name in ((e._device, "_draw"), (e._device, "_look_ahead"), (e, "_read")):
        noted(owner, name)
    e.generate([tiny.prompt(5), tiny.prompt(6)], max_new_tokens=3, stop_ids=(), constraint=GRAMMARS[0])
    first, turn = ["_look_ahead", "_draw", "_look_ahead", "_read", "_read"], ["_draw", "_look_ahead", "_read"]
    assert order == [*first, *turn, "_draw", "_read"]
    e.generate([tiny.prompt(5), tiny.prompt(6)], max_new_tokens=3, stop_ids=())
    assert [f._cache_size() for f in (masked.jit_look_ahead, masked.jit_draw_allowed, steps.jit_decode)] == compiled


def test_masks_are_packed_and_unpacked_bit_by_bit() -> None:
    matchers = [None, *(w.matcher() for w in (walk(VOCAB, i) for i in range(20)))]
    masks = masks_of(matchers, 24, VOCAB)
    assert masks.shape == (24, 3)
    allowed = np.asarray(masked.unpack(masks, VOCAB))
    for row, matcher in zip(allowed, matchers, strict=False):
        wanted = range(VOCAB) if matcher is None else matcher.walk.after[BEGIN]
        assert np.flatnonzero(row).tolist() == list(wanted)
    assert np.asarray(masked.unpack(masks, 70)).shape == (24, 70)


@pytest.mark.parametrize("kind", steps.KINDS)
def test_a_draw_never_takes_a_masked_token(kind: str) -> None:
    config, rows = tiny.CONFIG, 4
    how = {"greedy": {}, "plain": dict(temperature=3.0)}.get(kind, dict(temperature=3.0, top_p=0.5, top_k=3))
    settings = SamplingSettings(**how)
    made = rows_of([(Request([5], 9, settings), [5], 0)] * rows, [()] * rows, rows)
    state = init_state(config, rows, 1, "float32")
    state = state.replace(rows=made, extras=init_extras(config, rows) if kind == "full" else None)
    logits = jnp.tile(jnp.linspace(-50, 50, VOCAB), (rows, 1)).at[:, 3].set(-1e30)
    mask = np.zeros((rows, 3), np.uint32)
    mask[0, 0], mask[1, 1], mask[2] = 1 << 3, 1, (0b110, 0, 1 << 31)  # tokens 3; 32; 1, 2 and 95; none
    (state, drawn), _ = masked.jit_draw_allowed(state, logits, np.arange(rows), mask, kind=kind)
    tokens = drawn.tokens[0].tolist()
    assert tokens == [3, 32, 95, steps.NO_TOKEN]
    assert state.rows.done.tolist() == [False, False, False, True]
    assert state.rows.drawn.tolist() == [1, 1, 1, 0]


def test_a_nan_row_is_an_error_and_not_a_dead_end() -> None:
    e, params = engine(), tiny.model()
    e.params = params.replace(norm=params.norm.at[3].set(jnp.nan))
    handle = e.submit(Request(tiny.prompt(9), 5, constraint=GRAMMARS[0]))
    drain(e)
    assert handle.completion.finish_reason == "error"


def test_a_constraint_and_scores_are_one_line() -> None:
    with pytest.raises(InputError, match="constraint: expected none with score_from, found one"):
        engine().submit(Request([5, 6], score_from=1, constraint=GRAMMARS[0]))


def test_a_follower_draws_what_the_leader_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines in place of those of two processes: one is told, in bytes, what the other was asked."""
    told: list[bytes] = []
    leader, follower, rng = Leader(engine(pages=3), told.append), engine(pages=3), random.Random(8)
    queue, handles, followed = requests(12, seed=7), [], []
    names = {str(i): grammar for i, grammar in enumerate(GRAMMARS) if grammar is not None}
    for name, grammar in names.items():
        monkeypatch.setitem(vars(grammar), "source", name)  # a toy has none
    settings = SamplingSettings(0.7, seed=5, presence_penalty=0.4, logit_bias={7: -1.5}, bad_words=((9, 8),))
    queue.append(Request(tiny.prompt(9), 12, settings))
    while queue or leader.busy:
        if queue and rng.random() < 0.5:
            handles += leader.submit_all([queue.pop()])
        with pytest.raises(InputError):  # refused after a part of it was taken
            leader.submit_all([Request(tiny.prompt(5)), Request((VOCAB,))])
        if rng.random() < 0.05 and handles:
            leader.abort(rng.choice(handles))
        leader.step()
    leader.close()
    take = follower.submit_all

    def taken(requests: list[Request]) -> list[Handle]:
        found = take(requests)
        followed.extend(found)
        return found

    monkeypatch.setattr(follower, "submit_all", taken)
    follow(follower, iter(told).__next__, names.__getitem__)
    assert [h.completion for h in followed] == [h.completion for h in handles]
    assert {h.completion.finish_reason for h in handles} >= {"stop", "length", "abort"}
    assert follower.statistics.preemptions == leader.statistics.preemptions > 0
