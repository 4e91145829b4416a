"""Duplicates: no pair is missed, copies are found, different pictures are not; drop lists."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from allmlp.data import duplicates as module
from allmlp.data.drop_list import (
    drop_list,
    fingerprint,
    read_drop_list,
    without,
    write_drop_list,
)
from allmlp.data.duplicates import Duplicates, find_duplicates
from allmlp.data.hamming import find_near_pairs
from allmlp.data.items import EncodedImages, PackedBytes, Source
from allmlp.data.scan import perceptual_hash, scan
from allmlp.errors import UserError
from conftest import draw, encode


def photo(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """Something like a photograph: coarse and fine structure, width x height."""
    random = np.random.default_rng(seed)
    layers = np.zeros((size[1], size[0], 3))
    for cells, strength in ((3, 60), (7, 35), (15, 15)):
        coarse = random.normal(size=(cells, cells, 3)) * strength
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel].astype(np.float32))
            layers[..., channel] += np.asarray(layer.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(layers + 128, 0, 255).astype(np.uint8))


def source(
    files: list[bytes], name: str = "train", labels: list[int] | None = None
) -> EncodedImages:
    own = np.array(labels or [0] * len(files), dtype=np.int64)
    return EncodedImages(name, ["ant", "bee"], own, PackedBytes(files), f"made/{name}")


def pairs(found: Duplicates) -> set[tuple[str, int, str, int, str]]:
    every = [found.pair(number) for number in range(len(found))]
    return {(*each.first, *each.second, each.kind) for each in every}


def brute_force(hashes: np.ndarray, distance: int) -> list[tuple[int, int]]:
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    return list(zip(*(at.tolist() for at in np.nonzero(np.triu(bits <= distance, 1))), strict=True))


def clustered(seed: int, number: int, centres: int, flips: int) -> np.ndarray:
    """Hashes that differ from one of a few centres in up to `flips` bits."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, centres, dtype=np.uint64)[
        random.integers(0, centres, number)
    ]
    for _ in range(flips):
        bit = np.uint64(1) << random.integers(0, 64, number).astype(np.uint64)
        hashes = np.where(random.random(number) < 0.6, hashes ^ bit, hashes)
    return hashes


@pytest.mark.parametrize("num_bands", [3, 4])
@pytest.mark.parametrize("distance", [0, 1, 2, 3, 7, 10, 12])
def test_pairs_are_those_of_brute_force(distance: int, num_bands: int):
    for hashes in (clustered(1, 400, 12, 9), clustered(2, 300, 300, 0), clustered(3, 300, 2, 3)):
        found = find_near_pairs(hashes, distance, 10**9, num_bands)
        got = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
        assert got == brute_force(hashes, distance)
        assert (found.distance, found.left_out) == (distance, 0)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 64))
@settings(max_examples=60, deadline=None)
def test_pairs_of_any_hashes(values: list[int], distance: int):
    hashes = np.array([*values, *(value ^ 0b1011 << 40 for value in values)], dtype=np.uint64)
    distance = min(distance, 14)
    found = find_near_pairs(hashes, distance, 10**9)
    expected = brute_force(hashes, distance)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected


