// Questions: classes, differences of two, texts and patches, as far as the model can answer them.

import { $, answers, chance, hear, make, model, say, state } from "./shared.js";

const FORMS = { classes: ["ask-class", "ask-contrast"], texts: ["ask-text"], patches: ["ask-patch"] };
// What was chosen before the latest form was sent.
let before = [];

// Have what is chosen explained; what the server says against it is shown at the form, if one is given.
const begin = (form = null) => dispatchEvent(new CustomEvent("chosen", { detail: form }));

// Show the forms of what the model can answer.
export function offerQuestions() {
  for (const [kind, forms] of Object.entries(FORMS)) for (const form of forms) $(form).hidden = !answers(kind);
  $("legend").textContent = answers("classes") ? "Class" : "Question";
  hint();
  $("names").replaceChildren(...(model()?.class_names ?? []).map((name) => make("option", { value: name })));
  const [rows, columns] = model()?.grid ?? [1, 1];
  [$("row").max, $("column").max] = [rows - 1, columns - 1];
  $("photo").classList.toggle("pick", answers("patches"));
  mark();
}

// Forget the questions of another image or model.
export function unask() {
  [state.chosen, state.top, state.others] = [[], [], []];
  $("questions").disabled = true;
  hint();
  for (const form of document.querySelectorAll("#questions form")) clean(form);
  listTop();
}

// The image is there, so that questions about it may be asked.
export function canAsk() {
  $("questions").disabled = false;
  hint();
  mark();
}

function hint() {
  $("questions-hint").hidden = !answers("classes") || !$("questions").disabled;
}

export function predicted(told) {
  state.top = told.top.map(({ target, class_name, probability }) => ({ target: String(target), name: class_name, probability }));
  // A class that was given by name is known by its number from now on.
  const asked = state.chosen;
  state.chosen = told.targets.map((target, number) => (target < 0 ? asked[number] : String(target)));
  const names = new Map(state.chosen.map((target, number) => [target, told.class_names[number]]));
  state.others = state.others.map((one) => state.chosen[asked.indexOf(one.target)] ?? one.target)
    .concat(state.chosen)
    .filter((target, number, all) => all.indexOf(target) === number && !state.top.some((one) => one.target === target))
    .map((target) => ({ target, name: names.get(target) ?? state.others.find((one) => one.target === target)?.name ?? target, probability: null }));
  state.accounts = told.accounts?.map((one, number) => ({ ...one, name: told.class_names[number] })) ?? null;
  const [first, second] = state.top;
  if (second) [$("this").placeholder, $("that").placeholder] = [first.name, second.name];
  listTop();
}

// Fill in the probabilities that the answer has.
export function listAnswer(maps, asked) {
  state.others = state.others.map((one) => ({ ...one, probability: maps[asked.indexOf(one.target)]?.probability ?? one.probability }));
  listTop();
}

function listTop() {
  const focused = document.activeElement?.dataset?.target;
  $("compare").closest("label").hidden = state.top.length + state.others.length < 2;
  $("top").replaceChildren(...[...state.top, ...state.others].map(({ target, name, probability }) => {
    const box = make("input", { type: $("compare").checked ? "checkbox" : "radio", name: "class", checked: state.chosen.includes(target) });
    box.dataset.target = target;
    box.addEventListener("change", () => choose(target, box.checked));
    const bar = make("span", { className: "bar", ariaHidden: "true", hidden: probability === null }, make("span"));
    bar.firstChild.style.width = `${100 * (probability ?? 0)}%`;
    return make("label", {}, box, make("span", { className: "name", title: name }, name), make("span", { className: "percent" }, chance(probability)), bar);
  }));
  if (focused) [...$("top").querySelectorAll("input")].find((box) => box.dataset.target === focused)?.focus();
}

function choose(target, wanted, form = null) {
  if (!$("compare").checked) state.chosen = [target];
  else if (wanted) state.chosen = [...state.chosen, target];
  else if (state.chosen.length > 1) state.chosen = state.chosen.filter((one) => one !== target);
  // At least one stays chosen.
  else return listTop();
  listTop();
  return begin(form);
}

export function compare() {
  if ($("compare").checked || state.chosen.length < 2) return listTop();
  state.chosen = state.chosen.slice(0, 1);
  listTop();
  return begin();
}

// Whether signed maps are wanted: where the user wants both colours, and of questions that may be differences.
export const wantsBoth = () => $("both").checked || state.chosen.some((target) => !/^\d+$/.test(target));

// Forms.

const given = (id) => $(id).value.trim();
const quoted = (text) => `"${text}"`;

// The target of each form in the words of a request; empty where something is missing.
const TARGETS = {
  "ask-class": () => given("other"),
  "ask-contrast": () => {
    const [one, other] = ["this", "that"].map((id) => given(id) || $(id).placeholder);
    return one && other ? `${quoted(one)}-${quoted(other)}` : "";
  },
  "ask-text": () => given("text") && `text:${given("text")}${given("not-text") && ` - text:${given("not-text")}`}`,
  "ask-patch": () => given("row") && given("column") && `patch:${Number(given("row"))},${Number(given("column"))}`,
};

export function send(form) {
  clean(form);
  const target = TARGETS[form.id]();
  const field = form.querySelector("input");
  if (!target) return field.focus();
  mark();
  before = [...state.chosen];
  if (state.chosen.includes(target)) return undefined;
  return choose(target, true, form);
}

// Show at a form what the server says against its question, and take the question back.
export function refused(form, error) {
  state.chosen = before;
  listTop();
  say("Not explained");
  hear("");
  form.querySelector(".wrong").textContent = error.message;
  for (const field of form.querySelectorAll("input")) field.setAttribute("aria-invalid", "true");
  form.querySelector("input").focus();
}

function clean(form) {
  form.querySelector(".wrong").textContent = "";
  for (const field of form.querySelectorAll("input")) field.removeAttribute("aria-invalid");
}

// Patches.

// Ask about the patch of the photograph that was clicked.
export function pick(event) {
  if (!answers("patches") || $("questions").disabled) return;
  const [rows, columns] = model().grid;
  const { width, height } = $("photo").getBoundingClientRect();
  const place = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor((count * at) / size)));
  $("row").value = place(event.offsetY, height, rows);
  $("column").value = place(event.offsetX, width, columns);
  send($("ask-patch"));
}

// Mark the patch of the form in the photograph.
export function mark() {
  const [rows, columns] = model()?.grid ?? [1, 1];
  const [row, column] = [$("row"), $("column")].map((field) => (field.value && field.checkValidity() ? Number(field.value) : -1));
  const cell = $("cell");
  cell.hidden = !answers("patches") || !state.image?.photo || row < 0 || column < 0;
  Object.assign(cell.style, {
    top: `${(100 * row) / rows}%`, left: `${(100 * column) / columns}%`, height: `${100 / rows}%`, width: `${100 / columns}%`,
  });
}
