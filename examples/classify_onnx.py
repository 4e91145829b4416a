"""Classify pictures with a file of `mixer export`; needs numpy, pillow and onnxruntime only.

python examples/classify_onnx.py FILE.onnx photo.jpg [more.jpg ...]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(image, how):
    """The picture at the model's size: the whole of it, or its centre, as the model was trained."""
    height, width = how["image_size"]
    is_small = image.width <= width and image.height <= height
    is_whole = how["resize"] == "squash" or (is_small and not how.get("crop_small"))
    crop = 1.0 if is_whole else how["crop"]
    if how["resize"] == "resmall-crop":  # the shorter side to size / crop, else both sides
        scale = max(width / image.width, height / image.height) / crop
        whole = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    else:
        whole = round(width / crop), round(height / crop)
    x, y = image.width / whole[0], image.height / whole[1]
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return image.resize((width, height), FILTERS[how["interpolation"]], box=box)


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
how, classes = json.loads(about["preprocessing"]), json.loads(about["class_names"])
takes_pixels = session.get_inputs()[0].type == "tensor(uint8)"
for path in sys.argv[2:]:
    image = Image.open(path)
    image = ImageOps.exif_transpose(image) if how["exif_orientation"] else image
    image = resize(image.convert("RGB" if how["channels"] == 3 else "L"), how)
    pixels = np.asarray(image).reshape(1, image.height, image.width, -1)  # (1, H, W, channels)
    if not takes_pixels:
        pixels = (pixels / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    logits = session.run(None, {"images": pixels})[0][0]
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = ", ".join(f"{classes[at]} {shares[at]:.1%}" for at in np.argsort(-shares)[:5])
    print(f"{path}: {best}")
