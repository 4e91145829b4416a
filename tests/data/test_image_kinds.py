"""The decoder on samples of other than 8 bits, transparency, AVIF, and what is no image."""

from __future__ import annotations

import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from allmlp.data.image import EncodedImage, decode
from allmlp.errors import UserError
from conftest import draw, encode
from odd_images import NAMED, REFUSED, png16, tiff


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


def test_12_bit_samples_keep_their_places():
    samples = np.arange(25) * 163
    assert (decode(tiff(samples, 12), "x", 1).ravel() == samples * 255 // 4095).all()


def test_only_the_transparent_color_of_16_bits_becomes_white():
    samples = np.zeros((2, 3, 3), np.uint16)
    samples[...] = (5_000, 6_000, 7_000)
    samples[0, 1] = (5_000, 6_000, 7_001)  # the same but for the lower byte
    for picture, clear in ((samples, (5_000, 6_000, 7_000)), (samples[..., 2], (7_000,))):
        white = (decode(png16(picture, clear), "x") == 255).all(axis=-1)
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


def test_a_file_under_a_foreign_name_says_what_it_is():
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    for data, kind, fix in (
        (heic, "HEIC", "heif-convert"),
        (b"\n<!DOCTYPE html>\n<html><title>404</title>", "HTML page", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer", "git lfs pull"),
        (b'<?xml version="1.0"?>\n<svg xmlns="...">', "SVG", "PNG"),
        (b"\0\0\0\x18ftypmp42" + bytes(99), "video", "ffmpeg"),
        (encode(draw(1), "JPEG2000"), "JPEG 2000", "PNG"),
        (encode(draw(1), "AVIF")[:200], "AVIF, but damaged", "JPEG"),
    ):
        with pytest.raises(UserError, match=kind) as caught:
            EncodedImage(data, "photo.jpg")
        assert caught.value.where == "photo.jpg"
        assert fix in str(caught.value.fix)


@pytest.mark.parametrize(("width", "height"), [(16_000, 16_000), (10_400, 10_400), (60_000, 1)])
def test_an_avif_bomb_is_refused_from_the_header(width, height):
    data = encode(draw(1), "AVIF")
    place = data.index(b"ispe") + 8
    size = struct.pack(">II", width, height)
    with pytest.raises(UserError, match="too large|the limits are|damaged"):
        EncodedImage(data[:place] + size + data[place + 8 :], "x")


def test_a_16_bit_ramp_stays_a_ramp():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    pixels = np.asarray(decode(encode(Image.fromarray(ramp)), "x"))[0, :, 0].astype(int)
    assert (pixels[0], pixels[-1]) == (0, 255)
    assert len(np.unique(pixels)) == 256
    assert (np.diff(pixels) == 1).all()
