// The page at /: one question to the base and to the aligned model, side by side.

const by = (id) => document.getElementById(id);
const SIDES = ["base", "aligned"];
const MAX_SIDE = 1344; // pixels; more is only upload time, models look at far fewer
const MAX_BYTES = 4 * 2 ** 20; // of a file that is sent as it is
const AWAY = "The server cannot be reached. Is it running, and is this machine online?";
const BROKE_OFF = "The answer broke off. Is the server still running?";
const NO_KEY = "This server wants an API key. Enter it under More.";
const WRONG_KEY = "The server does not know this API key. Enter another under More.";
const AS_IT_IS = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // what all servers can read
let image = null; // data: URL
let stopper = null;

// The image: chosen, dropped anywhere on the page, or pasted.

by("file").addEventListener("change", () => by("file").files[0] && take(by("file").files[0]));
by("remove").addEventListener("click", () => {
  image = null;
  by("file").value = "";
  picture("", "");
  hint("Drop an image here, paste one, or click");
  by("file").focus();
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) take(file);
});
// Words may still be dragged about in the question.
const ours = ({ dataTransfer, target }) =>
  dataTransfer.types.includes("Files") || !target.closest?.("textarea, input");
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if (!ours(event)) return;
    event.preventDefault(); // or the browser would leave this page for the file
    by("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", () => by("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  if (!ours(event)) return;
  event.preventDefault();
  by("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});

async function take(file) {
  // What is dragged over from another page can be an address alone, which is not ours to fetch.
  if (!file) return hint("That was no file. Save the image first, or copy it and paste it here", "error");
  try {
    image = await shrunk(file);
  } catch {
    hint(`${file.name} is not an image that this browser can read`, "error");
    return;
  }
  picture(image, file.name);
  hint("");
}

function picture(source, name) {
  by("preview").src = source;
  by("preview").alt = name;
  by("preview").hidden = by("remove").hidden = !source;
}

function hint(text, kind = "") {
  by("hint").textContent = text;
  by("hint").className = kind;
  by("hint").hidden = !text;
}

async function shrunk(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= MAX_BYTES && AS_IT_IS.includes(file.type)) return read(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}

// What the server can do: its own weight, and the forms that its models allow.

const shown = () => (by("shown").textContent = Number(by("weight").value).toFixed(2));
by("weight").addEventListener("input", shown);
by("key").addEventListener("change", meet);
meet();

async function meet() {
  let aligned;
  try {
    ({ aligned } = await models());
  } catch {
    return; // a key is asked for; all else is told when something is asked
  }
  by("weight").max = Math.max(1, aligned.guidance_weight);
  by("weight").value = aligned.guidance_weight;
  by("weight").disabled = !aligned.reward;
  shown();
  const own = by("form-name").options[0];
  by("form-name").replaceChildren(own, ...aligned.guidance_forms.map((form) => new Option(form)));
  by("base-title").textContent = `Base: ${short(aligned.base)}`;
  if (aligned.reward) by("aligned-title").textContent = `Guided by ${short(aligned.reward)}`;
}

function short(model) {
  return model.name.replace(/\/+$/, "").split("/").slice(-2).join("/");
}

async function models(signal) {
  const response = await call("/v1/models", { signal });
  const [aligned, base] = (await response.json()).data;
  return { aligned, base };
}

// Asking.

by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) by("form").requestSubmit();
});
by("stop").addEventListener("click", () => stopper?.abort());
by("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopper?.abort();
  const mine = (stopper = new AbortController());
  begin();
  const weight = Number(by("weight").value);
  const form = by("form-name").value;
  try {
    const { aligned, base } = await models(mine.signal);
    const guidance = aligned.reward
      ? { guidance_weight: weight, ...(form && { guidance_form: form }) }
      : {};
    await Promise.all([
      answer("base", { model: base.id }, mine.signal),
      answer("aligned", { model: aligned.id, ...guidance }, mine.signal),
    ]);
  } catch (error) {
    if (stopper === mine) for (const side of SIDES) tell(side, error);
  }
  if (stopper !== mine) return;
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

async function answer(side, wanted, signal) {
  const content = [{ type: "text", text: by("question").value }];
  if (image) content.unshift({ type: "image_url", image_url: { url: image } });
  const body = {
    ...wanted,
    messages: [{ role: "user", content }],
    stream: true,
    stream_options: { include_usage: true },
    explain: true,
  };
  try {
    const response = await call("/v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal,
    });
    for await (const event of events(response)) show(side, event);
    by(side).parentElement.ariaBusy = "false";
  } catch (error) {
    if (!signal.aborted || stopper.signal === signal) tell(side, error);
  }
}

async function call(path, options) {
  const key = by("key").value.trim();
  const headers = {
    "content-type": "application/json",
    ...(key && { authorization: `Bearer ${key}` }),
  };
  const response = await fetch(path, { ...options, headers }).catch(orElse(AWAY));
  by("key-error").textContent = response.status === 401 ? (key ? WRONG_KEY : NO_KEY) : "";
  if (!response.ok) throw new Error(await refusal(response));
  return response;
}

// What browsers say of a lost connection differs, and helps nobody.
function orElse(message) {
  return (error) => {
    throw error.name === "AbortError" ? error : new Error(message);
  };
}

async function refusal(response) {
  if (response.status === 401) {
    by("more").open = true;
    return by("key-error").textContent;
  }
  try {
    const { message } = (await response.json()).error;
    return message[0].toUpperCase() + message.slice(1);
  } catch {
    return `The server said ${response.status}.`;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(orElse(BROKE_OFF));
    if (done) throw new Error(BROKE_OFF);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// Showing.

function show(side, event) {
  if (event.error) throw new Error(event.error.message);
  for (const choice of event.choices) {
    const text = choice.delta.content;
    if (!text) continue;
    const tokens = choice.explain ?? [];
    const changed = tokens.some((token) => token.changed);
    const piece = document.createElement(changed ? "mark" : "span");
    piece.textContent = text;
    if (tokens.length) piece.title = tokens.map(thoughts).join("; ");
    by(side).append(piece);
  }
  if (event.usage) {
    const { completion_tokens: all, changed_tokens: changed, base_ms, reward_ms } = event.usage;
    by(`${side}-cost`).textContent =
      `${all} token${all === 1 ? "" : "s"}, ${changed} changed; ` +
      `base ${base_ms.toFixed(0)} ms, reward ${reward_ms.toFixed(0)} ms`;
    if (!by(side).textContent) by(side).append(nothing());
  }
}

function nothing() {
  const note = document.createElement("span");
  note.className = "nothing";
  note.textContent = "ended without a word";
  return note;
}

function thoughts(token) {
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
  const reward = token.reward === null ? "" : `, reward ${percent(token.reward)}`;
  return `${token.token}: base ${percent(token.base)}${reward}, together ${percent(token.combined)}`;
}

function tell(side, error) {
  by(side).parentElement.ariaBusy = "false";
  if (error.name === "AbortError") by(`${side}-cost`).textContent = "stopped";
  else by(`${side}-error`).textContent = error.message;
}
