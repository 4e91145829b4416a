"""Images as they come: damaged, turned, in odd modes, of odd shapes, and meant to do harm."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import allmlp as am
from allmlp.data.loader import evaluation_batches, training_batches
from allmlp.data.sampler import Order
from allmlp.data.source import ImageFiles, labelled
from allmlp.errors import UserError
from allmlp.preprocessing import Preprocessing
from allmlp.training.config import AugmentSettings, NoCrop
from allmlp.training.dataset import Augmentation
from conftest import draw, encode, make_class_folder, tiny_model, tiny_run, turned
from odd_images import arrow
from runs import losses_of

DAMAGED = {
    "cut.jpg": encode(draw(1, (200, 200)), "JPEG")[:-900],
    "empty.jpg": b"",
    "page.jpg": b"<!doctype html><html><title>404 Not Found</title></html>",
    "noise.png": np.random.default_rng(0).bytes(2000),
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}


def test_bad_images_are_replaced_counted_and_listed_and_left_alone(tmp_path):
    """The same replacements on every way through the data, with and without workers."""
    data = make_class_folder(tmp_path / "data", {"a": 40, "b": 40})
    for name, content in DAMAGED.items():
        (data / "a" / name).write_bytes(content)
    (data / "a" / "folder.jpg").mkdir()
    (data / "a" / "pixel.png").write_bytes(encode(Image.new("RGB", (1, 1))))
    losses = []
    for number, workers in enumerate((0, 2)):
        changes = {"data__max_bad": 0.2, "data__num_workers": workers}
        run = tiny_run(data, tmp_path / f"run{number}", **changes).run_folder
        listed = [line.split("\t")[0] for line in (run / "bad_files.txt").read_text().splitlines()]
        assert len(listed) == len(set(listed))
        assert {Path(name).name for name in listed} == set(DAMAGED)
        losses.append(losses_of(run))
    assert losses[0] == losses[1]
    assert {name: (data / "a" / name).read_bytes() for name in DAMAGED} == DAMAGED
    with pytest.raises(UserError, match=r"of 77 images cannot be decoded[\s\S]*max_bad 0.1"):
        tiny_run(data, tmp_path / "strict", data__max_bad=0.0)
    assert not (tmp_path / "strict").exists()


def test_all_orientations_look_the_same_to_train_evaluate_and_predict(tmp_path):
    paths = [str(tmp_path / f"{orientation}.png") for orientation in range(1, 9)]
    for orientation, path in enumerate(paths, 1):
        arrow(orientation).save(path, exif=turned(orientation))
    source = labelled(ImageFiles(paths), "x", ["a", "b"], np.zeros(8, np.int64))
    preprocessing = Preprocessing(image_size=(8, 8))
    still = Augmentation(AugmentSettings(crop=NoCrop(), flip=False), preprocessing)
    for name, batches in {
        "train": training_batches(
            *(source, preprocessing, still, Order(seed=0, batch_size=8), range(1)), num_workers=0
        ),
        "evaluate": evaluation_batches(source, preprocessing, batch_size=8, num_workers=0),
    }.items():
        images = next(iter(batches)).images
        assert (images == images[:1]).all(), name
    model = tiny_model(num_classes=3)
    model.class_names, model.preprocessing = ["a", "b", "c"], preprocessing
    predictions = [prediction.classes for prediction in am.predict(model, paths)]
    assert all(classes == predictions[0] for classes in predictions)


BOMBS = """
import struct, sys, time, zlib, resource
from allmlp.data.image import MAX_SIDE, decode
from allmlp.errors import UserError

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

def png(width, height, extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\\x89PNG\\r\\n\\x1a\\n" + header + extra + pixels + chunk(b"IEND", b"")

pixels = chunk(b"IDAT", zlib.compress(bytes(30_000_000), 9))
text = chunk(b"zTXt", b"Comment\\0\\0" + zlib.compress(bytes(150_000_000), 1))
files = {
    "256 million pixels": png(16_000, 16_000),
    "108 million pixels": png(10_400, 10_400),
    "90 billion pixels": png(300_000, 300_000),
    "a line": png(65_500, 1),
    "a column": png(1, MAX_SIDE + 1),
    "text": png(16_000, 16_000, text),
}
decode_error = lambda: decode(files["a line"][:40], "warm")
try: decode_error()
except UserError: pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in files.items():
    started = time.process_time()
    try:
        decode(data, name)
    except UserError as error:
        assert error.where == name
    else:
        sys.exit(f"{name} was decoded")
    assert time.process_time() - started < 1.0, name
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MiB")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="measures memory as Unix does")
def test_bombs_cost_nothing():
    """Refused from the header: decoding would take hundreds of megabytes."""
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, check=True)
    grown = int(done.stdout.rsplit("grown by ", 1)[1].split()[0])
    assert grown < 100, done.stdout
