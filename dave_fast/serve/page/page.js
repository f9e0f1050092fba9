// The page of a dave-fast server: an image goes to /v1/images once, explanations stream from /v1/explain/stream.

const $ = (id) => document.getElementById(id);
const BRIGHTEST = 0.995; // as dave_fast.figures shows maps: over this quantile, to this power
const GAMMA = 0.7;
const STOPS = [ // matplotlib's "inferno", nine of its colours
  [0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85],
  [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164],
];

let models = [];
let image = null; // {id, crop: URL}
let chosen = []; // indices of the classes to explain; empty: the most probable
let running = null; // AbortController
let latest = null; // the last maps or answer
let curve = []; // {samples, error, bound}
let key = sessionStorage.getItem("dave-fast-key") ?? "";

// ---- talking to the server ----

async function ask(path, options = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  if (answer.status === 401) {
    key = prompt("This server wants an API key:") ?? "";
    sessionStorage.setItem("dave-fast-key", key);
    if (key) return ask(path, options);
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    const later = answer.headers.get("retry-after");
    throw new Error((told.detail ?? answer.statusText) + (later ? ` Come again in ${later} s.` : ""));
  }
  return answer;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const name = block.match(/^event: (.*)$/m)?.[1];
      if (name) yield [name, JSON.parse(block.match(/^data: (.*)$/m)[1])];
    }
  }
}

function query(extra = {}) {
  const asked = new URLSearchParams({
    image: image.id, model: $("model").value, n_samples: $("samples").value, seed: $("seed").value, ...extra,
  });
  if ($("tolerance").value) asked.set("tolerance", $("tolerance").value);
  for (const target of chosen) asked.append("target", target);
  return asked;
}

// ---- an image comes in ----

async function take(file) {
  try {
    say(`Sending ${file.name || "the image"} …`);
    stop();
    const stored = await (await ask("v1/images", { method: "POST", body: file, headers: { "content-type": file.type || "application/octet-stream" } })).json();
    image = { id: stored.image };
    chosen = [];
    await explain();
  } catch (error) {
    problem(error);
  }
}

async function crop() {
  const answer = await ask(`v1/images/${image.id}/crop?model=${encodeURIComponent($("model").value)}`);
  if (image.crop) URL.revokeObjectURL(image.crop);
  image.crop = URL.createObjectURL(await answer.blob());
}

// ---- an explanation comes back ----

async function explain() {
  if (!image) return;
  stop();
  const mine = (running = new AbortController());
  latest = null;
  curve = [];
  $("again").disabled = false;
  $("stop").disabled = false;
  say("Waiting for the first samples …");
  try {
    await crop();
    const answer = await ask(`v1/explain/stream?${query({ encoding: "uint8" })}`, { signal: mine.signal });
    for await (const [name, told] of events(answer)) {
      if (mine.signal.aborted) return;
      if (name === "prediction") showClasses(told);
      else if (name === "error") throw new Error(told.detail);
      else show(told, name === "done");
    }
    if (!latest || !("cut_short" in latest)) throw new Error("The stream broke off; explain again.");
  } catch (error) {
    if (error.name !== "AbortError") problem(error);
  } finally {
    if (running === mine) {
      running = null;
      $("stop").disabled = true;
    }
  }
}

function stop() {
  running?.abort();
  running = null;
  $("stop").disabled = true;
}

function show(told, final) {
  latest = told;
  $("progress").value = told.samples / told.n_samples;
  if (told.error !== null) curve.push({ samples: told.samples, error: told.error, bound: told.error_bound });
  const bound = told.error_bound === null ? "" : `, error below ${percent(told.error_bound)} (nine times in ten)`;
  const ends = { tolerance: "Good enough", deadline: "At the deadline", shutdown: "The server ends" };
  const state = final ? ends[told.cut_short] ?? "Done" : "Refining";
  // screen readers hear the end, not every step
  $("status").setAttribute("aria-live", final ? "polite" : "off");
  say(`${state}: ${told.samples} of ${told.n_samples} samples${bound}.`);
  drawMaps(told, final);
  drawCurve();
}

