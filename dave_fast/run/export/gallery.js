"use strict";
// The page of a run, for window.gallery of data.js. All of its texts come from outside and are shown as text alone.

const data = window.gallery;
const $ = (id) => document.getElementById(id);
const FILTERS = ["q", "target", "prediction", "right", "status", "sort"];
const DEFAULTS = { q: "", target: "", prediction: "", right: "", status: "", sort: "", view: "overlay", open: "" };
const VIEWS = { overlay: "Overlay", photograph: "Photograph", signed: "Signed" };
const LEGENDS = {
  overlay: "The brighter, the more the pixels speak for the explained class.",
  photograph: "What the model saw.",
  signed: "Orange speaks for the explained class, blue against it.",
};
// Pixels: the narrowest cell, and between cells. Screens of rows that are kept above and below.
const NARROWEST = 150, GAP = 12, AROUND = 1;

const state = { ...DEFAULTS };
let order = [];             // numbers of the records that are shown, in their order
let columns = 1, wide = 0, high = 0;
let focused = -1;           // place of the cell that has or had the focus
let place = -1;             // place of the record in the viewer
let waiting = 0, remembering = 0;
const cells = new Map();    // by place

function begin() {
  const { facts, id, errors } = data;
  const failed = Object.keys(errors).length;
  document.title = `${facts.model} · dave-fast`;
  $("title").textContent = `What ${facts.model} looked at`;
  const told = Object.entries(facts).filter(([name]) => name !== "model");
  told.unshift(["maps", number(id.length - failed)], ["errors", number(failed)]);
  if (data.labelled) told.splice(2, 0, ["right", percent(rights() / (id.length - failed))]);
  $("facts").append(...told.map(([name, value]) => make("span", {}, `${name} `, make("b", {}, value))));
  fillFilters();
  for (const group of document.querySelectorAll(".toggle")) {
    group.append(...data.views.map((view) => make("button", { type: "button", "data-view": view }, VIEWS[view])));
    group.addEventListener("click", (event) => event.target.dataset.view && show(event.target.dataset.view));
  }
  data.lower = id.map((each) => each.toLowerCase());
  $("controls").hidden = false;
  recall();
  listen();
}

function listen() {
  for (const name of FILTERS) {
    $(name).addEventListener("input", () => { state[name] = $(name).value; choose(); remember(); });
  }
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("reset").addEventListener("click", () => {
    Object.assign(state, DEFAULTS, { view: state.view, sort: state.sort });
    fill(); choose(); remember();
    $("q").focus();
  });
  $("more").addEventListener("click", () => {
    const open = $("filters").classList.toggle("open");
    $("more").setAttribute("aria-expanded", open);
  });
  addEventListener("hashchange", recall);
  addEventListener("scroll", () => { waiting ||= requestAnimationFrame(draw); }, { passive: true });
  new ResizeObserver(() => arrange()).observe($("grid"));
  $("grid").addEventListener("click", (event) => {
    const cell = event.target.closest("li");
    if (cell) open(Number(cell.dataset.place));
  });
  $("grid").addEventListener("keydown", walk);
  $("grid").addEventListener("focusin", (event) => { focused = Number(event.target.closest("li").dataset.place); });
  $("viewer").addEventListener("keydown", turn);
  $("viewer").addEventListener("close", () => { state.open = ""; remember(); focus(place); });
  $("viewer").addEventListener("click", (event) => event.target === $("viewer") && $("viewer").close());
  $("close").addEventListener("click", () => $("viewer").close());
  $("previous").addEventListener("click", () => open(place - 1));
  $("next").addEventListener("click", () => open(place + 1));
  $("picture").addEventListener("error", () => {
    $("no-picture").textContent = "The picture is missing beside this page.";
    $("no-picture").hidden = !($("picture").hidden = true);
  });
}

// Filters

function fillFilters() {
  for (const name of ["target", "prediction"]) {
    const counts = tally(data[name]);
    const found = [...counts].filter(([index]) => index >= 0).sort(([one], [two]) => one - two);
    options(name, "all classes", found.map(([index, count]) => [index, `${classOf(index)}, ${number(count)}`]));
  }
  const right = rights(), maps = data.shown.filter(Boolean).length;
  const words = data.labelled ? ["right", "wrong"] : ["is the explained class", "is another class"];
  $("right").parentElement.hidden = right === maps && !data.labelled;
  options("right", "all", words.map((word, n) => [n ? "no" : "yes", `${word}, ${number(n ? maps - right : right)}`]));
  const errors = Object.values(data.errors);
  const kinds = [...tally(errors.map(([, kind]) => kind))].sort(([, one], [, two]) => two - one).slice(0, 50);
  $("status").parentElement.hidden = !errors.length;
  options("status", "all", [
    ["ok", `with a map, ${number(maps)}`],
    ["error", `errors, ${number(errors.length)}`],
    ...kinds.map(([kind, count]) => [`error ${kind}`, `${kind}, ${number(count)}`]),
  ]);
}

