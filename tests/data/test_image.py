"""The decoder: formats, modes, orientation, limits, and any bytes at all."""

import contextlib
import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from allmlp.data.image import EncodedImage, decode, turn_upright
from allmlp.data.sources.folders import scan_images
from allmlp.errors import UserError
from conftest import draw, encode, turned
from odd_images import NAMED, REFUSED, arrow, png16

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize(
    "kind", ["PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", "WEBP", "JPEG", "AVIF", "MPO"]
)
def test_every_format(kind):
    image = draw(1)
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(encode(image, kind, **options), "x")
    assert (decoded.dtype, decoded.shape) == (np.uint8, (30, 40, 3))
    assert EncodedImage(encode(image, kind, **options), "x").size == (30, 40)
    exact = kind in ("PNG", "BMP", "DIB", "TIFF", "PPM", "WEBP")
    difference = np.abs(np.asarray(decoded, int) - np.asarray(image, int)).max()
    assert difference == 0 if exact else difference < 60


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_all_eight_orientations_give_one_picture(kind):
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    if kind in ("JPEG", "AVIF"):
        options = {"quality": 100, "subsampling": 0 if kind == "JPEG" else "4:4:4"}
    upright = np.asarray(decode(encode(arrow(), kind, **options), "x"), int)
    for orientation in range(1, 9):
        data = encode(arrow(orientation), kind, exif=turned(orientation), **options)
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (16, 24)
        image = EncodedImage(data, "x")
        decoded = image.decode().astype(int)
        assert image.size == decoded.shape[:2] == upright.shape[:2]
        if kind in ("JPEG", "PNG"):  # the paper's protocol
            stored = EncodedImage(data, "x", exif_orientation=False)
            assert stored.size == stored.decode().shape[:2] == arrow(orientation).size[::-1]
        limit = 40 if kind in ("JPEG", "AVIF") else 0
        assert np.abs(decoded - upright).max() <= limit, orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_picture_is_the_picture_made_smaller(orientation, reduction):
    """JPEG's own way, Pillow's for an untidy file, and an area mean of the whole agree."""
    y, x = np.mgrid[0:152, 0:208]
    smooth = np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)
    data = encode(Image.fromarray(smooth), "JPEG", quality=95, exif=turned(orientation))
    for file in (data, data[:-2] + b"abc" + data[-2:]):
        image = EncodedImage(file, "x")
        whole, small = image.decode().astype(int), image.decode(reduction, fast=True).astype(int)
        rows, columns = (side // reduction for side in image.size)
        assert small.shape == (rows, columns, 3)
        mean = whole.reshape(rows, reduction, columns, reduction, 3).mean(axis=(1, 3))
        assert np.abs(small - mean).mean() < 3


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("size", [(210, 301), (96, 128)])
def test_stopping_early_gives_the_same_bits(options, size):
    for drawn in (draw(4, size), draw(4, size).convert("L")):
        data = encode(drawn, "JPEG", **options)
        image = EncodedImage(data, "x", 3 if drawn.mode == "RGB" else 1)
        for reduction in (1, 2, 4, 8):
            whole = image.decode(reduction, fast=True)
            for rows in (1, 16, 33, 64, size[1]):
                part = image.decode(reduction, fast=True, rows=rows)
                needed = -(-rows // reduction)
                assert len(part) < len(whole) or rows + 64 > size[1]
                assert (part[:needed] == whole[:needed]).all()


def test_a_file_cut_short_is_found_even_where_its_end_is_not_needed():
    data = encode(draw(4, (400, 400)), "JPEG")
    image = EncodedImage(data[: len(data) * 3 // 4], "x")
    with pytest.raises(UserError, match="damaged"):
        image.decode(fast=True, rows=40)
    progressive = encode(draw(4, (200, 300)), "JPEG", progressive=True)
    assert EncodedImage(progressive, "x").decode(fast=True, rows=10).shape == (300, 200, 3)


def test_a_damaged_png_is_damaged_whoever_looks_at_its_tags_first():
    """Pillow decodes a PNG to find its EXIF; a failure there must not pass for pixels."""
    data = encode(draw(1, (64, 64)))
    place = data.index(b"IDAT") + 4
    refused = 0
    for at in range(place + 20, place + 2000, 40):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        accepted = []
        for orientation in (True, False):
            try:
                decode(bytes(damaged), "x", exif_orientation=orientation)
                accepted.append(True)
            except UserError:
                accepted.append(False)
        assert accepted[0] == accepted[1]
        refused += not accepted[0]
    assert refused > 20


@pytest.mark.parametrize("size", [(100, 1), (100, 7), (7, 100), (5, 5), (17, 9), (101, 77)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_sides_are_rounded_up(kind, size):
    """Also of a JPEG of a few pixels, which its decoder gives at any size."""
    image = EncodedImage(encode(draw(1, size), kind), "x")
    for reduction in (1, 2, 4, 8):
        for fast in (False, True):
            expected = tuple(-(-side // reduction) for side in image.size)
            assert image.decode(reduction, fast=fast).shape[:2] == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html>\n<html><title>404</title>", "not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC|not an image"),
        (encode(draw(1), "JPEG")[:300], "damaged|not an image"),
        *((encode(draw(1), kind)[:-300], "damaged|not") for kind in ("PNG", "GIF", "AVIF", "MPO")),
        (encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "range is not stated"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data, message):
    with pytest.raises(UserError, match=message) as caught:
        decode(data, "album/photo.jpg")
    assert "where: album/photo.jpg" in str(caught.value)
    assert caught.value.fix


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_give_an_image_or_a_user_error(data):
    marks = [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"II*\0", b"P6"]
    for prefix in (*marks, b"\0\0\0\x20ftypavif\0\0\0\0avifmif1"):
        with contextlib.suppress(UserError):
            assert decode(prefix + data, "x").shape[2] == 3


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_give_an_image_or_a_user_error(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF"]))
    file = bytearray(encode(draw(3, (9, 7)), kind))
    # The directory stands at the end of Pillow's TIFFs; wrong types there raise anything.
    start = int.from_bytes(file[4:8], "little") if kind == "TIFF" else 0
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(start, len(file) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        assert decode(bytes(file[: data.draw(st.integers(1, len(file)))]), "x").shape[2] == 3


# Samples of more than 8 bits, transparency, animations, and what is no image


@pytest.mark.parametrize("name", NAMED)
def test_every_depth_and_kind_of_transparency(name):
    data, color = NAMED[name]
    pixels = decode(data, "x").astype(int)
    assert pixels.shape == (5, 5, 3)
    assert (pixels == color).all()
    (grey,) = np.asarray(Image.new("RGB", (1, 1), color).convert("L")).ravel().tolist()
    assert np.abs(decode(data, "x", 1).astype(int) - grey).max() <= 1
    assert (EncodedImage(data, "x").decode(2, fast=True) == pixels[:3, :3]).all()


@pytest.mark.parametrize("name", REFUSED)
def test_samples_without_a_stated_range_are_refused_from_the_header(name):
    data, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        EncodedImage(data, "x.tif")
    assert caught.value.fix


def test_only_the_transparent_color_of_16_bits_becomes_white():
    samples = np.zeros((2, 3, 3), np.uint16)
    samples[...] = (5_000, 6_000, 7_000)
    samples[0, 1] = (5_000, 6_000, 7_001)  # the same but for the lower byte
    for image, clear in ((samples, (5_000, 6_000, 7_000)), (samples[..., 2], (7_000,))):
        white = (decode(png16(image, clear), "x") == 255).all(axis=-1)
        assert white.tolist() == [[True, False, True], [True, True, True]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "MPO", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    data = encode(first, kind, save_all=True, append_images=[second])
    assert np.abs(decode(data, "x")[0, 0].astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("bits", [10, 12])
def test_an_avif_of_more_than_8_bits_is_scaled(bits):
    samples = np.full((8, 8, 3), 60_000 >> (16 - bits), np.uint16)
    try:
        _, data = cv2.imencode(".avif", samples, [cv2.IMWRITE_AVIF_DEPTH, bits])
    except cv2.error:
        pytest.skip("this OpenCV does not write AVIF")
    assert np.abs(decode(data.tobytes(), "x").astype(int) - 233).max() <= 1


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_heic(orientation: int, tmp_path: Path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install 'allmlp[heic]'")
    pillow_heif.register_heif_opener()
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48] = 255, 0, 0  # red in the upper left
    exif = turned(orientation).tobytes()
    data = encode(Image.fromarray(pixels), "HEIF", quality=-1, exif=exif)
    upright = turn_upright(pixels, orientation)
    for honours in (True, False):  # the container turns it, once
        image = EncodedImage(data, "x.heic", exif_orientation=honours)
        assert (image.format, image.size) == ("HEIF", upright.shape[:2])
        assert np.abs(image.decode().astype(int) - upright).max() <= 12
    assert decode(data, "x.heic", 1).shape == (*upright.shape[:2], 1)
    (tmp_path / "x.heic").write_bytes(data)
    assert [*scan_images(str(tmp_path))] == ["x.heic"]
    with pytest.raises(UserError, match="damaged"):
        decode(data[: len(data) // 2], "x.heic")
