"""Duplicates: no pair is missed, copies are found, different images are not; drop lists."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allmlp.data import check as module
from allmlp.data.check import PAIRS, Duplicates, find_duplicates, near_pairs
from allmlp.data.fingerprint import exclude, exclude_list, read_exclude_list
from allmlp.data.source import EncodedImages, PackedBytes, Source, labelled
from allmlp.errors import UserError
from conftest import encode


@functools.cache
def photo(seed: int) -> Image.Image:
    """Something like a photograph: coarse and fine structure, 90 x 70 pixels."""
    random, layers = np.random.default_rng(seed), np.zeros((70, 90, 3))
    for cells, strength in ((3, 60), (7, 35), (15, 15)):
        coarse = random.normal(size=(cells, cells, 3)) * strength
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel].astype(np.float32))
            layers[..., channel] += np.asarray(layer.resize((90, 70), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(layers + 128, 0, 255).astype(np.uint8))


def source(files: list[bytes], name: str = "train", labels: list[int] | None = None) -> Source:
    own = np.array(labels or [0] * len(files), dtype=np.int64)
    return labelled(EncodedImages(PackedBytes(files), f"made/{name}"), name, ["ant", "bee"], own)


def pairs(found: Duplicates) -> set[tuple[str, int, str, int, str]]:
    return {(*one, *other, kind) for one, other, kind, _ in found.most_different_first()}


def brute_force(hashes: np.ndarray, distance: int) -> list[list[int]]:
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    return np.argwhere(np.triu(bits <= distance, 1)).tolist()


def clustered(seed: int, number: int, centres: int, flips: int) -> np.ndarray:
    """Hashes that differ from one of a few centres in up to `flips` bits."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 2**64, centres, dtype=np.uint64)
    hashes = drawn[random.integers(0, centres, number)]
    for _ in range(flips):
        bit = np.uint64(1) << random.integers(0, 64, number).astype(np.uint64)
        hashes = np.where(random.random(number) < 0.6, hashes ^ bit, hashes)
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 7, 10])
def test_pairs_are_those_of_brute_force(distance: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK", 70)
    for hashes in (clustered(1, 400, 12, 9), clustered(2, 300, 300, 0), clustered(3, 300, 2, 3)):
        first, second, reached = near_pairs(hashes, distance, 10**9)
        assert np.stack([first, second], axis=1).tolist() == brute_force(hashes, distance)
        assert reached == distance
    assert len(near_pairs(np.empty(0, np.uint64), distance, 9)[0]) == 0


def test_a_flood_lowers_the_distance_and_stays_complete():
    hashes = clustered(4, 1500, 3, 8)
    whole = len(brute_force(hashes, 10))
    first, second, reached = near_pairs(hashes, 10, whole // 4)
    assert 0 < reached < 10
    assert np.stack([first, second], axis=1).tolist() == brute_force(hashes, reached)
    assert len(first) <= whole // 4 < len(brute_force(hashes, reached + 1))
    first, _, reached = near_pairs(np.zeros(5000, dtype=np.uint64), 10, 20_000)
    assert (len(first), reached) == (0, -1)


CHANGES = {
    "jpeg": lambda image: encode(image, "JPEG", quality=60),
    "half": lambda image: encode(image.resize((45, 35))),
    "larger": lambda image: encode(image.resize((135, 105)), "JPEG", quality=90),
    "lighter": lambda image: encode(image.point(lambda level: round(1.1 * level))),
    "cut": lambda image: encode(image.crop((1, 1, 89, 69))),
    "alpha": lambda image: encode(image.convert("RGBA"), "WEBP", quality=80),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_copies_are_found_and_other_pictures_are_not(name: str):
    images, change = [photo(seed) for seed in range(24)], CHANGES[name]
    train = source([encode(image) for image in images])
    test = source([change(images[3]), encode(photo(100)), change(images[20])], "test")
    found = find_duplicates({"train": train, "test": test}, num_workers=0)
    assert pairs(found) == {("train", 3, "test", 0, "near"), ("train", 20, "test", 2, "near")}
    assert all(0 < pair["difference"] < 0.07 for pair in found.pairs)


def test_exact_copies_are_told_apart_from_near_ones_and_labels_are_compared():
    file = encode(photo(1))
    same_pixels = encode(photo(1), compress_level=1)
    assert same_pixels != file
    files = [file, encode(photo(2)), file, same_pixels, encode(photo(1), "JPEG", quality=90)]
    found = find_duplicates({"train": source(files, labels=[0, 0, 1, 0, 0])}, num_workers=0)
    assert pairs(found) == {
        ("train", 0, "train", 2, "same file"),
        ("train", 0, "train", 3, "same pixels"),
        ("train", 0, "train", 4, "near"),
    }
    assert found.other_label().tolist() == [True, False, False]
    gone = [(at, why.partition(" train")[0]) for _, at, why in found.to_exclude()]
    assert gone == [(2, "same file as"), (3, "same pixels as"), (4, "near duplicate of")]
    exact = find_duplicates({"train": source(files)}, near=False, num_workers=0)
    assert len(exact) == 2


@pytest.fixture
def found() -> Duplicates:
    """In three splits of images, where a tenth is a JPEG copy."""

    def files(*seeds: float) -> list[bytes]:
        kinds = ({"kind": "JPEG", "quality": 90} if seed % 1 else {} for seed in seeds)
        return [encode(photo(int(seed)), **kind) for seed, kind in zip(seeds, kinds, strict=True)]

    splits = {
        "train": source(files(1, 2, 3, 4, 4.1, 4)),
        "validation": source(files(2.1, 5, 6), "validation"),
        "test": source(files(1, 6.1, 9, 9), "test"),
    }
    return find_duplicates(splits, num_workers=0)


@pytest.fixture
def path(found: Duplicates, tmp_path: Path) -> Path:
    """The list of what to exclude of them."""
    path = tmp_path / "list.txt"
    path.write_text(exclude_list(found.splits, found.to_exclude(), "made"))
    return path


def test_the_list_keeps_test_and_the_first(found: Duplicates, path: Path):
    assert found.counts()["test"]["train"] == 1
    assert found.counts()["train"]["train"] == 3
    excluded = read_exclude_list(path)
    indices = {split: list(images) for split, images in excluded.images.items()}
    assert indices == {"train": [0, 1, 4, 5], "validation": [2], "test": [3]}
    why = [line.split("\t")[-1] for line in path.read_text().splitlines() if line[0] != "#"]
    assert why[0] == "same file as test[0] made/test[0]"
    assert why[1] == "near duplicate of validation[0] made/validation[0]"
    assert why[3] == "same file as train[3] made/train[3]"
    kept = {name: exclude(data, excluded, name) for name, data in found.splits.items()}
    assert [len(data) for data in kept.values()] == [2, 2, 3]
    assert kept["train"].item_name(0) == "made/train[2]"
    assert len(find_duplicates(kept, num_workers=0)) == 0


def test_a_chain_keeps_what_is_no_duplicate_of_what_stays():
    """a ~ b ~ c, but not a ~ c: b goes, a and c stay."""
    data = {"train": source([encode(photo(seed)) for seed in range(3)])}
    chain = Duplicates(data, np.array([(0, 1, 2, 0.0), (1, 2, 2, 0.0)], dtype=PAIRS))
    assert [at for _, at, _ in chain.to_exclude()] == [1]


def test_a_list_is_for_its_own_data(found: Duplicates, path: Path):
    excluded, train = read_exclude_list(path), found.splits["train"]

    def named(prefix: str) -> Source:
        return replace(train, images=replace(train.images, item_prefix=prefix))

    assert len(exclude(named("elsewhere/train"), excluded, "train")) == 2  # moved
    for other, split, value in (
        (source([train.read(index) for index in range(5)]), "train", "has 5"),
        (named("made/other"), "train", "other names"),
        (train, "extra", "0 images"),
    ):
        with pytest.raises(UserError, match=value):
            exclude(other, excluded, split)


def test_a_line_may_be_deleted_but_not_damaged(found: Duplicates, path: Path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], *lines[7:]]) + "\n")
    assert len(exclude(found.splits["train"], read_exclude_list(path), "train")) == 3
    for text in ("\n".join([*lines[:6], "train\tone\tname\twhy"]), "anything\n"):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            read_exclude_list(path)
        assert error.value.where == str(path)


