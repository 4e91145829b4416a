"""Encoded images of every bit depth and kind of transparency, with the pixels they stand for."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from conftest import encode

SIDE = 5  # odd: rows of 12-bit samples end within a byte
WHITE = (255, 255, 255)


def tiff(
    samples: Sequence[int] | np.ndarray,
    bits: int,
    *,
    photometric: int = 1,
    sample_format: int = 1,
    order: str = "<",
    channels: int = 1,
    compressed: bool = False,
) -> bytes:
    """A TIFF of one strip with 1 or 2 channels; `photometric` 0 means that 0 is white."""
    flat = np.asarray(samples).reshape(SIDE, SIDE * channels)
    if bits == 12:
        rows = ["".join(f"{value:012b}" for value in row.tolist()) for row in flat]
        rows = [row + "0" * (-len(row) % 8) for row in rows]
        data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    else:
        kind = {1: "u", 2: "i", 3: "f"}[sample_format]
        data = flat.astype(f"{order}{kind}{bits // 8}").tobytes()
    data = zlib.compress(data) if compressed else data
    shorts = {258: bits, 259: 8 if compressed else 1, 262: photometric, 277: channels}
    tags = {256: SIDE, 257: SIDE, **shorts, 273: 0, 278: SIDE, 279: len(data), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in sorted(tags.items()):
        if tag in (258, 339):  # one for each channel, of which two fit
            values = [value] * channels + [0] * (2 - channels)
            entries += struct.pack(order + "HHIHH", tag, 3, channels, *values)
        elif tag in shorts:
            entries += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
        else:
            entries += struct.pack(order + "HHII", tag, 4, 1, value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + data


def png16(samples: np.ndarray, clear: Sequence[int] | None = None) -> bytes:
    """A PNG of 16 bits a sample, (H, W) or (H, W, 2 to 4), perhaps with a transparent colour."""
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    rows = samples.astype(">u2").reshape(height, -1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    transparent = b"" if clear is None else chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    body = transparent + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


UNDO = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 2, 6, 4)), strict=True))


def arrow(orientation: int = 1) -> Image.Image:
    """An image that every turn and mirror changes, as a file of this orientation stores it."""
    pixels = np.zeros((24, 16, 3), np.uint8)
    pixels[2:8, 2:4] = (250, 10, 10)
    pixels[20:22, 6:14] = (10, 250, 10)
    upright = Image.fromarray(pixels)
    return upright.transpose(UNDO[orientation]) if orientation in UNDO else upright


def full(*values: int) -> np.ndarray:
    """Samples (SIDE, SIDE) or (SIDE, SIDE, channels), the same everywhere."""
    return np.broadcast_to(np.array(values), (SIDE, SIDE, len(values))).squeeze()


def _grey(value: int) -> tuple[int, int, int]:
    return (value, value, value)


def _named() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Files by name, each with the RGB of its upper left pixel, which is that of most of them."""
    ramp = np.full(SIDE * SIDE, 60_000)
    bright, dark = _grey(60_000 // 257), _grey(5_000 // 257)
    files: dict[str, tuple[bytes, tuple[int, int, int]]] = {}
    for order, name in (("<", "le"), (">", "be")):
        for zipped in (False, True):
            key = f"tiff16_{name}{'_zip' * zipped}"
            files[key] = tiff(ramp, 16, order=order, compressed=zipped), bright
            inverted = tiff(ramp, 16, photometric=0, order=order, compressed=zipped)
            files[f"{key}_min_is_white"] = inverted, _grey(255 - 60_000 // 257)
        twelve = full(3_750)
        files[f"tiff12_{name}"] = tiff(twelve, 12, order=order), _grey(3_750 * 255 // 4_095)
        inverted = tiff(twelve, 12, photometric=0, order=order)
        files[f"tiff12_{name}_min_is_white"] = inverted, _grey(255 - 3_750 * 255 // 4_095)
    files["png16_grey"] = png16(full(5_000)), dark
    files["png16_grey_clear"] = png16(full(5_000), (5_000,)), WHITE
    # Of 16 bits only the upper 8 are alike: not the transparent colour.
    files["png16_grey_nearly_clear"] = png16(full(5_001), (5_000,)), dark
    files["png16_rgb"] = png16(full(56_000, 7_000, 7_000)), (218, 27, 27)
    files["png16_rgb_clear"] = png16(full(5_000, 6_000, 7_000), (5_000, 6_000, 7_000)), WHITE
    nearly = png16(full(5_000, 6_000, 7_001), (5_000, 6_000, 7_000))
    files["png16_rgb_nearly_clear"] = nearly, (19, 23, 27)
    files["png16_rgba_clear"] = png16(full(5_000, 6_000, 7_000, 0)), WHITE
    files["png16_la_clear"] = png16(full(5_000, 0)), WHITE
    files["pgm12"] = b"P5 5 5 4095\n" + full(3_750).astype(">u2").tobytes(), _grey(233)
    clear = Image.new("RGBA", (SIDE, SIDE), (10, 200, 10, 0))
    for kind in ("PNG", "WEBP", "GIF", "TIFF", "AVIF"):
        files[f"{kind.lower()}_clear"] = encode(clear, kind), WHITE
    half = Image.new("RGBA", (SIDE, SIDE), (0, 200, 0, 128))
    files["png_half_clear"] = encode(half), (127, 227, 127)
    files["png_la_clear"] = encode(Image.new("LA", (SIDE, SIDE), (20, 0))), WHITE
    palette = Image.new("P", (SIDE, SIDE))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    files["png_palette"] = encode(palette), (10, 20, 30)
    files["png_palette_clear"] = encode(palette, transparency=0), WHITE
    files["png_grey_clear"] = encode(Image.new("L", (SIDE, SIDE), 20), transparency=20), WHITE
    files["png_1"] = encode(Image.new("1", (SIDE, SIDE), 1)), WHITE
    red = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    files["tiff_cmyk"] = encode(red, "TIFF"), (255, 0, 0)
    return files


NAMED = _named()
# What our decoder reads, but Pillow alone does not open.
NOT_BY_PILLOW = [
    *(f"tiff16_be{zipped}_min_is_white" for zipped in ("", "_zip")),
    *("tiff12_be", "tiff12_be_min_is_white", "tiff12_le_min_is_white"),
]
# Samples whose range nobody knows; what the message must say of them.
REFUSED = {
    "uint32": (tiff(full(4_000_000_000), 32), "32-bit"),
    "uint32_be": (tiff(full(4_000_000_000), 32, order=">"), "32-bit"),
    "int32": (tiff(full(-5), 32, sample_format=2), "signed"),
    "int16": (tiff(full(-5), 16, sample_format=2), "signed"),
    "int16_be": (tiff(full(-5), 16, sample_format=2, order=">"), "signed"),
    "int8": (tiff(full(-5), 8, sample_format=2), "signed"),
    "float32": (tiff(full(1), 32, sample_format=3), "floating-point"),
    "float64": (tiff(full(1), 64, sample_format=3), "floating-point"),
    "grey_alpha16": (tiff(full(9, 9), 16, channels=2), "not an image"),
    "pfm": (b"Pf\n5 5\n-1.0\n" + full(1).astype("<f4").tobytes(), "floating-point"),
}