def test_a_flood_lowers_the_distance_and_stays_complete():
    hashes = clustered(4, 1500, 3, 8)
    whole = len(brute_force(hashes, 10))
    found = find_near_pairs(hashes, 10, whole // 4)
    assert 0 < found.distance < 10
    got = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert got == brute_force(hashes, found.distance)
    assert len(got) <= whole // 4 < len(brute_force(hashes, found.distance + 1))


def test_a_flood_of_equal_hashes_is_linear_and_told():
    hashes = np.zeros(5000, dtype=np.uint64)
    found = find_near_pairs(hashes, 10, 20_000)
    assert found.distance == 0
    assert len(found.first) <= 20_000
    assert len(found.first) + found.left_out == 5000 * 4999 // 2
    assert set(found.first.tolist()) | set(found.second.tolist()) == set(range(5000))


def change(name: str, image: Image.Image) -> bytes:
    width, height = image.size
    if name == "jpeg":
        return encode(image, "JPEG", quality=60)
    if name == "half":
        return encode(image.resize((width // 2, height // 2)))
    if name == "larger":
        return encode(image.resize((width * 3 // 2, height * 3 // 2)), "JPEG", quality=90)
    if name == "lighter":
        return encode(image.point([min(255, round(1.1 * level)) for level in range(256)] * 3))
    if name == "cut":
        return encode(image.crop((1, 1, width - 1, height - 1)))
    if name == "alpha":
        return encode(image.convert("RGBA"), "WEBP", quality=80)
    return encode(image.convert("L"))


CHANGES = ["jpeg", "half", "larger", "lighter", "cut", "alpha"]


@pytest.mark.parametrize("name", CHANGES)
def test_changed_copies_are_found_and_other_pictures_are_not(name: str):
    images = [photo(seed) for seed in range(24)]
    train = source([encode(image) for image in images])
    test = source([change(name, images[3]), encode(photo(100)), change(name, images[20])], "test")
    found = find_duplicates({"train": train, "test": test}, num_workers=0)
    assert pairs(found) == {("train", 3, "test", 0, "near"), ("train", 20, "test", 2, "near")}
    assert np.all((found.difference > 0) & (found.difference < 0.07))


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
    assert found.groups() == [[0, 2, 3, 4]]
    assert found.partners[4] == {"train": [0, 2, 3, 4]}
    assert (found.kind_of(0, 2), found.kind_of(2, 3)) == ("same file", "same pixels")
    exact = find_duplicates({"train": source(files)}, near=False, num_workers=0)
    assert len(exact) == 2


def flat(color: tuple[int, int, int], speck: int = 0) -> Image.Image:
    image = Image.new("RGB", (64, 48), color)
    if speck:
        image.putpixel((speck, speck), (0, 0, 0))
    return image


def sky(top: int, seed: int) -> Image.Image:
    """An even gradient with a little noise: much alike in brightness, nothing on it."""
    ramp = np.linspace(top, top - 60, 48)[:, None, None] + np.zeros((48, 64, 3))
    noise = np.random.default_rng(seed).normal(size=ramp.shape)
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def test_flat_pictures_are_compared_for_equality_only():
    images = [flat((200, 200, 200)), flat((200, 200, 200), 5), flat((90, 0, 0)), flat((90, 0, 0))]
    images += [sky(200, seed) for seed in range(4)]
    found = find_duplicates({"train": source([encode(image) for image in images])}, num_workers=0)
    assert pairs(found) == {("train", 2, "train", 3, "same file")}
    assert found.num_plain == 8


def test_an_object_on_the_same_ground_is_another_picture():
    ground = np.asarray(sky(220, 0)).copy()
    files = []
    for at, shape in ((8, (10, 30)), (30, (20, 8)), (20, (8, 8))):
        picture = ground.copy()
        picture[at : at + shape[0], at : at + shape[1]] = 30
        files.append(encode(Image.fromarray(picture)))
    assert len(find_duplicates({"train": source(files)}, num_workers=0)) == 0


def test_odd_pictures_do_no_harm():
    odd = [
        Image.new("L", (1, 1), 7),
        Image.new("RGB", (1, 300)),
        Image.new("RGB", (2000, 1), "red"),
    ]
    odd += [
        photo(1).convert("L"),
        Image.new("RGBA", (40, 40)),
        photo(1).convert("P"),
        draw(1, (8, 8)),
    ]
    files = [encode(image) for image in odd] + [b"", b"no image", encode(photo(1))[:900]]
    found = find_duplicates({"train": source(files)}, num_workers=0)
    assert [bad.index for bad in found.unreadable["train"]] == [7, 8, 9]
    assert {pair[4] for pair in pairs(found)} <= {"near"}
    assert found.num_plain == 5


def test_equal_unreadable_files_are_no_duplicates():
    assert len(find_duplicates({"train": source([b"broken", b"broken"])}, num_workers=0)) == 0


def test_one_image_alone():
    found = find_duplicates({"train": source([encode(photo(1))])}, num_workers=0)
    assert (len(found), found.groups(), found.partners) == (0, [], {})


def many() -> dict[str, Source]:
    images = [photo(seed % 60, (40, 30)) for seed in range(150)]
    ways = [("PNG", {}), ("JPEG", {"quality": 80}), ("PNG", {"compress_level": 0})]
    files = [encode(image, ways[at % 3][0], **ways[at % 3][1]) for at, image in enumerate(images)]
    files[70] = files[70][:50]
    return {"train": source(files[:100]), "test": source(files[100:], "test")}


def test_workers_change_nothing():
    progress: list[int] = []
    alone = find_duplicates(many(), num_workers=0, on_progress=progress.append)
    assert sum(progress) == 150
    assert len(alone) > 60
    for num_workers in (1, 2):
        other = find_duplicates(many(), num_workers=num_workers)
        for name in ("first", "second", "kind", "difference", "original"):
            assert np.array_equal(getattr(alone, name), getattr(other, name)), name
        assert alone.unreadable == other.unreadable


def test_few_thumbnails_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = find_duplicates(many(), num_workers=0)
    monkeypatch.setattr(module, "_MOST_THUMBNAILS", 7)
    monkeypatch.setattr(module, "_BATCH", 3)
    parts = find_duplicates(many(), num_workers=0)
    assert np.array_equal(whole.second, parts.second)
    assert np.array_equal(whole.difference, parts.difference)


def test_workers_below_zero():
    with pytest.raises(UserError, match="at least 0"):
        scan({"train": source([encode(photo(1))])}, num_workers=-1)


def test_a_killed_worker_is_one_message():
    class Deadly(EncodedImages):
        def read(self, index: int) -> bytes:
            os._exit(1)

    data = Deadly("train", ["ant"], np.zeros(3, dtype=np.int64), [b""] * 3, "made")
    with pytest.raises(UserError, match="was killed"):
        find_duplicates({"train": data}, num_workers=1)


def test_the_hash_ignores_brightness_and_size():
    image = np.asarray(photo(5))
    small = np.asarray(photo(5).resize((45, 35)))
    one = perceptual_hash(image)
    for other in (np.clip(image * 0.9, 0, 255).astype(np.uint8), small):
        assert (one ^ perceptual_hash(other)).bit_count() <= 6
    assert (one ^ perceptual_hash(np.asarray(photo(6)))).bit_count() > 15


def three_splits() -> dict[str, EncodedImages]:
    """Pictures 1 to 6; those with a tenth are JPEG copies."""

    def files(*seeds: float) -> list[bytes]:
        return [
            encode(photo(int(seed)), "JPEG", quality=90) if seed % 1 else encode(photo(int(seed)))
            for seed in seeds
        ]

    return {
        "train": source(files(1, 2, 3, 4, 4.1, 4)),
        "validation": source(files(2.1, 5, 6), "validation"),
        "test": source(files(1, 6.1, 9, 9), "test"),
    }


def test_the_drop_list_keeps_test_and_the_first(tmp_path: Path):
    splits = three_splits()
    found = find_duplicates(splits, num_workers=0)
    assert found.count_with("test", "train") == 1
    assert found.count_with("train", "train") == 3
    drops = drop_list(found, "made")
    assert [(each.split, each.index) for each in drops.dropped] == [
        *(("train", 0), ("train", 1), ("train", 4), ("train", 5)),
        *(("validation", 2), ("test", 3)),
    ]
    why = [each.why for each in drops.dropped]
    assert why[0] == "same file as test[0] made/test[0]"
    assert why[1] == "near duplicate of validation[0] made/validation[0]"
    assert why[3] == "same file as train[3] made/train[3]"
    path = tmp_path / "list.txt"
    write_drop_list(drops, path)
    read = read_drop_list(path)
    assert read.splits == drops.splits
    assert [replace(each, line=0) for each in read.dropped] == drops.dropped
    kept = {name: without(data, read, name) for name, data in splits.items()}
    assert {name: len(data) for name, data in kept.items()} == {
        "train": 2,
        "validation": 2,
        "test": 3,
    }
    assert kept["train"].item_name(0) == "made/train[2]"
    assert len(find_duplicates(kept, num_workers=0)) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["list.txt"]


def test_a_chain_keeps_what_is_no_duplicate_of_what_stays():
    """a ~ b ~ c, but not a ~ c: b goes, a and c stay."""
    data = {"train": source([encode(photo(seed)) for seed in range(3)])}
    found = find_duplicates(data, num_workers=0)
    chain = replace(
        found,
        first=np.array([0, 1]),
        second=np.array([1, 2]),
        kind=np.array([2, 2], dtype=np.uint8),
        difference=np.zeros(2, dtype=np.float32),
    )
    assert [each.index for each in drop_list(chain, "made").dropped] == [1]
    assert chain.groups() == [[0, 1, 2]]


def test_a_drop_list_is_refused_for_other_data(tmp_path: Path):
    splits = three_splits()
    path = tmp_path / "list.txt"
    write_drop_list(drop_list(find_duplicates(splits, num_workers=0), "made"), path)
    drops = read_drop_list(path)
    train = splits["train"]
    with pytest.raises(UserError, match="6 images, train has 5"):
        without(source([train.read(index) for index in range(5)]), drops, "train")
    moved = replace(train, item_prefix="elsewhere/train")
    assert len(without(moved, drops, "train")) == 2
    with pytest.raises(UserError, match=r"line 7 is 'train\[0\]', but train\[0\] is 'other\[0\]'"):
        without(replace(train, item_prefix="made/other"), drops, "train")
    shorter = replace(drops, dropped=[])
    with pytest.raises(UserError, match="other names"):
        without(replace(train, item_prefix="made/other"), shorter, "train")
    with pytest.raises(UserError, match="no extra split"):
        without(train, drops, "extra")


def test_a_line_may_be_deleted_but_not_damaged(tmp_path: Path):
    splits = three_splits()
    path = tmp_path / "list.txt"
    write_drop_list(drop_list(find_duplicates(splits, num_workers=0), "made"), path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], *lines[7:]]) + "\n")
    assert len(without(splits["train"], read_drop_list(path), "train")) == 3
    path.write_text("\n".join([*lines[:6], "train\tone\tname\twhy"]))
    with pytest.raises(UserError, match="line 7 of the drop list is damaged"):
        read_drop_list(path)
    path.write_text("anything\n")
    with pytest.raises(UserError, match="not a drop list"):
        read_drop_list(path)
    with pytest.raises(UserError, match="cannot read"):
        read_drop_list(tmp_path / "none.txt")


def test_strange_names_survive_the_file(tmp_path: Path):
    class Strange(EncodedImages):
        def item_name(self, index: int) -> str:
            return f"a\tb\\c\n{index}\udce9"

    file = encode(photo(1))
    data = Strange("odd", ["ant"], np.zeros(2, dtype=np.int64), [file, file], "")
    path = tmp_path / "list.txt"
    write_drop_list(drop_list(find_duplicates({"train": data}, num_workers=0), "odd\n"), path)
    drops = read_drop_list(path)
    assert drops.dropped[0].name == "a\tb\\c\n1\udce9"
    assert drops.source == "odd\n"
    assert len(without(data, drops, "train")) == 1
    assert len(fingerprint(data)) == 64
