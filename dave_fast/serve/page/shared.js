// What the modules of the page share: its state, elements, and the words that it shows.

export const state = {
  models: [],
  // The image: {content: Blob, name, id, photo: ImageData of the crop, seenBy: the model that has this crop}.
  image: null,
  // Targets to explain, in the words of a request: "4", "text:a cat"; empty: the most probable class.
  chosen: [],
  // The most probable classes, and what the user has added: {target, name, probability}.
  top: [],
  others: [],
  // AbortController of the explanation that is running.
  running: null,
  // The latest maps or the answer, with `asked`, the targets of its maps.
  latest: null,
  // The errors so far: {samples, maps: [one for each target: [one for each depth: {error, error_bound}]]}.
  curve: [],
  // What each depth accounts for of the scores, with names; null for a model that has pixels alone.
  accounts: null,
};

export const $ = (id) => document.getElementById(id);

export const model = () => state.models.find((one) => one.name === $("model").value);
export const answers = (kind) => model()?.questions.includes(kind) ?? false;

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

// A class without a probability: chosen by the user, or of a model that has none.
export const chance = (probability) => (probability === null ? "" : percent(probability));

// The visible status changes with every event; screen readers announce the beginning, the end and problems only.
export function say(text) {
  $("status").textContent = text;
}

export function hear(text) {
  $("heard").textContent = text;
}

export function problem(error) {
  hear("");
  $("problem").textContent = error.message;
}
