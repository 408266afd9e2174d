"""Work between steps: how much of it, in which order, and what waits for a step."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from polygraft.engine.residency.background import IDLE_SECONDS, STEP_SHARE, BackgroundWork


class Log:
    """Jobs that take as long as they say, on a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []

    def job(
        self, name: str, *slices: float, needs_step: int | None = None, rests: int | None = None
    ) -> Generator[bool | None, None, None]:
        for at, seconds in enumerate(slices):
            self.now += seconds
            self.done.append(f"{name}{at}")
            yield True if at == needs_step else False if at == rests else None


@pytest.fixture
def log() -> Log:
    return Log()


def test_after_a_step_it_takes_its_share_and_no_more(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("a", *[0.3 * STEP_SHARE] * 50))
    work.run_after_step(1.0)
    assert len(log.done) == 4


def test_a_slice_that_took_too_long_is_paid_back(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("a", 2.5 * STEP_SHARE, 0.01, 0.01))
    steps = 0
    while len(log.done) < 2:
        work.run_after_step(1.0)
        steps += 1
    # It took the share of two and a half steps; the next slice starts in the first step that has something left.
    assert steps == 3
    assert log.now <= STEP_SHARE * steps + 0.01


def test_what_nobody_waits_for_rests_until_the_server_has_been_idle_for_a_while(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("a", 0.0, 0.0, 0.0, rests=0))
    for _ in range(3):
        work.run_after_step(1.0)
        work.run_idle()
    assert log.done == ["a0"]
    assert work.resting
    assert work.idle
    work.wake_resting()
    assert not work.resting
    work.run_idle()
    assert log.done == ["a0", "a1", "a2"]


def test_in_the_long_run_it_keeps_to_its_share(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("a", *[0.013] * 10_000))
    for _ in range(500):
        work.run_after_step(0.05)
    assert log.now == pytest.approx(500 * 0.05 * STEP_SHARE, rel=0.05)


def test_what_a_step_leaves_isnt_saved_up(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    for _ in range(100):
        work.run_after_step(1.0)
    work.add(log.job("a", *[0.3 * STEP_SHARE] * 50))
    work.run_after_step(1.0)
    assert len(log.done) == 4


def test_idle_time_is_its_own_and_clears_its_debt(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("a", 5.0, *[IDLE_SECONDS / 3.5] * 20))
    work.run_after_step(1.0)
    work.run_idle()
    assert len(log.done) == 1 + 4
    before = len(log.done)
    work.run_after_step(1.0)
    assert len(log.done) > before


def test_jobs_take_turns(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    for name in "ab":
        work.add(log.job(name, 0.001, 0.001))
    work.run_idle(1.0)
    assert log.done == ["a0", "b0", "a1", "b1"]
    assert work.idle


def test_a_small_job_beside_a_large_one_takes_twice_as_long_as_alone(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("large", *[1.0] * 30))
    work.run_idle(0.5)
    work.add(log.job("small", *[0.01] * 200))
    steps = 0
    while "small199" not in log.done:
        work.run_idle(0.1)
        steps += 1
    # It takes 2 s alone.
    assert log.now <= 1.0 + 2 * 2.0 + 1.0


def test_who_has_waited_gets_no_more_than_its_share_afterwards(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("waits", *[0.1] * 100, needs_step=0))
    work.add(log.job("works", *[0.1] * 100))
    for _ in range(50):
        work.run_idle(0.05)  # no step comes: the first one's turn is put off only once
    waited = sum(name.startswith("waits") for name in log.done)
    assert 20 <= waited <= 30


def test_a_job_that_waits_for_a_step_goes_on_after_it(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("a", 0.001, 0.001, needs_step=0))
    work.add(log.job("b", 0.001, 0.001))
    work.run_idle(1.0)
    assert log.done == ["a0", "b0", "b1"]
    assert not work.idle
    work.run_after_step(1.0)
    assert log.done == ["a0", "b0", "b1", "a1"]
    work.run_after_step(1.0)
    assert work.idle


def test_without_time_nothing_runs(log: Log) -> None:
    work = BackgroundWork(lambda: log.now)
    work.add(log.job("a", 0.001))
    work.run_after_step(0.0)
    assert log.done == []
    assert not work.idle
