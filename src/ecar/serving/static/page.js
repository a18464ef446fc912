// The page: a form, a grid of images that grow, and what was made before.

import { asCurl, asPython, bodies, describe, generate, PREVIEWS } from "./api.js";

const $ = (id) => document.getElementById(id);
const MANY = 30; // classes from which on a search field helps
const PAST = 20; // generations that the history holds
const state = { model: null, names: [], running: null, shown: null };

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
  };
}

function use(wanted) {
  $("count").value = wanted.count;
  $("seed").value = wanted.seed;
  $("guidance").value = wanted.guidance ?? "";
  $("candidates").value = wanted.candidates;
  $("steps").querySelectorAll("input").forEach((field, index) => { field.value = wanted.steps[index]; });
  noteSteps();
  $("classes").querySelectorAll("input").forEach((box) => { box.checked = wanted.classes.includes(Number(box.value)); });
}

function card(name, seed) {
  const picture = element("img", { alt: `${name}, not begun`, hidden: true });
  const blank = element("div", { className: "blank" });
  const bar = element("progress", { max: PREVIEWS + 1, value: 0 });
  const text = element("span", { textContent: name });
  const caption = element("figcaption", {}, [text]);
  const figure = element("figure", {}, [picture, blank, bar, caption]);
  figure.dataset.state = "waiting";
  function show(event) {
    const last = event.type === "image_generation.completed";
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
      caption.append(element("a", link));
    }
  }
  return { figure, show, picture };
}

async function run(wanted) {
  const stop = new AbortController();
  state.running = stop;
  busy(true);
  const requests = bodies(wanted);
  const cards = requests.map((body, index) =>
    Array.from({ length: body.n }, (_, i) => card(wanted.names[wanted.classes[index]], body.seed + i)));
  const images = cards.flat();
  $("images").replaceChildren(...images.map((one) => one.figure));
  const start = performance.now();
  say("Generating");
  try {
    await Promise.all(requests.map((body, index) =>
      generate(body, key(), stop.signal, (event) => cards[index][event.image_index].show(event))));
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
  const names = wanted.classes.map((id) => state.names[id]).join(", ");
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
  if (wanted.classes.length === 0) {
    say("Choose a class first", true);
    return;
  }
  await run(wanted);
});
$("stop").addEventListener("click", () => state.running?.abort());
$("key").addEventListener("change", () => { if (!state.model) begin(); });
$("steps").addEventListener("input", noteSteps);
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e9); });
$("filter").addEventListener("input", () => {
  const wanted = $("filter").value.toLowerCase();
  for (const label of $("classes").children) label.hidden = !label.textContent.toLowerCase().includes(wanted);
});
$("save").addEventListener("click", () => $("images").querySelectorAll("a").forEach((link) => link.click()));
for (const [id, write, what] of [["curl", asCurl, "curl"], ["python", asPython, "Python"]]) {
  $(id).addEventListener("click", () => {
    const wanted = state.model && settings();
    if (wanted?.classes.length) copy(write(wanted, location.origin, Boolean(key())), what);
    else say("Choose a class first", true);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
begin();
