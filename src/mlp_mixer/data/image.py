"""The only decoder: encoded bytes -> an upright 8-bit RGB or grey picture, for every verb.

The header is read first: only the formats of `FORMATS` are opened and nothing larger than
`MAX_PIXELS` is decoded. EXIF rotation is applied, transparency is blended on white, 16-bit samples
are scaled (not cut off), and of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from mlp_mixer.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Files with these endings are taken for images when a folder is read.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
MAX_PIXELS = 89_478_485  # Pillow's own limit, 1/4 GiB of 24-bit pixels; there only a warning

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIX = f"Images are {', '.join(FORMATS)} files; convert or remove this one"


def read_header(data: bytes, where: object) -> Image.Image:
    """Returns the image with its header read and no pixel decoded.

    Args:
        data: the encoded file.
        where: its name, for the error.

    Raises:
        UserError: not an image, a format outside `FORMATS`, or more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise UserError("the file is empty", where=where, fix=_FIX)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below is stricter than Pillow's warning
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(f"the image is too large: {error}", where=where, fix=_FIX) from error
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise UserError("the file is not an image", where=where, fix=_FIX) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        what = f"the image has {width}x{height} pixels; the limit is {MAX_PIXELS:,} in all"
        raise UserError(what, where=where, fix="Make it smaller or remove it")
    return image


def decode(data: bytes, where: object, channels: int = 3) -> Image.Image:
    """Returns the upright picture in mode RGB (channels 3) or L (channels 1), 8 bits a sample.

    Args:
        data: the encoded file.
        where: its name, for the error.
        channels: 3 or 1.

    Raises:
        UserError: `read_header` refuses it, or its pixels are damaged or cut short.
    """
    image = read_header(data, where)
    mode = "RGB" if channels == 3 else "L"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                picture = _decode_jpeg(data, image, mode)
            else:
                image.load()  # turns a TIFF upright by itself and takes its orientation away
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                picture = _to_mode(image, mode)
    except Exception as error:  # whatever a decoder makes of damaged bytes
        what = f"the image is damaged: {str(error) or type(error).__name__}"
        raise UserError(what, where=where, fix=_FIX) from error
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns the PNG file of 8-bit `pixels`, (H, W) grey or (H, W, 3) RGB."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _decode_jpeg(data: bytes, image: Image.Image, mode: str) -> Image.Image:
    try:
        if mode == "RGB":
            return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
        return Image.fromarray(simplejpeg.decode_jpeg(data, "GRAY")[..., 0])
    except ValueError:  # also where the file is only untidy; Pillow refuses those cut short
        return image.convert(mode)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a sample; convert() would cut at 255 and not scale
        samples = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray((samples // 257).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
