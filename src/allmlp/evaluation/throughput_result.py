"""What `throughput` found: figures, as JSON values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from allmlp.evaluation.peak import Peak
from allmlp.evaluation.result_file import measurement
from allmlp.evaluation.sweep import Course, Plan, percentile
from allmlp.evaluation.timed_model import Mode


@dataclass
class ModelThroughput:
    """What was measured of one model.

    Attributes:
        name: by which it was given.
        mode: "inference" or "training".
        course: the points of the sweep, the latencies, and what went wrong.
        header: what the model is, see `allmlp.evaluation.result_file.describe`.
        precision: of the products; why, in words.
        flops: of one image's forward pass, by the closed formula of its configuration.
        counted: the same, as torch counts while it computes.
        peak: the machine's own products in that precision; None where that was not reached.
        state_bytes: of weights, buffers and the optimizer's state.
        batch_bytes: of one image.
        threads: of the processor, at the best batch size; None where nothing was measured.
    """

    name: str
    mode: Mode
    course: Course
    header: dict[str, Any]
    precision: str = ""
    why: str = ""
    flops: int = 0
    counted: int = 0
    peak: Peak | None = None
    state_bytes: int = 0
    batch_bytes: int = 0
    threads: int | None = None

    @property
    def images_per_second(self) -> float | None:
        """The highest rate; None where nothing was measured."""
        best = self.course.best
        return None if best is None else best.images_per_second

    @property
    def share_of_peak(self) -> float | None:
        """The operations of the best rate, relative to the machine's own products."""
        rate = self.images_per_second
        if rate is None or self.peak is None:
            return None
        passes = 3 if self.mode == "training" else 1  # as in training: itself and two gradients
        return passes * self.flops * rate / (self.peak.gflops * 1e9)

    @property
    def memory_bytes(self) -> int | None:
        """Weights, optimizer, the batch and what a step takes, at the best batch size."""
        best = self.course.best
        if best is None or best.growth is None:
            return None
        return self.state_bytes + best.batch_size * self.batch_bytes + best.growth

    def latency_ms(self) -> dict[str, float] | None:
        """Returns the 50th, 90th and 99th percentile of a single image, and the number of runs."""
        taken = self.course.latencies
        if not taken:
            return None
        found = {f"p{each}": 1e3 * percentile(taken, each) for each in (50, 90, 99)}
        return {**found, "runs": len(taken)}

    def to_json(self) -> dict[str, Any]:
        """Returns every figure as JSON values."""
        best, peak = self.course.best, self.peak
        points = [
            {
                "batch_size": point.batch_size,
                "images_per_second": point.images_per_second,
                "spread": [min(point.rates), max(point.rates)],
                "step_memory_bytes": point.growth,
            }
            for point in self.course.points
        ]
        return {
            "name": self.name,
            "model": self.header,
            "mode": self.mode,
            "precision": self.precision,
            "threads": self.threads,
            "image_size": self.header.get("image_size"),
            "points": points,
            "best": next((p for p in points if best and p["batch_size"] == best.batch_size), None),
            "ended": self.course.ended,
            "error": self.course.error,
            "latency_ms": self.latency_ms(),
            "flops": {"formula": self.flops, "counted": self.counted},
            "peak": None
            if peak is None
            else {"gflops": peak.gflops, "shape": list(peak.shape), "share": self.share_of_peak},
            "memory_bytes": self.memory_bytes,
        }


@dataclass
class Throughput:
    """A measurement of one or more models that took turns.

    Attributes:
        models: in the order in which they were given.
        device: that computed.
        threads: of the processor, at most.
        compiled: whether torch.compile was used.
        plan: how long was measured.
        environment: versions, hardware, date and command.
        interrupted: whether it was stopped before its end.
    """

    models: list[ModelThroughput]
    device: torch.device
    threads: int
    compiled: bool
    plan: Plan
    environment: dict[str, Any]
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns a measurement of the kind "throughput", see `evaluation.measurement`."""
        shared = {"compiled": self.compiled, "device": str(self.device)}
        on_gpu = self.device.type == "cuda"
        figures = {
            "interrupted": self.interrupted,
            "seconds": self.plan.seconds,
            "rounds": self.plan.rounds,
            "memory_is": "torch's allocations" if on_gpu else "growth of the resident set",
            "models": [{**each.to_json(), **shared} for each in self.models],
        }
        return measurement("throughput", None, {**figures, "environment": self.environment})
