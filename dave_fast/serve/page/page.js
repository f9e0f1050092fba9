// The page of a dave-fast server: it sends an image to /v1/images once and streams explanations from /v1/explain/stream.

import { COLOURS, paint, plot, png } from "./pictures.js";
import { ask, events } from "./server.js";

const $ = (id) => document.getElementById(id);
// How often a busy server is asked.
const TRIES = 5;

let models = [];
// The image: {content: Blob, name, id, photo: ImageData of the crop, seenBy: the model that has this crop}.
let image = null;
// Indices of the classes to explain; empty: the most probable class.
let chosen = [];
// The most probable classes: {target, class_name, probability}.
let top5 = [];
// Classes that the user has added, in the same form.
let others = [];
// AbortController of the explanation that is running.
let running = null;
// The latest maps or the answer.
let latest = null;
// The errors so far: {samples, maps: [one for each class: [one for each depth: {error, error_bound}]]}.
let curve = [];
// What each depth accounts for of the scores of the chosen classes; null for a model that has pixels alone.
let accounts = null;

// Images.

async function take(file) {
  stop();
  show(null);
  try {
    const content = new Blob([await file.arrayBuffer().catch(() => { throw new Error("That could not be read; give one image file."); })], { type: file.type });
    image = { content, name: file.name || "the image" };
    [chosen, top5, others] = [[], [], []];
    clear();
    $("classes").disabled = true;
    $("welcome").hidden = true;
    $("result").hidden = false;
    await explain();
  } catch (error) {
    failed(error);
  }
}

// Maps of another crop are removed at once; those of the same crop stay until new ones arrive.
function clear() {
  latest = accounts = null;
  nameDepth();
  $("maps").replaceChildren();
}

async function upload(mine, signal) {
  const type = mine.content.type || "application/octet-stream";
  const answer = await ask("v1/images", { method: "POST", body: mine.content, headers: { "content-type": type }, signal });
  mine.id = (await answer.json()).image;
}

// Make a call that names the image, which is sent first, and sent again if the server has dropped it.
async function withImage(mine, signal, call) {
  if (!mine.id) await upload(mine, signal);
  try {
    return await call();
  } catch (error) {
    if (error.status !== 404) throw error;
    await upload(mine, signal);
    return call();
  }
}

async function see(mine, signal) {
  const model = $("model").value;
  if (mine.seenBy === model) return;
  const answer = await withImage(mine, signal, () => ask(`v1/images/${mine.id}/crop?model=${encodeURIComponent(model)}`, { signal }));
  const picture = await createImageBitmap(await answer.blob());
  const canvas = $("photo");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  mine.photo = context.getImageData(0, 0, canvas.width, canvas.height);
  mine.seenBy = model;
}

// Explanations.

async function explain() {
  if (!image || !numbersHold()) return;
  stop();
  const mine = (running = new AbortController());
  curve = [];
  if (image.seenBy !== $("model").value) clear();
  show(null);
  $("again").disabled = false;
  $("stop").disabled = false;
  $("maps").setAttribute("aria-busy", "true");
  say(`Explaining ${image.name} …`);
  hear("Explaining.");
  try {
    await patiently(mine.signal, () => refined(image, mine.signal));
  } catch (error) {
    if (error.name !== "AbortError" && running === mine) failed(error);
  } finally {
    if (running === mine) finish();
  }
}

// Make a call; repeat it while the server is busy, after the time that the server names.
async function patiently(signal, call) {
  for (let left = TRIES; ; left--) {
    try {
      return await call();
    } catch (error) {
      if (!error.wait || left === 1) throw error;
      hear("The server is busy. Waiting.");
      for (let seconds = error.wait; seconds > 0; seconds--) {
        say(`The server is busy. Asking again in ${seconds} s …`);
        await new Promise((done) => setTimeout(done, 1000));
        signal.throwIfAborted();
      }
    }
  }
}

async function refined(mine, signal) {
  await see(mine, signal);
  const answer = await withImage(mine, signal, () => ask(`v1/explain/stream?${query(mine, { encoding: "uint8" })}`, { signal }));
  for await (const [name, told] of events(answer)) {
    signal.throwIfAborted();
    if (name === "prediction") predicted(told);
    else arrived(told, name === "done");
  }
}

