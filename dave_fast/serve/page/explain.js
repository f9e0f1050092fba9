// Explanations: an image is sent to /v1/images once, and maps are streamed from /v1/explain/stream.

import { drawCurve, drawMaps, nameDepth, showErrors } from "./maps.js";
import { canAsk, predicted, refused, unask, wantsBoth } from "./questions.js";
import { ask, events, withImage } from "./server.js";
import { $, answers, hear, model, percent, problem, say, state } from "./shared.js";

// How often a busy server is asked.
const TRIES = 5;

// Images.

export async function take(file) {
  stop();
  show(null);
  try {
    const content = new Blob([await file.arrayBuffer().catch(() => { throw new Error("That could not be read; give one image file."); })], { type: file.type });
    state.image = { content, name: file.name || "the image" };
    unask();
    clear();
    $("welcome").hidden = true;
    $("result").hidden = false;
    await explain();
  } catch (error) {
    failed(error);
  }
}

// Maps of another crop are removed at once; those of the same crop stay until new ones arrive.
export function clear() {
  state.latest = state.accounts = null;
  nameDepth();
  $("maps").replaceChildren();
}

async function see(mine, signal) {
  const name = $("model").value;
  if (mine.seenBy === name) return;
  const answer = await withImage(mine, signal, () => ask(`v1/images/${mine.id}/crop?model=${encodeURIComponent(name)}`, { signal }));
  const picture = await createImageBitmap(await answer.blob());
  const canvas = $("photo");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  mine.photo = context.getImageData(0, 0, canvas.width, canvas.height);
  mine.seenBy = name;
}

// Explanations.

// Explain what is chosen. What the server says against a question is shown at its form, if one is given.
export async function explain(form = null) {
  const { image } = state;
  if (!image || !numbersHold()) return;
  stop();
  const mine = (state.running = new AbortController());
  const { curve } = state;
  state.curve = [];
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
    if (error.name === "AbortError" || state.running !== mine) return;
    if (!form || error.status !== 422) return failed(error);
    // The maps before it stay.
    state.curve = curve;
    if (state.latest) {
      show(state.latest);
      drawCurve();
    }
    refused(form, error);
  } finally {
    if (state.running === mine) finish();
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
  canAsk();
  if (!state.chosen.length && !answers("classes")) {
    const ways = [["texts", "Ask about a text"], ["patches", "Ask about a patch"]];
    const way = ways.find(([kind]) => answers(kind))?.[1] ?? "The page has no questions for this model; its routes do";
    say(way);
    return hear(`${way}.`);
  }
  const answer = await withImage(mine, signal, () => ask(`v1/explain/stream?${query(mine)}`, { signal }));
  for await (const [name, told] of events(answer)) {
    signal.throwIfAborted();
    if (name === "prediction") {
      predicted(told);
      nameDepth();
    } else arrived(told, name === "done");
  }
}

function numbersHold() {
  const wrong = [...document.querySelectorAll("details input[type=number]")].find((field) => !field.checkValidity());
  if (!wrong) return true;
  wrong.closest("details").open = true;
  wrong.reportValidity();
  return false;
}

function query(mine) {
  const asked = new URLSearchParams({ image: mine.id, model: $("model").value, n_samples: $("samples").value, seed: $("seed").value, shrink: $("shrink").checked, encoding: "uint8" });
  if ($("tolerance").value) asked.set("tolerance", $("tolerance").value);
  if (model().blocks) asked.set("depth", ["pixels", ...Array(model().blocks).keys()]);
  if (wantsBoth()) asked.set("signed", true);
  for (const target of state.chosen) asked.append("target", target);
  return asked;
}

function finish() {
  state.running = null;
  $("stop").disabled = true;
  $("maps").setAttribute("aria-busy", "false");
}

export function stop() {
  state.running?.abort();
  finish();
}

function arrived(told, final) {
  state.latest = { ...told, final, asked: [...state.chosen] };
  state.curve.push({ samples: told.samples, maps: told.maps.map((one) => (one.depths ?? [one]).map(({ error, error_bound }) => ({ error, error_bound }))) });
  const ends = { tolerance: "Good enough", deadline: "At the deadline", shutdown: "Cut short: the server ends" };
  const how = final ? ends[told.cut_short] ?? "Done" : "Refining";
  say(final ? `${how}, in ${(told.total_ms / 1000).toFixed(1)} s` : `${how} …`);
  const { error_bound } = show(told);
  if (final) hear(`${how}: ${told.samples} samples, ${error_bound === null ? "error unknown" : `error below ${percent(error_bound)}`}.`);
  // What was assumed about the file.
  if (final) $("problem").textContent = told.notes.join(" ");
  drawMaps();
  drawCurve();
}

function show(told) {
  $("problem").textContent = "";
  $("progress").value = told ? told.samples / told.n_samples : 0;
  $("told-samples").textContent = told ? `${told.samples} / ${told.n_samples}` : "–";
  return showErrors(told);
}

export function failed(error) {
  say("Not explained");
  if (!state.image?.photo) [$("welcome").hidden, $("result").hidden] = [false, true];
  problem(error);
}
