"""The engine on a tiny model. A request's text does not depend on other requests, their order, or the pool."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_engine import alone, assert_same, scores

from jllama import Engine, Request, SamplingSettings
from jllama.decode import generate
from jllama.engine import steps
from jllama.engine.request import Handle
from jllama.engine.tuning import tuning_for
from jllama.errors import InputError
from jllama.sampling import make_sampling
from jllama.stream import pad

CPU = tuning_for(jax.devices("cpu")[0])
SLOTS, PAGES, MAX_LEN = 4, 16, 256  # the same in all tests, so that the steps are compiled once


def engine(pages: int = PAGES, **more: object) -> Engine:
    """An engine that may use only ``pages`` of its pool. The pool has the same shape in every test."""
    made = Engine(tiny.model(), slots=SLOTS, pages=PAGES, max_len=MAX_LEN, budget=2 * CPU.piece, **more)
    made._scheduler.pools[0].take(PAGES - pages)
    return made


SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=1.0),
    SamplingSettings(temperature=0.8, top_k=20),
    SamplingSettings(temperature=1.2, top_p=0.9, min_p=0.01),
]


def requests(count: int, seed: int, limit: int = 24) -> list[Request]:
    """Requests with common prefixes, some equal except for the seed, some that stop early."""
    rng = random.Random(seed)
    heads = [tiny.prompt(rng.choice((1, 5, 40, 64, 65, 100, 128))) for _ in range(3)]
    return [
        Request(
            rng.choice(heads) + tiny.prompt(rng.randrange(1, 20), seed=rng.randrange(3)),
            max_new_tokens=rng.randrange(1, limit),
            sampling=SamplingSettings(**vars(rng.choice(SETTINGS)) | {"seed": rng.randrange(100)}),
            stop_ids=rng.choice(((), (), tuple(range(3, 12)))),
            priority=rng.choice((0, 0, 1)),
        )
        for _ in range(count)
    ]


def drain(e: Engine) -> None:
    for _ in e.events():
        pass
    assert not e.busy


def check(handles: list[Handle], **how: bool) -> None:
    for h in handles:
        assert_same(tiny.model(), h.request, h.completion.ids, h.completion.logprobs, **how)


def test_generate_gives_what_jllama_generate_gives_in_the_order_of_the_prompts() -> None:
    prompts = [tiny.prompt(n) for n in (3, 70, 9, 1, 130, 64, 65, 128)]
    for how, settings_ in ((dict(temperature=1.0, top_p=0.9), SamplingSettings(1.0, top_p=0.9, seed=5)), ({}, None)):
        out = engine().generate(prompts, max_new_tokens=20, stop_ids=(5, 6), sampling=settings_, n=2)
        tokens, lengths = pad([p for p in prompts for _ in range(2)])
        made = jax.jit(functools.partial(generate, max_new_tokens=20, stop_ids=(5, 6)))(
            tiny.model(), tokens, lengths=lengths, sampling=make_sampling(16, seed=5, **how)
        )
        for i, (completion, n) in enumerate(zip(out, made.lengths.tolist(), strict=True)):
            assert completion.ids == made.tokens[i, :n].tolist()
            np.testing.assert_allclose(completion.logprobs, made.logprobs[i, :n], atol=1e-4)
            assert completion.finish_reason == ("stop" if completion.ids[-1] in (5, 6) else "length")


def test_a_hundred_requests_through_a_pool_that_forces_preemption() -> None:
    e, rng = engine(pages=5), random.Random(4)
    long = [Request(tiny.prompt(50, seed=i % 3), 100 + i, SETTINGS[i % 4], stop_ids=()) for i in range(12)]
    queue, handles = requests(90, seed=3) + long, []
    while queue or e.busy:
        for _ in range(min(rng.choice((0, 1, 2)), len(queue))):
            handles.append(e.submit(queue.pop()))
        e.step()
    check(handles)
    assert all(h.finished for h in handles)
    assert e.statistics.preemptions > 5
    assert e.statistics.prefix_hits > 1000
    assert e._scheduler.pools[0].free == 5
    assert e.statistics.new_tokens == sum(len(h.completion.ids) for h in handles)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 500)),
        st.tuples(st.just("abort"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.integers(1, 3)),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(actions=actions, pages=st.integers(4, PAGES))
def test_random_arrivals_aborts_and_pools(actions: list[tuple[str, int]], pages: int) -> None:
    e, handles, aborted = engine(pages), [], set()
    for what, n in actions:
        if what == "submit":
            handles.append(e.submit(requests(1, seed=n)[0]))
        elif what == "abort" and handles:
            if not handles[n % len(handles)].finished:
                aborted.add(handles[n % len(handles)])
            e.abort(handles[n % len(handles)])
        elif what == "step":
            for _ in range(n):
                e.step()
    drain(e)
    assert e._scheduler.pools[0].free == pages
    check([h for h in handles if h not in aborted])
    check(list(aborted), ended=False)
    assert all(h.completion.finish_reason == "abort" for h in aborted)


def test_a_prefix_hit_changes_no_text_and_is_not_computed_again() -> None:
    e, prompt = engine(), tiny.prompt(150)
    first = e.generate([prompt], max_new_tokens=30, stop_ids=())[0]
    assert e.statistics.prefix_hits == 0
    again = e.generate([prompt], max_new_tokens=30, stop_ids=())[0]
    assert again.ids == first.ids
    assert e.statistics.prefix_hits == 149  # all that is fed: two pages shared, and the third copied
    turn = [*prompt, *first.ids, 7, 8]
    e.generate([turn], max_new_tokens=3, stop_ids=())
    assert e.statistics.prefix_hits == 149 + 160  # what is fed goes on at a multiple of 32
    handles = [e.submit(Request(turn[:n], 10, stop_ids=())) for n in (182, 128, 129, 40)]
    drain(e)
    check(handles)


def test_samples_of_one_prompt_feed_it_once() -> None:
    e, prompt = engine(), tiny.prompt(70)
    out = e.generate([prompt], max_new_tokens=9, stop_ids=(), sampling=SamplingSettings(1.0), n=4)
    assert len({tuple(c.ids) for c in out}) == 4
    assert e.statistics.prefix_hits == 3 * 64  # a tail of 5 is not worth a copy
    e = engine()
    e.generate([tiny.prompt(90)], max_new_tokens=9, stop_ids=(), n=4)
    assert e.statistics.prefix_hits == 3 * 89


def test_new_weights_cost_no_compilation_and_forget_what_the_old_ones_computed() -> None:
    e, prompt = engine(), tiny.prompt(90)
    e.generate([prompt], max_new_tokens=5, stop_ids=())
    compiled = steps.jit_decode._cache_size(), steps.jit_feed._cache_size()
    other = tiny.model(seed=1)
    e.params = other
    out = e.generate([prompt], max_new_tokens=5, stop_ids=())[0]
    assert (steps.jit_decode._cache_size(), steps.jit_feed._cache_size()) == compiled
    assert e.params is other
    assert e.statistics.prefix_hits == 0
    assert_same(other, Request(prompt, 5, stop_ids=()), out.ids, out.logprobs)
    with pytest.raises(InputError, match="params: expected weights of the shapes"):
        e.params = tiny.model("bfloat16")


def test_score_gives_the_log_probabilities_of_a_forward_and_shares_contexts() -> None:
    e, context = engine(), tiny.prompt(100)
    ends = [tiny.prompt(n, seed=2) for n in (1, 3, 70)]
    out = e.score([context] * 3 + [[4]], [*ends, [9, 9]])
    for prompt, end, scored in zip([context] * 3 + [[4]], [*ends, [9, 9]], out, strict=True):
        wanted, likeliest = scores(tiny.model(), prompt, end)
        np.testing.assert_allclose(scored.logprobs, wanted, atol=1e-4)
        assert scored.greedy == (likeliest == end).tolist()
        assert scored.ids == end
    assert e.statistics.prefix_hits >= 2 * 64
    greedy = e.generate([context], max_new_tokens=4, stop_ids=())[0].ids
    assert e.score([context], [greedy])[0].greedy == [True] * 4
    assert e.score([], []) == []


FULL = {
    "presence": dict(presence_penalty=1.5),
    "frequency": dict(frequency_penalty=0.7, temperature=0.9, seed=3),
    "repetition": dict(repetition_penalty=1.7),
    "bias": dict(logit_bias={11: 4.0, 12: float("-inf"), 40: -2.5}),
    "min_tokens": dict(min_tokens=6),
    "bad_words": dict(bad_words=((14,), (20, 14), (63, 20, 9))),
    "all": dict(
        temperature=1.1, top_p=0.95, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.1,
        logit_bias={7: 2.0}, min_tokens=3, bad_words=((7, 7),), top_logprobs=2,
    ),
}  # fmt: skip


def test_every_setting_holds_row_by_row_also_after_a_preemption() -> None:
    e = engine(pages=5)
    handles = [
        e.submit(Request(tiny.prompt(30 + 9 * i), 60, SamplingSettings(**how), stop_ids=(60,)))
        for i, how in enumerate([*FULL.values(), {}])
    ]
    drain(e)
    check(handles)
    assert e.statistics.preemptions > 0
    plain = handles[-1]
    assert plain.completion.top_logprobs == []


def test_settings_leave_a_slot_with_their_request() -> None:
    """A row draws beside one that has further settings, in a slot whose last row had others."""
    e = engine()
    e.generate([tiny.prompt(9)] * SLOTS, max_new_tokens=2, sampling=SamplingSettings(logit_bias={9: 1000.0}))
    later = [Request(tiny.prompt(9 + i), 12, s, ()) for i, s in enumerate(SETTINGS[:3])]
    later.append(Request(tiny.prompt(20), 12, SamplingSettings(presence_penalty=0.1), ()))
    handles = [e.submit(r) for r in later]
    drain(e)
    check(handles)


def test_what_the_settings_are_for() -> None:
    e, prompt = engine(), tiny.prompt(20)
    free = e.generate([prompt], max_new_tokens=12, stop_ids=())[0].ids

    def made(stop_ids: tuple[int, ...] = (), **how: object) -> list[int]:
        return e.generate([prompt], max_new_tokens=12, stop_ids=stop_ids, sampling=SamplingSettings(**how))[0].ids

    assert made(stop_ids=(free[2],)) == free[: free.index(free[2]) + 1]
    assert len(made(stop_ids=(free[2],), min_tokens=8)) >= 8
    assert free[0] not in made(bad_words=((free[0],),))
    pair = made(bad_words=((free[0], free[1]),))
    assert pair[0] == free[0]
    assert pair[1] != free[1]
    assert made(bad_words=((prompt[-1], free[0]),))[0] != free[0]  # begins in the prompt
    assert made(logit_bias={9: 1000.0}) == [9] * 12
    assert len(set(made(frequency_penalty=1000.0))) == 12
    assert len(set(made(presence_penalty=1000.0))) == 12


def test_top_log_probabilities_are_the_models_own() -> None:
    prompt = tiny.prompt(20)
    out = engine().generate([prompt], max_new_tokens=5, stop_ids=(), sampling=SamplingSettings(top_logprobs=20))[0]
    assert [len(top) for top in out.top_logprobs] == [20] * 5
    for token, logprob, top in zip(out.ids, out.logprobs, out.top_logprobs, strict=True):
        assert next(iter(top)) == token
        np.testing.assert_allclose(top[token], logprob, atol=1e-5)
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_the_next_plan_is_launched_before_the_last_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    e, order = engine(), []
    launch, read = e._device.launch, e._read
    monkeypatch.setattr(e._device, "launch", lambda *plan: order.append("launch") or launch(*plan))
    monkeypatch.setattr(e, "_read", lambda launched: order.append("read") or read(launched))
    e.generate([tiny.prompt(5)], max_new_tokens=4 * max(CPU.steps), stop_ids=())
    assert order[:6] == ["launch", "launch", "read", "read", "launch", "read"]  # the first turn has two results
    assert order[-1] == "read"
    assert order.count("launch") == order.count("read") - 1


def test_a_first_token_comes_before_the_decode_steps_of_its_turn() -> None:
    e = engine()
    for seed in (0, 1):
        e.submit(Request(tiny.prompt(5, seed), 12, stop_ids=()))
        turns = [[len(event.ids) for event in e.step()] for _ in range(3)]
        assert turns == [[], [1], [4]] if seed == 0 else turns[1][-1] == 1


def test_events_come_as_text_is_made_and_end_with_a_reason() -> None:
    e = engine()
    handle = e.submit(Request(tiny.prompt(9), 30, stop_ids=()))
    events = list(e.events())
    assert len(events) > 1
    assert [t for event in events for t in event.ids] == handle.completion.ids
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]
    assert all(event.handle is handle for event in events)


def test_pause_launches_nothing_and_resume_goes_on() -> None:
    e = engine()
    handle = e.submit(Request(tiny.prompt(9), 40, stop_ids=()))
    e.step()
    e.pause()
    while events := e.step():
        assert [event.handle for event in events] == [handle]
    assert 0 < len(handle.completion.ids) < 40
    assert e.step() == []
    with pytest.raises(InputError, match="it is paused"):
        e.generate([[5]], max_new_tokens=2)
    e.resume()
    drain(e)
    check([handle])


def test_a_lost_state_is_made_anew_and_no_text_changes() -> None:
    e = engine()
    handles = [e.submit(Request(tiny.prompt(9 + i), 40, SETTINGS[i], stop_ids=())) for i in range(3)]
    e.step()
    e.step()
    e._device._state.k.delete()  # as if an interrupt came between a donation and its result
    drain(e)
    check(handles)


@pytest.mark.parametrize("place", ["_device.launch", "_read", "_scheduler.plan"])
def test_an_interrupt_anywhere_in_a_step_changes_no_text(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()
    handles = [e.submit(Request(tiny.prompt(9 + i), 40, SETTINGS[i], stop_ids=())) for i in range(3)]
    for _ in range(3):  # the first turn has two results to be read; the next step launches
        e.step()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = functools.reduce(getattr, place.split(".")[:-1], e)
        patch.setattr(owner, place.split(".")[-1], interrupted)
        with pytest.raises(KeyboardInterrupt):
            e.step()
    drain(e)
    check(handles)


def test_nan_weights_are_one_line_and_the_engine_goes_on_with_others() -> None:
    e, params = engine(), tiny.model()
    e.params = params.replace(norm=params.norm.at[3].set(jnp.nan))
    with pytest.raises(InputError, match="model: prompt 0: logits are NaN") as error:
        e.generate([tiny.prompt(9)], max_new_tokens=5)
    assert "\n" not in str(error.value)
    e.params = params
    handle = e.submit(Request(tiny.prompt(9), 5))
    drain(e)
    check([handle])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "prompt: expected at least 1 token, found 0"),
        (Request([5, 96]), "prompt: expected token ids from 0 to 95, found 96"),
        (Request([5] * 250, 7), r"at most 256 tokens \(max_len\), found 257: a prompt of 250 and max_new_tokens 7"),
        (Request([5], 0), "max_new_tokens: expected a whole number from 1 to .*, found 0"),
        (Request([5], stop_ids=range(17)), "stop_ids: entries: expected a whole number from 0 to 16, found 17"),
        (Request([5, 6], score_from=2), r"score_from: expected 1 to 1 \(the prompt's .*, found 2"),
        (Request([5], sampling=SamplingSettings(-1.0)), "temperature: expected a number of at least 0, found -1"),
        (Request([5], sampling=SamplingSettings(top_logprobs=21)), "top_logprobs: expected .* 0 to 20, found 21"),
        (Request([5], sampling=SamplingSettings(logit_bias={99: 1.0})), "logit_bias: expected token ids .*, found 99"),
        (Request([5], sampling=SamplingSettings(bad_words=[[]])), "bad_words: tokens of a sequence: .* found 0"),
        (Request([5], sampling=SamplingSettings(presence_penalty=float("nan"))), "presence_penalty: .* found nan"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_leaves_nothing(request_: Request, message: str) -> None:
    e = engine()
    with pytest.raises(InputError, match=message):
        e.submit(request_)
    assert not e.busy
    assert e.statistics.waiting == 0


def test_a_bad_prompt_among_others_is_named_and_nothing_stays() -> None:
    e = engine(pages=3)
    with pytest.raises(InputError, match=r"prompt 1: request: expected at most 16 pages|prompt 1: .*max_len"):
        e.generate([[5], [5] * 250], max_new_tokens=20)
    assert not e.busy
    assert e._scheduler.pools[0].free == 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(slots=0), "slots: expected at least 1, found 0"),
        (dict(max_len=257), r"max_len: expected 2 to 256 \(the model's context\), found 257"),
        (dict(budget=8), "budget: expected at least 32 tokens, found 8"),
        (dict(memory=1.5), "memory: expected a part of the device's"),
        (dict(pages=0), "pages: expected at least 1, found 0"),
        (
            dict(pages=10**9),
            r"pages: expected at most \d+ \(what fits into the device.s free memory\), found 1000000000",
        ),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(how: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(tiny.model(), **how)


def test_the_reference_notices_another_text() -> None:
    request = Request(tiny.prompt(9), 5, stop_ids=())
    wanted = alone(tiny.model(), request)
    wrong = [*wanted.ids[:2], (wanted.ids[2] + 1) % 96, *wanted.ids[3:]]
    with pytest.raises(AssertionError):
        assert_same(tiny.model(), request, wrong, wanted.logprobs)
