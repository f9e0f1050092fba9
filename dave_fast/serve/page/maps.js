// Maps: their panels, depths, errors, and files.

import { COLOURS, paint, plot, png } from "./pictures.js";
import { listAnswer } from "./questions.js";
import { ask, withImage } from "./server.js";
import { $, chance, hear, make, model, percent, problem, state } from "./shared.js";

// Errors.

// Show the largest errors of the targets at the depth that is shown, null where one is unknown, and return them.
export function showErrors(told) {
  const largest = (name) => told?.maps.map((one) => shown(one)[name]).reduce((most, one) => (most === null || one === null ? null : Math.max(most, one))) ?? null;
  const found = { error: largest("error"), error_bound: largest("error_bound") };
  $("told-error").textContent = found.error === null ? "–" : percent(found.error);
  $("told-bound").textContent = found.error_bound === null ? "–" : percent(found.error_bound);
  return found;
}

export function drawCurve() {
  const points = state.curve.map(({ samples, maps }) => ({ samples, maps: maps.map((depths) => depths[depths.length > 1 ? level() : 0]) }));
  const known = points.filter((point) => point.maps.every((one) => one.error !== null));
  $("error").hidden = known.length === 0;
  if (!known.length) return;
  plot($("curve"), known, Math.max(state.latest.n_samples, 2), Number($("tolerance").value));
  $("curve-text").textContent = "Error of the map by samples: the estimate (line), and what it is below nine times in ten (top of the band)";
}

// Depths: the answer has all of them, and the slider chooses: 0 for the pixels, 1 for block 0, and so on.

const blocks = () => model()?.blocks ?? 0;
const level = () => Number($("depth").value);
const depthName = () => (level() ? `block ${level() - 1} of ${blocks()}` : "pixels");

// A target with the map and the errors of the depth that is shown.
const shown = (one) => (one.depths ? { ...one, ...one.depths[level()] } : one);

export function offerDepths() {
  $("depth").max = blocks();
  $("depths").hidden = !blocks();
  nameDepth();
}

export function nameDepth() {
  $("depth-value").textContent = depthName();
  $("depth").setAttribute("aria-valuetext", depthName());
  const accounts = state.accounts ?? [];
  const told = accounts.map(({ name, score, pixels, patches, prefix }) => {
    const carried = level() ? patches[level() - 1] + prefix[level() - 1] : pixels;
    const share = score > 0 ? ` (${Math.round((100 * carried) / score)}\u00a0%)` : "";
    return `${carried.toFixed(2)} of the score ${score.toFixed(2)}${share}${accounts.length > 1 ? ` of ${name}` : ""}`;
  });
  const what = level() ? "The tokens that enter this block" : "The pixels";
  $("depth-share").textContent = told.length ? `${what} account for ${told.join(", ")}.` : "";
}

export function chooseDepth() {
  nameDepth();
  const address = new URL(location);
  if (level()) address.searchParams.set("depth", level() - 1);
  else address.searchParams.delete("depth");
  history.replaceState(null, "", address);
  if (!state.latest) return;
  showErrors(state.latest);
  drawMaps();
  drawCurve();
}

// Pictures.

// Differences are always shown in two colours, since half of them would say half of it.
const isDifference = (one) => one.target < 0 && one.class_name.includes(" − ");
const inTwoColours = (one) => one.signed && (isDifference(one) || $("both").checked);

export function drawMaps() {
  const { latest } = state;
  const panels = $("maps");
  if ([...panels.children].map((one) => one.dataset.target).join("\n") !== latest.asked.join("\n")) panels.replaceChildren(...latest.maps.map(panel));
  latest.maps.map(shown).forEach((one, number) => {
    const article = panels.children[number];
    const way = inTwoColours(one) ? `orange where it speaks for ${one.class_name}, blue where against` : `where it speaks for ${one.class_name}`;
    article.querySelector("canvas").setAttribute("aria-label", `Map of ${level() ? `what enters ${depthName()}` : "the pixels"}, ${way}`);
    article.querySelector(".said").textContent = one.error_bound === null ? "error not known yet" : `error about ${percent(one.error)}, below ${percent(one.error_bound)}`;
    for (const button of article.querySelectorAll("button")) button.disabled = !latest.final;
  });
  const signed = latest.maps.map((one) => Boolean(inTwoColours(shown(one))));
  $("one-colour").hidden = signed.every(Boolean);
  $("two-colours").hidden = !signed.some(Boolean);
  if (latest.final) listAnswer(latest.maps, latest.asked);
  repaint();
}

export function repaint() {
  const opacity = Number($("opacity").value) / 100;
  state.latest?.maps.map(shown).forEach((one, number) => {
    const canvas = $("maps").children[number]?.querySelector("canvas");
    if (canvas && state.image.photo) paint(canvas, state.image.photo, inTwoColours(one) ? one.signed : one.map, opacity);
  });
}

function panel(one, number) {
  const canvas = make("canvas");
  canvas.setAttribute("role", "img");
  const swatch = make("span", { className: `swatch c${number % COLOURS}`, ariaHidden: "true" });
  const title = make("h3", {}, swatch, make("span", { className: "name", title: one.class_name }, one.class_name), make("span", { className: "percent" }, chance(one.probability)));
  const target = state.latest.asked[number];
  const actions = [["PNG", async () => save(await png(canvas), one, "png")], [".npz", () => saveArrays(one, target)]];
  const buttons = actions.map(([kind, action]) => {
    const button = make("button", { type: "button", className: "quiet", disabled: true }, `Save ${kind}`, make("span", { className: "sr" }, ` of ${one.class_name}`));
    button.addEventListener("click", () => action().catch(problem));
    return button;
  });
  const article = make("article", {}, title, canvas, make("p", { className: "said" }), make("div", { className: "row" }, ...buttons));
  article.dataset.target = target;
  return article;
}

// Files.

async function saveArrays(one, target) {
  // The number of samples and the depth that are shown, of this target only.
  const { model: name, seed, samples, shrink } = state.latest;
  const asked = () => new URLSearchParams({ image: state.image.id, model: name, seed, n_samples: samples, shrink, depth: level() ? level() - 1 : "pixels", target });
  const answer = await withImage(state.image, undefined, () => ask(`v1/explain?${asked()}`, { method: "POST", headers: { accept: "application/x-npz" } }));
  save(await answer.blob(), one, "npz");
}

function save(blob, one, kind) {
  const name = `${one.class_name}${level() ? ` block ${level() - 1}` : ""}`.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  const link = make("a", { href: URL.createObjectURL(blob), download: `dave-${name}.${kind}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  hear(`Saved ${link.download}.`);
}
