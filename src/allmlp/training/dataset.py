"""The three splits of a run, and the augmentation of training images."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, field, replace

import numpy as np

from allmlp.data.augment import padded_crop, random_erasing, warp
from allmlp.data.fingerprint import exclude, fingerprint, image_key, read_exclude_list
from allmlp.data.groups import deal_folds, hold_out, shared_groups
from allmlp.data.image import DARK, EncodedImage
from allmlp.data.randaugment import randaugment
from allmlp.data.source import BadImage, Source, array_shape, join, random_subset, subset
from allmlp.data.sources import notes_of, open_splits
from allmlp.data.transforms import flip, inception_crop, random_crop, resize_for_evaluation
from allmlp.errors import UserError, plural, some_of
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.world import World
from allmlp.training.config import (
    AugmentSettings,
    DataSettings,
    InceptionCrop,
    PaddedCrop,
    RandomCrop,
)

# Headers are checked before training; in a larger set only this many images, evenly spaced.
MOST_CHECKED = 5_000
_MOST_DECODED = 32  # images with 16 bits per sample
_FREE = 5  # this many bad images never stop a run, even in a small data set


@dataclass(frozen=True)
class Splits:
    train: Source
    validation: Source | None  # for choosing the best weights; None keeps the last
    test: Source | None  # measured once at the end
    held_out: bool  # whether validation was held out of the training images
    bad: list[BadImage]  # training images with unreadable headers
    notes: list[str] = field(default_factory=list)  # about any other changes to the data
    keys: list[str] = field(default_factory=list)  # `image_key` of up to 5,000 training images
    how: str = ""  # details of the holdout

    @functools.cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """The fingerprint of each split that there is, wherever its images are."""
        own = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: None if s is None else fingerprint(s, moved=True) for name, s in own.items()}

    def has_fingerprint(self, known: object, split: str) -> bool:
        """Whether this is the fingerprint of a split, in the words of any version."""
        source = getattr(self, split)
        if source is None:
            return False
        return known == self.fingerprints[split] or known == fingerprint(source)

    def describe(self) -> list[str]:
        names, counts = self.train.class_names, self.train.class_counts()
        few, many = int(counts.argmin()), int(counts.argmax())
        validate, test = "none to validate", f"{len(self.test):,}" if self.test else "none"
        if self.validation is not None:
            origin = "held out of the training images" if self.held_out else "the data's own"
            validate = f"{len(self.validation):,} to validate ({origin}{self.how})"
        others = "" if few == many else f" ({names[few]}) to {counts[many]:,} ({names[many]})"
        lines = [
            f"{plural(len(self.train), 'image')} to train, {validate}, "
            f"{test} to test; {plural(len(names), 'class')}",
            f"training images per class: {counts[few]:,}{others}",
        ]
        if self.train.is_multi_label:
            sums = self.train.labels.sum(axis=1)
            none = f"{(sums == 0).sum():,} images have none"
            mean = f"mean {sums.mean():.2f}; {none}"
            lines.append(f"labels per image: {sums.min()} to {sums.max()}, {mean}")
        lines += self.notes
        for split in filter(None, (self.validation, self.test)):
            absent = [names[at] for at in np.flatnonzero(split.class_counts() == 0)]
            if absent:
                lines.append(f"{split.name} has no image of {some_of(absent)}")
        if self.bad:
            some = f"{len(self.bad):,} of {plural(len(self.train), 'training image')}"
            lines.append(f"warning: {some} cannot be read and are skipped: {self.bad[0].name} ...")
        return lines


def open_training_data(
    settings: DataSettings, splits: Splits | None = None, world: World | None = None
) -> Splits:
    """Returns the splits with checked headers; one process of a machine does it for all."""
    world = World() if world is None else world
    found = world.once_per_machine(lambda: _checked(settings, splits))
    counts = world.gather(found.train.class_counts().tolist())
    other = next((rank for rank, count in enumerate(counts) if count != counts[0]), None)
    if other is not None:
        what = f"rank {other} has {sum(counts[other]):,} training images of these classes, and rank"
        what += f" 0 has {sum(counts[0]):,}, or in other classes"
        raise UserError(what, where=settings.source, fix="Give every machine the same copy")
    return found


def _checked(settings: DataSettings, splits: Splits | None) -> Splits:
    splits, keys = splits or split_data(settings), []
    bad = check_readable(splits.train, settings.max_bad, keys)
    for other in (splits.validation, splits.test):
        if other is not None:
            check_readable(other, settings.max_bad)
    return replace(splits, bad=bad, keys=keys, notes=[*splits.notes, *_dark(splits.train)])


def splits_with_train(source: str) -> dict[str, Source]:
    splits = open_splits(source)
    if "train" not in splits:
        fix = f"Known there: {', '.join(splits)}. Give a source that has both"
        raise UserError("the data has no train split", where=source, fix=fix)
    return splits


def open_folds(
    settings: DataSettings, number: int, splits: dict[str, Source] | None = None
) -> tuple[Source, np.ndarray, str]:
    """Returns training and validation images, the fold of each, int64 (n,), and a description."""
    splits = splits or _open_splits(settings)[0]
    parts = [splits[split] for split in ("train", "validation") if split in splits]
    whole = join(parts, settings.source) if len(parts) > 1 else parts[0]
    if not 2 <= number <= len(whole):
        what = f"{plural(len(whole), 'image')} cannot be dealt into {number} folds"
        raise UserError(what, where="folds", fix="folds: 5")
    return whole, *deal_folds(whole, number)


def split_data(settings: DataSettings) -> Splits:
    """Returns the splits of a run; without a validation split, images are held out of train."""
    splits, notes = _open_splits(settings)
    train, validation, how, sides = splits["train"], splits.get("validation"), "", None
    if settings.fold is not None:
        number, folds = settings.fold
        train, dealt, _ = open_folds(settings, folds, splits)
        sides = np.flatnonzero(dealt != number - 1), np.flatnonzero(dealt == number - 1)
        how = f", fold {number} of {folds}"
    elif validation is None and settings.holdout != 0.0:
        *sides, how = hold_out(train, settings.holdout or 0.1)
        if len(sides[1]) == 0:
            what = "no class has two images, so none can be held out for validation"
            raise UserError(what, where=settings.source, fix="Add images or a val/ folder")
    elif settings.holdout == 0.0:
        validation = None
    elif settings.holdout is not None:
        what = f"holdout {settings.holdout}, but the data has validation images of its own"
        raise UserError(what, where=settings.source, fix="Leave it out")
    if sides is not None:
        validation = subset(train, sides[1], f"{settings.source}:held-out")
        train = subset(train, sides[0], f"{settings.source}:train")
    if settings.fraction < 1.0:
        total = len(train)
        train = random_subset(train, settings.fraction, settings.fraction_seed)
        notes.append(f"{len(train):,} of {plural(total, 'training image')}, drawn at random")
    used = {"train": train, "validation": validation, "test": splits.get("test")}
    used = {name: source for name, source in used.items() if source is not None}
    notes += [f"warning: {line}" for line in shared_groups(used)]
    return Splits(train, validation, used.get("test"), sides is not None, [], notes, how=how)


def _open_splits(settings: DataSettings) -> tuple[dict[str, Source], list[str]]:
    """Returns the data's own splits without excluded images, and notes on them."""
    if not settings.source:
        fix = "A folder with FOLDER/train/<class>/*.jpg, or another source of data"
        raise UserError("the recipe needs data", where="data.source", fix=fix)
    splits = splits_with_train(settings.source)
    notes, names = notes_of(splits), splits["train"].class_names
    if settings.exclude is not None:
        drops, before = read_exclude_list(settings.exclude), sum(map(len, splits.values()))
        # The test split is never subsampled; the list may be of the training images alone.
        for name in splits.keys() & drops.splits.keys() - {"test"} or {"train"}:
            splits[name] = exclude(splits[name], drops, name)
        left_out = before - sum(map(len, splits.values()))
        notes.append(f"left out {plural(left_out, 'image')} by {settings.exclude}")
    if len(names) < 2:
        what = f"there is only one class, {names[0]!r}; a classifier needs two"
        raise UserError(what, where=settings.source)
    return splits, notes


