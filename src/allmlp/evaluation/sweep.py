"""The order of a throughput measurement: batch sizes, rounds in which models take turns, latency.

Nothing here knows of torch or of real time: what is timed is a `Subject`, and the clock is given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from allmlp.errors import UserError

LARGEST_BATCH = 2**16
_RISE = 1.01  # a rate less than one per cent above the best so far counts as no rise
_NO_RISES = 2
_SMALL_BATCH = 8  # tried before a larger one whose memory is not known
_USABLE = 0.8  # of the free memory; other programs need some
_FEWEST_RUNS, _MOST_RUNS = 10, 1000  # of the latency


class Subject(Protocol):
    """A model that can be timed."""

    def prepare(self, batch_size: int) -> None:
        """Makes a batch of so many images ready; the one before may be forgotten."""
        ...

    def run(self, times: int) -> None:
        """Computes so many steps, and returns when they are done."""
        ...

    def growth(self) -> int | None:
        """Runs one step and returns by how many bytes the memory rose meanwhile; None: unknown."""
        ...

    def free_memory(self) -> int | None:
        """Returns how many bytes can still be had; None where that is not known."""
        ...

    def release(self) -> None:
        """Forgets the batch."""
        ...


@dataclass(frozen=True)
class Point:
    """The rate at one batch size.

    Attributes:
        batch_size: images a step.
        rates: images a second in each round.
        growth: bytes by which memory rose in a step; None where it cannot be told.
    """

    batch_size: int
    rates: tuple[float, ...]
    growth: int | None

    @property
    def images_per_second(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)


@dataclass
class Course:
    """What is found of one model.

    Attributes:
        name: of the model.
        subject: that is timed; None where it could not be built.
        error: why the model is given up; None while all is well.
        ended: why no larger batch was tried; None until then.
        points: measured so far, in the order of the batch sizes.
        latencies: seconds of each run with a batch of one image.
    """

    name: str
    subject: Subject | None = None
    error: str | None = None
    ended: str | None = None
    points: list[Point] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    step_seconds: float = 0.0  # of the batch size at hand
    grown: int | None = None
    spent: float = 0.0  # seconds, without the first steps

    @property
    def best(self) -> Point | None:
        """The point with the highest rate: the paper's throughput."""
        return max(self.points, key=lambda point: point.images_per_second, default=None)


@dataclass(frozen=True)
class Plan:
    """How long is measured, and what.

    Attributes:
        batch_sizes: to measure; None doubles from 1 for as long as it pays.
        seconds: timed at each batch size, over all rounds; of the latency too.
        rounds: in which the models take turns.
        budget: seconds that one model's doubling may take.
    """

    batch_sizes: tuple[int, ...] | None = None
    seconds: float = 2.0
    rounds: int = 5
    budget: float = 30.0


Clock = Callable[[], float]
Tell = Callable[[str], None]


def sweep(courses: Sequence[Course], plan: Plan, clock: Clock, tell: Tell) -> None:
    """Measures the rate of every model at every batch size; `courses` are filled in.

    The models take turns within a batch size, so that a disturbance falls on all of them. A model
    that fails keeps the reason, and the others go on.

    Args:
        courses: with subjects.
        plan: how long and what.
        clock: seconds that only rise.
        tell: is told what is measured next.
    """
    doubling = (2**power for power in range(LARGEST_BATCH.bit_length()))
    for size in doubling if plan.batch_sizes is None else sorted(plan.batch_sizes):
        there = [each for each in courses if each.error is None and each.ended is None]
        there = [each for each in there if _fits(each, size, plan)]
        if not there:
            break
        begun = []
        for course in there:
            tell(f"{course.name}, batch {size:,}")
            if attempt(course, _begin, course, size, clock):
                begun.append((course, []))
        for _ in range(plan.rounds):
            for course, rates in begun:
                if course.error is None and course.ended is None:
                    attempt(course, _round, course, rates, size, plan, clock)
        for course, rates in begun:
            assert course.subject is not None
            course.subject.release()
            if len(rates) == plan.rounds:
                course.points.append(Point(size, tuple(rates), course.grown))
                if plan.batch_sizes is None and _has_stopped_rising(course.points):
                    course.ended = "the rate no longer rises"


def _fits(course: Course, size: int, plan: Plan) -> bool:
    """Says whether a model goes on to this batch size, and notes why not."""
    last = course.points[-1] if course.points else None
    if plan.batch_sizes is None and last is not None:
        step = course.step_seconds * size / last.batch_size
        expected = max(plan.seconds, plan.rounds * step) + 2 * step
        if course.spent + expected > plan.budget:
            course.ended = f"the budget of {plan.budget:g} s"
            return False
    if last is not None:
        course.ended = _too_large(course, size, last.growth, last.batch_size)
    return course.ended is None


