// The backend of `mixer export --output FOLDER/`: images to an ONNX file, without a server.
//
// Decoding, resizing and decisions are those of `mixer predict`; the file's metadata, in model.json,
// describes them.

import * as ort from "./ort.wasm.bundle.min.mjs";
import { megabytes, start } from "./page.js";

const PRECISION = 22; // bits after the point of Pillow's weights
const BAND = 2 ** 22; // pixels of an image that are read at a time
const SHOWN = 5; // classes

ort.env.wasm.numThreads = 1; // several need headers that a plain web server does not send

let model = null; // {name, limits, how, names, decision, ...}
let session = null;

async function describe(say) {
  try {
    const { metadata, ...about } = await (await fetch("model.json", { cache: "no-cache" })).json();
    say(`Loading the model, ${megabytes(about.bytes)} ...`);
    const { architecture, precision } = JSON.parse(metadata.allmlp);
    model = {
      ...about,
      precision,
      classes: architecture.num_classes,
      image_size: architecture.image_size,
      how: JSON.parse(metadata.preprocessing),
      names: JSON.parse(metadata.class_names),
      decision: JSON.parse(metadata.decision ?? "{}"),
      hint: "JPEG, PNG, WebP, GIF and whatever else this browser shows",
    };
    session = await ort.InferenceSession.create(`model.onnx?${about.sha256}`);
  } catch (error) {
    throw new Error(`The model cannot be loaded: ${error.message}`);
  }
  return model;
}

export async function classify([image]) {
  const pixels = await modelInput(image.file, model.how);
  const tensor = new ort.Tensor("uint8", pixels, [1, ...model.image_size, model.how.channels]);
  const { logits } = await session.run({ images: tensor });
  return [decide(await logits.getData(), model.names, model.decision)];
}

// --- answers -------------------------------------------------------------------------------------

function decide(logits, names, { labels, temperature = 1, thresholds, unsure_below: least }) {
  if (!logits.every(Number.isFinite)) {
    throw new Error("the model's numbers for this image are not finite");
  }
  const scaled = Array.from(logits, (value) => value / temperature);
  const highest = Math.max(...scaled);
  const sum = scaled.reduce((total, value) => total + Math.exp(value - highest), 0);
  const probabilityOf = (value) =>
    Math.fround(labels === "multi" ? 1 / (1 + Math.exp(-value)) : Math.exp(value - highest) / sum);
  const classes = scaled.map((value, at) => ({
    name: names ? names[at] : String(at),
    probability: probabilityOf(value),
  }));
  const found = { error: null };
  if (labels === "multi") {
    const limit = (at) => Math.fround(thresholds?.[at] ?? 0.5);
    found.answers = classes.filter(({ probability }, at) => probability >= limit(at));
    found.answers = found.answers.map(({ name }) => name);
  }
  const ordered = [...classes].sort((one, other) => other.probability - one.probability);
  if (least !== undefined) {
    found.answer = ordered[0].probability >= Math.fround(least) ? ordered[0].name : "unsure";
  }
  return { ...found, classes: ordered.slice(0, SHOWN) };
}

// --- pixels --------------------------------------------------------------------------------------

// Returns uint8 pixels (height, width, channels) at the model's size.
export async function modelInput(file, how) {
  if (!file.size) throw new Error("the file is empty");
  const bytes = new DataView(await file.arrayBuffer());
  const orientation = withoutOrientation(bytes);
  let stored;
  try {
    stored = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" });
  } catch {
    throw new Error(
      "this browser cannot decode the file: it is not an image, is damaged, or has a format that " +
        "browsers do not show, such as TIFF (JPEG, PNG, WebP and GIF work)",
    );
  }
  const image = upright(stored, how.exif_orientation ? orientation : 1);
  const { pixels: most, side } = model.limits;
  if (image.width * image.height > most || Math.max(image.width, image.height) > side) {
    throw new Error(`the image has ${image.width}x${image.height} pixels, more than the limit`);
  }
  const [height, width] = how.image_size;
  const [left, top, right, bottom] = boxOf(image, how);
  const filter = FILTERS[how.interpolation];
  const columns = weightsOf(image.width, left, right, width, filter);
  const rows = weightsOf(image.height, top, bottom, height, filter);
  const narrow = narrowed(image, columns, how.channels);
  stored.close();
  return resampled(narrow, rows, width * how.channels);
}

