"""Groups of images that belong together, such as the photos of one patient: no group is ever on two
sides of a holdout or in two folds. The column is chosen by SOURCE#group=COLUMN."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from allmlp.data.classes import natural_order
from allmlp.data.source import Source, split_by_class, stratified_folds, subset, values_of
from allmlp.data.source_spec import FOLD, GROUP
from allmlp.errors import UserError, plural

_TRIES = 20  # random orders of the groups


def column_of(source: Source, role: str) -> list[str] | None:
    """Returns every image's group or fold as text; None if the data has no such column."""
    values = values_of(source, role)
    if values is None:
        return None
    texts = ["" if value is None else str(value).strip() for value in values]
    if "" in texts:
        what, where = f"the {role} of the image is empty", source.item_name(texts.index(""))
        raise UserError(what, where=where, fix="Give every image one, or choose another column")
    return texts


def numbered(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Returns the distinct texts in natural order, and every image's index into them."""
    names, codes = np.unique(np.array(texts, dtype=object), return_inverse=True)
    order = sorted(range(len(names)), key=lambda at: natural_order(names[at]))
    return [names[at] for at in order], np.argsort(order)[codes]


def hold_out(source: Source, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the indices (kept, held out), and how many groups were held out, as text.

    Without groups as `split_by_class`; otherwise whole groups, so that every class is as near to
    `fraction` as they allow and keeps training images.
    """
    texts = column_of(source, GROUP)
    if texts is None:
        return *split_by_class(source.labels, fraction, seed), ""
    names, groups = numbered(texts)
    is_held_out = deal(source.labels, groups, (1 - fraction, fraction), seed) == 1
    present = source.class_counts() > 0
    for group in np.argsort(np.bincount(groups), kind="stable"):  # the smallest that can be
        rest = subset(source, np.flatnonzero(groups != group), source.name).class_counts() > 0
        if not is_held_out.any() and (rest == present).all():
            is_held_out = groups == group
    if not is_held_out.any():
        what = f"no group of {len(names)} can be held out: each has all images of some class"
        fix = "Choose the validation images yourself (a column split), or choose other groups"
        raise UserError(what, where=source.name, fix=fix)
    number = len(np.unique(groups[is_held_out]))
    text = f", {number:,} of {plural(len(names), 'group')}"
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out), text


def deal_folds(source: Source, number: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """Returns the fold of every image, int64 (n,) from 0, and how they were chosen, as text.

    The data's own folds if it has a column of them; otherwise the classes are spread evenly, whole
    groups at a time.
    """
    texts, own, even = column_of(source, GROUP), column_of(source, FOLD), "classes spread evenly"
    names, groups = numbered(texts) if texts is not None else ([], None)
    if own is not None:
        values, folds = numbered(own)
        if len(values) != number:
            what = f"the data has {plural(len(values), 'fold')} of its own: {', '.join(values[:9])}"
            fix = f"folds: {len(values)}; or rename the column 'fold'"
            raise UserError(what, where=source.name, fix=fix)
        if groups is not None:
            pairs = np.unique(groups * number + folds) // number
            twice = np.flatnonzero(np.bincount(pairs) > 1)
            if len(twice):
                what = f"the data's own folds divide groups, such as {names[twice[0]]!r}"
                raise UserError(what, where=source.name, fix="Leave out group=, or the folds")
        return folds, f"the data's own folds {', '.join(values)}"
    if groups is not None:
        if len(names) < number:
            what = f"{plural(len(names), 'group')} cannot be dealt into {number} folds"
            raise UserError(what, where=source.name, fix="Fewer folds")
        text = f"{plural(len(names), 'group')} stay whole, classes spread as evenly as they allow"
        return deal(source.labels, groups, (1 / number,) * number, seed), text
    if source.is_multi_label:
        return deal(source.labels, np.arange(len(source)), (1 / number,) * number, seed), even
    return stratified_folds(source.labels, number, seed), even


def deal(
    labels: np.ndarray, groups: np.ndarray, fractions: tuple[float, ...], seed: int
) -> np.ndarray:
    """Returns the part of every image, int64 (n,): whole groups, each class near the fractions.

    Large groups first, in random order among equals: each to the part where it does least harm to
    the sum over parts and classes of (images - wanted)^2 / wanted. The best of several orders. No
    part below a half takes all images of a class, unless they are one group.
    """
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
    """Returns a line for every two splits that share groups."""
    named = {split: column_of(source, GROUP) for split, source in splits.items()}
    sets = {split: set(names) for split, names in named.items() if names is not None}
    lines: list[str] = []
    for one, other in combinations(sets, 2):
        both = sorted(sets[one] & sets[other], key=natural_order)
        if both:
            some = ", ".join(both[:5]) + ", ..." * (len(both) > 5)
            lines.append(f"{plural(len(both), 'group')} in both {one} and {other}: {some}")
    return lines
