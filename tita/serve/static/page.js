// The page at /: one question to the base and to the aligned model, side by side.

const by = (id) => document.getElementById(id);
const MAX_SIDE = 1344; // pixels; more is only upload time, models look at far fewer
let image = null; // data: URL
let stopper = null;

by("weight").addEventListener("input", () => {
  by("shown").textContent = Number(by("weight").value).toFixed(2);
});

by("file").addEventListener("change", () => take(by("file").files[0]));
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) take(file);
});
const drop = by("drop");
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  drop.addEventListener(name, () => drop.classList.remove("over"));
}
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
drop.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") by("file").click();
});

async function take(file) {
  if (!file) return;
  try {
    image = await shrunk(file);
  } catch {
    by("hint").textContent = `${file.name} is not an image that this browser can read`;
    return;
  }
  by("preview").src = image;
  by("preview").alt = file.name;
  by("preview").hidden = false;
  by("hint").hidden = true;
}

async function shrunk(file) {
  const bitmap = await createImageBitmap(file);
  const scale = MAX_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1) return read(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
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

by("stop").addEventListener("click", () => stopper?.abort());
by("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopper?.abort();
  const mine = (stopper = new AbortController());
  document.body.dataset.state = "asking";
  by("stop").disabled = false;
  const weight = Number(by("weight").value);
  const names = await modelNames(mine.signal);
  if (names) {
    await Promise.all([
      answer("base", { model: names.base }, mine.signal),
      answer("aligned", { model: names.aligned, guidance_weight: weight }, mine.signal),
    ]);
  }
  if (stopper !== mine) return;
  by("stop").disabled = true;
  document.body.dataset.state = "done";
});

function headers() {
  const key = by("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function modelNames(signal) {
  try {
    const response = await fetch("/v1/models", { headers: headers(), signal });
    if (!response.ok) throw new Error(await refusal(response));
    const ids = (await response.json()).data.map((each) => each.id);
    return { aligned: ids[0], base: ids.find((id) => id.endsWith(":base")) };
  } catch (error) {
    for (const side of ["base", "aligned"]) tell(side, error);
    return null;
  }
}

async function answer(side, wanted, signal) {
  const place = by(side);
  place.replaceChildren();
  place.classList.remove("error");
  by(`${side}-cost`).textContent = "";
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
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) show(side, event);
  } catch (error) {
    tell(side, error);
  }
}

async function refusal(response) {
  if (response.status === 401) by("access").open = true;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server said ${response.status}`;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

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
      `${all} tokens, ${changed} changed; base ${base_ms.toFixed(0)} ms, reward ${reward_ms.toFixed(0)} ms`;
  }
}

function thoughts(token) {
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
  const reward = token.reward === null ? "" : `, reward ${percent(token.reward)}`;
  return `${token.token}: base ${percent(token.base)}${reward}, together ${percent(token.combined)}`;
}

function tell(side, error) {
  const place = by(side);
  if (error.name === "AbortError") {
    by(`${side}-cost`).textContent = "stopped";
    return;
  }
  place.classList.add("error");
  place.append(error.message);
}
