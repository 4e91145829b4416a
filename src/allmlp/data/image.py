"""The decoder used by every command: encoded bytes -> upright 8-bit pixels; see docs/data.md.

Legend: H W pixels; an image is uint8 (H, W, channels) with 3 channels (RGB) or 1 (grey).
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from allmlp.errors import UserError
from allmlp.names import extra

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM")
# File extensions of images when reading a folder.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
HEIC = (".heic", ".heif", ".hif")  # read if the package pillow-heif is installed
HAS_HEIC = find_spec("pillow_heif") is not None
SUFFIXES += HEIC if HAS_HEIC else ()
MAX_PIXELS = 89_478_485  # 1/4 GiB of 24-bit pixels; Pillow warns above it
MAX_SIDE = 32_767  # pixels; the limit of 16-bit coordinates in image libraries
DARK = 16_383  # 16-bit samples all below this probably hold 14 bits or fewer
REDUCTIONS = (8, 4, 2)  # JPEG decoding is faster at a reduced size

# JPEG header markers: EXIF and XMP; frame headers of the two sequential codings.
_APP1, _SEQUENTIAL = 0xE1, (0xC0, 0xC1)
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"tiff:Orientation")  # found in some chunk
_BLOCK_ROWS = 32  # a multiple of every MCU height

_FIX = f"Images are {', '.join(FORMATS)} files; convert or remove this one"


class EncodedImage:
    """An encoded image with its header read but no pixels decoded.

    `where` names it in errors; `channels` is 3 for RGB, 1 for grey. `exif_orientation` rotates it
    upright by its EXIF tag (the paper's code does not; a TIFF always is rotated). `size`, (H, W),
    is that of the upright image, `mode` Pillow's mode of the file ("RGB", "CMYK", "I;16", ...) and
    `bits` 8, 12 or 16 per sample.
    """

    def __init__(
        self, data: bytes, where: object, channels: int = 3, *, exif_orientation: bool = True
    ) -> None:
        self.where, self.channels = where, channels
        self.data, self._image = data, None
        self.bits, self._zero_is_white = 8, False
        self._markers = _find_markers(data)
        if not data:
            raise UserError("the file is empty", where=where, fix=_FIX)
        self.format, self.mode, (height, width) = self._read_header()
        if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
            what = f"the image has {width}x{height} pixels; the limits are {MAX_PIXELS:,} in all"
            fix = "Make it smaller or remove it"
            raise UserError(f"{what} and {MAX_SIDE:,} a side", where=where, fix=fix)
        # Pillow itself rotates a TIFF upright and reports the rotated size; so does libheif, by the
        # container's own rotation, which the EXIF tag of a HEIC only repeats.
        wanted = exif_orientation and self.format not in ("TIFF", "HEIF")
        self._orientation = self._read_orientation() if wanted else 1
        self.size = (width, height) if self._orientation >= 5 else (height, width)

    def _read_header(self) -> tuple[str, str, tuple[int, int]]:
        if self.data[:3] == b"\xff\xd8\xff":
            try:  # 20 times faster than Pillow
                height, width, colors, _ = simplejpeg.decode_jpeg_header(self.data)
            except ValueError:
                pass  # malformed; leave it to Pillow
            else:
                if colors in ("YCbCr", "RGB", "Gray"):
                    return "JPEG", "L" if colors == "Gray" else "RGB", (int(height), int(width))
        if self.data[:2] in (b"II", b"MM"):
            self._read_tiff_samples()
        image = self._open()
        if image.mode == "F":
            raise self._no_range("floating-point")
        is_deep_png = image.format == "PNG" and self.data[24] == 16
        if is_deep_png or (image.mode.startswith("I") and self.bits == 8):
            self.bits = 16
        return str(image.format), image.mode, (image.height, image.width)

    def _read_tiff_samples(self) -> None:
        """Reads a TIFF's sample format, which Pillow's mode does not include."""
        from PIL import TiffImagePlugin as tiff  # 70 ms

        for order in (tiff.II, tiff.MM):  # Pillow decodes these but registers one byte order only
            for white in (0, 1):
                tiff.OPEN_INFO.setdefault((order, white, (1,), 1, (12,), ()), ("I;16", "I;12"))
        tiff.OPEN_INFO.setdefault((tiff.MM, 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
        try:
            is_big = self.data[2:4] in (b"\0+", b"+\0")
            file = io.BytesIO(self.data)
            tags = tiff.ImageFileDirectory_v2(file.read(16 if is_big else 8))
            file.seek(tags.next)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tags.load(file)
            kind = int(max(tags.get(tiff.SAMPLEFORMAT, (1,))))  # bytes if damaged
            bits = int(max(tags.get(tiff.BITSPERSAMPLE, (1,))))
            self._zero_is_white = tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == 0
        except Exception:  # damaged or not a TIFF; leave it to Pillow
            return
        if kind in (2, 3) or bits > 16:
            names = {2: "signed integer", 3: "floating-point"}
            raise self._no_range(names.get(kind, f"{bits}-bit"))
        self.bits = max(8, bits)

    def _no_range(self, kind: str) -> UserError:
        what = f"the image has {kind} samples, whose range is not stated"
        fix = "Scale them to unsigned 8 or 16 bits and save it again"
        return UserError(what, where=self.where, fix=fix)

    def _open(self) -> Image.Image:
        if self._image is None:
            is_heic = re.match(rb"....ftyp(hei|hev|mif1|msf1)", self.data, re.DOTALL) is not None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # our limits are stricter than Pillow's
                    self._image = Image.open(io.BytesIO(self.data), formats=_formats(is_heic))
            except Image.DecompressionBombError as error:
                what = f"the image is too large: {error}"
                raise UserError(what, where=self.where, fix=_FIX) from error
            except Exception as error:  # decoders may raise anything for damaged bytes
                what, fix = "the file is not an image", _FIX
                if is_heic and not HAS_HEIC:
                    what = "the file is a HEIC image"
                    fix = f"{extra('heic')}, or convert it: heif-convert IN OUT.jpg"
                raise UserError(what, where=self.where, fix=fix) from error
        return self._image

    def _read_orientation(self) -> int:
        if self._markers and _APP1 not in self._markers:  # segment with EXIF and XMP
            return 1
        if self.format == "PNG" and not any(name in self.data for name in _PNG_EXIF):
            return 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # A second object: Pillow decodes a PNG to find its tags, and if that fails, a
                # retry on the same object accepts the damaged pixels.
                image = Image.open(io.BytesIO(self.data), formats=FORMATS)
                value = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # damaged EXIF does not mean damaged pixels
            return 1
        return value if isinstance(value, int) and 1 <= value <= 8 else 1

    def decode(
        self, reduction: int = 1, *, fast: bool = False, rows: int | None = None
    ) -> np.ndarray:
        """Returns the pixels, uint8 (H, W, channels), contiguous.

        For training: a `reduction` of 2, 4 or 8 divides the size (sides rounded up); `fast` decodes
        a JPEG 10 % faster and slightly less exactly (TensorFlow's fast inverse DCT), and then only
        the top `rows` rows, before the reduction, are guaranteed.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = self._pixels(reduction, fast, rows)
        except Exception as error:  # decoders may raise anything for damaged bytes
            what = f"the image is damaged: {str(error) or type(error).__name__}"
            raise UserError(what, where=self.where, fix=_FIX) from error
        return turn_upright(pixels, self._orientation)

    def _pixels(self, reduction: int, fast: bool, rows: int | None) -> np.ndarray:
        if self.format == "JPEG" and self.mode in ("RGB", "L"):
            colors = "RGB" if self.channels == 3 else "GRAY"
            stored = self.size if self._orientation < 5 else self.size[::-1]
            data, (height, width), strict = self.data, stored, True
            # A file without its end marker is decoded fully: truncation is always detected.
            is_plain = any(marker in self._markers for marker in _SEQUENTIAL)
            is_plain = is_plain and data.endswith(b"\xff\xd9") and self._orientation == 1
            if fast and rows is not None and is_plain and rows + _BLOCK_ROWS < height:
                height, strict = -(-rows // _BLOCK_ROWS) * _BLOCK_ROWS, False
                place = next(self._markers[m] for m in _SEQUENTIAL if m in self._markers) + 1
                # The decoder stops at the height in the header; its rows are bit-identical.
                data = data[:place] + height.to_bytes(2, "big") + data[place + 2 :]
            wanted = (-(-height // reduction), -(-width // reduction))
            scale: dict[str, Any] = {}
            if reduction > 1:
                scale = {"min_height": wanted[0], "min_width": wanted[1], "min_factor": reduction}
            try:
                pixels = simplejpeg.decode_jpeg(
                    data, colors, fastdct=fast, fastupsample=fast, strict=strict, **scale
                )
                if pixels.shape[:2] == wanted:  # may differ for images of a few pixels
                    return pixels
            except ValueError:
                pass  # perhaps just malformed; Pillow detects truncation
        image = self._open()
        image.load()
        image = self._to_8_bits(image).convert("RGB" if self.channels == 3 else "L")
        pixels = np.asarray(image if reduction == 1 else image.reduce(reduction))
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def _to_8_bits(self, image: Image.Image) -> Image.Image:
        clear = image.info.get("transparency") if self.bits > 8 else None
        if image.mode.startswith("I"):  # 12 or 16 bits; convert() would clip at 255, not scale
            samples = np.asarray(image).astype(np.uint32)
            pixels = samples * 255 // (2**self.bits - 1)
            if self._zero_is_white:  # Pillow inverts samples of up to 8 bits only
                pixels = 255 - pixels
            if clear is not None:
                pixels[samples == clear] = 255
            return Image.fromarray(pixels.astype(np.uint8))
        if isinstance(clear, tuple):  # transparent colour of a 16-bit PNG
            # Pillow keeps the upper byte of a sample; read as little-endian, it keeps the lower.
            low = Image.open(io.BytesIO(self.data), formats=("PNG",))
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            pixels = np.array(image)
            pixels[(pixels.astype(np.uint16) << 8 | np.asarray(low) == clear).all(axis=-1)] = 255
            return Image.fromarray(pixels)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image

    def brightest(self) -> int | None:
        """Returns the largest 16-bit sample (of RGB its upper byte); None for other images."""
        if self.bits != 16 or self.mode == "CMYK":  # CMYK is ink, not light
            return None
        self.decode()
        samples = np.asarray(self._open())
        if samples.ndim == 3:
            return int(samples[..., :3].max()) << 8 | 255
        return 65_535 - int(samples.min()) if self._zero_is_white else int(samples.max())


@functools.cache
def _formats(is_heic: bool) -> tuple[str, ...]:
    if not (is_heic and HAS_HEIC):
        return FORMATS
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener(decode_threads=1)  # the loader has processes
    return (*FORMATS, "HEIF")


def _find_markers(data: bytes) -> dict[int, int]:
    """The segments of a JPEG header as {marker: offset after its length}; empty if damaged."""
    markers: dict[int, int] = {}
    position = 2 if data[:2] == b"\xff\xd8" else len(data)
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan
            return markers
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        markers.setdefault(marker, position + 4)
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return {}


def decode(
    data: bytes, where: object, channels: int = 3, *, exif_orientation: bool = True
) -> np.ndarray:
    """Returns the upright image, uint8 (H, W, channels); `where` names it in errors."""
    return EncodedImage(data, where, channels, exif_orientation=exif_orientation).decode()


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates and mirrors an image (H, W, channels) by its EXIF orientation, 1 to 8."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)  # 5: done; 6 to 8: mirrored below
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def to_pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def encoded_image(image: Any, where: str = "the image") -> bytes:
    """Encodes a PIL image or uint8 pixels, (H, W) or (H, W, 3), as PNG; bytes are unchanged."""
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    file = io.BytesIO()
    try:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
                raise ValueError(f"an array of {image.dtype} {image.shape} is not an image")
            return encode_png(image[..., 0] if image.shape[2:] == (1,) else image)
        is_plain = image.mode not in ("CMYK", "YCbCr", "LAB", "HSV")  # which a PNG cannot have
        (image if is_plain else image.convert("RGB")).save(file, "PNG", exif=image.getexif())
        return file.getvalue()
    except (OSError, TypeError, ValueError, AttributeError) as error:
        fix = "Give uint8 arrays (H, W) or (H, W, 3), PIL images, encoded bytes, paths or URLs"
        raise UserError(f"{where} cannot be used: {error}", fix=fix, code="wrong-type") from error


def encode_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
