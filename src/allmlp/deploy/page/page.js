// The page of `mixer serve`: images to the endpoint, its answers to the screen.

const $ = (id) => document.getElementById(id);
const items = []; // {name, file, url, classes, error, occlusion, units: {layer: answer}}
let about = null;
let selected = null;
let waiting = null; // what ends the requests of the image that was shown before

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, options);
  element.append(...children);
  return element;
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.001 ? 3 : 1)} %`;
const points = (share) => (100 * share).toFixed(Math.abs(share) < 0.001 ? 3 : 1);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

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

async function start() {
  try {
    about = await ask("/model");
  } catch (error) {
    $("status").textContent = error.message;
    return;
  }
  const [height, width] = about.image_size;
  document.title = `${about.name} - mixer serve`;
  $("name").textContent = about.name;
  $("about").textContent = [
    about.architecture,
    count(about.classes, "class").replace("classs", "classes"),
    `${height}x${width} pixels`,
    about.precision,
    ...(about.decision.labels === "multi" ? ["any number of labels per image"] : []),
  ].join(" · ");
  const limits = about.limits;
  $("hint").textContent =
    `${limits.formats.join(", ")}; up to ${megabytes(limits.image_bytes)} each`;
  $("curl").textContent = `curl -F images=@photo.jpg ${location.origin}/predict`;
  const layers = about.units.layers;
  $("layer").append(make("option", { value: "", textContent: "the first three" }));
  for (const number of layers) {
    $("layer").append(make("option", { value: number, textContent: `layer ${number}` }));
  }
  $("layer-label").hidden = layers.length < 4;
  $("file").addEventListener("change", () => {
    add([...$("file").files]);
    $("file").value = ""; // the same file may be chosen again
  });
  $("layer").addEventListener("change", () => selected && show(selected));
  document.addEventListener("paste", (event) => add([...(event.clipboardData?.files ?? [])]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("drop").classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    add([...(event.dataTransfer?.files ?? [])]);
  });
}

function parts(files) {
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

async function add(files) {
  if (!files.length) return;
  const added = files.map((file) => ({
    name: file.name || "pasted image",
    file,
    url: URL.createObjectURL(file),
    units: {},
  }));
  items.push(...added);
  const most = about.limits.image_bytes;
  for (const image of added) {
    if (image.file.size > most) {
      image.error = `the file has ${megabytes(image.file.size)}; the limit is ${megabytes(most)}`;
    }
  }
  show(added[0]);
  const wanted = added.filter((image) => !image.error);
  let done = added.length - wanted.length;
  for (const part of parts(wanted)) {
    $("status").textContent = `Looking at ${count(added.length - done, "image")} ...`;
    try {
      const answers = await ask("/predict", part);
      part.forEach((image, at) => Object.assign(image, answers[at], { name: image.name }));
    } catch (error) {
      for (const image of part) image.error = error.message;
    }
    done += part.length;
    if (part.includes(selected)) show(selected);
    else drawStrip();
  }
  const bad = added.filter((image) => image.error).length;
  const not = bad ? `, ${bad} of them could not be classified` : "";
  $("status").textContent = `${count(added.length, "image")}${not}.`;
}

function drawStrip() {
  $("strip").hidden = items.length < 2;
  $("strip").replaceChildren(
    ...items.map((item) => {
      const what = item.error ? "no answer" : item.classes ? answerOf(item, "none") : "...";
      const image = make("img", { src: item.url, alt: "" });
      const ending = item.name.includes(".") ? item.name.split(".").pop().slice(0, 5) : "?";
      image.onerror = () => {
        image.replaceWith(make("span", { className: "nothing", textContent: ending }));
      };
      const label = make("span", { textContent: what, className: item.error ? "bad" : "" });
      const button = make("button", { type: "button", title: item.name }, image, label);
      button.setAttribute("aria-pressed", item === selected);
      button.setAttribute("aria-label", `${item.name}: ${what}`);
      button.onclick = () => show(item);
      return make("li", {}, button);
    }),
  );
}

function show(item) {
  waiting?.abort();
  waiting = new AbortController();
  selected = item;
  drawStrip();
  $("answer").hidden = false;
  const said = item.answer ?? item.answers;
  $("answer-title").textContent = said === undefined ? item.name : `${item.name}: ${answerOf(item)}`;
  $("error").hidden = !item.error;
  $("error").textContent = item.error ? `Not classified: ${item.error}` : "";
  drawPicture(item);
  const answers = item.answers ?? [item.answer ?? item.classes?.[0]?.name];
  const line = (prediction) => classLine(prediction, answers.includes(prediction.name));
  $("classes").replaceChildren(...(item.classes ?? []).map(line));
  const isGood = !item.error && item.classes?.length > 0;
  for (const id of ["occlusion", "units"]) $(id).hidden = !isGood;
  if (isGood) explain(item, waiting.signal);
}

function drawPicture(item) {
  const picture = $("picture");
  picture.hidden = Boolean(item.error);
  picture.alt = `the image ${item.name}`;
  picture.classList.remove("pixels");
  picture.onload = () => {
    picture.hidden = Boolean(item.error);
    picture.classList.toggle("pixels", picture.naturalWidth < 160);
  };
  picture.onerror = () => {
    // A format that browsers do not show: what the model sees comes with the map.
    picture.hidden = true;
    item.isHidden = true;
  };
  if (item.isHidden && item.occlusion) picture.src = item.occlusion.image;
  else picture.src = item.url;
}

function answerOf(item, none = "none of the classes") {
  if (item.answers) return item.answers.join(", ") || none;
  return item.answer ?? item.classes[0].name;
}

function classLine(prediction, isAnswer) {
  const bar = make("div", { className: "bar" });
  bar.style.width = `${100 * prediction.probability}%`;
  const track = make("div", { className: "track" }, bar);
  track.setAttribute("aria-hidden", "true");
  return make(
    "li",
    { className: isAnswer ? "answer" : "" },
    make("span", { className: "name", textContent: prediction.name }),
    make("span", { className: "value", textContent: percent(prediction.probability) }),
    track,
  );
}

async function explain(item, signal) {
  const layer = $("layer").value;
  await section("units", about.units.note, "Reading the units ...", async () => {
    item.units[layer] ??= await ask(`/units${layer && `?layer=${layer}`}`, [item], signal);
    signal.throwIfAborted();
    drawUnits(item.units[layer], item.name);
    return "";
  });
  if (signal.aborted) return;
  const covered = count(about.occlusion.covered_images, "covered image");
  await section("occlusion", about.occlusion.note, `Computing ${covered} ...`, async () => {
    item.occlusion ??= await ask("/occlusion", [item], signal);
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
    clearTimeout(timer);
    body.hidden = false;
  } catch (error) {
    if (error.name === "AbortError") return;
    clearTimeout(timer);
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
  if (item.isHidden) $("picture").src = found.image;
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

start();
