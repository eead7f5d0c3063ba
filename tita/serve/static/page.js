// The page at /: sends one question to the base model and to the aligned model, side by side.

const ROOT = new URL("../", import.meta.url); // of the server; a proxy may serve it below a prefix
const by = (id) => document.getElementById(id);
const SIDES = ["base", "aligned"];
const MAX_SIDE = 1344; // pixels; models use fewer, so larger images only take longer to upload
const MAX_BYTES = 4 * 2 ** 20; // of a file that is sent unchanged
const UNREACHABLE = "The server cannot be reached. Check that it is running and that this machine is online.";
const ENDED_EARLY = "The stream ended early. Check that the server is running.";
const KEY_REQUIRED = "This server requires an API key. Enter it under More.";
const KEY_INVALID = "This API key is not valid. Enter another one under More.";
const PORTABLE = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // formats that every server can decode
let image = null; // data: URL
let stopper = null;

// The image: selected, dropped anywhere on the page, or pasted.

by("file").addEventListener("change", () => by("file").files[0] && loadImage(by("file").files[0]));
by("remove").addEventListener("click", () => {
  image = null;
  by("file").value = "";
  showImage("", "");
  showHint("Drop an image here, paste one, or click");
  by("file").focus();
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) loadImage(file);
});
// Dragging text within the form keeps working.
const handlesDrag = ({ dataTransfer, target }) =>
  dataTransfer.types.includes("Files") || !target.closest?.("textarea, input");
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if (!handlesDrag(event)) return;
    event.preventDefault(); // otherwise the browser opens the file instead of this page
    by("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", () => by("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  if (!handlesDrag(event)) return;
  event.preventDefault();
  by("drop").classList.remove("over");
  loadImage(event.dataTransfer.files[0]);
});

async function loadImage(file) {
  // An image dragged from another page may be only a URL.
  if (!file) return showHint("This is not a file. Save the image first, or copy it and paste it here.", "error");
  try {
    image = await downscale(file);
  } catch {
    showHint(`${file.name} is not an image that this browser can read.`, "error");
    return;
  }
  showImage(image, file.name);
  showHint("");
}

function showImage(source, name) {
  by("preview").src = source;
  by("preview").alt = name;
  by("preview").hidden = by("remove").hidden = !source;
}

function showHint(text, kind = "") {
  by("hint").textContent = text;
  by("hint").className = kind;
  by("hint").hidden = !text;
}

async function downscale(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= MAX_BYTES && PORTABLE.includes(file.type)) return readAsDataURL(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

function readAsDataURL(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}

// The server's default weight, its guidance forms, and its models.

const showWeight = () => (by("shown").textContent = Number(by("weight").value).toFixed(2));
by("weight").addEventListener("input", showWeight);
let viewForms = [];
let defaultForm = "";
by("form-name").addEventListener("change", allowWeights);
by("key").addEventListener("change", showModels);
showModels();

async function showModels() {
  let aligned;
  try {
    ({ aligned } = await models());
  } catch {
    return; // `call` reports a missing key; other errors are shown when a question is asked
  }
  const rewards = Object.keys(aligned.rewards);
  if (rewards.length > 1) {
    const weights = aligned.guidance_weights ?? {};
    by("weights").replaceChildren(...rewards.flatMap((name) => slider(name, weights[name] ?? 0)));
  } else {
    by("weight").max = Math.max(1, aligned.guidance_weight);
    by("weight").value = aligned.guidance_weight;
    by("weight").disabled = !rewards.length;
    showWeight();
  }
  viewForms = aligned.guidance_view_forms;
  defaultForm = aligned.guidance_form;
  const serverDefault = by("form-name").options[0];
  by("form-name").replaceChildren(serverDefault, ...aligned.guidance_forms.map((form) => new Option(form)));
  if (rewards.length) allowWeights();
  by("base-title").textContent = `Base: ${short(aligned.base)}`;
  const steering = aligned.reward ? short(aligned.reward) : rewards.join(", ");
  if (steering) by("aligned-title").textContent = `Guided by ${steering}`;
}

// A labelled slider for the weight of one of several reward models.
function slider(name, weight) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const shown = document.createElement("output");
  input.id = label.htmlFor = `weight-${name}`;
  Object.assign(input, { type: "range", min: 0, max: Math.max(1, weight), step: 0.05, value: weight });
  input.dataset.reward = name;
  const show = () => (shown.textContent = Number(input.value).toFixed(2));
  input.addEventListener("input", show);
  show();
  label.append(`Weight of ${name} `, shown);
  return [label, input];
}

// A form that needs no reward model has a weight of its own, the server's default.
function allowWeights() {
  const off = viewForms.includes(by("form-name").value || defaultForm);
  for (const input of by("weights").querySelectorAll("input")) input.disabled = off;
}