def _too_large(course: Course, size: int, growth: int | None, of_size: int) -> str | None:
    """Says why a batch will not fit, judged by how memory rose with a smaller one.

    On a processor nothing raises: the system ends a process that takes too much.
    """
    assert course.subject is not None
    free = course.subject.free_memory()
    if growth is None or free is None or growth * size / of_size <= _USABLE * free:
        return None
    needed = f"about {growth * size / of_size / 1e9:.1f} GB"
    return f"memory: {size:,} images would take {needed}, {free / 1e9:.1f} GB are free"


def _begin(course: Course, size: int, clock: Clock) -> None:
    """Warms up: one step to make everything ready, one to see the memory, one to see the time."""
    subject = course.subject
    assert subject is not None
    if size > _SMALL_BATCH and not course.points:  # chosen by the user: nothing is known yet
        subject.prepare(_SMALL_BATCH)
        subject.run(1)
        reason = _too_large(course, size, subject.growth(), _SMALL_BATCH)
        if reason is not None:
            raise MemoryError(reason)
    subject.prepare(size)
    subject.run(1)  # compiles, and lays out what the libraries keep
    started = clock()
    course.grown = subject.growth()
    before_last = clock()
    subject.run(1)
    course.step_seconds = clock() - before_last
    course.spent += clock() - started


def _round(course: Course, rates: list[float], size: int, plan: Plan, clock: Clock) -> None:
    assert course.subject is not None
    steps = _steps_in(plan.seconds / plan.rounds, course.step_seconds)
    started = clock()
    course.subject.run(steps)
    seconds = clock() - started
    course.spent += seconds
    course.step_seconds = seconds / steps
    rates.append(steps * size / seconds)


def _steps_in(seconds: float, step_seconds: float) -> int:
    return max(1, round(seconds / max(step_seconds, 1e-6)))


def _has_stopped_rising(points: Sequence[Point]) -> bool:
    """Says whether the last two rates are no rise over the best before each of them."""
    if len(points) <= _NO_RISES:
        return False
    rates = [point.images_per_second for point in points]
    return all(rates[at] < _RISE * max(rates[:at]) for at in range(-_NO_RISES, 0))


def attempt(course: Course, act: Callable[..., object], *arguments: object) -> bool:
    """Does something with one model; where that fails, keeps the reason and returns False.

    Where a smaller batch was measured before, too little memory only ends the model's sweep. A
    `UserError` and Ctrl-C go through.
    """
    try:
        act(*arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a model may raise; the others are to go on
        reason = _reason(error)
        if course.points and "memory" in reason:
            course.ended = reason
        else:
            course.error = reason
        if course.subject is not None:
            course.subject.release()
        return False
    return True


def _reason(error: Exception) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
    if text.startswith("memory: "):
        return text
    # torch.OutOfMemoryError on a GPU; on a processor "DefaultCPUAllocator: can't allocate memory".
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text}"
    return text if "memory" in text else f"{type(error).__name__}: {text}"


def time_latency(courses: Sequence[Course], plan: Plan, clock: Clock, tell: Tell) -> None:
    """Times single images one by one; `courses` are filled in.

    Each model takes as many runs as fit into the seconds of the plan, 10 to 1,000, a part of them
    in each round.
    """
    begun: list[tuple[Course, int]] = []
    for course in courses:
        if course.error is None and course.points:
            tell(f"{course.name}, latency")
            if attempt(course, _begin, course, 1, clock):
                fit = int(plan.seconds / max(course.step_seconds, 1e-6))
                begun.append((course, min(max(fit, _FEWEST_RUNS), _MOST_RUNS)))
    for number in range(plan.rounds):
        for course, runs in begun:
            share = runs * (number + 1) // plan.rounds - runs * number // plan.rounds
            attempt(course, _time_each, course, share, clock)
    for course, _ in begun:
        assert course.subject is not None
        course.subject.release()


def _time_each(course: Course, times: int, clock: Clock) -> None:
    assert course.subject is not None
    for _ in range(times):
        started = clock()
        course.subject.run(1)
        course.latencies.append(clock() - started)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest of the values that at least so many per cent of them do not exceed.

    The nearest rank: a value that was measured, never one between two. Of fewer than 100 values the
    99th percentile is the largest.

    Args:
        values: at least one.
        percent: above 0, at most 100.
    """
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]