function options(name, all, values) {
  $(name).append(make("option", { value: "" }, all));
  $(name).append(...values.map(([value, text]) => make("option", { value }, text.slice(0, 120))));
}

function choose() {
  const { target, prediction, right, status, sort } = state;
  const wanted = state.q.trim().toLowerCase();
  order = [];
  for (let n = 0; n < data.id.length; n++) {
    const error = data.errors[n];
    if (wanted && !data.lower[n].includes(wanted)) continue;
    if (target && data.target[n] !== Number(target)) continue;
    if (prediction && data.prediction[n] !== Number(prediction)) continue;
    if (right && (error || isRight(n) !== (right === "yes"))) continue;
    if (status === "ok" ? error : status && (!error || (status !== "error" && status !== `error ${error[1]}`))) continue;
    order.push(n);
  }
  // a sort is stable: records that are equal keep the order of the run
  const probability = (n, missing) => data.probability[n] ?? missing;
  if (sort === "high") order.sort((one, two) => probability(two, -1) - probability(one, -1));
  if (sort === "low") order.sort((one, two) => probability(one, 2) - probability(two, 2));
  if (sort === "errors") order.sort((one, two) => data.shown[one] - data.shown[two]);
  if (sort === "id") order.sort((one, two) => (data.id[one] < data.id[two] ? -1 : data.id[one] > data.id[two] ? 1 : 0));
  $("count").textContent = `${number(order.length)} of ${number(data.id.length)} records`;
  const filtered = FILTERS.some((name) => name !== "sort" && state[name]);
  $("reset").hidden = !filtered;
  const set = FILTERS.filter((name) => name !== "q" && state[name]).length;
  $("more").textContent = set ? `Filters, ${set}` : "Filters";
  $("none").hidden = order.length > 0;
  focused = -1;
  clear();
  arrange();
}

// The address: #target=3&sort=low&open=ID

function recall() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) ?? DEFAULTS[name];
  if (!data.views.includes(state.view)) state.view = "overlay";
  fill();
  press();
  choose();
  const at = state.open ? order.indexOf(data.id.indexOf(state.open)) : -1;
  if (at >= 0) open(at);
  else if ($("viewer").open) $("viewer").close();
}

function fill() {
  for (const name of FILTERS) {
    $(name).value = state[name];
    // a value that is none of a list's
    state[name] = $(name).value || (($(name).value = ""), "");
  }
}

function remember() {
  // browsers take a limited number of changes a second
  clearTimeout(remembering);
  remembering = setTimeout(() => {
    const told = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) if (value !== DEFAULTS[name]) told.set(name, value);
    const text = told.toString();
    history.replaceState(null, "", location.href.split("#")[0] + (text ? `#${text}` : ""));
  }, 150);
}

// The grid has an element for what is near the window alone.

function arrange() {
  const grid = $("grid"), width = grid.clientWidth;
  columns = Math.max(1, Math.floor((width + GAP) / (NARROWEST + GAP)));
  wide = (width - GAP * (columns - 1)) / columns;
  const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  high = wide / data.aspect + rem * parseFloat(getComputedStyle(grid).getPropertyValue("--caption"));
  const rows = Math.ceil(order.length / columns);
  grid.style.height = `${Math.max(0, rows * (high + GAP) - GAP)}px`;
  cells.forEach(position);
  draw();
}

function draw() {
  waiting = 0;
  const from = -$("grid").getBoundingClientRect().top, screen = innerHeight;
  const row = (pixels) => Math.floor(pixels / (high + GAP));
  const first = Math.max(0, row(from - AROUND * screen)) * columns;
  const last = Math.min(order.length, (row(from + (1 + AROUND) * screen) + 1) * columns);
  for (const [at, cell] of cells) {
    if ((at < first || at >= last) && at !== focused) { cell.remove(); cells.delete(at); }
  }
  for (let at = first; at < last; at++) {
    if (cells.has(at)) continue;
    const cell = cellOf(at);
    // in the order of the records, for the keyboard and screen readers
    const next = [...cells.keys()].filter((other) => other > at).reduce((one, two) => Math.min(one, two), Infinity);
    $("grid").insertBefore(cell, cells.get(next) ?? null);
    cells.set(at, cell);
    position(cell, at);
  }
}

function clear() {
  cells.clear();
  $("grid").replaceChildren();
}

function position(cell, at) {
  const x = (at % columns) * (wide + GAP), y = Math.floor(at / columns) * (high + GAP);
  cell.style.cssText = `width: ${wide}px; height: ${high}px; transform: translate(${x}px, ${y}px)`;
}

