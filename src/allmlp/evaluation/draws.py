"""Which images a few-shot measurement takes: its settings, checked, and its draws.

Source: big_vision evaluators/fewshot_lsr.py; scenic train_lib/transfer/fewshot_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from allmlp.data.items import Source
from allmlp.errors import UserError
from allmlp.evaluation.features import PRECISIONS, Precision
from allmlp.preprocessing import RESIZE_METHODS

Protocol = Literal["big_vision", "scenic"]
PROTOCOLS = get_args(Protocol)
SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2 = 1024.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, checked: the arguments of `few_shot` of the same names."""

    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    l2: float
    protocol: Protocol
    resize: str
    precision: Precision


def check_settings(
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] | None = None,
    l2: float | None = None,
    protocol: str = "big_vision",
    resize: str = "resize-crop",
    precision: str = "float32",
) -> Settings:
    """Returns the settings with the protocol's own values for None.

    Raises:
        UserError: a value is out of range, or has no effect under the protocol.
    """
    named = (
        ("protocol", protocol, PROTOCOLS),
        ("resize", resize, RESIZE_METHODS),
        ("precision", precision, PRECISIONS),
    )
    for name, value, known in named:
        if value not in known:
            fix = f"Known: {', '.join(known)}"
            raise UserError(f"unknown {name} {value!r}", where=name, fix=fix)
    if protocol == "scenic" and (seeds is not None or l2 is not None):
        name = "l2" if seeds is None else "seeds"
        does = "tries its own list of l2" if seeds is None else "takes the first images: no draw"
        fix = f"Leave {name} out, or take the protocol big_vision"
        raise UserError(f"{name} has no effect: the protocol scenic {does}", where=name, fix=fix)
    seeds = SEEDS if seeds is None else seeds
    l2 = L2 if l2 is None else l2
    for name, numbers, least in (("shots", shots, 1), ("seeds", seeds, 0)):
        wrong = [each for each in numbers if type(each) is not int or each < least]
        if wrong or not numbers:
            what = f"{name} are whole numbers of at least {least}, got {(wrong or ['none'])[0]}"
            raise UserError(what, where=name)
        if len(set(numbers)) < len(numbers):
            raise UserError(f"a number twice: {' '.join(map(str, numbers))}", where=name)
    if not (isinstance(l2, int | float) and 0 < l2 < float("inf")):
        raise UserError(f"l2 must be above 0 and finite, got {l2}", where="l2", fix="1024")
    return Settings(
        shots=tuple(shots),
        seeds=() if protocol == "scenic" else tuple(seeds),
        l2=float(l2),
        protocol=cast(Protocol, protocol),
        resize=resize,
        precision=cast(Precision, precision),
    )


Draws = dict[int, list[np.ndarray]]  # {seed: the indices of each class}; scenic's seed is 0


def permuted(train: Source, settings: Settings) -> Draws:
    """Returns for each seed the training images of each class in the order of their drawing."""
    by_class = np.argsort(train.labels, kind="stable")
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    members = np.split(by_class, np.cumsum(counts)[:-1])
    if settings.protocol == "scenic":
        return {0: members}
    randoms = {seed: np.random.default_rng(seed) for seed in settings.seeds}
    return {
        seed: [random.permutation(each) for each in members] for seed, random in randoms.items()
    }


def first_good(orders: Draws, most: int, bad: np.ndarray) -> Draws:
    """Returns the first `most` images of each class that are not bad."""
    if len(bad):
        orders = {
            seed: [each[~np.isin(each, bad)] for each in order] for seed, order in orders.items()
        }
    return {seed: [each[:most] for each in order] for seed, order in orders.items()}


def union(drawn: Draws) -> np.ndarray:
    """Returns every index that is drawn, ascending and once."""
    return np.unique(np.concatenate([each for order in drawn.values() for each in order]))