function numbersHold() {
  const wrong = [...document.querySelectorAll("input[type=number]")].find((field) => !field.checkValidity());
  if (!wrong) return true;
  wrong.closest("details").open = true;
  wrong.reportValidity();
  return false;
}

function query(mine, extra = {}) {
  const asked = new URLSearchParams({ image: mine.id, model: $("model").value, n_samples: $("samples").value, seed: $("seed").value, shrink: $("shrink").checked, ...extra });
  if ($("tolerance").value) asked.set("tolerance", $("tolerance").value);
  if (blocks()) asked.set("depth", ["pixels", ...Array(blocks()).keys()]);
  for (const target of chosen) asked.append("target", target);
  return asked;
}

function finish() {
  running = null;
  $("stop").disabled = true;
  $("maps").setAttribute("aria-busy", "false");
}

function stop() {
  running?.abort();
  finish();
}

function arrived(told, final) {
  latest = { ...told, final };
  curve.push({ samples: told.samples, maps: told.maps.map((one) => (one.depths ?? [one]).map(({ error, error_bound }) => ({ error, error_bound }))) });
  const ends = { tolerance: "Good enough", deadline: "At the deadline", shutdown: "Cut short: the server ends" };
  const state = final ? ends[told.cut_short] ?? "Done" : "Refining";
  say(final ? `${state}, in ${(told.total_ms / 1000).toFixed(1)} s` : `${state} …`);
  const { error_bound } = errors(told);
  if (final) hear(`${state}: ${told.samples} samples, ${error_bound === null ? "error unknown" : `error below ${percent(error_bound)}`}.`);
  show(told);
  // What was assumed about the file.
  if (final) $("problem").textContent = told.notes.join(" ");
  const known = new Map(told.maps.map((one) => [one.target, one]));
  others = others.map((one) => known.get(one.target) ?? one);
  if (final) listTop();
  drawMaps();
  drawCurve();
}

function show(told) {
  $("problem").textContent = "";
  $("progress").value = told ? told.samples / told.n_samples : 0;
  $("told-samples").textContent = told ? `${told.samples} / ${told.n_samples}` : "–";
  showErrors(told);
}

function showErrors(told) {
  const { error, error_bound } = told ? errors(told) : { error: null, error_bound: null };
  $("told-error").textContent = error === null ? "–" : percent(error);
  $("told-bound").textContent = error_bound === null ? "–" : percent(error_bound);
}

// The largest errors of the classes at the depth that is shown; null where one is unknown.
function errors(told) {
  const largest = (name) => told.maps.map((one) => shown(one)[name]).reduce((most, one) => (most === null || one === null ? null : Math.max(most, one)));
  return { error: largest("error"), error_bound: largest("error_bound") };
}

// Depths: the answer has all of them, and the slider chooses: 0 for the pixels, 1 for block 0, and so on.

const blocks = () => models.find((one) => one.name === $("model").value)?.blocks ?? 0;
const level = () => Number($("depth").value);
const depthName = () => (level() ? `block ${level() - 1} of ${blocks()}` : "pixels");

// A class with the map and the errors of the depth that is shown.
const shown = (one) => (one.depths ? { ...one, ...one.depths[level()] } : one);

function offerDepths() {
  $("depth").max = blocks();
  $("depths").hidden = !blocks();
  nameDepth();
}

function nameDepth() {
  $("depth-value").textContent = depthName();
  $("depth").setAttribute("aria-valuetext", depthName());
  const told = (accounts ?? []).map(({ target, score, pixels, patches, prefix }) => {
    const carried = level() ? patches[level() - 1] + prefix[level() - 1] : pixels;
    const share = score > 0 ? ` (${Math.round((100 * carried) / score)}\u00a0%)` : "";
    return `${carried.toFixed(2)} of the score ${score.toFixed(2)}${share}${accounts.length > 1 ? ` of ${nameOf(target)}` : ""}`;
  });
  const what = level() ? "The tokens that enter this block" : "The pixels";
  $("depth-share").textContent = told.length ? `${what} account for ${told.join(", ")}.` : "";
}

function chooseDepth() {
  nameDepth();
  const address = new URL(location);
  if (level()) address.searchParams.set("depth", level() - 1);
  else address.searchParams.delete("depth");
  history.replaceState(null, "", address);
  if (!latest) return;
  showErrors(latest);
  drawMaps();
  drawCurve();
}

// Classes.

