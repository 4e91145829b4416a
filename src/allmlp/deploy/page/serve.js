// The backend of `mixer serve`: images to its endpoint, which also draws maps.

import { $, count, make, megabytes, percent, showAgain, start } from "./page.js";

let about = null;

const points = (share) => (100 * share).toFixed(Math.abs(share) < 0.001 ? 3 : 1);

async function ask(address, files, signal) {
  const options = { signal };
  if (files) {
    options.method = "POST";
    options.body = new FormData();
    for (const image of files) options.body.append("images", image.file, image.name);
  }
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is mixer serve still running?");
  }
  const answer = await response.json().catch((error) => {
    if (signal?.aborted) throw error;
    return { error: `The server answered with status ${response.status}.` };
  });
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function describe() {
  about = await ask("model");
  const { formats, image_bytes: most } = about.limits;
  about.hint = `${formats.join(", ")}; up to ${megabytes(most)} each`;
  $("privacy").innerHTML =
    "Images stay on the machine that runs <code>mixer serve</code>; none is kept.";
  $("curl").textContent = `curl -F images=@photo.jpg ${new URL("predict", location.href)}`;
  $("programs").hidden = false;
  const layers = about.units.layers;
  $("layer").append(make("option", { value: "", textContent: "the first three" }));
  for (const number of layers) {
    $("layer").append(make("option", { value: number, textContent: `layer ${number}` }));
  }
  $("layer-label").hidden = layers.length < 4;
  $("layer").addEventListener("change", showAgain);
  return about;
}

function check(file) {
  const most = about.limits.image_bytes;
  if (file.size <= most) return null;
  return `the file has ${megabytes(file.size)}; the limit is ${megabytes(most)}`;
}

function groups(files) {
  // As few requests as the limits allow.
  const found = [];
  let bytes = 0;
  for (const image of files) {
    bytes += image.file.size + 1000;
    const last = found.at(-1);
    if (!last || last.length >= about.limits.images || bytes > about.limits.request_bytes) {
      found.push([image]);
      bytes = image.file.size + 1000;
    } else {
      last.push(image);
    }
  }
  return found;
}

const classify = (group) => ask("predict", group);

async function explain(item, signal) {
  const layer = $("layer").value;
  await section("units", about.units.note, "Reading the units ...", async () => {
    item.units ??= {};
    item.units[layer] ??= await ask(`units${layer && `?layer=${layer}`}`, [item], signal);
    signal.throwIfAborted();
    drawUnits(item.units[layer], item.name);
    return "";
  });
  if (signal.aborted) return;
  const covered = count(about.occlusion.covered_images, "covered image");
  await section("occlusion", about.occlusion.note, `Computing ${covered} ...`, async () => {
    item.occlusion ??= await ask("occlusion", [item], signal);
    signal.throwIfAborted();
    return drawOcclusion(item);
  });
}

async function section(id, note, busy, work) {
  const text = $(id).querySelector(".note");
  const body = $(id).querySelector(".body");
  text.textContent = note || busy;
  if (note) {
    body.hidden = true;
    return;
  }
  $(id).setAttribute("aria-busy", "true");
  const timer = setTimeout(() => (body.hidden = true), 200); // no flicker where it is quick
  try {
    text.textContent = await work();
    body.hidden = false;
  } catch (error) {
    if (error.name === "AbortError") return;
    body.hidden = true;
    text.textContent = error.message;
  } finally {
    clearTimeout(timer);
    $(id).setAttribute("aria-busy", "false");
  }
}

function drawOcclusion(item) {
  const found = item.occlusion;
  $("seen").src = found.image;
  $("seen").alt = `${item.name} at the size of the model's input`;
  $("map").src = found.map;
  $("map").alt = `map of the drop of the probability of ${found.class}`;
  $("low").textContent = `\u2212${points(found.scale)} points`;
  $("high").textContent = `+${points(found.scale)} points`;
  item.seen = found.image;
  if (item.isHidden) $("picture").src = item.seen;
  const { drop, row, column } = found.largest_drop;
  const size = `${found.window}x${found.window}`;
  const [rows, columns] = found.patches;
  const what = `The probability of ${found.class}, ${percent(found.probability)},`;
  const place = `row ${row}, column ${column}`;
  return (
    `A grey window of ${size} patches slides over the ${rows}x${columns} patches of the image. ` +
    (drop > 0
      ? `${what} falls most, by ${points(drop)} points, where its upper left patch is at ${place}.`
      : `${what} falls nowhere.`)
  );
}

function drawUnits(found, name) {
  const picture = (source, caption, alt) =>
    make(
      "figure",
      {},
      make("img", { className: "pixels", src: source, alt }),
      make("figcaption", { textContent: caption }),
    );
  const unit = (layer, response) => {
    const where = `unit ${response.unit} of layer ${layer}`;
    const pictures = [
      picture(response.weights, "weights", `incoming weights of ${where}`),
      picture(response.read, "read", `what ${where} reads of ${name}`),
    ];
    if (response.written) {
      pictures.push(picture(response.written, "written", `where ${where} writes for ${name}`));
    }
    const title = make("h4", { textContent: `Unit ${response.unit}` });
    return make("div", { className: "unit" }, title, ...pictures);
  };
  $("layers").replaceChildren(
    ...found.layers.flatMap((layer) => [
      make("h3", {
        textContent: `Layer ${layer.layer}: ${layer.units.length} of ${layer.of} units`,
      }),
      make(
        "div",
        { className: "unit-grid" },
        ...layer.units.map((response) => unit(layer.layer, response)),
      ),
    ]),
  );
}

start({ describe, check, groups, classify, explain });
