"""Holdouts and folds: classes spread evenly, and groups of images (SOURCE#group=COLUMN) whole."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, combinations

import numpy as np

from allmlp.data.classes import natural_order
from allmlp.data.source import FOLD, GROUP, Source, subset, values_of
from allmlp.errors import UserError, plural

_TRIES = 20  # random orders of the groups


def hold_out(source: Source, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the indices (kept, held out) by whole groups, and how many groups were held out."""
    texts = values_of(source, GROUP)
    if texts is None:
        return *split_by_class(source.labels, fraction, seed), ""
    names, groups = _numbered(texts)
    is_held_out = deal(source.labels, groups, (1 - fraction, fraction), seed) == 1
    if not is_held_out.any():  # the smallest group without which every class has images
        present = source.class_counts() > 0
        for group in np.argsort(np.bincount(groups), kind="stable"):
            rest = subset(source, np.flatnonzero(groups != group), "").class_counts() > 0
            if (rest == present).all():
                is_held_out = groups == group
                break
        else:
            what = f"no group of {len(names)} can be held out: each has all images of some class"
            fix = "Choose the validation images yourself (a column split), or choose other groups"
            raise UserError(what, where=source.name, fix=fix)
    number = len(np.unique(groups[is_held_out]))
    text = f", {number:,} of {plural(len(names), 'group')}"
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out), text


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices (kept, held out): of every class `fraction`, but some on either side."""
    side = np.full(len(labels), -1)  # 1: held out
    random = np.random.default_rng(seed)
    if labels.ndim == 1:
        classes = [random.permutation(np.flatnonzero(labels == one)) for one in np.unique(labels)]
    else:  # the rarest first
        order = random.permutation(len(labels))
        rarest = np.argsort(labels.sum(axis=0), kind="stable")
        unlabelled = np.logical_not(labels.any(axis=1))
        classes = chain((order[labels[order, at]] for at in rarest), [order[unlabelled[order]]])
    for members in classes:
        if len(members) > 1:
            number = min(max(round(fraction * len(members)), 1), len(members) - 1)
            undecided = members[side[members] < 0]
            missing = max(0, number - int((side[members] == 1).sum()))
            side[undecided] = np.arange(len(undecided)) < missing
    return np.flatnonzero(side < 1), np.flatnonzero(side == 1)


def deal_folds(source: Source, number: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """Returns the fold of every image, int64 (n,), and how they were chosen, as text."""
    texts, own = values_of(source, GROUP), values_of(source, FOLD)
    names, groups = ([], np.arange(len(source))) if texts is None else _numbered(texts)
    if own is not None:
        if "" in own:
            fix = "Give every training and validation image one"
            raise UserError("the fold is empty", where=source.item_name(own.index("")), fix=fix)
        values, folds = _numbered(own)
        if len(values) != number:
            what = f"the data has {plural(len(values), 'fold')} of its own: {', '.join(values[:9])}"
            fix = f"folds: {len(values)}; or rename the column 'fold'"
            raise UserError(what, where=source.name, fix=fix)
        divided = np.flatnonzero(np.bincount(np.unique(groups * number + folds) // number) > 1)
        if len(divided):
            what = f"the data's own folds divide groups, such as {names[divided[0]]!r}"
            raise UserError(what, where=source.name, fix="Leave out group=, or the folds")
        return folds, f"the data's own folds {', '.join(values)}"
    if texts is None:
        return stratified_folds(source.labels, number, seed), "classes spread evenly"
    if len(names) < number:
        what = f"{plural(len(names), 'group')} cannot be dealt into {number} folds"
        raise UserError(what, where=source.name, fix="Fewer folds")
    text = f"{plural(len(names), 'group')} stay whole, classes spread as evenly as they allow"
    return deal(source.labels, groups, (1 / number,) * number, seed), text


def stratified_folds(labels: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Returns the fold of every image, int64 (n,): random, with each class spread evenly."""
    if labels.ndim == 2:
        return deal(labels, np.arange(len(labels)), (1 / folds,) * folds, seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    chosen = np.empty(len(labels), dtype=np.int64)
    chosen[by_class] = np.arange(len(labels)) % folds
    return chosen


def deal(
    labels: np.ndarray, groups: np.ndarray, fractions: tuple[float, ...], seed: int
) -> np.ndarray:
    """Returns the part of every image, int64 (n,): whole groups, each class near the fractions."""
    if labels.ndim == 1:
        images, classes = np.arange(len(labels)), labels
    else:  # several labels an image: a further class, of all images, keeps the parts' sizes
        images, classes = np.nonzero(np.column_stack([labels, np.ones(len(labels), dtype=bool)]))
    num_classes, num_groups = int(classes.max()) + 1, int(groups.max()) + 1
    pairs, counts = np.unique(groups[images] * num_classes + classes, return_counts=True)
    of_group, of_class = np.divmod(pairs, num_classes)
    ends = np.searchsorted(of_group, np.arange(num_groups + 1))
    totals, sizes = np.bincount(classes, minlength=num_classes), np.bincount(groups)
    present = totals > 0
    wanted = np.outer(fractions, np.maximum(totals, 1))
    is_small = np.array(fractions) < 0.5
    random, best, least = np.random.default_rng(seed), None, np.inf
    # Large groups first, in random order among equals, each to the part where the sum over parts
    # and classes of (images - wanted)^2 / wanted grows least; a part below a half takes all images
    # of a class only if they are one group. The best of several orders counts.
    for _ in range(max(1, min(_TRIES, 20_000 // num_groups))):
        order = random.permutation(num_groups)
        order = order[np.argsort(-sizes[order], kind="stable")]
        filled, part = np.zeros(wanted.shape), np.empty(num_groups, dtype=np.int64)
        for group in order.tolist():
            at = slice(ends[group], ends[group + 1])
            own, more = of_class[at], counts[at]
            cost = (more * (2 * filled[:, own] + more) / wanted[:, own]).sum(axis=1)
            cost[is_small & (filled[:, own] + more == totals[own]).any(axis=1)] += 1e18
            part[group] = chosen = np.lexsort((filled.sum(axis=1), cost))[0]
            filled[chosen, own] += more
        harm = float(((filled - wanted)[:, present] ** 2 / wanted[:, present]).sum())
        harm += 1e18 * (filled.sum(axis=1) == 0).sum()
        if harm < least:
            best, least = part, harm
    assert best is not None
    return best[groups]


def shared_groups(splits: Mapping[str, Source]) -> list[str]:
    sets = {split: set(values_of(source, GROUP) or ()) for split, source in splits.items()}
    lines: list[str] = []
    for one, other in combinations(sets, 2):
        both = sorted(sets[one] & sets[other], key=natural_order)
        if both:
            some = ", ".join(both[:5]) + ", ..." * (len(both) > 5)
            lines.append(f"{plural(len(both), 'group')} in both {one} and {other}: {some}")
    return lines


def _numbered(texts: list[str]) -> tuple[list[str], np.ndarray]:
    names = sorted(set(texts), key=natural_order)
    place = {name: at for at, name in enumerate(names)}
    return names, np.array([place[text] for text in texts])
