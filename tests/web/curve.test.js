// The numbers of a curve: the running mean, what is left out, and what is found again.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Curve } from "../../web/lib/curve.js";

const BETA = 0.97;

/** A curve with these losses at steps 1, 2, … */
function curveOf(losses) {
  const curve = new Curve("loss");
  curve.append({ steps: losses.map((_, index) => index + 1), losses, rates: losses.map(() => 1e-4) });
  return curve;
}

const column = (curve, name) => [...curve[name].subarray(0, curve.length)];

/** Kingma and Ba 2015, section 3: the mean of all losses, each weighted by β to the power of its age. */
function weightedMean(losses) {
  const weights = losses.map((_, index) => BETA ** (losses.length - 1 - index));
  const sum = weights.reduce((total, weight) => total + weight);
  return losses.reduce((total, loss, index) => total + weights[index] * loss, 0) / sum;
}

function assertClose(actual, expected) {
  assert.equal(actual.length, expected.length);
  for (const [index, value] of actual.entries()) {
    assert.ok(Math.abs(value - expected[index]) < 1e-12, `${index}: ${value} instead of ${expected[index]}`);
  }
}

test("the running mean weights every loss by its age", () => {
  const losses = Array.from({ length: 300 }, (_, index) => Math.sin(index) ** 2 + 1 / (index + 1));
  const expected = losses.map((_, index) => weightedMean(losses.slice(0, index + 1)));
  assertClose(column(curveOf(losses), "smooth"), expected);
});

test("the running mean of equal losses is that loss, from the first one on", () => {
  assertClose(column(curveOf([0.25, 0.25, 0.25]), "smooth"), [0.25, 0.25, 0.25]);
});

test("a loss that is no number is left out, and the mean goes on without it", () => {
  for (const bad of [null, undefined, Number.NaN, Infinity, -Infinity]) {
    const curve = curveOf([1, bad, 3]);
    assert.deepEqual(column(curve, "steps"), [1, 3]);
    assertClose(column(curve, "smooth"), [1, weightedMean([1, 3])]);
    assert.equal(curve.lastStep, 3);
  }
});

test("a last loss that is no number counts as seen", () => {
  const curve = curveOf([1, null]);
  assert.deepEqual([curve.length, curve.lastStep], [1, 2]);
  curve.append({ steps: [2, 3], losses: [5, 6] });
  assert.deepEqual(column(curve, "steps"), [1, 3]);
});

test("a learning rate that is no number is 0", () => {
  const curve = new Curve("loss");
  curve.append({ steps: [1, 2, 3], losses: [1, 1, 1], rates: [0.5, null] });
  assert.deepEqual(column(curve, "rates"), [0.5, 0, 0]);
});

test("steps that are known already are left out", () => {
  const curve = curveOf([1, 2, 3]);
  curve.append({ steps: [2, 3, 4, 4], losses: [9, 9, 4, 9], rates: [9, 9, 9, 9] });
  assert.deepEqual(column(curve, "steps"), [1, 2, 3, 4]);
  assert.deepEqual(column(curve, "losses"), [1, 2, 3, 4]);
});

test("a gap stays a gap", () => {
  const curve = curveOf([1, 2]);
  curve.append({ steps: [10], losses: [3], rates: [0] });
  assert.deepEqual(column(curve, "steps"), [1, 2, 10]);
  assertClose(column(curve, "smooth").slice(-1), [weightedMean([1, 2, 3])]);
});

test("a curve grows beyond its first capacity, in parts or at once", () => {
  const losses = Array.from({ length: 5000 }, (_, index) => 1 / (index + 1));
  const once = curveOf(losses);
  const parts = new Curve("loss");
  for (let from = 0; from < 5000; from += 700) {
    const part = losses.slice(from, from + 700);
    parts.append({ steps: part.map((_, index) => from + index + 1), losses: part, rates: part.map(() => 1e-4) });
  }
  assert.equal(once.length, 5000);
  for (const name of ["steps", "losses", "smooth", "rates"]) assert.deepEqual(column(parts, name), column(once, name));
  assert.deepEqual(column(once, "losses"), losses);
});

test("scores of one step are joined, and stand in order", () => {
  const curve = new Curve("loss");
  curve.append({ scores: [{ step: 2, scores: { "CLIP-I": 0.5 } }] });
  curve.append({ scores: [{ step: 2, scores: { validation_loss: 0.25 } }] });
  curve.append({ scores: [{ step: 0, scores: { validation_loss: 0.5 } }] });
  curve.append({ scores: [{ step: 2, scores: { validation_loss: 0.125 } }] });
  const first = { step: 0, scores: { validation_loss: 0.5 } };
  assert.deepEqual(curve.scores, [first, { step: 2, scores: { "CLIP-I": 0.5, validation_loss: 0.125 } }]);
  assert.equal(curve.lastStep, -1); // scores are no steps
});

test("the newest score up to a step is found, past those that are no number", () => {
  const curve = new Curve("loss");
  const scores = [0.1, 0.2, null].map((value, index) => ({ step: 10 * index, scores: { DINO: value } }));
  curve.append({ scores });
  assert.deepEqual(
    [-1, 0, 9, 10, 99].map((step) => curve.score("DINO", step)),
    [null, 0.1, 0.1, 0.2, 0.2],
  );
  assert.equal(curve.score("CLIP-I", 99), null);
});

test("CLIPScore, which is 100 × CLIP-T, is not drawn", () => {
  const curve = new Curve("loss");
  curve.append({ scores: [{ step: 0, scores: { "CLIP-T": 0.3, CLIPScore: 30 } }] });
  assert.deepEqual(curve.scoreNames(), ["CLIP-T"]);
});

test("the nearest step is found", () => {
  const curve = new Curve("loss");
  assert.equal(curve.nearest(3), -1);
  const steps = [1, 2, 5, 9, 10];
  curve.append({ steps, losses: steps.map(() => 1), rates: [] });
  for (let at = -2; at < 13; at += 0.25) {
    const distance = (step) => Math.abs(step - at);
    assert.equal(distance(steps[curve.nearest(at)]), Math.min(...steps.map(distance)), `at ${at}`);
  }
  assert.deepEqual([curve.nearest(Infinity), curve.nearest(-Infinity)], [4, 0]);
});

test("what comes after a step is forgotten", () => {
  const curve = curveOf([1, 2, 3, 4]);
  curve.append({ scores: [2, 3].map((step) => ({ step, scores: { DINO: 0.5 } })) });
  curve.cut(2);
  assert.deepEqual([column(curve, "losses"), curve.lastStep, curve.scores.length], [[1, 2], 2, 1]);
  curve.append({ steps: [3, 4], losses: [3, 4], rates: [1e-4, 1e-4] });
  assert.deepEqual(column(curve, "smooth"), column(curveOf([1, 2, 3, 4]), "smooth"));
  curve.cut(99);
  assert.equal(curve.lastStep, 4);
});

test("a curve that is cleared is like a new one", () => {
  const curve = curveOf([1, 2, 3]);
  curve.append({ scores: [{ step: 1, scores: { DINO: 1 } }] });
  curve.clear();
  assert.deepEqual([curve.length, curve.lastStep, curve.scores], [0, -1, []]);
  curve.append({ steps: [1], losses: [7], rates: [0] });
  assert.deepEqual(column(curve, "smooth"), [7]);
});
