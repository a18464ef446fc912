// The server's API: requests, streams, and the same request as a command.

export const PREVIEWS = 3;

function headers(key) {
  const result = { "Content-Type": "application/json" };
  if (key) result.Authorization = `Bearer ${key}`;
  return result;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not the server's own answer: the status has to do
  }
  const error = new Error(message);
  error.status = response.status;
  throw error;
}

export async function describe(key) {
  const models = await (await checked(await fetch("/v1/models", { headers: headers(key) }))).json();
  const model = models.data[0];
  const path = `/v1/models/${encodeURIComponent(model.id)}/classes`;
  const classes = await (await checked(await fetch(path, { headers: headers(key) }))).json();
  return { model, classes: classes.data };
}

// Waits, unless it is stopped.
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

// The answer to a request. Many classes of many images are more than the queue holds: what it refuses is asked again.
async function patient(path, options) {
  for (;;) {
    const response = await fetch(path, options);
    if (response.status !== 429) return checked(response);
    await pause(Number(response.headers.get("Retry-After")) || 1, options.signal);
  }
}

function pathOf(body) {
  return `/v1/images/${body.strength === undefined ? "generations" : body.prompt === undefined ? "variations" : "edits"}`;
}

// [name, text] of each field of a form; of lists, one for each value.
function fieldsOf(body) {
  return Object.entries(body).flatMap(([name, value]) =>
    Array.isArray(value) ? value.map((one) => [`${name}[]`, String(one)]) : [[name, String(value)]]);
}

// Calls onEvent with each event of the stream: previews, images. Throws what goes wrong.
// files: image and mask of an edit, null for a generation.
export async function generate(body, files, key, signal, onEvent) {
  const request = { ...body, stream: true, partial_images: body.candidates ? 0 : PREVIEWS }; // who is chosen is known last
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(request), signal };
  if (files) {
    delete options.headers["Content-Type"]; // the browser's, with the boundary
    options.body = new FormData();
    for (const [name, file] of Object.entries(files)) options.body.append(name, file, `${name}.png`);
    for (const [name, text] of fieldsOf(request)) options.body.append(name, text);
  }
  const response = await patient(pathOf(body), options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (!data) continue; // a keep-alive comment
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Error(event.error.message);
      onEvent(event);
    }
  }
}

// What asks for a class: its name, or its id where another one has that name too.
function promptOf(names, id) {
  return names.indexOf(names[id]) === names.lastIndexOf(names[id]) ? names[id] : String(id);
}

// One body per class, as it is sent but for the stream and, of an edit, its files. An edit without a class is a variation.
export function bodies(settings) {
  const classes = settings.edit && settings.classes.length === 0 ? [null] : settings.classes;
  return classes.map((id) => ({
    model: settings.model,
    ...(id === null ? {} : { prompt: promptOf(settings.names, id) }),
    n: settings.count,
    seed: settings.seed,
    ...(settings.guidance === null ? {} : { guidance_scale: settings.guidance }),
    num_inference_steps: settings.steps,
    ...(settings.candidates > 1 ? { candidates: settings.candidates } : {}),
    ...(settings.edit ? { strength: settings.edit.strength } : {}),
  }));
}

export function asCurl(settings, origin, withKey) {
  const key = withKey ? " -H \"Authorization: Bearer $ECAR_API_KEY\"" : "";
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  if (!settings.edit) {
    return bodies(settings).map((body) =>
      `curl ${origin}${pathOf(body)} -H 'Content-Type: application/json'${key} -d ${quoted(JSON.stringify(body))}`).join("\n");
  }
  const files = `-F image=@image.png${settings.edit.painted ? " -F mask=@mask.png" : ""}`;
  return bodies(settings).map((body) => {
    const fields = fieldsOf(body).map(([name, text]) => `--form-string ${quoted(`${name}=${text}`)}`);
    return `curl ${origin}${pathOf(body)}${key} ${files} ${fields.join(" ")}`;
  }).join("\n");
}

export function asPython(settings, origin, withKey) {
  const key = withKey ? "os.environ[\"ECAR_API_KEY\"]" : "\"none\"";
  const [first] = bodies(settings);
  const { model, n, prompt, ...rest } = first;
  const common = `model=${JSON.stringify(model)}, n=${n}, extra_body=${JSON.stringify(rest)}`;
  const mask = settings.edit?.painted ? "mask=open(\"mask.png\", \"rb\"), " : "";
  let call = `images.generate(prompt=name, ${common})`;
  if (settings.edit) call = `images.edit(image=open("image.png", "rb"), ${mask}prompt=name, ${common})`;
  if (prompt === undefined) call = `images.create_variation(image=open("image.png", "rb"), ${common})`;
  const names = prompt === undefined ? ["variation"] : settings.classes.map((id) => promptOf(settings.names, id));
  return [
    "import base64",
    ...(withKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}/v1", api_key=${key})`,
    `for name in ${JSON.stringify(names)}:`,
    `    answer = client.${call}`,
    "    for image in answer.data:",
    "        with open(f\"{name} {image.seed}.png\", \"wb\") as file:",
    "            file.write(base64.b64decode(image.b64_json))",
    "",
  ].join("\n");
}
