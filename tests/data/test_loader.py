"""Order and batches: pure functions of the seed, the same bits however they are loaded."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from allmlp.data import loader, workers
from allmlp.data.image import EncodedImage
from allmlp.data.loader import Batch, evaluation_batches, training_batches
from allmlp.data.sampler import Order
from allmlp.data.source import Source, random_subset
from allmlp.data.sources import open_splits
from allmlp.data.transforms import inception_crop
from allmlp.errors import UserError
from allmlp.preprocessing import Preprocessing
from allmlp.training.dataset import Augmentation
from conftest import tiny_config

PREPROCESSING = Preprocessing(image_size=(8, 8))


def crop(image: EncodedImage, random: np.random.Generator) -> np.ndarray:
    return inception_crop(image, (8, 8), random)


def children() -> set[str]:
    """The numbers of the processes that this one has started."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def die_at_bee_3(image: EncodedImage, random: np.random.Generator) -> np.ndarray:
    if str(image.where).endswith("bee/3.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return crop(image, random)


def load(source: Source, start: int, stop: int, **options: object) -> list[Batch]:
    return list(run(source, start, stop, **options))


def run(source: Source, start: int, stop: int, **options: object) -> Iterator[Batch]:
    arguments = {"seed": 3, "batch_size": 6, "num_workers": 0, "transform": crop, **options}
    transform, names = arguments.pop("transform"), {field.name for field in fields(Order)}
    order = Order(**{name: arguments.pop(name) for name in names & arguments.keys()})
    steps = range(start, stop)
    return training_batches(source, PREPROCESSING, transform, order, steps, **arguments)


# What a killed worker was about to send stays open; nothing else may.
killed_workers = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def tidy() -> Iterator[None]:
    yield
    gc.collect()


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)


