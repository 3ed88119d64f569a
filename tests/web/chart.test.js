// What a chart draws of which numbers. Its canvas is 248 × 122 pixels: 200 for the steps, 100 for the losses.

import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";
import { canvasSize, colors, drawFrame, INK, openPage, resizes, settled, textsOf } from "./comfyui.js";

const { Chart } = await import("../../web/lib/chart.js");
const { Curve } = await import("../../web/lib/curve.js");
const { DARK, OPACITY } = await import("../../web/lib/palette.js");
const [BLUE, ORANGE, GREEN] = DARK.series;

let chart;

beforeEach(() => openPage());
afterEach(() => {
  chart.dispose();
  Object.assign(canvasSize, { width: 248, height: 122 });
  window.devicePixelRatio = 1;
});

function curveOf(points, title = "loss") {
  const curve = new Curve(title);
  curve.append(points);
  return curve;
}

const falling = (title) => curveOf({ steps: [5, 10], losses: [2, 1], rates: [1e-4, 5e-5] }, title);

/** A chart in the page, as it looks after the next frame. */
function shown(curves, { total = 0, log = false } = {}) {
  chart = new Chart(curves);
  chart.total = total;
  document.body.append(chart.element, chart.legend);
  chart.attach();
  if (log) chart.logButton.click();
  drawFrame();
  return chart;
}

const drawn = (kind) => chart.canvas.pen.drawn.filter((one) => one.kind === kind);
const linesOf = (color) => drawn("line").filter((one) => one.color === color);
const legend = () => textsOf(chart.legend, "span");

test("axes have four losses from the bottom to the top, and three steps", () => {
  shown([falling()], { total: 20 });
  const texts = drawn("text").map(({ text, align, points: [[x, y]] }) => [text, align, x, y]);
  assert.deepEqual(texts, [
    ["0.95", "right", 36, 106],
    ["1.3", "right", 36, 72.7],
    ["1.6", "right", 36, 39.3],
    ["2.0", "right", 36, 6],
    ["0", "left", 40, 109],
    ["10", "center", 140, 109],
    ["20", "right", 240, 109],
  ]);
  const looks = drawn("text").map(({ baseline, alpha, font }) => [baseline, alpha, font]);
  assert.deepEqual(looks.slice(0, 4), Array(4).fill(["middle", OPACITY.axis, "10px system-ui, sans-serif"]));
  assert.deepEqual(looks.slice(4), Array(3).fill(["top", OPACITY.axis, "10px system-ui, sans-serif"]));
  const grid = linesOf(INK).map(({ points, alpha }) => [alpha, ...points]);
  assert.deepEqual(
    grid,
    [106, 72.7, 39.3, 6].map((y) => [0.15, [40, y], [240, y]]),
  );
});

test("a run's losses are drawn faint and smoothed, each at its step", () => {
  shown([falling()], { total: 20 });
  const [raw, smoothed] = linesOf(BLUE);
  assert.deepEqual(
    raw.points,
    [6, 6, 101.2, 101.2].map((y, index) => [index < 2 ? 90 : 140, y]),
  );
  assert.deepEqual([raw.alpha, raw.width], [OPACITY.raw, 1]);
  assert.deepEqual(smoothed.points, [
    [90, 6],
    [140, 54.3],
  ]);
  assert.deepEqual([smoothed.alpha, smoothed.width], [1, 1.6]);
});

test("the learning rate is a dashed line, its highest just below the top", () => {
  shown([falling()], { total: 20 });
  const [{ color, alpha, points }] = drawn("dashes");
  assert.deepEqual([color, alpha], [INK, OPACITY.rate]);
  assert.deepEqual(points, [
    [90, 11],
    [140, 58.5],
  ]);
});

test("a rate that grows is highest at its end, and one of many steps is drawn at every pixel only", () => {
  shown([curveOf({ steps: [5, 10], losses: [2, 1], rates: [5e-5, 1e-4] })], { total: 20 });
  assert.deepEqual(drawn("dashes")[0].points, [
    [90, 58.5],
    [140, 11],
  ]);
  chart.dispose();
  const steps = Array.from({ length: 1000 }, (_, index) => index + 1);
  shown([curveOf({ steps, losses: steps, rates: steps })]);
  assert.equal(drawn("dashes")[0].points.length, 200);
});