// Returns a file's EXIF orientation, and sets it to 1 there: browsers differ in where they use it.
function withoutOrientation(bytes) {
  try {
    const [tiff, checksum] = exifOf(bytes);
    const little = bytes.getUint16(tiff) === 0x4949; // "II"
    const tags = tiff + bytes.getUint32(tiff + 4, little);
    for (let at = tags + 2 + 12 * bytes.getUint16(tags, little); (at -= 12) > tags; ) {
      if (bytes.getUint16(at, little) !== 0x112) continue;
      const value = bytes.getUint16(at + 8, little);
      bytes.setUint16(at + 8, 1, little);
      checksum();
      return value >= 1 && value <= 8 ? value : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // damaged tags do not mean damaged pixels
  }
  return 1;
}

// Returns where the EXIF tags of a JPEG, WebP or PNG file begin, and what renews their checksum.
function exifOf(bytes) {
  const name = (at) => String.fromCharCode(...[0, 1, 2, 3].map((i) => bytes.getUint8(at + i)));
  const nothing = () => {};
  if (bytes.getUint16(0) === 0xffd8) {
    for (let at = 2; bytes.getUint16(at) !== 0xffda; at += 2 + bytes.getUint16(at + 2)) {
      if (bytes.getUint16(at) === 0xffe1 && name(at + 4) === "Exif") return [at + 10, nothing];
    }
  } else if (name(0) === "RIFF") {
    for (let at = 12, size; ; at += 8 + size + (size % 2)) {
      size = bytes.getUint32(at + 4, true);
      if (name(at) === "EXIF") return [at + (name(at + 8) === "Exif" ? 14 : 8), nothing];
    }
  } else if (name(0) === "\x89PNG") {
    for (let at = 8, size; ; at += 12 + size) {
      size = bytes.getUint32(at);
      const end = at + 8 + size;
      if (name(at + 4) === "eXIf") {
        return [at + 8, () => bytes.setUint32(end, crc32(bytes, at + 4, end))];
      }
    }
  }
  throw new RangeError("no tags");
}

function crc32(bytes, from, to) {
  let crc = ~0;
  for (let at = from; at < to; at++) {
    crc ^= bytes.getUint8(at);
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

// An image with its EXIF orientation: {width, height, draw(context, top)}.
function upright(stored, orientation) {
  const swapped = orientation >= 5;
  const [width, height] = swapped ? [stored.height, stored.width] : [stored.width, stored.height];
  const [x, left] = [2, 3, 6, 7].includes(orientation) ? [-1, width] : [1, 0];
  const [y, top] = [3, 4, 7, 8].includes(orientation) ? [-1, height] : [1, 0];
  const matrix = swapped ? [0, y, x, 0] : [x, 0, 0, y];
  const draw = (context, from) => {
    context.setTransform(...matrix, left, top - from);
    context.drawImage(stored, 0, 0);
    context.resetTransform();
  };
  return { width, height, draw };
}

// The part of an image that the model sees, as [left, top, right, bottom].
function boxOf(image, { image_size: [height, width], resize, crop, crop_small: cropSmall }) {
  const isSmall = image.width <= width && image.height <= height;
  const isWhole = resize === "squash" || (isSmall && !cropSmall);
  const part = isWhole ? 1 : crop;
  let [wide, high] = [roundEven(width / part), roundEven(height / part)];
  if (resize === "resmall-crop") {
    const scale = Math.max(width / image.width, height / image.height) / part;
    wide = Math.max(width, roundEven(image.width * scale));
    high = Math.max(height, roundEven(image.height * scale));
  }
  const [x, y] = [image.width / wide, image.height / high];
  const [left, top] = [Math.floor((wide - width) / 2), Math.floor((high - height) / 2)];
  return [left * x, top * y, (left + width) * x, (top + height) * y];
}

// Rounds halves to the even number, as Python does.
function roundEven(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(1 - Math.abs(x), 0) },
  bicubic: {
    support: 2,
    at(x) {
      const size = Math.abs(x);
      if (size < 1) return (1.5 * size - 2.5) * size * size + 1;
      return size < 2 ? -0.5 * (((size - 5) * size + 8) * size - 4) : 0;
    },
  },
};

// Pillow's antialiased resampling along one side: for every output pixel the first input pixel and
// the weights, in fixed point. The box has single precision there.
function weightsOf(size, from, to, number, filter) {
  const start = Math.fround(from);
  const scale = Math.fround(Math.fround(to) - start) / number;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  return Array.from({ length: number }, (_, at) => {
    const center = start + (at + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const last = Math.min(Math.trunc(center + support + 0.5), size);
    const weights = Array.from({ length: last - first }, (_, i) =>
      filter.at((i + first - center + 0.5) / stretch),
    );
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const fixed = (weight) => {
      const value = (weight / sum) * 2 ** PRECISION;
      return Math.trunc(value + (value < 0 ? -0.5 : 0.5));
    };
    return { first, weights: Int32Array.from(weights, fixed) };
  });
}

const clipped = (sum) => Math.min(Math.max(sum >> PRECISION, 0), 255);

// The image at the new width, read in bands: a phone has no room for all pixels of its own photos.
function narrowed(image, columns, channels) {
  const { width, height } = image;
  const result = new Uint8Array(height * columns.length * channels);
  const band = Math.min(height, Math.max(1, Math.floor(BAND / width)));
  const canvas = new OffscreenCanvas(width, band);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  let to = 0;
  for (let top = 0; top < height; top += band) {
    context.fillStyle = "white"; // under what is transparent
    context.fillRect(0, 0, width, band);
    image.draw(context, top);
    const { data } = context.getImageData(0, 0, width, Math.min(band, height - top));
    if (channels === 1) toGrey(data);
    for (let row = 0; row < data.length; row += 4 * width) {
      for (const { first, weights } of columns) {
        for (let channel = 0; channel < channels; channel++) {
          let sum = 2 ** (PRECISION - 1);
          let from = row + 4 * first + channel;
          for (let i = 0; i < weights.length; i++, from += 4) sum += data[from] * weights[i];
          result[to++] = clipped(sum);
        }
      }
    }
  }
  return result;
}

// Pillow's grey, in the first of the four channels.
function toGrey(data) {
  for (let at = 0; at < data.length; at += 4) {
    data[at] = (data[at] * 19595 + data[at + 1] * 38470 + data[at + 2] * 7471 + 2 ** 15) >> 16;
  }
}

// The rows, of `size` numbers each, at the new height.
function resampled(narrow, rows, size) {
  const result = new Uint8Array(rows.length * size);
  let to = 0;
  for (const { first, weights } of rows) {
    for (let column = 0; column < size; column++) {
      let sum = 2 ** (PRECISION - 1);
      let from = first * size + column;
      for (let i = 0; i < weights.length; i++, from += size) sum += narrow[from] * weights[i];
      result[to++] = clipped(sum);
    }
  }
  return result;
}

document.getElementById("privacy").textContent =
  "The model runs in this browser: images are not sent anywhere.";
start({ describe, check: () => null, groups: (files) => files.map((file) => [file]), classify });
