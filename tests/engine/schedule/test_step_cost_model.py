"""How a step's cost is learned, and how it bounds what shares a step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.adapters.stack import Stack
from polygraft.engine.engine import Engine
from polygraft.engine.schedule.step_cost import StepBudget, StepCost, Work, keys_of
from polygraft.engine.sequences.sequence import Sequence
from polygraft_types.requests import Request, ScoreRequest, StoppingParams
from tests.engine.asking import check_clean
from tests.engine.schedule.test_scheduler import BUDGET, Simulation
from tests.engines import make_engine


class Logits(Sequence):
    """Logits are wanted behind its last tokens."""

    wanted = 1

    @property
    def logits_from(self) -> int:
        return self.num_tokens - self.wanted


def sequence(tokens: int, computed: int = 0, wanted: int = 1) -> Logits:
    made = Logits("s", [0] * tokens, Stack())
    made.num_computed = computed
    made.wanted = wanted
    return made


def known(
    limit: float, *, step: float = 0.0, row: float = 1.0, key: float = 0.0, logits: float = 0.0
) -> StepCost:
    """Costs in seconds."""
    cost = StepCost(key=1.0, logits=1.0, limit=limit)
    cost.step, cost.row, cost.key, cost.logits = step, row, key, logits
    return cost


@given(st.integers(0, 50), st.integers(0, 50))
def test_keys(start: int, count: int) -> None:
    assert keys_of(start, count) == sum(at + 1 for at in range(start, start + count))


def true_seconds(work: Work) -> float:
    """A machine on which attention takes four times what its arithmetic says."""
    return 0.008 + 0.0007 * work.rows + 4 * 0.3e-6 * work.keys + 0.0004 * work.logits


def mixed(rng: random.Random) -> Work:
    work = Work()
    for _ in range(rng.randrange(1, 32)):
        work.add(rng.randrange(1500), 1, 1)
    match rng.randrange(4):
        case 0:
            work.add(rng.randrange(500), 256, 1)
        case 1:
            work.add(rng.randrange(500, 8000), 200, 0)
        case 2:
            work.add(rng.randrange(500, 8000), 100, 100)
    return work


def test_costs_become_what_steps_take_whatever_a_machine_does_now_and_then() -> None:
    rng = random.Random(1)
    cost = StepCost(key=0.0004, logits=0.3, limit=1.0)
    cost.observe(Work(8, 36, 1), 0.2)  # the first one warms up
    for _ in range(300):
        work = mixed(rng)
        hiccup = 10.0 if rng.random() < 0.03 else rng.uniform(0.9, 1.1)
        cost.observe(work, true_seconds(work) * hiccup)
    for _ in range(50):
        work = mixed(rng)
        cost.observe(work, true_seconds(work))
    for _ in range(100):
        work = mixed(rng)
        assert cost.seconds(work) == pytest.approx(true_seconds(work), rel=0.4)


def test_nothing_is_limited_before_a_step_has_run_or_without_a_limit() -> None:
    cost = StepCost(key=1.0, logits=1.0, limit=0.001)
    assert cost.limit is None
    cost.observe(Work(1, 1, 1), 5.0)
    assert cost.limit is not None
    assert known(0.0).limit is None


def test_a_limit_leaves_room_for_more_than_reading_the_weights() -> None:
    assert known(1.0, step=2.0).limit == 8.0
    assert known(1.0, step=0.1).limit == 1.0


def test_long_contexts_and_logits_weigh_more() -> None:
    short = StepBudget(512, known(100.0, row=1.0, key=0.01))
    assert short.fill(sequence(600), 0) == 72, "72 + 0.01 · 72 · 73 / 2 is 98.28, and of 73 it is 100.01"
    assert StepBudget(512, known(100.0, row=1.0, key=0.01)).fill(sequence(9000, 8000), 8000) == 1
    assert StepBudget(512, known(100.0, row=1.0, logits=4.0)).fill(sequence(600, wanted=600), 0) == 20
    assert StepBudget(512, known(100.0, row=1.0, logits=4.0)).fill(sequence(600), 0) == 100
    assert StepBudget(50, known(100.0)).fill(sequence(600), 0) == 50
    assert StepBudget(50, None).fill(sequence(600), 0) == 50


def test_decodes_are_never_refused_and_leave_a_quarter() -> None:
    budget = StepBudget(512, known(100.0))
    for _ in range(300):
        budget.decode(sequence(9, 8))
    assert not budget.exhausted
    assert budget.fill(sequence(600), 0) == 25
    assert budget.exhausted
    assert (budget.tokens, budget.work.rows) == (512 - 325, 325)


def test_one_token_at_least() -> None:
    budget = StepBudget(512, known(0.5, row=100.0))
    assert budget.fill(sequence(600), 0) == 1
    assert budget.exhausted


arrivals = st.tuples(st.integers(1, 16), st.integers(1, 8), st.integers(0, 8))


@given(st.lists(arrivals, min_size=1, max_size=8), st.floats(0.01, 50.0), st.booleans())
@settings(max_examples=200, deadline=None)
def test_everything_ends_whatever_the_limit(
    events: list[tuple[int, int, int]], limit: float, caching: bool
) -> None:
    simulation = Simulation(caching=caching)
    simulation.scheduler._cost = known(limit, row=1.0, key=0.3, logits=1.0)
    for prompt, new, stack in events:
        simulation.arrive(prompt, new, stack)
    for _ in range(3000):
        if not simulation.scheduler.has_work:
            break
        batch = simulation.step()
        assert batch.items, "work is left and nothing runs"
        assert batch.work.rows >= batch.rows
        assert batch.rows <= BUDGET
    assert set(simulation.finished) == set(simulation.goal)


@pytest.fixture(scope="module")
def engine(tiny_model: object) -> Engine:
    return make_engine(tiny_model("llama"))  # type: ignore[operator]


def asked() -> list[Request | ScoreRequest]:
    prompt = tuple((7 * at) % 250 for at in range(100))
    continuations = tuple((at % 250, 3, 5) for at in range(40))
    return [
        ScoreRequest("score", prompt, continuations, top_logprobs=2),
        Request("long", prompt[::-1], stopping=StoppingParams(max_new_tokens=5, ignore_eos=True)),
        Request("short", prompt[:5], stopping=StoppingParams(max_new_tokens=60, ignore_eos=True)),
    ]


def answers(engine: Engine, widest: list[int]) -> list[object]:
    step = engine.step

    def watched() -> object:
        result = step()
        if result.stats is not None:
            widest.append(result.stats.prefill_rows)
        return result

    engine.step = watched  # type: ignore[method-assign]
    try:
        outputs = engine.generate(asked())
    finally:
        engine.step = step  # type: ignore[method-assign]
    check_clean(engine)
    return [
        [score.log_likelihood for score in outputs[0][-1].scores],
        *([token for output in one for token in output.token_ids] for one in outputs[1:]),
    ]


def test_scores_and_long_prompts_take_more_steps_and_give_the_same(llama: Path) -> None:
    engine = make_engine(llama, prefix_caching=False)
    cost = engine.step_cost
    free: list[int] = []
    cost._limit = 0.0
    expected = answers(engine, free)
    assert max(free) > 100
    bounded: list[int] = []
    # A row costs a millisecond, and a key in a context of 100 the same: 20 rows behind 100 others fit.
    cost._limit = 0.04
    cost.observe = lambda work, seconds: None  # type: ignore[method-assign]
    cost.step, cost.row, cost.key, cost.logits = 0.0, 1e-3, 1e-5, 0.0
    assert answers(engine, bounded) == expected
    assert max(bounded) <= 36
    assert max(bounded[-20:]) <= 22


def test_a_decode_shares_every_step_of_a_score(llama: Path) -> None:
    engine = make_engine(llama, prefix_caching=False)
    engine.step_cost._limit = 0.04
    engine.step_cost.observe = lambda work, seconds: None  # type: ignore[method-assign]
    engine.step_cost.step, engine.step_cost.row, engine.step_cost.key = 0.0, 1e-3, 1e-5
    [score, _, stream] = asked()
    engine.submit(stream)
    engine.step()
    engine.submit(score)
    for _ in range(30):
        outputs = engine.step().outputs
        assert [output.request_id for output in outputs if output.token_ids] == ["short"]
    engine.abort("score")
    engine.abort("short")
    check_clean(engine)
