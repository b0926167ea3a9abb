"""The scheduler and its pages on a fake device in plain Python, where any confusion of pages changes a text."""

import random
import subprocess
import sys

import pytest
from fake_device import VOCAB, FakeDevice, alone
from hypothesis import given, settings
from hypothesis import strategies as st

from jllama.engine.pages import Pages, root
from jllama.engine.scheduler import EXPECT, OVERTAKE, Scheduler, Sequence
from jllama.errors import InputError


def scheduler(slots: int = 4, pages: int = 20, size: int = 4, max_len: int = 64, **more: object) -> Scheduler:
    settings = dict(piece=4, pieces=6, steps=(1, 2, 5)) | more
    return Scheduler(Pages(pages, size, worth=2), slots=slots, max_len=max_len, **settings)


def text(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{n} {seed}")
    return [rng.randrange(VOCAB) for _ in range(n)]


def run(device: FakeDevice) -> int:
    turns = 0
    while device.turn():
        turns += 1
        assert turns < 100_000
    return turns


def assert_as_alone(sequences: list[Sequence]) -> None:
    for s in sequences:
        assert s.finish in ("stop", "length")
        assert s.tokens[s.prompt :] == alone(s.tokens[: s.prompt], s.limit, s.stop_ids)


def requests(count: int, seed: int, longest: int = 20, limit: int = 20) -> list[Sequence]:
    """Requests with common prefixes, equal ones, and some with stop tokens that occur."""
    rng = random.Random(seed)
    heads = [text(rng.randrange(1, longest - 4), seed=i) for i in range(5)]
    return [
        Sequence(
            (rng.choice(heads) + text(rng.randrange(5), rng.randrange(3)))[:longest],
            rng.randrange(1, limit),
            frozenset(rng.sample(range(VOCAB), rng.choice((0, 0, 3)))),
            priority=rng.choice((0, 0, 0, 1, -1)),
            salt=rng.choice(("", "", "tenant")),
        )
        for _ in range(count)
    ]


def test_ten_thousand_requests_through_a_pool_that_forces_preemption_lose_nothing_and_leak_no_page() -> None:
    device = FakeDevice(scheduler(slots=8, pages=24))
    sequences, rng = requests(10_000, seed=1), random.Random(2)
    queue = list(reversed(sequences))
    while queue or device.scheduler.waiting or device.scheduler.running:
        for _ in range(min(rng.choice((0, 0, 1, 3)), len(queue))):
            device.scheduler.add(queue.pop())
        device.turn()
    run(device)
    assert_as_alone(sequences)
    assert device.scheduler.preemptions > 100
    assert device.scheduler.hits > 10_000
    assert device.scheduler.pages.free == 24


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 10_000)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("turn"), st.integers(1, 3)),
        st.tuples(st.just("forget"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(actions=actions, slots=st.integers(1, 5), pages=st.integers(10, 40), size=st.sampled_from([4, 8]))
def test_any_arrivals_aborts_and_pools_give_the_texts_of_requests_alone(
    actions: list[tuple[str, int]], slots: int, pages: int, size: int
) -> None:
    device, sequences = FakeDevice(scheduler(slots, pages, size)), []
    for what, n in actions:
        if what == "add":
            sequences += requests(1, seed=n)
            sequences[-1].constrained = n % 4 == 1
            device.scheduler.add(sequences[-1])
        elif what == "abort" and sequences:
            device.scheduler.finish(sequences[n % len(sequences)], "abort")
        elif what == "forget":
            device.scheduler.forget()
        elif what == "turn":
            for _ in range(n):
                device.turn()
    run(device)
    assert_as_alone([s for s in sequences if s.finish != "abort"])
    for s in sequences:  # also of one that was aborted, what came was right
        drawn = s.tokens[s.prompt :]
        assert drawn == alone(s.tokens[: s.prompt], len(drawn))
    assert not device.scheduler.running
    assert not device.scheduler.waiting
    assert device.scheduler.pages.free == pages


def test_rows_beside_a_constrained_one_draw_a_token_a_turn_and_go_on_faster_once_it_has_ended() -> None:
    device = FakeDevice(scheduler(pages=40))
    free, bound = Sequence(text(3), 20), Sequence(text(3, seed=1), 6, constrained=True)
    for s in (free, bound):
        device.scheduler.add(s)
    drawn = []
    while device.turn():
        drawn.append((len(free.tokens) - 3, len(bound.tokens) - 3))
    assert drawn[1:8] == [(n + 1, n) for n in range(7)]  # the other one's first token needs no mask
    assert [a for a, _ in drawn[8:]] == [12, 17, 20]
    assert_as_alone([free, bound])


@pytest.mark.parametrize(("limit", "prompt"), [(1, 8), (2, 12)])
def test_a_request_admitted_beside_a_constrained_one_has_the_pages_of_the_turn_in_which_it_joins(
    limit: int, prompt: int
) -> None:
    device = FakeDevice(scheduler(pages=40, pieces=1))
    free, bound = Sequence(text(2), 40), Sequence(text(3), limit, constrained=True)
    late = Sequence(text(prompt, seed=1), 20)  # its first token to be drawn begins a page
    for s in (free, bound):
        device.scheduler.add(s)
    device.turn()
    device.turn()
    device.scheduler.add(late)  # is fed in several turns, and joins when the constrained one has ended
    run(device)
    assert_as_alone([free, bound, late])


@pytest.mark.parametrize(("prompt", "firsts"), [(3, 1), (1, 0), (4, 1), (5, 0), (6, 1)])
def test_first_tokens_are_drawn_from_the_last_piece_or_else_after_one_step(prompt: int, firsts: int) -> None:
    s = scheduler()
    s.add(first := Sequence(text(prompt), 20))
    plan = s.plan()
    assert plan.firsts == [first] * firsts  # no piece of 4 has only the last token
    assert (plan.steps, first.drawn) == (1, firsts + 1)
    assert s.plan().steps == 5
    s.add(Sequence(text(3, seed=1), 20))
    s._since = EXPECT  # as if it had come long after the first one
    plans = [s.plan() for _ in range(2)]
    assert [(len(p.firsts), len(p.rows), p.steps) for p in plans] == [(1, 2, 2), (0, 2, 5)]


def test_turns_are_short_while_requests_keep_coming_and_slots_are_free() -> None:
    s = scheduler(slots=3, pages=400, max_len=400)
    s.add(Sequence(text(3), 300))
    s.add(Sequence(text(3, seed=1), 300))
    assert [s.plan().steps for _ in range(3)] == [1, 5, 5]  # those that came before any ran tell nothing
    s.add(Sequence(text(3, seed=2), 300))
    assert [s.plan().steps for _ in range(EXPECT + 2)] == [1] * EXPECT + [5, 5]
    s.add(Sequence(text(3, seed=3), 300))
    assert [s.plan().steps for _ in range(2)] == [2, 2]  # it must wait for a slot in any case
    for sequence in (*s.running, *s.waiting):
        s.finish(sequence, "abort")
    s.add(Sequence(text(3, seed=4), 300))
    assert [s.plan().steps for _ in range(2)] == [1, 5]  # alone, whatever came before


def test_more_is_fed_where_no_row_draws() -> None:
    s = scheduler(pages=100, max_len=200, pieces=2, alone=7)
    s.add(Sequence(text(40), 20))
    s.add(Sequence(text(40, seed=1), 20))
    assert [len(s.plan().pieces) for _ in range(7)] == [7, 7, 2, 2, 2, 0, 0]


def test_samples_of_one_prompt_share_its_full_pages_and_copy_the_last() -> None:
    device = FakeDevice(scheduler(slots=8, pages=40))
    group = [Sequence(text(11), 6) for _ in range(8)]
    for s in group:
        device.scheduler.add(s)
    device.turn()
    device.turn()
    assert len({tuple(s.pages[:2]) for s in group}) == 1  # 10 tokens are fed: two full pages
    assert len({s.pages[2] for s in group}) == 8
    run(device)
    assert device.fed == 11  # once for all
    assert_as_alone(group)


def test_a_long_prompt_that_is_known_is_fed_from_its_last_page_only() -> None:
    device = FakeDevice(scheduler(max_len=400, pages=100))
    first = Sequence(text(203), 3)
    device.scheduler.add(first)
    run(device)
    fed = device.fed
    second = Sequence(text(203)[:201] + [1, 2, 3, 4], 3)
    device.scheduler.add(second)
    run(device)
    assert device.fed - fed <= 4
    assert_as_alone([first, second])


def test_a_next_turn_of_a_conversation_finds_question_and_answer() -> None:
    device = FakeDevice(scheduler())
    first = Sequence(text(10), 9)
    device.scheduler.add(first)
    run(device)
    fed, second = device.fed, Sequence([*first.tokens, 1, 2, 3], 9)
    device.scheduler.add(second)
    run(device)
    assert device.fed - fed <= 4  # the last one drawn, and the new ones
    assert_as_alone([first, second])


def test_another_salt_shares_nothing() -> None:
    for salt, fed in (("", 12), ("b", 24)):
        device = FakeDevice(scheduler())
        for s in (Sequence(text(13), 2), Sequence(text(13), 2, salt=salt)):
            device.scheduler.add(s)
            run(device)
        assert device.fed == fed


def test_after_new_weights_nothing_that_the_old_ones_wrote_is_found() -> None:
    device = FakeDevice(scheduler())
    running = Sequence(text(13), 9)
    device.scheduler.add(running)
    device.turn()
    device.scheduler.forget()
    run(device)  # what began with the old ones goes on, but is not shared
    fed = device.fed
    device.scheduler.add(Sequence(text(13), 2))
    run(device)
    assert device.fed - fed == 12


def test_the_oldest_known_pages_go_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    pages = Pages(4, 2, worth=1)
    old, new = pages.take(2), pages.take(2)
    for owned, tokens in ((old, [1, 2, 3, 4]), (new, [5, 6, 7, 8])):
        name = b"root"
        for i, page in enumerate(owned):
            name = pages.remember(page, name, tokens[2 * i : 2 * i + 2], turn=1)
    pages.give_back(old)
    pages.give_back(new)
    assert pages.take(1) == [old[1]]
    assert pages.take(2) == [old[0], new[1]]


def test_a_prompt_goes_on_in_a_copied_page_at_multiples_and_may_end_anywhere_in_it() -> None:
    pages = Pages(4, 8, worth=3, multiple=4)
    pages.remember(pages.take(1)[0], root(""), [1, 2, 3, 4, 5, 6, 7], turn=1)
    assert pages.find([1, 2, 3, 4, 5, 6], "", 2).tail_tokens == 6
    assert pages.find([1, 2, 3, 4, 5, 6], "", 2, goes_on=True).tail_tokens == 4
    assert pages.find([1, 2, 3, 4, 5, 6, 9], "", 2).tail_tokens == 4
    assert pages.find([1, 2, 3], "", 2).tail_tokens == 3
    assert pages.find([1, 2, 3, 9], "", 2).tail is None
    assert pages.find([1, 2], "", 2).tail is None


def test_the_newest_is_preempted_and_the_oldest_never() -> None:
    device = FakeDevice(scheduler(slots=4, pages=12))
    group = [Sequence(text(6, seed=i), 30) for i in range(4)]
    for s in group:
        device.scheduler.add(s)
    ended: list[Sequence] = []
    while device.turn():
        assert not group[0].finish or group[0] in ended or not ended
        ended += [s for s in group if s.finish and s not in ended]
    assert ended == group
    assert device.scheduler.preemptions > 0
    assert_as_alone(group)


def test_a_stream_of_urgent_requests_delays_another_but_does_not_starve_it() -> None:
    device = FakeDevice(scheduler(slots=1))
    device.scheduler.add(Sequence(text(5), 2))
    patient, came = Sequence(text(5, seed=1), 2, priority=0), 0
    device.scheduler.add(patient)
    while patient.finish is None:
        device.scheduler.add(Sequence(text(5, seed=2), 2, priority=1))
        device.turn()
        came += 1
        assert came < 20 * OVERTAKE
    assert came > OVERTAKE  # it did matter
    quick, slow = Sequence(text(5), 2, priority=5), Sequence(text(5), 2)
    device = FakeDevice(scheduler(slots=1))
    for s in (slow, quick):
        device.scheduler.add(s)
    while quick.finish is None:
        device.turn()
    assert slow.finish is None


def test_prompts_are_fed_within_the_budget_while_rows_draw() -> None:
    device = FakeDevice(scheduler(pages=100, max_len=200, pieces=3))
    first, long = Sequence(text(3), 60), Sequence(text(100), 5)
    device.scheduler.add(first)
    for _ in range(3):
        device.turn()
    device.scheduler.add(long)
    pieces, steps = [], []
    original = device.run

    def spied(plan):
        pieces.append(len(plan.pieces))
        if plan.pieces:
            assert first in plan.rows
            steps.append(plan.steps)
        return original(plan)

    device.run = spied
    while not long.joined:
        device.turn()
    assert max(pieces) == 3
    assert steps == [1] + [2] * 8  # 99 tokens by 12 a turn, and few steps, so that the prompt need not wait
    run(device)
    assert_as_alone([first, long])


@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [
        (60, 5, r"at most 64 tokens \(max_len\), found 65: a prompt of 60 and max_new_tokens 5"),
        (30, 30, r"at most 14 pages of 4 tokens \(the whole pool\), found a need of 15: a prompt of 30"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(prompt: int, limit: int, message: str) -> None:
    tight = scheduler(pages=14)
    with pytest.raises(InputError, match=message):
        tight.add(Sequence(text(prompt), limit))
    assert not tight.waiting


def test_what_just_fits_runs_alone_in_the_whole_pool() -> None:
    device = FakeDevice(scheduler(pages=14))
    group = [Sequence(text(28, seed=i), 29) for i in range(3)]
    for s in group:
        device.scheduler.add(s)
    run(device)
    assert_as_alone(group)


def test_scheduling_needs_no_jax() -> None:
    code = "import sys, jllama.engine.scheduler; print('jax' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