function predicted(told) {
  $("classes").disabled = false;
  $("classes-hint").hidden = true;
  top5 = told.top;
  chosen = [...told.targets];
  for (const target of chosen) {
    if (![...top5, ...others].some((one) => one.target === target)) others.push({ target, class_name: nameOf(target), probability: null });
  }
  others = others.filter((one) => !top5.some((better) => better.target === one.target));
  accounts = told.accounts;
  nameDepth();
  listTop();
}

function listTop() {
  const focused = document.activeElement?.dataset?.target;
  $("top").replaceChildren(...[...top5, ...others].map(({ target, class_name, probability }) => {
    const box = make("input", { type: $("compare").checked ? "checkbox" : "radio", name: "class", checked: chosen.includes(target) });
    box.dataset.target = target;
    box.addEventListener("change", () => choose(target, box.checked));
    const bar = make("span", { className: "bar", ariaHidden: "true" }, make("span"));
    bar.firstChild.style.width = `${100 * (probability ?? 0)}%`;
    return make("label", {}, box, make("span", { className: "name", title: class_name }, class_name), make("span", { className: "percent" }, chance(probability)), bar);
  }));
  if (focused) $("top").querySelector(`[data-target="${focused}"]`)?.focus();
}

function choose(target, wanted) {
  if (!$("compare").checked) chosen = [target];
  else if (wanted) chosen = [...chosen, target];
  else if (chosen.length > 1) chosen = chosen.filter((one) => one !== target);
  // At least one class stays chosen.
  else return listTop();
  listTop();
  return explain();
}

function compare() {
  if ($("compare").checked || chosen.length < 2) return listTop();
  chosen = chosen.slice(0, 1);
  listTop();
  return explain();
}

function addClass() {
  const text = $("other").value.trim();
  if (!text) return;
  const names = classNames();
  const index = /^\d+$/.test(text) ? Number(text) : names.findIndex((name) => name.toLowerCase() === text.toLowerCase());
  if (index < 0) return problem(new Error(`No class of ${$("model").value} is called “${text}”. Take a name from the list, or an index.`));
  $("other").value = "";
  if (!chosen.includes(index)) choose(index, true);
}

const classNames = () => models.find((one) => one.name === $("model").value)?.class_names ?? [];
const nameOf = (target) => classNames()[target] ?? `class ${target}`;

function listClasses() {
  $("names").replaceChildren(...classNames().map((name) => make("option", { value: name })));
}

// Pictures.

function drawMaps() {
  const panels = $("maps");
  const wanted = latest.maps.map((one) => String(one.target));
  if ([...panels.children].map((one) => one.dataset.target).join() !== wanted.join()) panels.replaceChildren(...latest.maps.map(panel));
  latest.maps.map(shown).forEach((one, number) => {
    const article = panels.children[number];
    article.querySelector("canvas").setAttribute("aria-label", `Map of ${level() ? `what enters ${depthName()}` : "the pixels"}, where it speaks for ${one.class_name}`);
    article.querySelector(".said").textContent = one.error_bound === null ? "error not known yet" : `error about ${percent(one.error)}, below ${percent(one.error_bound)}`;
    for (const button of article.querySelectorAll("button")) button.disabled = !latest.final;
  });
  repaint();
}

function repaint() {
  const opacity = Number($("opacity").value) / 100;
  latest?.maps.map(shown).forEach((one, number) => {
    const canvas = $("maps").children[number]?.querySelector("canvas");
    if (canvas && image.photo) paint(canvas, image.photo, one.map, opacity);
  });
}

function panel(one, number) {
  const canvas = make("canvas");
  canvas.setAttribute("role", "img");
  const swatch = make("span", { className: `swatch c${number % COLOURS}`, ariaHidden: "true" });
  const title = make("h3", {}, swatch, make("span", { className: "name", title: one.class_name }, one.class_name), make("span", { className: "percent" }, chance(one.probability)));
  const buttons = [["PNG", savePicture], [".npz", saveArrays]].map(([kind, action]) => {
    const button = make("button", { type: "button", className: "quiet", disabled: true }, `Save ${kind}`, make("span", { className: "sr" }, ` of ${one.class_name}`));
    button.addEventListener("click", () => action(one, canvas).catch(problem));
    return button;
  });
  const article = make("article", {}, title, canvas, make("p", { className: "said" }), make("div", { className: "row" }, ...buttons));
  article.dataset.target = one.target;
  return article;
}