def test_every_image_once_before_any_comes_twice():
    for batch_size in (1, 6, 20, 33):
        steps = Order(seed=0, batch_size=batch_size).places(range(60), np.zeros(20))
        order = [index for step in steps for _, index in step]
        for epoch in range(len(order) // 20):
            assert sorted(order[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_balanced_places():
    """An epoch has its length; every class the same number of places, every image of it too."""
    labels = np.repeat([4, 0, 1], [190, 10, 3])  # classes 2 and 3 have no images
    order, first = Order(seed=7, batch_size=203, balanced=True), set()
    for epoch, places in enumerate(order.places(range(6), labels)):
        indices = [index for _, index, _ in places]
        assert sorted(np.bincount(labels[indices], minlength=5)) == [0, 0, 67, 68, 68]
        times = np.bincount(indices, minlength=203)
        for label in (4, 0, 1):
            assert np.ptp(times[labels == label]) <= 1
        first |= {index for index in indices if index < 190}
        assert [*order.places(range(epoch, epoch + 1), labels)] == [places]  # from any start
    assert len(first) > 150  # other images in every epoch
    other = replace(order, seed=8)
    assert next(other.places(range(1), labels)) != next(order.places(range(1), labels))


def test_balanced_batches(class_folder: Path):
    """The same bits at any number of processes and workers; what comes again is another crop."""
    for number in range(1, 6):  # one of six is left
        (class_folder / "train" / "cat" / f"{number}.png").unlink()
    source = open_splits(str(class_folder))["train"]
    alone = load(source, 0, 5, balanced=True)
    labels = torch.cat([batch.labels for batch in alone])
    assert torch.bincount(labels).tolist() == [10, 10, 10]
    cats = torch.cat([batch.images[batch.labels == 2] for batch in alone])
    assert len({image.numpy().tobytes() for image in cats}) > 5
    assert_same(alone[3:], load(source, 3, 5, balanced=True, num_workers=2))
    parts = [load(source, 0, 5, balanced=True, rank=rank, world_size=2) for rank in range(2)]
    for whole, *halves in zip(alone, *parts, strict=True):
        assert torch.equal(whole.images, torch.cat([half.images for half in halves]))


@pytest.mark.parametrize("augmented", [False, True])
def test_the_same_bits_with_and_without_workers(class_folder: Path, augmented):
    source, options = open_splits(str(class_folder))["train"], {}
    if augmented:
        config = tiny_config(str(class_folder), class_folder)
        for key, value in {"randaugment": 15.0, "erasing": 0.5, "rotate": 9.0}.items():
            config = config.with_value(f"augment.{key}", value)
        options["transform"] = Augmentation(config.augment, PREPROCESSING)
    alone = load(source, 0, 7, **options)
    assert_same(alone[5:], load(source, 5, 7, **options))  # from any start
    for number in (1, 3):
        assert_same(alone, load(source, 0, 7, num_workers=number, **options))


def test_the_same_bits_in_parts(source: Source, monkeypatch):
    """A batch of 6, or 3 and a neighbour, comes in parts of at most 2 images, of 192 bytes each."""
    options = [{}, {"world_size": 2, "rank": 1, "with_neighbour": True}]
    whole = [load(source, 0, 5, **changes) for changes in options]
    monkeypatch.setattr(loader, "LARGEST_PART", 2 * 192)
    sizes: list[int] = []
    collate = loader.collate
    monkeypatch.setattr(loader, "collate", lambda s: (sizes.append(len(s)), collate(s))[1])
    for batches, changes in zip(whole, options, strict=True):
        assert_same(batches, load(source, 0, 5, **changes))
        assert_same(batches, load(source, 0, 5, num_workers=2, **changes))
    assert sizes == [2] * 15 + [2] * 10


@pytest.mark.parametrize("free", [2**20 + 100, 2**20 + 1200, None])  # a batch takes 1,152 bytes
def test_the_same_bits_through_a_pipe(source: Source, monkeypatch, free: int | None):
    monkeypatch.setattr(workers, "shared_memory", lambda: free)
    monkeypatch.setattr(workers, "_reported", [])
    alone, piped = load(source, 0, 7), load(source, 0, 7, num_workers=2)
    assert_same(alone, piped)
    assert {batch.images.stride() for batch in alone} == {batch.images.stride() for batch in piped}
    assert all(batch.images.is_shared() == (free != 2**20 + 100) for batch in piped)
    for number, batch in enumerate(piped):
        batch.images.fill_(number)  # each has memory of its own
    assert [int(batch.images.max()) for batch in piped] == list(range(7))


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_without_shared_memory_there_are_no_workers(source: Source, monkeypatch, capsys):
    monkeypatch.setattr(workers, "shared_memory", lambda: 4096)
    monkeypatch.setattr(workers, "_reported", [])
    monkeypatch.setattr(multiprocessing.Process, "start", lambda _: pytest.fail("a process"))
    assert_same(load(source, 0, 3, num_workers=2), load(source, 0, 3))
    assert "/dev/shm is full or read-only" in capsys.readouterr().err


def test_more_processes_than_the_system_gives(source: Source, monkeypatch):
    def no_more(_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", no_more)
    with pytest.raises(UserError, match="cannot be started.*temporarily unavailable") as caught:
        load(source, 0, 3, num_workers=2)
    assert "num_workers" in str(caught.value.fix)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_batch_in_its_order(source: Source, world_size):
    alone = load(source, 2, 8)
    ranks = [load(source, 2, 8, rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert {len(part.labels) for part in parts} == {6 // world_size}
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)


@killed_workers
@pytest.mark.skipif(os.name == "nt", reason="signals as Unix has them")
@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_worker_that_dies_is_named_with_its_image(source: Source, number, tidy):
    with pytest.raises(UserError, match=r"worker process \d, at .*bee/3\.png, ended") as caught:
        load(source, 0, 8, num_workers=number, transform=die_at_bee_3)
    assert "num_workers" in str(caught.value.fix)


@killed_workers
@pytest.mark.skipif(os.name == "nt", reason="signals as Unix has them")
def test_a_worker_that_dies_while_the_model_works_is_named_at_the_next_batch(source, tidy):
    """torch's own handler would raise in the middle of the model."""
    others = children()  # of other tests, which still need them
    batches = run(source, 0, 500, num_workers=1)
    next(batches)
    for child in children() - others:
        if b"multiprocessing" not in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    for _ in range(100):
        time.sleep(0.005)  # the model works; nothing may be raised here
    with pytest.raises(UserError, match=r"worker process 0, (at|between) .*, ended"):
        list(batches)


def test_subsets_are_nested_and_seeded(source: Source):

    def places(fraction: float, seed: int) -> list[int]:
        return random_subset(source, fraction, seed).indices.tolist()

    assert [len(places(fraction, 1)) for fraction in (0.01, 0.1, 0.35, 1.0)] == [1, 2, 7, 20]
    assert set(places(0.1, 1)) < set(places(0.35, 1))
    assert places(0.35, 1) == places(0.35, 1) != places(0.35, 2)


def test_a_bad_image_is_replaced_by_the_next_and_named(class_folder: Path):
    (class_folder / "train" / "bee" / "2.png").write_bytes(b"no image")
    source = open_splits(str(class_folder))["train"]
    broken = next(i for i in range(20) if source.item_name(i).endswith("bee/2.png"))
    batches = load(source, 0, 10)  # three epochs
    assert_same(batches, load(source, 0, 10, num_workers=2))
    for batch in batches:
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (6, 3, 8, 8))
        assert batch.labels.tolist() == [source.labels[i] for i in batch.indices.tolist()]
    drawn = [index for batch in batches for index in batch.indices.tolist()]
    assert broken not in drawn
    assert len(drawn) == 60
    named = [image for batch in batches for image in batch.bad]
    assert [image.index for image in named] == [broken] * 3
    assert named[0].what == "the file is not an image"


def test_evaluation_reads_each_image_once_and_in_order(class_folder: Path):
    (class_folder / "train" / "ant" / "4.png").write_bytes(b"")
    source = open_splits(str(class_folder))["train"]
    for number in (0, 2):
        batches = list(evaluation_batches(source, PREPROCESSING, batch_size=6, num_workers=number))
        indices = [index for batch in batches for index in batch.indices.tolist()]
        assert indices == [index for index in range(20) if index != 4]
        assert [image.index for batch in batches for image in batch.bad] == [4]
        assert sum(len(batch.images) for batch in batches) == 19
