// Requests to the server: API keys, error messages, images that it stores, server-sent events.

let key = sessionStorage.getItem("dave-fast-key") ?? "";

// An error of the server. status: HTTP status, null without an answer; wait: seconds until a busy server can be asked.
export class ServerProblem extends Error {
  constructor(message, status = null, wait = null) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

export async function ask(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : gone();
    }
    if (answer.ok) return answer;
    if (answer.status !== 401 || !(await askForKey())) throw await refusal(answer);
  }
}

function gone() {
  return new ServerProblem("The server does not answer. See whether it is running, then explain again.");
}

async function refusal(answer) {
  const told = await answer.json().catch(() => ({}));
  const busy = answer.status === 429 || answer.status === 503;
  const wait = busy ? Number(answer.headers.get("retry-after")) || 1 : null;
  return new ServerProblem(sentence(told.detail ?? `The server answered ${answer.status}.`), answer.status, wait);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

async function askForKey() {
  const dialog = document.getElementById("key-dialog");
  const field = document.getElementById("key");
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  key = dialog.returnValue ? field.value.trim() : "";
  sessionStorage.setItem("dave-fast-key", key);
  return key !== "";
}

async function upload(image, signal) {
  const type = image.content.type || "application/octet-stream";
  const answer = await ask("v1/images", { method: "POST", body: image.content, headers: { "content-type": type }, signal });
  image.id = (await answer.json()).image;
}

// Make a call that names the image, which is sent first, and sent again if the server has dropped it.
export async function withImage(image, signal, call) {
  if (!image.id) await upload(image, signal);
  try {
    return await call();
  } catch (error) {
    if (error.status !== 404) throw error;
    await upload(image, signal);
    return call();
  }
}

// Yield [name, data] of each event; throw ServerProblem if the stream ends early.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : gone();
    });
    if (done) throw new ServerProblem("The stream broke off before the answer. Explain again.");
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const name = block.match(/^event: (.*)$/m)?.[1];
      if (!name) continue;
      const told = JSON.parse(block.match(/^data: (.*)$/m)[1]);
      if (name === "error") throw new ServerProblem(sentence(told.detail), told.status);
      yield [name, told];
      if (name === "done") return;
    }
  }
}