test("a rate that is always 0 is not drawn", () => {
  shown([curveOf({ steps: [1, 2], losses: [1, 1], rates: [0, 0] })]);
  assert.deepEqual(drawn("dashes"), []);
});

test("scores are dots on a line of their own colour, from 0 at the bottom to 1 at the top", () => {
  const scores = [
    { step: 0, scores: { "CLIP-I": 0.5, "CLIP-T": 0 } },
    { step: 10, scores: { "CLIP-I": null, "CLIP-T": 1.5 } },
    { step: 20, scores: { "CLIP-I": 0.75, CLIPScore: 30 } },
  ];
  shown([curveOf({ steps: [5], losses: [1], rates: [0], scores })], { total: 20 });
  const image = [
    [40, 56],
    [240, 31],
  ];
  const text = [
    [40, 106],
    [140, 6],
  ];
  assert.deepEqual(
    [ORANGE, GREEN].map((color) => linesOf(color).map(({ points }) => points)),
    [[image], [text]],
  );
  assert.deepEqual(
    drawn("area").map(({ color, points: [[x, y]] }) => [color, [x, y]]),
    [...image.map((point) => [ORANGE, point]), ...text.map((point) => [GREEN, point])],
  );
});

test("a score's dots are whole circles, its line is thin", () => {
  const scores = [{ step: 1, scores: { "CLIP-I": 0.5 } }];
  shown([curveOf({ steps: [1], losses: [1], rates: [0], scores })]);
  const [[, , radius, angle]] = drawn("area")[0].points;
  assert.deepEqual([radius, angle, linesOf(ORANGE)[0].width], [2.5, 6.3, 1]);
});

test("compared runs have a smoothed line each in a colour of its own, and nothing else", () => {
  const other = curveOf({ steps: [20], losses: [1], rates: [1e-4], scores: [{ step: 20, scores: { "CLIP-I": 1 } }] });
  shown([falling("a"), other]);
  assert.deepEqual(
    [BLUE, ORANGE].map((color) => linesOf(color).map(({ points }) => points.map(([x]) => x))),
    [[[90, 140]], [[240]]],
  );
  assert.deepEqual([drawn("dashes"), drawn("area")], [[], []]);
});

test("the right end is the last step of the run, or the last that was reached", () => {
  const ends = [
    [{ total: 20 }, "20"],
    [{ total: 4 }, "10"],
    [{}, "10"],
  ];
  for (const [options, end] of ends) {
    shown([falling()], options);
    assert.equal(drawn("text").at(-1).text, end);
    chart.dispose();
  }
});

test("without a loss there are axes, and no legend", () => {
  shown([curveOf({})]);
  assert.deepEqual(
    drawn("text").map(({ text }) => text),
    ["0.0", "0.33", "0.67", "1.0", "0", "1", "1"],
  );
  assert.deepEqual(legend(), []);
  assert.deepEqual(textsOf(chart.legend, "button"), ["log"]);
});

test("the legend tells the newest values", () => {
  const scores = [{ step: 5, scores: { "CLIP-I": 0.12345 } }];
  shown([curveOf({ steps: [5, 10], losses: [2, 1], rates: [1e-4, 5e-5], scores })]);
  assert.deepEqual(legend(), ["step 10 · loss 1.00 · smoothed 1.49", "lr 0.000050", "CLIP-I 0.123"]);
  const colors = [...chart.legend.querySelectorAll("i")].map((one) => one.style.background);
  assert.deepEqual(colors, [BLUE, INK, ORANGE]);
});

test("two runs that are compared are named too", () => {
  shown([falling("a"), falling("b")]);
  assert.deepEqual(legend(), ["a 1.49", "b 1.49"]);
});

test("the legend of compared runs names them, each with its smoothed loss", () => {
  shown([falling("a"), curveOf({}, "empty"), falling("b")]);
  assert.deepEqual(legend(), ["a 1.49", "b 1.49"]);
  const colors = [...chart.legend.querySelectorAll("i")].map((one) => one.style.background);
  assert.deepEqual(colors, [BLUE, GREEN]);
});