function guidanceOf(aligned) {
  const form = by("form-name").value;
  const chosen = form ? { guidance_form: form } : {};
  if (aligned.guidance_view_forms.includes(form || aligned.guidance_form)) return chosen;
  const rewards = Object.keys(aligned.rewards);
  if (!rewards.length) return {};
  if (rewards.length === 1) return { guidance_weight: Number(by("weight").value), ...chosen };
  const weights = rewards.map((name) => [name, Number(by(`weight-${name}`).value)]);
  return { guidance_weights: Object.fromEntries(weights), ...chosen };
}

function short(model) {
  return model.name.replace(/\/+$/, "").split("/").slice(-2).join("/");
}

async function models(signal) {
  const response = await call("v1/models", { signal });
  const [aligned, base] = (await response.json()).data;
  return { aligned, base };
}

// Sending a question.

by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) by("form").requestSubmit();
});
by("stop").addEventListener("click", () => stopper?.abort());
by("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopper?.abort();
  const controller = (stopper = new AbortController());
  begin();
  try {
    const { aligned, base } = await models(controller.signal);
    const guidance = guidanceOf(aligned);
    await Promise.all([
      answer("base", { model: base.id }, controller.signal),
      answer("aligned", { model: aligned.id, ...guidance }, controller.signal),
    ]);
  } catch (error) {
    if (stopper === controller) for (const side of SIDES) showError(side, error);
  }
  if (stopper !== controller) return;
  by("stop").disabled = true;
  document.body.dataset.state = "done";
});

function begin() {
  document.body.dataset.state = "asking";
  by("stop").disabled = false;
  for (const side of SIDES) {
    by(side).replaceChildren();
    by(`${side}-error`).textContent = by(`${side}-cost`).textContent = "";
    by(side).parentElement.ariaBusy = "true";
  }
}

async function answer(side, fields, signal) {
  const content = [{ type: "text", text: by("question").value }];
  if (image) content.unshift({ type: "image_url", image_url: { url: image } });
  const body = {
    ...fields,
    messages: [{ role: "user", content }],
    stream: true,
    stream_options: { include_usage: true },
    explain: true,
  };
  try {
    const response = await call("v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal,
    });
    for await (const event of events(response)) show(side, event);
    by(side).parentElement.ariaBusy = "false";
  } catch (error) {
    if (!signal.aborted || stopper.signal === signal) showError(side, error);
  }
}

async function call(path, options) {
  const key = by("key").value.trim();
  const headers = {
    "content-type": "application/json",
    ...(key && { authorization: `Bearer ${key}` }),
  };
  const response = await fetch(new URL(path, ROOT), { ...options, headers }).catch(orThrow(UNREACHABLE));
  by("key-error").textContent = response.status === 401 ? (key ? KEY_INVALID : KEY_REQUIRED) : "";
  if (!response.ok) throw new Error(await errorMessage(response));
  return response;
}

// The message for a lost connection differs between browsers.
function orThrow(message) {
  return (error) => {
    throw error.name === "AbortError" ? error : new Error(message);
  };
}

async function errorMessage(response) {
  if (response.status === 401) {
    by("more").open = true;
    return by("key-error").textContent;
  }
  try {
    const { message } = (await response.json()).error;
    return message[0].toUpperCase() + message.slice(1);
  } catch {
    return `The server returned status ${response.status}.`;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(orThrow(ENDED_EARLY));
    if (done) throw new Error(ENDED_EARLY);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// Showing the answers.

function show(side, event) {
  if (event.error) throw new Error(event.error.message);
  for (const choice of event.choices) {
    const text = choice.delta.content;
    if (!text) continue;
    const tokens = choice.explain ?? [];
    const changed = tokens.some((token) => token.changed);
    const piece = document.createElement(changed ? "mark" : "span");
    piece.textContent = text;
    if (tokens.length) piece.title = tokens.map(describe).join("; ");
    by(side).append(piece);
  }
  if (event.usage) {
    const { completion_tokens: all, changed_tokens: changed, base_ms, reward_ms } = event.usage;
    by(`${side}-cost`).textContent =
      `${all} token${all === 1 ? "" : "s"}, ${changed} changed; ` +
      `base ${base_ms.toFixed(0)} ms, reward ${reward_ms.toFixed(0)} ms`;
    if (!by(side).textContent) by(side).append(emptyNote());
  }
}

function emptyNote() {
  const note = document.createElement("span");
  note.className = "empty";
  note.textContent = "empty answer";
  return note;
}

function describe(token) {
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
  const terms = Object.entries(token.terms).map(([name, logprob]) => `${name} ${percent(logprob)}`);
  return `${token.token}: ${terms.join(", ")}, combined ${percent(token.combined)}`;
}

function showError(side, error) {
  by(side).parentElement.ariaBusy = "false";
  if (error.name === "AbortError") by(`${side}-cost`).textContent = "stopped";
  else by(`${side}-error`).textContent = error.message;
}
