// The page: an image in, the likeliest classes and the kept patches out. Nothing leaves the machine.

import { preprocess, unturned } from "./preprocess.mjs";

const TOP = 5;
// Over what the model removed: a colour that shows on black and on white.
const DIMMED = "rgba(96, 96, 150, 0.8)";

const element = (id) => document.getElementById(id);

/** The model, ready to run. */
async function load(settings) {
  const ort = await import(settings.runtime);
  // One thread wherever the server does not send the two headers of serve.py: without them a
  // browser hides the memory that threads share.
  const cores = navigator.hardwareConcurrency || 1;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(cores, 8) : 1;
  const response = await fetch(settings.model);
  if (!response.ok) throw new Error(`${settings.model}: ${response.status} ${response.statusText}`);
  const session = await ort.InferenceSession.create(await response.arrayBuffer(), {
    executionProviders: ["wasm"],
  });
  return { ort, session, threads: ort.env.wasm.numThreads };
}

/** RGB bytes of an image file, as they are stored: no colour profile, no orientation. */
async function decode(file) {
  const stored = unturned(new Uint8Array(await file.arrayBuffer()));
  const bitmap = await createImageBitmap(new Blob([stored]), {
    colorSpaceConversion: "none",
    premultiplyAlpha: "none",
  });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8ClampedArray(width * height * 3);
  let transparent = false;
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    pixels[to] = rgba[from];
    pixels[to + 1] = rgba[from + 1];
    pixels[to + 2] = rgba[from + 2];
    transparent ||= rgba[from + 3] !== 255;
  }
  return { pixels, size: [height, width], transparent };
}

function softmax(logits) {
  const highest = logits.reduce((most, one) => Math.max(most, one), -Infinity);
  const powers = Array.from(logits, (one) => Math.exp(one - highest));
  const sum = powers.reduce((total, one) => total + one, 0);
  return powers.map((one) => one / sum);
}

function showTop(probabilities, labels) {
  const order = probabilities.map((_, index) => index);
  order.sort((one, other) => probabilities[other] - probabilities[one] || one - other);
  element("top").replaceChildren(
    ...order.slice(0, TOP).map((index) => {
      const row = document.createElement("li");
      const name = document.createElement("span");
      const share = document.createElement("span");
      const bar = document.createElement("meter");
      name.textContent = labels[index];
      share.textContent = `${(100 * probabilities[index]).toFixed(1)} %`;
      bar.value = probabilities[index];
      row.append(name, share, bar);
      return row;
    }),
  );
}

function showImage(view, [height, width]) {
  const canvas = element("image");
  [canvas.width, canvas.height] = [width, height];
  const picture = new ImageData(width, height);
  for (let from = 0, to = 0; from < view.length; from += 3, to += 4) {
    picture.data.set([view[from], view[from + 1], view[from + 2], 255], to);
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

/** Dim the patches that are not among `positions`; the class token is no patch. */
function showPatches(positions, [height, width], { rows, columns, patch, stride, cls_position }) {
  const canvas = element("patches");
  [canvas.width, canvas.height] = [width, height];
  const kept = new Set();
  for (const position of positions) {
    const place = Number(position);
    if (place === cls_position) continue;
    kept.add(cls_position !== null && place > cls_position ? place - 1 : place);
  }
  const context = canvas.getContext("2d");
  context.fillStyle = DIMMED;
  context.fillRect(0, 0, width, height);
  for (const place of kept) {
    const top = Math.floor(place / columns) * stride;
    const left = (place % columns) * stride;
    context.clearRect(left, top, patch, patch);
  }
  return `${kept.size} of ${rows * columns} patches`;
}

function showStages(outputs, settings) {
  const { stages, grid, preprocessing } = settings;
  element("stages").replaceChildren();
  element("patches").hidden = grid === null || stages.length === 0;
  if (element("patches").hidden) return;
  const draw = (stage) => showPatches(outputs[stage.output].data, preprocessing.crop, grid);
  for (const [number, stage] of stages.entries()) {
    const choice = document.createElement("label");
    const button = document.createElement("input");
    button.type = "radio";
    button.name = "stage";
    button.checked = number === stages.length - 1;
    button.addEventListener("change", () => draw(stage));
    choice.append(button, ` after block ${stage.block}: ${draw(stage)}`); // the last stays
    element("stages").append(choice);
  }
}

function say(text, note = "") {
  element("status").textContent = text;
  element("note").textContent = note;
  element("note").hidden = note === "";
}

/** Let the browser paint what was said before a long step. */
const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

async function classify(file, { ort, session }, settings) {
  say(`Reading ${file.name} ...`);
  await painted();
  const start = performance.now();
  const { pixels, size, transparent } = await decode(file);
  const { input, view } = preprocess(pixels, size, settings.preprocessing);
  const ready = performance.now();
  const images = new ort.Tensor("float32", input, [1, 3, ...settings.preprocessing.crop]);
  const outputs = await session.run({ [settings.input]: images });
  const end = performance.now();
  showImage(view, settings.preprocessing.crop);
  showStages(outputs, settings);
  showTop(softmax(outputs.logits.data), settings.labels);
  element("result").hidden = false;
  say(
    `${file.name}: ${(ready - start).toFixed(0)} ms to read and resize, ` +
      `${(end - ready).toFixed(0)} ms for the model.`,
    transparent
      ? "This image is partly transparent. Browsers do not keep the colours behind that, " +
          "which vssm.preprocess takes, so its numbers differ."
      : "",
  );
}

async function main() {
  say("Loading the model ...");
  const settings = await (await fetch("settings.json")).json();
  document.title = settings.title;
  element("title").textContent = settings.title;
  const model = await load(settings);
  element("facts").textContent =
    `ONNX Runtime Web ${settings.version}, WebAssembly with SIMD, ${model.threads} ` +
    (model.threads === 1 ? "thread" : "threads") +
    (self.crossOriginIsolated ? "" : " (more need the headers that serve.py sends)") +
    `. Images stay in this browser. ${settings.facts}.`;
  // One at a time: a second image waits for the first.
  let last = Promise.resolve();
  const take = (files) => {
    for (const file of files) {
      last = last.then(() => classify(file, model, settings)).catch(fail);
    }
  };
  const drop = element("drop");
  element("file").addEventListener("change", (event) => take(event.target.files));
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragenter" || name === "dragover");
    });
  }
  drop.addEventListener("drop", (event) => take(event.dataTransfer.files));
  drop.hidden = false;
  say("Ready.");
}

function fail(error) {
  console.error(error);
  say(`This did not work: ${error.message ?? error}`);
}

main().catch(fail);
