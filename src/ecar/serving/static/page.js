// The page: a form, a grid of images that grow, and what was made before.

import { asCurl, asPython, bodies, describe, generate, PREVIEWS } from "./api.js";
import { Editor, filesOf } from "./editor.js";

const $ = (id) => document.getElementById(id);
const MANY = 30; // classes from which on a search field helps
const PAST = 20; // generations that the history holds
const state = { model: null, names: [], running: null, editor: null };

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function key() {
  return $("key").value.trim();
}

async function begin() {
  let description;
  try {
    description = await describe(key());
  } catch (error) {
    if (error.status === 401) {
      $("key-field").hidden = false;
      say("This server asks for an API key.", true);
    } else {
      say(`The server cannot be reached: ${error.message}`, true);
    }
    return false;
  }
  state.model = description.model;
  state.names = description.classes.length ? description.classes.map((one) => one.name) : ["image"]; // a prompt is needed
  showModel();
  state.editor ??= new Editor(showMode, state.model.size.split("x").map(Number));
  say("");
  return true;
}

function showModel() {
  const { id, size, stages, max_images: most } = state.model;
  $("about").textContent = `${id}: ${size}, ${stages.length} stages of ${stages.map((s) => s.side.join("x")).join(", ")}`;
  $("count").max = most;
  $("candidates").max = state.model.max_candidates;
  $("candidates-field").hidden = state.model.max_candidates === 1;
  $("guidance").placeholder = stages.map((stage) => stage.guidance).join(", ");
  $("steps").replaceChildren(...stages.map((stage, index) => element("label", { textContent: `Steps ${index + 1} ` }, [
    element("input", { type: "number", min: 1, max: state.model.max_steps, value: stage.steps, required: true }),
  ])));
  $("filter").hidden = state.names.length < MANY;
  $("classes").replaceChildren(...state.names.map((name, index) => element("label", {}, [
    element("input", { type: "checkbox", value: index, checked: index === 0 }), name,
  ])));
}

// Of many classes those that fit, and those that are chosen.
function find() {
  const wanted = $("filter").value.trim().toLowerCase();
  const labels = [...$("classes").children];
  const fitting = labels.filter((label) => label.textContent.toLowerCase().includes(wanted));
  const kept = new Set(fitting);
  for (const label of labels) label.hidden = !kept.has(label) && !label.firstChild.checked;
  $("found").hidden = wanted === "";
  $("found").textContent = `${fitting.length} of ${labels.length} classes; Enter chooses ${fitting[0]?.textContent ?? "none"}`;
  return fitting;
}

function showMode() {
  $("go").textContent = state.editor.picture ? "Edit" : "Generate";
}

// A picture from somewhere; what is wrong with it is told.
async function edit(source) {
  if (!state.editor) return;
  try {
    await state.editor.open(source);
    say("Paint what is to be drawn anew, or vary all of it");
    $("drop").scrollIntoView({ block: "nearest" });
  } catch (error) {
    say(error.message, true);
  }
}

function noteSteps() {
  const { fixed_steps: fixed, stages } = state.model;
  const fields = [...$("steps").querySelectorAll("input")];
  $("steps-note").hidden = !fixed || fields.every((field, index) => Number(field.value) === stages[index].steps);
  $("steps-note").textContent = `This model was made for ${stages.map((stage) => stage.steps).join(" + ")} steps: others are worse.`;
}

function settings() {
  return {
    model: state.model.id,
    names: state.names,
    classes: [...$("classes").querySelectorAll(":checked")].map((box) => Number(box.value)),
    count: Number($("count").value),
    seed: Number($("seed").value),
    guidance: $("guidance").value === "" ? null : Number($("guidance").value), // null: the model's own, per stage
    candidates: Number($("candidates").value),
    steps: [...$("steps").querySelectorAll("input")].map((field) => Number(field.value)),
    edit: state.editor?.snapshot() ?? null,
  };
}

// Only a whole picture can be varied without a class.
function lacksClass(wanted) {
  const lacking = wanted.classes.length === 0 && (!wanted.edit || wanted.edit.painted !== null);
  if (lacking) say("Choose a class first", true);
  return lacking;
}

function use(wanted) {
  $("count").value = wanted.count;
  $("seed").value = wanted.seed;
  $("guidance").value = wanted.guidance ?? "";
  $("candidates").value = wanted.candidates;
  $("steps").querySelectorAll("input").forEach((field, index) => { field.value = wanted.steps[index]; });
  noteSteps();
  state.editor.restore(wanted.edit);
  $("classes").querySelectorAll("input").forEach((box) => { box.checked = wanted.classes.includes(Number(box.value)); });
  find();
}