function showClasses(told) {
  $("classes").disabled = false;
  $("classes-hint").hidden = true;
  chosen = [...told.targets];
  const names = models.find((model) => model.name === told.model)?.class_names;
  const listed = [...told.top];
  for (const target of chosen) {
    if (!listed.some((one) => one.target === target)) listed.push({ target, class_name: names?.[target] ?? `class ${target}`, probability: null });
  }
  const focused = document.activeElement?.dataset?.target;
  $("top").replaceChildren(...listed.map((one) => {
    const box = make("input", { type: "checkbox", checked: chosen.includes(one.target) });
    box.dataset.target = one.target;
    box.addEventListener("change", () => choose(one.target, box.checked));
    const bar = make("span", { className: "bar", ariaHidden: "true" }, make("span"));
    bar.firstChild.style.width = `${100 * (one.probability ?? 0)}%`;
    const share = one.probability === null ? "" : percent(one.probability);
    return make("label", {}, box, make("span", {}, one.class_name), make("span", { className: "percent" }, share), bar);
  }));
  if (focused) $("top").querySelector(`[data-target="${focused}"]`)?.focus();
}

function choose(target, wanted) {
  chosen = wanted ? [...chosen, target] : chosen.filter((one) => one !== target);
  explain();
}

function addClass() {
  const text = $("other").value.trim();
  if (!text) return;
  const names = models.find((model) => model.name === $("model").value)?.class_names ?? [];
  const index = /^\d+$/.test(text) ? Number(text) : names.findIndex((name) => name.toLowerCase() === text.toLowerCase());
  if (index < 0) return problem(new Error(`No class is called “${text}”.`));
  $("other").value = "";
  if (!chosen.includes(index)) choose(index, true);
}

// ---- pictures ----

function drawMaps(told, final) {
  const panels = $("maps");
  const wanted = told.maps.map((one) => String(one.target));
  if ([...panels.children].map((panel) => panel.dataset.target).join() !== wanted.join()) {
    panels.replaceChildren(...told.maps.map(panel));
  }
  told.maps.forEach((one, number) => {
    const article = panels.children[number];
    article.querySelector("img").src = image.crop;
    paint(article.querySelector("canvas"), one.map);
    const bound = one.error_bound === null ? "error not known yet" : `error about ${percent(one.error)}, below ${percent(one.error_bound)}`;
    article.querySelector(".said").textContent = `${told.samples} samples, ${bound}`;
    for (const button of article.querySelectorAll("button")) button.disabled = !final;
  });
}

