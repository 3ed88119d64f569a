// What a chart draws of which numbers. Its canvas is 248 × 122 pixels: 200 for the steps, 100 for the losses.

import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";
import { drawFrame, INK, openPage, textsOf } from "./comfyui.js";

const { Chart } = await import("../../web/lib/chart.js");
const { Curve } = await import("../../web/lib/curve.js");
const [BLUE, ORANGE, GREEN] = ["#4a90d9", "#e0883a", "#5bb56b"];

let chart;

beforeEach(() => openPage());
afterEach(() => chart.dispose());

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
  assert.deepEqual([raw.alpha, raw.width], [0.35, 1]);
  assert.deepEqual(smoothed.points, [
    [90, 6],
    [140, 54.3],
  ]);
  assert.deepEqual([smoothed.alpha, smoothed.width], [1, 1.6]);
});

test("the learning rate is a dashed line, its highest just below the top", () => {
  shown([falling()], { total: 20 });
  const [{ color, alpha, points }] = drawn("dashes");
  assert.deepEqual([color, alpha], [INK, 0.45]);
  assert.deepEqual(points, [
    [90, 11],
    [140, 58.5],
  ]);
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
    drawn("area").map(({ color, points: [point] }) => [color, point]),
    [...image.map((point) => [ORANGE, point]), ...text.map((point) => [GREEN, point])],
  );
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

test("the legend of compared runs names them, each with its smoothed loss", () => {
  shown([falling("a"), curveOf({}, "empty"), falling("b")]);
  assert.deepEqual(legend(), ["a 1.49", "b 1.49"]);
  const colors = [...chart.legend.querySelectorAll("i")].map((one) => one.style.background);
  assert.deepEqual(colors, [BLUE, GREEN]);
});

test("below the pointer are a line and the values of the nearest step", () => {
  shown([falling()], { total: 20 });
  chart.canvas.onpointermove({ offsetX: 100 }); // step 6
  drawFrame();
  assert.deepEqual(legend().slice(0, 2), ["step 5 · loss 2.00 · smoothed 2.00", "lr 0.00010"]);
  const line = linesOf(INK).at(-1);
  assert.deepEqual([line.alpha, ...line.points], [0.5, [90, 6], [90, 106]]);
  chart.canvas.onpointerleave();
  drawFrame();
  assert.equal(legend()[0], "step 10 · loss 1.00 · smoothed 1.49");
  assert.equal(linesOf(INK).length, 4);
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
  window.devicePixelRatio = 2;
  try {
    shown([falling()]);
    assert.deepEqual([chart.canvas.width, chart.canvas.height], [496, 244]);
    assert.deepEqual(chart.canvas.pen.transform, [2, 0, 0, 2, 0, 0]);
  } finally {
    window.devicePixelRatio = 1;
  }
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
  chart.dispose();
  chart.canvas.pen.drawn = [];
  chart.attach();
  drawFrame();
  assert.equal(linesOf(BLUE).length, 2);
});