function card(name, seed, before) {
  const picture = element("img", { alt: `${name}, not begun`, hidden: true });
  const blank = element("div", { className: "blank" });
  const bar = element("progress", { max: PREVIEWS + 1, value: 0 });
  const text = element("span", { textContent: name });
  const caption = element("figcaption", {}, [text]);
  const figure = element("figure", {}, [picture, blank, bar, caption]);
  figure.dataset.state = "waiting";
  function show(event) {
    const last = event.type.endsWith(".completed");
    picture.src = `data:image/png;base64,${event.b64_json}`;
    picture.alt = `${name}, seed ${event.seed}, ${last ? "finished" : `stage ${event.stage} of ${event.num_stages}`}`;
    picture.className = Number(event.size.split("x")[0]) < 128 ? "small" : "";
    picture.hidden = false;
    blank.hidden = true;
    bar.value = last ? PREVIEWS + 1 : event.partial_image_index + 1;
    bar.hidden = last;
    text.textContent = last ? name : `stage ${event.stage} of ${event.num_stages}`;
    figure.dataset.state = last ? "finished" : `preview ${event.partial_image_index}`;
    if (last) {
      const link = { href: picture.src, download: `${name} ${event.seed}.png`, textContent: "save", title: `seed ${seed}` };
      const again = element("button", { type: "button", textContent: "edit", title: "Edit this image" });
      again.addEventListener("click", () => edit(picture));
      caption.append(element("a", link), again, ...(before ? [comparer(picture, before)] : []));
    }
  }
  return { figure, show, picture };
}

// A button that shows the picture as it was, and again as it is.
function comparer(picture, before) {
  const after = picture.src;
  const button = element("button", { type: "button", textContent: "before", title: "Show the picture before the edit" });
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const was = picture.src === after;
    picture.src = was ? before : after;
    button.setAttribute("aria-pressed", String(was));
  });
  return button;
}

async function run(wanted) {
  const stop = new AbortController();
  state.running = stop;
  busy(true);
  const requests = bodies(wanted);
  const before = wanted.edit?.picture.toDataURL();
  const cards = requests.map((body, index) =>
    Array.from({ length: body.n }, (_, i) => card(wanted.names[wanted.classes[index]] ?? "variation", body.seed + i, before)));
  const images = cards.flat();
  $("images").replaceChildren(...images.map((one) => one.figure));
  $("images").scrollIntoView({ block: "nearest" }); // on a phone it is far below the picture
  const start = performance.now();
  say(wanted.edit ? "Editing" : "Generating");
  try {
    const files = wanted.edit && await filesOf(wanted.edit);
    await Promise.all(requests.map((body, index) =>
      generate(body, files, key(), stop.signal, (event) => cards[index][event.image_index].show(event))));
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    say(`${images.length} ${images.length === 1 ? "image" : "images"} in ${seconds} s`);
    remember(wanted, images);
  } catch (error) {
    const stopped = stop.signal.aborted;
    stop.abort(); // the other requests are of no use any more
    say(stopped ? "Stopped" : error.message, !stopped);
  } finally {
    busy(false);
    state.running = null;
  }
}

function busy(yes) {
  $("go").disabled = yes;
  $("stop").disabled = !yes;
  $("save").disabled = yes || !$("images").querySelector("a");
}

function remember(wanted, images) {
  const pictures = images.slice(0, 4).map((one) => element("img", { src: one.picture.src, alt: "", className: one.picture.className }));
  const figures = images.map((one) => one.figure);
  const names = `${wanted.edit ? "edit: " : ""}${wanted.classes.map((id) => state.names[id]).join(", ") || "variation"}`;
  const entry = element("button", { type: "button", title: "Show again, with its settings" }, [
    element("span", { className: "row" }, pictures),
    `${names.length > 24 ? `${names.slice(0, 24)}...` : names}, seed ${wanted.seed}`,
  ]);
  entry.addEventListener("click", () => {
    if (state.running) return;
    use(wanted);
    $("images").replaceChildren(...figures);
    busy(false);
    say(`From the history: seed ${wanted.seed}`);
  });
  $("past").hidden = false;
  $("history").prepend(entry);
  while ($("history").children.length > PAST) $("history").lastChild.remove();
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`Copied as ${what}`);
  } catch {
    say("The browser does not allow copying here", true); // pages over plain http from another machine
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (state.running || (!state.model && !(await begin()))) return;
  const wanted = settings();
  if (lacksClass(wanted)) return;
  await run(wanted);
});
$("stop").addEventListener("click", () => state.running?.abort());
$("key").addEventListener("change", () => { if (!state.model) begin(); });
$("steps").addEventListener("input", noteSteps);
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e9); });
$("filter").addEventListener("input", find);
$("filter").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !$("filter").value) return; // without a word, it begins as everywhere in the form
  event.preventDefault();
  const [first] = find();
  if (!first) return;
  first.firstChild.checked = true;
  $("filter").value = "";
  find();
});
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  $("file").value = ""; // the same one can be chosen again
  if (file) edit(file);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) edit(file);
});
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault(); // else the browser leaves the page for the picture
    if (name === "drop") edit(event.dataTransfer.files[0]);
  });
}
$("keep").addEventListener("click", async () => {
  for (const [name, file] of Object.entries(await filesOf(state.editor.snapshot()))) {
    const href = URL.createObjectURL(file);
    element("a", { href, download: `${name}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  }
});
$("save").addEventListener("click", () => $("images").querySelectorAll("a").forEach((link) => link.click()));
for (const [id, write, what] of [["curl", asCurl, "curl"], ["python", asPython, "Python"]]) {
  $(id).addEventListener("click", () => {
    const wanted = state.model && settings();
    if (wanted && !lacksClass(wanted)) copy(write(wanted, location.origin, Boolean(key())), what);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
begin();
