// Pixels to the model's input, to the bit what vssm.preprocess makes of the same pixels.
//
// The resizing is Pillow's (src/libImaging/Resample.c and Geometry.c): a filter that widens with
// what it shrinks, weights as whole numbers, each row first and then each column, rounded to a byte
// in between. A browser's own drawImage does none of this, and moves the class of some images.

const BITS = 22; // of the weights' fraction
const MAX_PIXELS = 89_478_485; // of vssm.preprocess
const CHANNELS = 3;

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
};

function cubic(x) {
  const a = -0.5;
  const t = Math.abs(x);
  if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
  return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
}

/** For each place of the result the first place that it is made of, and the weights from there on. */
function windows(before, after, { support, weight }) {
  const scale = before / after;
  const stretch = Math.max(scale, 1);
  const inverse = 1 / stretch;
  const found = [];
  for (let i = 0; i < after; i++) {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(center + support * stretch + 0.5), before);
    const weights = new Float64Array(end - first);
    for (let j = first; j < end; j++) weights[j - first] = weight((j - center + 0.5) * inverse);
    const sum = weights.reduce((total, one) => total + one, 0);
    for (let j = 0; j < weights.length; j++) {
      const one = (weights[j] / sum) * (1 << BITS);
      weights[j] = Math.trunc(one + (one < 0 ? -0.5 : 0.5));
    }
    found.push({ first, weights });
  }
  return found;
}

/** Filter every line; `step` leads from place to place, `lineStep` from line to line. */
function filtered(source, lines, places, from, to) {
  const result = new Uint8ClampedArray(lines * places.length * CHANNELS);
  const half = 1 << (BITS - 1);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < places.length; i++) {
      const { first, weights } = places[i];
      for (let channel = 0; channel < CHANNELS; channel++) {
        let at = line * from.lineStep + first * from.step + channel;
        let sum = half;
        for (let j = 0; j < weights.length; j++, at += from.step) sum += source[at] * weights[j];
        result[line * to.lineStep + i * to.step + channel] = sum >> BITS; // clamped by the array
      }
    }
  }
  return result;
}

/** The index in `before` that each place of `after` takes: the nearest, summed up as Pillow does. */
function nearest(before, after) {
  const scale = before / after;
  const found = new Int32Array(after);
  for (let i = 0, at = scale * 0.5; i < after; i++, at += scale) found[i] = Math.trunc(at);
  return found;
}

/**
 * The bytes of an image file; of a JPEG file without the mark by which browsers know that its Exif
 * data says how to turn it. vssm.preprocess does not turn images, nor do the official evaluations,
 * and a browser has no switch for it.
 */
export function unturned(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 4 || view.getUint16(0) !== 0xffd8) return bytes;
  // Segments: a marker, the length from there on, the content; the image begins after 0xffda.
  for (let at = 2; at + 10 <= bytes.length && view.getUint16(at) !== 0xffda; ) {
    if (bytes[at] !== 0xff) break;
    if (view.getUint16(at) === 0xffe1 && view.getUint32(at + 4) === 0x45786966) bytes[at + 4] = 0;
    at += 2 + view.getUint16(at + 2);
  }
  return bytes;
}

/** RGB bytes (height, width, 3) of another size. */
export function resize(pixels, [height, width], [newHeight, newWidth], interpolation) {
  if (interpolation === "nearest") {
    const rows = nearest(height, newHeight);
    const columns = nearest(width, newWidth);
    const result = new Uint8ClampedArray(newHeight * newWidth * CHANNELS);
    let at = 0;
    for (const row of rows) {
      for (const column of columns) {
        const from = (row * width + column) * CHANNELS;
        for (let channel = 0; channel < CHANNELS; channel++) result[at++] = pixels[from + channel];
      }
    }
    return result;
  }
  const filter = FILTERS[interpolation];
  const wide = filtered(
    pixels,
    height,
    windows(width, newWidth, filter),
    { lineStep: width * CHANNELS, step: CHANNELS },
    { lineStep: newWidth * CHANNELS, step: CHANNELS },
  );
  return filtered(
    wide,
    newWidth,
    windows(height, newHeight, filter),
    { lineStep: CHANNELS, step: newWidth * CHANNELS },
    { lineStep: CHANNELS, step: newWidth * CHANNELS },
  );
}

/** torchvision's size: the shorter side as asked for, the longer one rounded down. */
function resizedSize(height, width, side) {
  const longer = Math.floor((side * Math.max(height, width)) / Math.min(height, width));
  if (longer * side > MAX_PIXELS) {
    throw new Error(
      `an image of ${width}x${height} would have more than ${MAX_PIXELS} pixels after resizing; ` +
        "crop it to a less extreme shape",
    );
  }
  return width <= height ? [longer, side] : [side, longer];
}

/** Half of the room around the crop, a half rounded to even, as Python's round does. */
function margin(room) {
  const half = Math.floor(room / 2);
  return room % 2 === 1 && half % 2 === 1 ? half + 1 : half;
}

/**
 * What the model gets of an image.
 *
 * @param {Uint8ClampedArray | Uint8Array} pixels RGB (height, width, 3), row by row.
 * @param {[number, number]} size height and width.
 * @param {object} spec `resize`, `crop` (height, width), `interpolation`, `mean` and `std`, as in
 *   model.json.
 * @returns {{input: Float32Array, view: Uint8ClampedArray}} The input (3, height, width), and the
 *   same crop before it was normalised, RGB (height, width, 3).
 */
export function preprocess(pixels, [height, width], spec) {
  const [rows, columns] = resizedSize(height, width, spec.resize);
  const whole =
    rows === height && columns === width
      ? pixels
      : resize(pixels, [height, width], [rows, columns], spec.interpolation);
  const [high, wide] = spec.crop;
  const top = margin(rows - high);
  const left = margin(columns - wide);
  const view = new Uint8ClampedArray(high * wide * CHANNELS);
  for (let row = 0; row < high; row++) {
    const from = ((top + row) * columns + left) * CHANNELS;
    view.set(whole.subarray(from, from + wide * CHANNELS), row * wide * CHANNELS);
  }
  const input = new Float32Array(high * wide * CHANNELS);
  // float32 at every step, as NumPy does it.
  const mean = Float32Array.from(spec.mean);
  const std = Float32Array.from(spec.std);
  for (let channel = 0; channel < CHANNELS; channel++) {
    for (let i = 0; i < high * wide; i++) {
      const value = Math.fround(view[i * CHANNELS + channel] / 255);
      input[channel * high * wide + i] = Math.fround(value - mean[channel]) / std[channel];
    }
  }
  return { input, view };
}