function panel(one) {
  const canvas = make("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Map of the pixels that speak for ${one.class_name}`);
  const stack = make("div", { className: "stack" }, make("img", { alt: "What the model saw" }), canvas);
  const title = make("h2", {}, one.class_name, make("span", {}, percent(one.probability)));
  const png = make("button", { type: "button", className: "quiet", disabled: true }, "Save PNG");
  const npz = make("button", { type: "button", className: "quiet", disabled: true }, "Save .npz");
  for (const button of [png, npz]) button.append(make("span", { className: "sr" }, ` of ${one.class_name}`));
  png.addEventListener("click", () => savePicture(stack, one.class_name));
  npz.addEventListener("click", () => saveArrays(one.target, one.class_name));
  const article = make("article", {}, title, stack, make("p", { className: "said" }), make("div", { className: "row" }, png, npz));
  article.dataset.target = one.target;
  return article;
}

function paint(canvas, map) {
  const [height, width] = map.shape;
  const bytes = Uint8Array.from(atob(map.data), (letter) => letter.charCodeAt(0));
  const sorted = Uint8Array.from(bytes).sort();
  const top = sorted[Math.min(sorted.length - 1, Math.floor(BRIGHTEST * sorted.length))] || sorted[sorted.length - 1] || 1;
  canvas.width = width;
  canvas.height = height;
  const opacity = Number($("opacity").value) / 100;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  for (let i = 0; i < bytes.length; i++) {
    const strength = Math.min(1, bytes[i] / top) ** GAMMA;
    const [red, green, blue] = colour(strength);
    // as the overlays of files: what speaks covers the photograph, the rest is dimmed
    picture.data.set([red, green, blue, 255 * opacity * Math.min(1, 0.45 + strength)], 4 * i);
  }
  context.putImageData(picture, 0, 0);
}

function colour(strength) {
  const place = strength * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[low].map((value, channel) => value + (place - low) * (STOPS[low + 1][channel] - value));
}

function drawCurve() {
  $("error").hidden = curve.length === 0;
  if (!curve.length) return;
  const [left, right, top, bottom] = [46, 628, 10, 132];
  const most = Math.max(...curve.map((point) => point.bound ?? point.error));
  const last = Math.max(latest.n_samples, 2);
  const x = (samples) => left + ((right - left) * Math.log2(samples)) / Math.log2(last);
  const y = (error) => bottom - ((bottom - top) * error) / most;
  const line = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
  const estimate = line(curve.map((point) => [x(point.samples), y(point.error)]));
  const bound = line(curve.filter((point) => point.bound !== null).map((point) => [x(point.samples), y(point.bound)]));
  const ticks = [];
  for (let samples = 1; samples <= last; samples *= 2) ticks.push(`<text x="${x(samples)}" y="150" text-anchor="middle">${samples}</text>`);
  const end = curve[curve.length - 1];
  $("curve").innerHTML = `
    <line class="axis" x1="${left}" x2="${right}" y1="${bottom}" y2="${bottom}"/>
    <text x="${left - 6}" y="${top + 10}" text-anchor="end">${percent(most)}</text>
    <text x="${left - 6}" y="${bottom}" text-anchor="end">0</text>${ticks.join("")}
    <path class="bound" d="${bound}"/><path class="estimate" d="${estimate}"/>
    <circle cx="${x(end.samples)}" cy="${y(end.error)}" r="4"/>`;
  $("curve-text").textContent = `Estimated error of the map (line) and its bound (dashed) by samples: now about ${percent(end.error)}.`;
}

// ---- saving ----

function savePicture(stack, name) {
  const [photo, map] = [stack.querySelector("img"), stack.querySelector("canvas")];
  const scale = Math.max(1, Math.ceil(896 / photo.naturalWidth));
  const canvas = make("canvas", { width: scale * photo.naturalWidth, height: scale * photo.naturalHeight });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  for (const layer of [photo, map]) context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => save(blob, `${name}.png`));
}

async function saveArrays(target, name) {
  try {
    const asked = query();
    asked.delete("target");
    asked.append("target", target);
    // the same samples as those that are shown
    asked.set("n_samples", latest.samples);
    asked.delete("tolerance");
    const answer = await ask(`v1/explain?${asked}`, { method: "POST", headers: { accept: "application/x-npz" } });
    save(await answer.blob(), `${name}.npz`);
  } catch (error) {
    problem(error);
  }
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ---- small things ----

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

function say(text) {
  $("status").textContent = text;
  $("status").className = "";
}

function problem(error) {
  $("status").setAttribute("aria-live", "assertive");
  $("status").textContent = error.message;
  $("status").className = "problem";
}

function listClasses() {
  const model = models.find((one) => one.name === $("model").value);
  $("names").replaceChildren(...(model?.class_names ?? []).map((name) => make("option", { value: name })));
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
    if (new URLSearchParams(location.search).has("example")) example();
  } catch (error) {
    problem(error);
  }
}

$("example").addEventListener("click", example);
$("file").addEventListener("change", () => $("file").files[0] && take($("file").files[0]));
$("model").addEventListener("change", () => { chosen = []; listClasses(); explain(); });
$("again").addEventListener("click", explain);
$("stop").addEventListener("click", () => { stop(); say("Stopped."); });
$("add").addEventListener("click", addClass);
$("other").addEventListener("keydown", (event) => event.key === "Enter" && addClass());
for (const id of ["samples", "seed", "tolerance"]) $(id).addEventListener("change", explain);
$("opacity").addEventListener("input", () => {
  $("opacity-value").textContent = `${$("opacity").value} %`;
  latest?.maps.forEach((one, number) => $("maps").children[number] && paint($("maps").children[number].querySelector("canvas"), one.map));
});
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => { event.preventDefault(); document.body.classList.add("dragging"); });
}
for (const name of ["dragleave", "drop"]) addEventListener(name, () => document.body.classList.remove("dragging"));
addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); });
addEventListener("paste", (event) => { const file = event.clipboardData?.files[0]; if (file) take(file); });
begin();