function drawCurve() {
  const points = curve.map(({ samples, maps }) => ({ samples, maps: maps.map((depths) => depths[depths.length > 1 ? level() : 0]) }));
  const known = points.filter((point) => point.maps.every((one) => one.error !== null));
  $("error").hidden = known.length === 0;
  if (!known.length) return;
  plot($("curve"), known, Math.max(latest.n_samples, 2), Number($("tolerance").value));
  $("curve-text").textContent = "Error of the map by samples: the estimate (line), and what it is below nine times in ten (top of the band)";
}

// Saving.

async function savePicture(one, canvas) {
  save(await png(canvas), one, "png");
}

async function saveArrays(one) {
  // The number of samples and the depth that are shown, of this class only.
  const { model, seed, samples, shrink } = latest;
  const asked = () => new URLSearchParams({ image: image.id, model, seed, n_samples: samples, shrink, depth: level() ? level() - 1 : "pixels", target: one.target });
  const answer = await withImage(image, undefined, () => ask(`v1/explain?${asked()}`, { method: "POST", headers: { accept: "application/x-npz" } }));
  save(await answer.blob(), one, "npz");
}

function save(blob, one, kind) {
  const name = `${one.class_name}${level() ? ` block ${level() - 1}` : ""}`.replace(/[^\p{L}\p{N}]+/gu, "-");
  const link = make("a", { href: URL.createObjectURL(blob), download: `dave-${name}.${kind}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  hear(`Saved ${link.download}.`);
}

// Helpers.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

// A class without a probability: chosen by the user, or of a model that has none.
const chance = (probability) => (probability === null ? "" : percent(probability));

// The visible status changes with every event; screen readers announce the beginning, the end and problems only.
function say(text) {
  $("status").textContent = text;
}

function hear(text) {
  $("heard").textContent = text;
}

function failed(error) {
  say("Not explained");
  if (!image?.photo) [$("welcome").hidden, $("result").hidden] = [false, true];
  problem(error);
}

function problem(error) {
  hear("");
  $("problem").textContent = error.message;
}

async function example() {
  try {
    take(new File([await (await ask("example.png")).blob()], "the example", { type: "image/png" }));
  } catch (error) {
    problem(error);
  }
}

async function begin() {
  try {
    models = await (await ask("v1/models")).json();
    $("model").replaceChildren(...models.map((model) => make("option", { value: model.name }, model.name)));
    listClasses();
    offerDepths();
    $("shrink").checked = models[0].shrink;
    const asked = new URLSearchParams(location.search);
    if (/^\d+$/.test(asked.get("depth"))) $("depth").value = Number(asked.get("depth")) + 1;
    nameDepth();
    if (asked.has("example")) await example();
  } catch (error) {
    problem(error);
  }
}

function given(files) {
  const file = files?.[0];
  if (file && (!file.type || file.type.startsWith("image/"))) return take(file);
  const what = file ? `“${file.name}” is no image file` : "That is no file";
  return problem(new Error(`${what}; give a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM.`));
}

$("example").addEventListener("click", example);
$("file").addEventListener("change", () => {
  if ($("file").files.length) given($("file").files);
  // Cleared so that choosing the same file again is a change.
  $("file").value = "";
});
$("model").addEventListener("change", () => { [chosen, top5, others] = [[], [], []]; clear(); listClasses(); offerDepths(); explain(); });
$("compare").addEventListener("change", compare);
$("again").addEventListener("click", explain);
$("stop").addEventListener("click", () => { stop(); say("Stopped"); hear("Stopped."); $("again").focus(); });
$("add").addEventListener("click", addClass);
$("other").addEventListener("keydown", (event) => event.key === "Enter" && addClass());
for (const id of ["samples", "seed", "tolerance", "shrink"]) $(id).addEventListener("change", explain);
$("depth").addEventListener("input", chooseDepth);
$("opacity").addEventListener("input", () => { $("opacity-value").textContent = `${$("opacity").value} %`; repaint(); });
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => { event.preventDefault(); document.body.classList.add("dragging"); });
}
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dragging"));
addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("dragging"); given(event.dataTransfer.files); });
addEventListener("paste", (event) => event.clipboardData?.files.length && given(event.clipboardData.files));
new ResizeObserver(() => latest && drawCurve()).observe($("curve"));
begin();