test("seven runs, and six scores, have colours of their own", () => {
  const colors = () => [...chart.legend.querySelectorAll("i")].map((one) => one.style.background);
  shown(Array.from({ length: 8 }, (_, number) => falling(String(number))));
  const ofRuns = colors();
  chart.dispose();
  const scores = { a: 0, b: 0, c: 0, d: 0, e: 0, f: 0, g: 0 };
  shown([curveOf({ steps: [1], losses: [1], rates: [0], scores: [{ step: 1, scores }] })]);
  for (const [count, [first, ...others]] of [
    [7, ofRuns],
    [6, colors().slice(2)],
  ]) {
    assert.deepEqual([new Set([first, ...others]).size, others.at(-1)], [count, first]);
    for (const color of [first, ...others]) assert.match(color, /^#[0-9a-f]{6}$/);
  }
});

test("below the pointer are a line and the values of the nearest step", () => {
  shown([falling()], { total: 20 });
  chart.canvas.onpointermove({ offsetX: 100 }); // step 6
  drawFrame();
  assert.deepEqual(legend().slice(0, 2), ["step 5 · loss 2.00 · smoothed 2.00", "lr 0.00010"]);
  const line = linesOf(INK).at(-1);
  assert.deepEqual([line.alpha, ...line.points], [OPACITY.rate, [90, 6], [90, 106]]);
  chart.canvas.onpointerleave();
  drawFrame();
  assert.equal(legend()[0], "step 10 · loss 1.00 · smoothed 1.49");
  assert.equal(linesOf(INK).length, 4);
});

test("the values below the pointer are those of its step, and of scores up to it", () => {
  const steps = Array.from({ length: 20 }, (_, index) => index + 1);
  const scores = [4, 13, 14].map((step) => ({ step, scores: { [step < 14 ? "CLIP-I" : "CLIP-T"]: step / 100 } }));
  shown([curveOf({ steps, losses: steps, rates: steps, scores })]);
  for (const [step, score] of [
    [13, "CLIP-I 0.130"],
    [5, "CLIP-I 0.040"],
  ]) {
    chart.canvas.onpointermove({ offsetX: 40 + 10 * step });
    drawFrame();
    assert.match(legend()[0], new RegExp(`^step ${step} · loss ${step}\\.`));
    assert.deepEqual(legend().slice(2), [score]);
  }
});

test("on a logarithmic axis equal ratios are equally far apart", () => {
  shown([curveOf({ steps: [1, 2, 3], losses: [0.01, 0.1, 1], rates: [0, 0, 0] })], { log: true });
  const [raw] = linesOf(BLUE);
  assert.deepEqual(
    raw.points.filter((_, index) => index % 2).map(([, y]) => y),
    [106, 56, 6],
  );
  assert.equal(chart.logButton.getAttribute("aria-pressed"), "true");
  chart.logButton.click();
  drawFrame();
  assert.equal(linesOf(BLUE)[0].points[3][1], 96);
  assert.equal(chart.logButton.getAttribute("aria-pressed"), "false");
});

test("a sharp screen has more pixels", () => {
  for (const [ratio, width, height] of [
    [2, 496, 244],
    [1, 248, 122],
    [undefined, 248, 122],
  ]) {
    window.devicePixelRatio = ratio;
    shown([falling()]);
    assert.deepEqual([chart.canvas.width, chart.canvas.height], [width, height]);
    assert.deepEqual(chart.canvas.pen.transform, [ratio ?? 1, 0, 0, ratio ?? 1, 0, 0]);
    assert.deepEqual(chart.canvas.pen.cleared, [0, 0, 248, 122]);
    chart.dispose();
  }
});

test("the canvas gets another size only when the chart has, and is drawn anew then", () => {
  shown([falling()]);
  const sizes = [];
  const { height } = chart.canvas;
  Object.defineProperty(chart.canvas, "height", { get: () => sizes.at(-1) ?? height, set: (size) => sizes.push(size) });
  chart.schedule();
  drawFrame();
  assert.deepEqual(sizes, []);
  canvasSize.height = 222;
  resizes.get(chart.element)();
  drawFrame();
  assert.deepEqual(sizes, [222]);
  assert.equal(linesOf(BLUE)[0].points[0][1], 6);
  assert.equal(drawn("text")[0].points[0][1], 206);
  chart.dispose();
  assert.equal(resizes.has(chart.element), false);
});

test("nothing is drawn where there is no room", () => {
  for (const [size, isDrawn] of [
    [{ width: 9, height: 122 }, false],
    [{ width: 248, height: 9 }, false],
    [{ width: 10, height: 10 }, true],
  ]) {
    Object.assign(canvasSize, size);
    shown([falling()]);
    assert.equal(chart.canvas.pen.drawn.length > 0, isDrawn);
    chart.dispose();
  }
});

test("what can be pressed says what it does", () => {
  shown([falling()]);
  const { title, type } = chart.logButton;
  assert.deepEqual(
    [title, type, chart.logButton.getAttribute("aria-pressed")],
    ["Logarithmic loss axis", "button", "false"],
  );
  assert.deepEqual([chart.element.className, chart.legend.className], ["dreambooth-chart", "dreambooth-legend"]);
  assert.deepEqual([chart.log, chart.total], [false, 0]);
});

test("nothing is drawn before a chart is attached, nor after it is disposed", () => {
  chart = new Chart([falling()]);
  document.body.append(chart.element);
  chart.schedule();
  drawFrame();
  assert.equal(chart.canvas.pen, undefined);
  const before = Chart.attached;
  chart.attach();
  chart.attach();
  assert.equal(Chart.attached, before + 1);
  chart.dispose();
  chart.dispose();
  assert.equal(Chart.attached, before);
  drawFrame();
  assert.equal(chart.canvas.pen, undefined);
});

test("a chart that is attached again draws again", () => {
  shown([falling()]);
  chart.schedule();
  chart.dispose();
  chart.canvas.pen.drawn = [];
  drawFrame();
  assert.deepEqual(chart.canvas.pen.drawn, []);
  chart.attach();
  drawFrame();
  assert.equal(linesOf(BLUE).length, 2);
});

test("the pointer follows the arrow keys from the newest step, within the plot", () => {
  shown([falling()], { total: 20 });
  const shownStep = () => Number(/^step (\d+)/.exec(legend()[0])[1]);
  const press = (key) => {
    const event = new window.KeyboardEvent("keydown", { key, cancelable: true });
    chart.canvas.dispatchEvent(event);
    drawFrame();
    return event.defaultPrevented;
  };
  for (let step = 0; step < 13; step += 1) assert.equal(press("ArrowLeft"), true);
  assert.deepEqual([shownStep(), linesOf(INK).length], [5, 5]);
  press("End");
  assert.equal(shownStep(), 10);
  press("ArrowRight");
  assert.equal(linesOf(INK).length, 5);
  press("Home");
  assert.equal(shownStep(), 5);
  press("Escape");
  assert.deepEqual([shownStep(), linesOf(INK).length], [10, 4]);
  assert.equal(press("a"), false);
  press("Home");
  chart.canvas.dispatchEvent(new window.Event("blur"));
  drawFrame();
  assert.equal(linesOf(INK).length, 4);
});

test("the curve is summed up for those who don't see it", () => {
  shown([curveOf({})]);
  const label = () => chart.canvas.getAttribute("aria-label");
  assert.deepEqual([chart.canvas.getAttribute("role"), chart.canvas.tabIndex], ["img", 0]);
  assert.equal(label(), "Loss curve, no values yet");
  chart.dispose();
  shown([falling()]);
  assert.equal(label(), "Loss curve from step 5 to 10: smoothed loss from 2.00 to 1.49");
  chart.dispose();
  shown([falling("a"), curveOf({}, "empty"), falling("b")]);
  assert.equal(label(), "Smoothed loss curves: a 1.49 at step 10; b 1.49 at step 10");
});

test("a chart is drawn anew in the colours of another theme", async () => {
  shown([falling()]);
  const before = new Map(colors);
  colors.set("--dreambooth-series-0", "#123456");
  document.body.classList.add("other");
  await settled();
  drawFrame();
  assert.equal(linesOf("#123456").length, 2);
  for (const [name, color] of before) colors.set(name, color);
  document.body.classList.remove("other");
});

test("the validation loss has a name, other scores keep theirs", () => {
  const scores = [{ step: 10, scores: { validation_loss: 0.5, DINO: 0.25 } }];
  shown([curveOf({ steps: [10], losses: [1], rates: [0], scores })]);
  assert.deepEqual(legend().slice(2), ["validation loss 0.500", "DINO 0.250"]);
});
