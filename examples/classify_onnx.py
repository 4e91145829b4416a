"""Classify images with a file of `mixer export`; needs numpy, pillow and onnxruntime only.

python examples/classify_onnx.py FILE.onnx photo.jpg [more.jpg ...]
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(path, how):
    """The image upright, opaque and with 8 bits a sample, as `decoding` in the file says."""
    file = io.BytesIO(Path(path).read_bytes())
    image = Image.open(file)
    tags, tiles = getattr(image, "tag_v2", {}), str(image.tile)
    clear, bits = image.info.get("transparency"), max(tags.get(258, (16,)))  # BitsPerSample
    if image.mode == "F" or bits > 16 or max(tags.get(339, (1,))) > 1:  # SampleFormat
        raise ValueError(f"{path}: the range of the samples is not stated")
    upright = ImageOps.exif_transpose if how["exif_orientation"] else Image.Image.copy
    image = upright(image)
    if image.mode.startswith("I"):  # 12 or 16 bits, which convert() would cut at 255
        samples = np.asarray(image).astype(int)
        pixels = samples * 255 // (2**bits - 1)
        pixels = 255 - pixels if tags.get(262) == 0 else pixels  # 0 is white
        image = Image.fromarray(np.where(samples == clear, 255, pixels).astype(np.uint8))
    elif "RGB;16B" in tiles and clear:  # Pillow keeps the upper bytes: with the lower ones
        low = Image.open(file)
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        samples = np.asarray(image).astype(int) * 256 + np.asarray(upright(low))
        is_clear = (samples == clear).all(axis=-1, keepdims=True)
        image = Image.fromarray(np.where(is_clear, 255, np.asarray(image)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if how["channels"] == 3 else "L")


def resize(image, how):
    """The image at the model's size: the whole of it, or its centre, as the model was trained."""
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


def answer(logits, classes, decision):
    """The classes that the model answers, as text: those above their thresholds, or the top 5."""
    logits = logits / np.float32(decision.get("temperature", 1))
    if decision.get("labels") == "multi":
        probabilities = 1 / (1 + np.exp(-logits))
        shown = np.flatnonzero(probabilities >= np.float32(decision.get("thresholds", 0.5)))
        shown = shown[np.argsort(-probabilities[shown], kind="stable")]
    else:
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        shown = np.argsort(-probabilities, kind="stable")[:5]
    text = ", ".join(f"{classes[k] if classes else k} {probabilities[k]:.1%}" for k in shown)
    if decision.get("unsure_below", 0) > probabilities.max():
        return f"unsure ({text})"
    return text or "none of the classes"


def main(file, paths):
    """Prints the answer for every image."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    how, classes = json.loads(about["preprocessing"]), json.loads(about["class_names"])
    decision = json.loads(about.get("decision", "{}"))
    takes_pixels = session.get_inputs()[0].type == "tensor(uint8)"
    for path in paths:
        image = resize(decode(path, how), how)
        pixels = np.asarray(image).reshape(1, image.height, image.width, -1)  # (1, H, W, channels)
        if not takes_pixels:
            pixels = (pixels / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        logits = session.run(None, {"images": pixels})[0][0]
        print(f"{path}: {answer(logits, classes, decision)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