def _dark(source: Source) -> list[str]:
    """A warning if 16-bit images use fewer bits and are nearly black."""
    brightest: list[int] = []
    for index in range(0, len(source), len(source) // _MOST_DECODED + 1):
        with contextlib.suppress(UserError):  # reported elsewhere
            found = EncodedImage(source.read(index), source.item_name(index)).brightest()
            brightest += [] if found is None else [found]
    if not brightest or max(brightest) > DARK:
        return []
    what = f"16-bit images whose brightest sample is {max(brightest):,} of 65,535"
    looked = f"{len(brightest)} looked at"
    return [f"{what} ({looked}): nearly black as 8 bits; mixer data check says more"]


def check_readable(source: Source, most: float, keys: list[str] | None = None) -> list[BadImage]:
    """Returns images with unreadable headers; appends the keys of all others to `keys`."""
    step = -(-len(source) // MOST_CHECKED)
    checked = source if step == 1 else subset(source, np.arange(0, len(source), step), source.name)
    bad: list[BadImage] = []
    for index in range(len(checked)):
        try:
            encoded = checked.read(index)
            if array_shape(checked) is None:
                EncodedImage(encoded, checked.item_name(index))
            if keys is not None:
                keys.append(image_key(encoded))
        except UserError as error:
            bad.append(BadImage(index, checked.item_name(index), error.what))
    check_number_bad(bad, checked, most)
    return [replace(image, index=image.index * step) for image in bad]


def check_number_bad(bad: list[BadImage], source: Source, most: float) -> None:
    """Raises UserError if more images are bad than `max_bad` of `DataSettings` allows."""
    of = len(source)
    if len(bad) <= most * of:
        return
    free = min(_FREE, (of - 1) // 2) if most else 0
    lost = subset(source, np.array([image.index for image in bad]), source.name)
    counts = source.class_counts()
    emptied = np.flatnonzero((lost.class_counts() == counts) & (counts > 0))
    if len(bad) <= free and not len(emptied):
        return
    limit = f"the limit is {most:.1%}" + (f" or {free} images" if free > most * of else "")
    if len(bad) <= free:
        limit = f"they are all images of the class {source.class_names[emptied[0]]!r}"
    named = "".join(f"\n  {image.name}: {image.what}" for image in bad[:5])
    more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
    fraction, enough = len(bad) / of, max(0.1, math.ceil(10 * len(bad) / of) / 10)
    what = f"{len(bad)} of {of:,} images cannot be decoded ({fraction:.1%}, {limit}):{named}{more}"
    raise UserError(what, fix=f"Fix or remove them, or allow more: max_bad {enough:g}")


@dataclass(frozen=True)
class Augmentation:
    settings: AugmentSettings
    preprocessing: Preprocessing

    def __call__(self, image: EncodedImage, random: np.random.Generator) -> np.ndarray:
        settings, crop = self.settings, self.settings.crop
        if isinstance(crop, InceptionCrop):
            pixels = inception_crop(image, self.preprocessing.image_size, random, crop.area)
        elif isinstance(crop, RandomCrop):
            pixels = random_crop(image.decode(), self.preprocessing, random)
        else:
            pixels = resize_for_evaluation(image.decode(), self.preprocessing)
            if isinstance(crop, PaddedCrop):
                pixels = padded_crop(pixels, random, crop.padding)
        if settings.flip:
            pixels = flip(pixels, random)
        kinds = ("rotate", "scale", "shear", "shift", "elastic")
        strengths = {kind: getattr(settings, kind) for kind in kinds}
        if any(strengths.values()):
            pixels = warp(pixels, random, **strengths)
        if settings.randaugment:
            pixels = randaugment(pixels, settings.randaugment, random, settings.randaugment_layers)
        if settings.random_erasing:
            pixels = random_erasing(pixels, random, settings.random_erasing)
        return pixels
