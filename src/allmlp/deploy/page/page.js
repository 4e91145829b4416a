// The page of a model: images from the user to a backend, its answers to the screen.
//
// A backend is {describe, check, groups, classify, explain}: see serve.js and browser.js.

export const $ = (id) => document.getElementById(id);
const items = []; // {name, file, url, classes, answer or answers, error, seen, ...}
let backend = null;
let selected = null;
let waiting = null; // what ends the requests of the image that was shown before

export function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, options);
  element.append(...children);
  return element;
}

export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.001 ? 3 : 1)} %`;
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
export const count = (number, word, plural = "s") => `${number} ${word}${number === 1 ? "" : plural}`;

export async function start(given) {
  backend = given;
  $("status").classList.remove("late");
  let about;
  try {
    about = await backend.describe((text) => ($("status").textContent = text));
  } catch (error) {
    $("status").textContent = error.message;
    return;
  }
  const [height, width] = about.image_size;
  document.title = about.name;
  $("name").textContent = about.name;
  $("about").textContent = [
    about.architecture,
    count(about.classes, "class", "es"),
    `${height}x${width} pixels`,
    about.precision,
    ...(about.decision.labels === "multi" ? ["any number of labels per image"] : []),
  ].join(" · ");
  $("status").textContent = "";
  $("hint").textContent = about.hint;
  $("file").disabled = false;
  $("file").addEventListener("change", () => {
    add([...$("file").files]);
    $("file").value = ""; // the same file may be chosen again
  });
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

export const showAgain = () => selected && show(selected);

async function add(files) {
  if (!files.length) return;
  const added = files.map((file) => ({
    name: file.name || "pasted image",
    file,
    url: URL.createObjectURL(file),
    error: backend.check(file),
  }));
  items.push(...added);
  show(added[0]);
  const wanted = added.filter((image) => !image.error);
  let done = added.length - wanted.length;
  for (const group of backend.groups(wanted)) {
    $("status").textContent = `Looking at ${count(added.length - done, "image")} ...`;
    try {
      const answers = await backend.classify(group);
      group.forEach((image, at) => Object.assign(image, answers[at], { name: image.name }));
    } catch (error) {
      for (const image of group) image.error = error.message;
    }
    done += group.length;
    if (group.includes(selected)) show(selected);
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
  for (const id of ["occlusion", "units"]) $(id).hidden = !(isGood && backend.explain);
  if (isGood) backend.explain?.(item, waiting.signal);
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
    // A format that browsers do not show: what the model sees may come later.
    picture.hidden = true;
    item.isHidden = true;
  };
  picture.src = (item.isHidden && item.seen) || item.url;
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