def test_strange_names_survive_the_file(tmp_path: Path):
    name, path = "a\tb\\c\n\udce9", tmp_path / "list.txt"
    data = source([encode(photo(1))] * 2, name)
    found = find_duplicates({"train": data}, num_workers=0)
    text = exclude_list(found.splits, found.to_exclude(), "odd\n")
    path.write_bytes(text.encode(errors="surrogateescape"))
    excluded = read_exclude_list(path)
    assert excluded.images["train"] == {1: f"{name}[1]"}
    assert len(exclude(data, excluded, "train")) == 1


def sky(top: int, seed: int) -> Image.Image:
    """An even gradient with a little noise: much alike in brightness, nothing on it."""
    ramp = np.linspace(top, top - 60, 48)[:, None, None] + np.zeros((48, 64, 3))
    noise = np.random.default_rng(seed).normal(size=ramp.shape)
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def test_flat_pictures_are_compared_for_equality_only():
    grey, red = (Image.new("RGB", (64, 48), color) for color in ((200, 200, 200), (90, 0, 0)))
    specked = grey.copy()
    specked.putpixel((5, 5), (0, 0, 0))
    images = [grey, specked, red, red, *(sky(200, seed) for seed in range(4))]
    found = find_duplicates({"train": source([encode(image) for image in images])}, num_workers=0)
    assert pairs(found) == {("train", 2, "train", 3, "same file")}
    assert found.num_plain == 8
