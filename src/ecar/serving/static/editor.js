// The picture that is edited, and its mask: painted with mouse, pen, finger or keys.

const $ = (id) => document.getElementById(id);
const LONGEST = 1024; // pixels of a side that are sent; the server scales to the model's size itself
const UNDOS = 12;
const PAINT = "#ff2d87";

export class Editor {
  // changed: called when a picture comes or goes; size: [width, height] of the model's images.
  constructor(changed, size) {
    this.changed = changed;
    this.size = size;
    this.picture = null; // a canvas that is never drawn into again: the history keeps it
    this.mask = $("mask");
    this.pen = this.mask.getContext("2d", { willReadFrequently: true });
    this.before = [];
    this.last = null; // where the stroke is, in pixels of the mask
    this.cursor = [0.5, 0.5]; // of the keyboard, in shares of the sides
    this.touched = false; // whether somebody chose the strength
    this.listen();
  }

  listen() {
    this.mask.addEventListener("pointerdown", (event) => this.begin(event));
    this.mask.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) this.mask.addEventListener(name, () => this.lift());
    this.mask.addEventListener("keydown", (event) => this.key(event));
    this.mask.addEventListener("pointerleave", () => { $("ring").hidden = true; });
    this.mask.addEventListener("focus", () => { if (this.mask.matches(":focus-visible")) this.ring(...this.cursor); });
    this.mask.addEventListener("blur", () => { $("ring").hidden = true; });
    $("undo").addEventListener("click", () => this.undo());
    $("invert").addEventListener("click", () => this.invert());
    $("clear").addEventListener("click", () => this.clear());
    $("strength").addEventListener("input", () => { this.touched = true; this.tell(); });
    $("remove").addEventListener("click", () => this.close());
  }

  // A file, or an img element that is loaded. Throws where it is no picture.
  async open(source) {
    let drawn = source;
    if (source instanceof Blob) {
      try {
        drawn = await createImageBitmap(source); // upright
      } catch {
        throw new Error(`${source.name || "That"} is not a picture that this browser reads`);
      }
    }
    const [width, height] = [drawn.naturalWidth ?? drawn.width, drawn.naturalHeight ?? drawn.height];
    const aspect = this.size[0] / this.size[1];
    const crop = [Math.min(width, height * aspect), Math.min(height, width / aspect)].map((side) => Math.max(1, Math.round(side)));
    const scale = Math.min(1, LONGEST / Math.max(...crop));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = crop.map((side) => Math.max(1, Math.round(side * scale)));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white"; // under transparent pixels, as the server does it
    context.fillRect(0, 0, canvas.width, canvas.height);
    const corner = [(width - crop[0]) / 2, (height - crop[1]) / 2].map(Math.floor);
    context.drawImage(drawn, ...corner, ...crop, 0, 0, canvas.width, canvas.height);
    this.restore({ picture: canvas, painted: null, strength: null });
  }

  close() {
    this.picture = null;
    this.show();
  }

  // What the history keeps.
  snapshot() {
    if (!this.picture) return null;
    const painted = this.painted() ? this.pixels() : null;
    return { picture: this.picture, painted, strength: Number($("strength").value) };
  }

  restore(kept) {
    this.picture = kept?.picture ?? null;
    if (this.picture) {
      [this.mask.width, this.mask.height] = [this.picture.width, this.picture.height];
      if (kept.painted) this.pen.putImageData(kept.painted, 0, 0);
      this.before = [];
      this.touched = kept.strength !== null;
      if (this.touched) $("strength").value = kept.strength;
    }
    this.show();
  }

  show() {
    $("editor").hidden = !this.picture;
    $("choose").hidden = Boolean(this.picture);
    if (this.picture) {
      const view = $("picture");
      [view.width, view.height] = [this.picture.width, this.picture.height];
      view.getContext("2d").drawImage(this.picture, 0, 0);
      $("layers").style.aspectRatio = `${view.width} / ${view.height}`;
      for (const layer of [view, this.mask]) layer.classList.toggle("small", view.width < 128);
    }
    this.tell();
    this.changed();
  }

  // The strength follows the mask until somebody chooses it: all of a part, or a part of all.
  tell() {
    if (!this.touched) $("strength").value = this.painted() ? 1 : 0.5;
    $("strength-value").textContent = Number($("strength").value).toFixed(2);
    $("undo").disabled = this.before.length === 0;
    $("mask-note").textContent = this.painted() ? "The painted part is drawn anew." : "Nothing is painted: all of the picture is varied.";
  }

  pixels() {
    return this.pen.getImageData(0, 0, this.mask.width, this.mask.height);
  }

  painted() {
    return this.picture !== null && this.pixels().data.some((value, index) => index % 4 === 3 && value >= 128);
  }

  keep() {
    this.before = [...this.before.slice(1 - UNDOS), this.pixels()];
  }

  undo() {
    const pixels = this.before.pop();
    if (pixels) this.pen.putImageData(pixels, 0, 0);
    this.tell();
  }

  invert() {
    this.keep();
    this.pen.globalCompositeOperation = "source-out"; // what is not painted yet
    this.pen.fillStyle = PAINT;
    this.pen.fillRect(0, 0, this.mask.width, this.mask.height);
    this.pen.globalCompositeOperation = "source-over";
    this.tell();
  }

  clear() {
    this.keep();
    this.pen.clearRect(0, 0, this.mask.width, this.mask.height);
    this.tell();
  }

  // Width of the brush in pixels of the mask: a share of its width.
  brush(event) {
    const pressure = event?.pointerType === "pen" ? 0.5 + event.pressure : 1;
    return Math.max(1, (Number($("brush").value) / 100) * this.mask.width * pressure);
  }

  place(event) {
    const box = this.mask.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  begin(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.mask.focus({ preventScroll: true });
    this.mask.setPointerCapture(event.pointerId);
    this.keep();
    this.stroke(...this.place(event), event);
  }

  lift() {
    if (this.last === null) return;
    this.last = null;
    this.tell();
  }

  move(event) {
    this.ring(...this.place(event));
    if (this.last === null) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) this.stroke(...this.place(one), event);
  }

  // On to a place, given in shares of the sides.
  stroke(x, y, event) {
    const to = [x * this.mask.width, y * this.mask.height];
    const width = this.brush(event);
    Object.assign(this.pen, { strokeStyle: PAINT, fillStyle: PAINT, lineCap: "round", lineWidth: width });
    this.pen.beginPath();
    this.pen.arc(...to, width / 2, 0, 2 * Math.PI); // a line of no length is not drawn
    this.pen.fill();
    this.pen.beginPath();
    this.pen.moveTo(...(this.last ?? to));
    this.pen.lineTo(...to);
    this.pen.stroke();
    this.last = to;
  }

  ring(x, y) {
    const width = this.brush() / this.mask.width;
    const style = { left: `${100 * x}%`, top: `${100 * y}%`, width: `${100 * width}%` };
    Object.assign($("ring").style, style);
    $("ring").hidden = false;
  }

  key(event) {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    const step = event.shiftKey ? 0.01 : 0.05;
    if (event.key === " " || event.key === "Enter") {
      this.keep();
      this.stroke(...this.cursor);
      this.lift();
    } else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
      this.undo();
    } else if (event.key === "i") {
      this.invert();
    } else if (event.key === "[" || event.key === "]") {
      $("brush").value = Number($("brush").value) + (event.key === "]" ? 4 : -4);
    } else if (x || y) {
      this.cursor = [this.cursor[0] + x * step, this.cursor[1] + y * step].map((at) => Math.min(1, Math.max(0, at)));
    } else {
      return;
    }
    event.preventDefault();
    this.ring(...this.cursor);
  }
}

// What is sent of a snapshot: PNG files, the mask transparent where it is painted.
export async function filesOf({ picture, painted }) {
  const files = { image: await png(picture) };
  if (painted) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.width, picture.height];
    const context = canvas.getContext("2d");
    const pixels = new ImageData(new Uint8ClampedArray(painted.data), painted.width);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set([0, 0, 0, pixels.data[at + 3] >= 128 ? 0 : 255], at);
    context.putImageData(pixels, 0, 0);
    files.mask = await png(canvas);
  }
  return files;
}

function png(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