function cellOf(at) {
  const n = order[at], error = data.errors[n];
  const shot = make("span", { class: "shot" });
  if (error) shot.append(make("span", { class: "failed" }, make("b", {}, "no map"), error[0]));
  else shot.append(make("img", { src: path("small", n), alt: "", loading: "lazy", decoding: "async" }));
  if (!error && !isRight(n)) {
    shot.append(make("span", { class: "wrong" }, make("span", { "aria-hidden": "true" }, "≠ "), nameOf(data.prediction[n])));
    shot.lastChild.title = `predicted: ${classOf(data.prediction[n])}`;
  }
  const caption = make("span", { class: "caption" });
  if (!error) {
    const share = data.probability[n] === null ? "" : percent(data.probability[n]);
    const name = make("span", { class: "name" }, nameOf(data.target[n]));
    caption.append(make("span", { class: "line" }, name, make("span", { class: "percent" }, share)));
  }
  caption.append(make("span", { class: "id" }, data.id[n]));
  const cell = make("li", { "data-place": at, "aria-setsize": order.length, "aria-posinset": at + 1 });
  cell.append(make("button", { type: "button", title: data.id[n] }, shot, caption));
  return cell;
}

function walk(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -order.length, End: order.length };
  if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  focus(Math.min(order.length - 1, Math.max(0, focused + steps[event.key])));
}

function focus(at) {
  if (at < 0 || at >= order.length) return;
  focused = at;
  const top = $("grid").getBoundingClientRect().top + Math.floor(at / columns) * (high + GAP);
  const bar = $("controls"), covered = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight + GAP : 0;
  if (top < covered) scrollBy({ top: top - covered, behavior: "instant" });
  else if (top + high > innerHeight) scrollBy({ top: top + high - innerHeight + GAP, behavior: "instant" });
  draw();
  cells.get(at)?.firstChild.focus({ preventScroll: true });
}

// The picture: overlay, photograph, both signs

function show(view) {
  state.view = view;
  press();
  for (const [at, cell] of cells) {
    const picture = cell.querySelector("img");
    if (picture) picture.src = path("small", order[at]);
  }
  if ($("viewer").open) look();
  remember();
}

function press() {
  for (const button of document.querySelectorAll(".toggle button")) {
    button.setAttribute("aria-pressed", button.dataset.view === state.view);
  }
}

function path(size, n) {
  // a map whose photograph is missing is there by itself
  const view = data.shown[n] === 2 ? state.view : "overlay", name = String(n).padStart(6, "0");
  return `${size}/${String(Math.floor(n / 1000)).padStart(3, "0")}/${name}.${view}.webp`;
}

// The viewer

function open(at) {
  if (at < 0 || at >= order.length) return;
  place = at;
  state.open = data.id[order[at]];
  look();
  if (!$("viewer").open) $("viewer").showModal();
  for (const near of [at - 1, at + 1]) {
    if (near >= 0 && near < order.length && data.shown[order[near]]) new Image().src = path("pictures", order[near]);
  }
  remember();
}

function look() {
  const n = order[place], error = data.errors[n], alone = data.shown[n] === 1;
  $("viewer-title").textContent = $("viewer-title").title = data.id[n];
  $("place").textContent = `${number(place + 1)} of ${number(order.length)}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === order.length - 1;
  $("picture").hidden = !!error;
  $("no-picture").hidden = !error;
  $("no-picture").textContent = error ? error[0] : "";
  if (!error) {
    $("picture").src = path("pictures", n);
    $("picture").alt = `${VIEWS[alone ? "overlay" : state.view]} of ${data.id[n]}, explained for ${nameOf(data.target[n])}`;
  }
  for (const button of $("viewer").querySelectorAll(".toggle button")) {
    button.disabled = !!error || (alone && button.dataset.view !== "overlay");
  }
  $("legend").textContent = error ? "" : alone ? "The photograph could not be read again: this is the map alone." : LEGENDS[state.view];
  const facts = error ? [["error", error[0]]] : [
    ["explained class", classOf(data.target[n])],
    ["its probability", data.probability[n] === null ? "–" : percent(data.probability[n])],
    ["predicted class", `${classOf(data.prediction[n])}${isRight(n) ? "" : data.labelled ? ": wrong" : ": another one"}`],
  ];
  if (error && data.target[n] >= 0) facts.push(["class to explain", classOf(data.target[n])]);
  facts.push(["photograph", data.uri[n]], ["seed", String(data.seed[n])], ["row of the export", number(n + 1)]);
  $("record").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function turn(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const steps = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: order.length - 1 };
  const views = { ArrowUp: -1, ArrowDown: 1 };
  if (event.key in steps) open(steps[event.key]);
  else if (event.key in views && data.shown[order[place]] === 2) {
    const count = data.views.length;
    show(data.views[(data.views.indexOf(state.view) + views[event.key] + count) % count]);
  } else return;
  event.preventDefault();
}

// Words

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function tally(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return counts;
}

function isRight(n) { return data.prediction[n] === data.target[n]; }

function rights() { return data.id.filter((_, n) => data.shown[n] && isRight(n)).length; }

function nameOf(index) { return data.names[index] ?? `class ${index}`; }

function classOf(index) {
  const name = nameOf(index);
  return name === `class ${index}` ? name : `${name} (${index})`;
}

function number(value) { return value.toLocaleString("en"); }

function percent(share) { return share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`; }

if (data) begin();
else $("problem").textContent = "data.js is missing beside this page: keep the files of the folder together.";
