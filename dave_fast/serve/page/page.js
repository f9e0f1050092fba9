// The page of a dave-fast server: what its elements do.

import { clear, explain, stop, take } from "./explain.js";
import { chooseDepth, drawCurve, drawMaps, nameDepth, offerDepths, repaint } from "./maps.js";
import { compare, mark, offerQuestions, pick, send, unask } from "./questions.js";
import { ask } from "./server.js";
import { $, hear, make, problem, say, state } from "./shared.js";

async function example() {
  try {
    take(new File([await (await ask("example.png")).blob()], "the example", { type: "image/png" }));
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

function changeModel() {
  unask();
  clear();
  offerQuestions();
  offerDepths();
  explain();
}

// Maps in two colours are asked for where the latest have none.
function changeColours() {
  const { latest } = state;
  if (!latest) return;
  const has = latest.maps.every((one) => (one.depths?.[0] ?? one).signed);
  if ($("both").checked && !has) explain();
  else drawMaps();
}

async function begin() {
  try {
    state.models = await (await ask("v1/models")).json();
    $("model").replaceChildren(...state.models.map((one) => make("option", { value: one.name }, one.name)));
    offerQuestions();
    offerDepths();
    $("shrink").checked = state.models[0].shrink;
    const asked = new URLSearchParams(location.search);
    if (/^\d+$/.test(asked.get("depth"))) $("depth").value = Number(asked.get("depth")) + 1;
    nameDepth();
    if (asked.has("example")) await example();
  } catch (error) {
    problem(error);
  }
}

$("example").addEventListener("click", example);
$("file").addEventListener("change", () => {
  if ($("file").files.length) given($("file").files);
  // Cleared so that choosing the same file again is a change.
  $("file").value = "";
});
$("model").addEventListener("change", changeModel);
$("compare").addEventListener("change", compare);
addEventListener("chosen", (event) => explain(event.detail));
$("again").addEventListener("click", () => explain());
$("stop").addEventListener("click", () => { stop(); say("Stopped"); hear("Stopped."); $("again").focus(); });
for (const form of document.querySelectorAll("#questions form")) {
  form.addEventListener("submit", (event) => { event.preventDefault(); send(form); });
}
$("photo").addEventListener("click", pick);
for (const id of ["row", "column"]) $(id).addEventListener("input", mark);
for (const id of ["samples", "seed", "tolerance", "shrink"]) $(id).addEventListener("change", () => explain());
$("both").addEventListener("change", changeColours);
$("depth").addEventListener("input", chooseDepth);
$("opacity").addEventListener("input", () => { $("opacity-value").textContent = `${$("opacity").value} %`; repaint(); });
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => { event.preventDefault(); document.body.classList.add("dragging"); });
}
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dragging"));
addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("dragging"); given(event.dataTransfer.files); });
addEventListener("paste", (event) => event.clipboardData?.files.length && given(event.clipboardData.files));
new ResizeObserver(() => state.latest && drawCurve()).observe($("curve"));
begin();
