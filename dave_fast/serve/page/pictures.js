// Draw maps over photographs, as dave_fast.images.drawing does, and plot the error.

const BRIGHTEST = 0.995;
const GAMMA = 0.7;
const [SATURATION, DIMMING, LIFT] = [0.4, 0.62, 0.05];
const [OPACITY, OPAQUE_FROM] = [0.92, 0.75];
// Nine colours of matplotlib's "inferno".
const STOPS = [
  [0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85],
  [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164],
];
// From −1 to 1: blue, black at 0, orange, as dave_fast.images.drawing has them.
const TWO_COLOURS = [
  [200, 240, 255], [53, 176, 255], [16, 64, 176], [0, 0, 0], [160, 48, 0], [255, 140, 26], [255, 240, 160],
];
// Number of line colours of the plot, in page.css.
export const COLOURS = 5;

// Return the colour at a share of the way along the stops.
function colour(stops, share) {
  const place = share * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return stops[low].map((value, channel) => value + (place - low) * (stops[low + 1][channel] - value));
}

// Return a function from a value of a map, or of a signed map, to [strength, red, green, blue].
function scale(values, signed) {
  const sorted = Float32Array.from(values, Math.abs).sort();
  const top = sorted[Math.floor(BRIGHTEST * (sorted.length - 1))] || sorted[sorted.length - 1] || 1;
  // A table: there are far more pixels than shades.
  const shades = Array.from({ length: 511 }, (_, number) => colour(signed ? TWO_COLOURS : STOPS, number / 510));
  return (value) => {
    const strength = Math.min(1, Math.abs(value) / top) ** GAMMA;
    const share = signed ? (1 + Math.sign(value) * strength) / 2 : strength;
    return [strength, ...shades[Math.round(510 * share)]];
  };
}

// Draw a map over photo, the ImageData of the crop; opacity 0 shows the photograph, 1 the overlay that dave-fast writes.
// A signed map, int16, is drawn in two colours over the photograph in grey.
export function paint(canvas, photo, map, opacity) {
  const bytes = Uint8Array.from(atob(map.data), (letter) => letter.charCodeAt(0));
  const signed = map.dtype === "int16";
  const values = signed ? new Int16Array(bytes.buffer) : bytes;
  const [shown, saturation] = [scale(values, signed), signed ? 0 : SATURATION];
  canvas.width = photo.width;
  canvas.height = photo.height;
  const picture = new ImageData(photo.width, photo.height);
  for (let i = 0; i < values.length; i++) {
    const [strength, ...over] = shown(values[i]);
    const alpha = opacity * OPACITY * Math.min(1, strength / OPAQUE_FROM);
    const [red, green, blue] = photo.data.subarray(4 * i, 4 * i + 3);
    const grey = 0.299 * red + 0.587 * green + 0.114 * blue;
    for (let channel = 0; channel < 3; channel++) {
      const seen = photo.data[4 * i + channel];
      const dimmed = 255 * LIFT + DIMMING * (grey + saturation * (seen - grey));
      const under = seen + opacity * (dimmed - seen);
      picture.data[4 * i + channel] = under + alpha * (over[channel] - under);
    }
    picture.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Return a PNG of a canvas, enlarged by the least whole number that gives its shorter side 448 pixels.
export function png(source) {
  const scale = Math.max(1, Math.ceil(448 / Math.min(source.width, source.height)));
  const canvas = Object.assign(document.createElement("canvas"), { width: scale * source.width, height: scale * source.height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

// Plot errors by samples: a line for each class, and a band up to its bound.
// points: {samples, maps: [{error, error_bound}]}, an unknown error is null.
export function plot(svg, points, last, tolerance) {
  const [width, height] = [Math.max(280, svg.clientWidth), 190];
  const [left, right, top, bottom] = [46, width - 14, 12, height - 40];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const most = Math.max(tolerance, ...points.flatMap((point) => point.maps.map((one) => one.error_bound ?? one.error ?? 0)));
  const ceiling = Math.max(0.1, Math.ceil(most * 5) / 5);
  const first = Math.min(points[0].samples, last / 2);
  const x = (samples) => left + ((right - left) * Math.log(samples / first)) / Math.log(last / first);
  const y = (error) => bottom - ((bottom - top) * error) / ceiling;
  const parts = [];
  for (let step = 0; step <= 4; step++) {
    const error = (ceiling * step) / 4;
    parts.push(shape("line", { class: "grid", x1: left, x2: right, y1: y(error), y2: y(error) }));
    parts.push(words(left - 8, y(error) + 4, "end", `${Math.round(100 * error)} %`));
  }
  const ticks = [];
  for (let samples = last; samples >= first * 0.999 && ticks.length < 9; samples /= 2) ticks.push(Math.round(samples));
  for (const samples of ticks) parts.push(words(x(Math.max(first, samples)), bottom + 18, "middle", samples));
  parts.push(words((left + right) / 2, height - 4, "middle", "samples"));
  if (tolerance > 0) {
    parts.push(shape("line", { class: "wanted", x1: left, x2: right, y1: y(tolerance), y2: y(tolerance) }));
    parts.push(words(right, y(tolerance) - 5, "end", "good enough"));
  }
  points[0].maps.forEach((_, number) => {
    const line = points
      .map((point) => ({ samples: point.samples, ...point.maps[number] }))
      .filter((point) => point.error !== null && point.error_bound !== null);
    if (!line.length) return;
    const lower = line.map((point) => `${x(point.samples).toFixed(1)},${y(point.error).toFixed(1)}`);
    const upper = line.map((point) => `${x(point.samples).toFixed(1)},${y(point.error_bound).toFixed(1)}`);
    const end = line[line.length - 1];
    parts.push(
      shape("polygon", { class: `band c${number % COLOURS}`, points: [...lower, ...upper.reverse()].join(" ") }),
      shape("polyline", { class: `line c${number % COLOURS}`, points: lower.join(" ") }),
      shape("circle", { class: `dot c${number % COLOURS}`, cx: x(end.samples), cy: y(end.error), r: 4 }),
    );
  });
  svg.replaceChildren(...parts);
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function words(x, y, anchor, text) {
  const made = shape("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}
