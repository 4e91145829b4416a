"""The order of a measurement, on a clock that only moves when a step is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import allmlp as am
from allmlp.evaluation.sweep import Course, Plan, percentile, sweep, time_latency


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A model whose step takes the seconds that a function of the batch size says."""

    def __init__(
        self,
        clock: Clock,
        seconds: Callable[[int], float],
        *,
        growth: int | None = None,
        free: int | None = None,
        fails_at: int | None = None,
        error: Exception | None = None,
        log: list[str] | None = None,
        name: str = "",
    ) -> None:
        self.clock, self.seconds, self.grows, self.free = clock, seconds, growth, free
        self.fails_at, self.error = fails_at, error
        self.log, self.name = [] if log is None else log, name
        self.batch = 0
        self.sizes: list[int] = []

    def prepare(self, batch_size: int) -> None:
        self.batch = batch_size
        self.sizes.append(batch_size)

    def run(self, times: int) -> None:
        if self.fails_at is not None and self.batch >= self.fails_at:
            assert self.error is not None
            raise self.error
        self.clock.now += times * self.seconds(self.batch)
        self.log.append(f"{self.name}{self.batch}")

    def growth(self) -> int | None:
        self.run(1)
        return None if self.grows is None else self.grows * self.batch

    def free_memory(self) -> int | None:
        return self.free

    def release(self) -> None:
        self.batch = 0


def silent(line: str) -> None:
    assert line


def rates(course: Course) -> dict[int, float]:
    return {point.batch_size: point.images_per_second for point in course.points}


def rising_to_four(batch: int) -> float:
    """100, 200 and 300 images a second at 1, 2 and 4, then 10 less with every doubling."""
    return batch / {1: 100, 2: 200, 4: 300, 8: 290, 16: 280, 32: 270}[batch]


def test_the_sweep_stops_when_the_rate_has_not_risen_twice():
    clock = Clock()
    course = Course("a", Fake(clock, rising_to_four))
    sweep([course], Plan(seconds=1.0), clock, silent)
    assert rates(course) == pytest.approx({1: 100, 2: 200, 4: 300, 8: 290, 16: 280})
    assert course.best is not None
    assert course.best.batch_size == 4
    assert course.ended == "the rate no longer rises"
    assert course.error is None


def test_one_dip_does_not_end_the_sweep_and_a_plateau_does():
    speeds = {1: 100, 2: 90, 4: 200, 8: 201, 16: 201.5}
    clock = Clock()
    course = Course("a", Fake(clock, lambda batch: batch / speeds[batch]))
    sweep([course], Plan(seconds=1.0), clock, silent)
    assert list(rates(course)) == [1, 2, 4, 8, 16]
    assert course.best is not None
    assert course.best.batch_size == 16


def test_chosen_batch_sizes_are_all_measured_in_order():
    clock = Clock()
    course = Course("a", Fake(clock, rising_to_four))
    sweep([course], Plan(batch_sizes=(32, 1, 8), seconds=1.0), clock, silent)
    assert list(rates(course)) == [1, 8, 32]
    assert course.ended is None


def test_the_budget_ends_the_doubling():
    clock = Clock()
    course = Course("a", Fake(clock, lambda batch: batch * 0.5 / (1 + batch)))
    sweep([course], Plan(seconds=2.0, budget=6.0), clock, silent)
    assert course.ended == "the budget of 6 s"
    assert 1 <= len(course.points) <= 3
    assert clock.now <= 8.0


def test_the_seconds_are_cut_into_rounds_and_the_median_counts():
    clock = Clock()
    slow = iter([1.0, 1.0, 1.0, 1.0, 4.0, 1.0])  # three steps to warm up, then three rounds
    course = Course("a", Fake(clock, lambda batch: next(slow)))
    sweep([course], Plan(batch_sizes=(1,), seconds=3.0, rounds=3), clock, silent)
    (point,) = course.points
    assert point.rates == pytest.approx((1.0, 0.25, 1.0))
    assert point.images_per_second == pytest.approx(1.0)


def test_models_take_turns_in_every_round():
    clock, log = Clock(), []
    courses = [Course(n, Fake(clock, lambda batch: 1.0, log=log, name=n)) for n in "ab"]
    sweep(courses, Plan(batch_sizes=(2,), seconds=0.1, rounds=3), clock, silent)
    assert log == ["a2"] * 3 + ["b2"] * 3 + ["a2", "b2"] * 3


def test_a_batch_that_would_not_fit_is_not_tried():
    clock = Clock()
    course = Course("a", Fake(clock, lambda batch: batch**0.5, growth=10**9, free=5 * 10**9))
    sweep([course], Plan(seconds=0.1, budget=1e5), clock, silent)
    assert list(rates(course)) == [1, 2, 4]
    assert course.ended == "memory: 8 images would take about 8.0 GB, 5.0 GB are free"
    assert course.error is None


def test_a_large_first_batch_is_judged_by_a_small_one():
    clock = Clock()
    fake = Fake(clock, lambda batch: 1.0, growth=10**9, free=20 * 10**9)
    course = Course("a", fake)
    sweep([course], Plan(batch_sizes=(64,)), clock, silent)
    assert fake.sizes == [8]
    assert course.error == "memory: 64 images would take about 64.0 GB, 20.0 GB are free"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't"),
        (ZeroDivisionError("no"), "ZeroDivisionError: no"),
    ],
)
def test_a_model_that_fails_is_a_row_and_the_others_go_on(error: Exception, said: str):
    clock = Clock()
    bad = Course("bad", Fake(clock, rising_to_four, fails_at=1, error=error))
    good = Course("good", Fake(clock, rising_to_four))
    sweep([bad, good], Plan(seconds=1.0), clock, silent)
    assert bad.error is not None
    assert bad.error.startswith(said)
    assert bad.points == []
    assert len(good.points) == 5


def test_too_little_memory_for_a_larger_batch_only_ends_the_sweep():
    clock = Clock()
    fake = Fake(clock, rising_to_four, fails_at=4, error=MemoryError("no room"))
    course = Course("a", fake)
    sweep([course], Plan(seconds=1.0), clock, silent)
    assert (course.error, course.ended) == (None, "out of memory: no room")
    assert list(rates(course)) == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), am.UserError("a mistake")])
def test_a_stop_and_a_mistake_go_through(error: BaseException):
    clock = Clock()
    course = Course("a", Fake(clock, rising_to_four, fails_at=2, error=error))  # pyright: ignore[reportArgumentType]
    with pytest.raises(type(error)):
        sweep([course], Plan(seconds=1.0), clock, silent)
    assert list(rates(course)) == [1]


@pytest.mark.parametrize(("step", "runs"), [(0.1, 20), (5.0, 10), (1e-6, 1000)])
def test_latency_takes_as_many_runs_as_fit(step: float, runs: int):
    clock = Clock()
    course = Course("a", Fake(clock, lambda batch: step * batch))
    sweep([course], Plan(batch_sizes=(1,)), clock, silent)
    time_latency([course], Plan(seconds=2.0, rounds=3), clock, silent)
    assert len(course.latencies) == pytest.approx(runs, abs=1)
    assert course.latencies == pytest.approx([step] * len(course.latencies), rel=1e-3)


def test_percentiles_are_values_that_were_measured():
    values = [float(each) for each in range(1, 101)]
    assert [percentile(values[::-1], each) for each in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 50) == percentile([3.0], 99) == 3.0
    assert [percentile([1.0, 2.0, 9.0], each) for each in (50, 90, 99)] == [2.0, 9.0, 9.0]
