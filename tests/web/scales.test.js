// Where a chart's numbers lie: ranges, scales, and columns of pixels.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Curve } from "../../web/lib/curve.js";
import { heightScale, lossRange, pixelColumns, ticks } from "../../web/lib/scales.js";

function curveOf(losses) {
  const curve = new Curve("loss");
  curve.append({ steps: losses.map((_, index) => index + 1), losses, rates: [] });
  return curve;
}

const AXES = [false, true]; // linear, logarithmic

test("an axis without a curve goes to 1", () => {
  assert.deepEqual(lossRange([], false), [0, 1]);
  assert.deepEqual(lossRange([new Curve("loss")], true), [0.01, 1]);
});

test("the axis of equal losses has a height", () => {
  assert.deepEqual(lossRange([curveOf([0.5, 0.5])], false), [0.5, 1.5]);
  assert.deepEqual(lossRange([curveOf([0.5, 0.5])], true), [0.5, 1]);
  assert.deepEqual(lossRange([curveOf([0, 0])], false), [0, 1]);
  assert.deepEqual(lossRange([curveOf([0, 0])], true), [1e-6, 2e-6]);
});

test("the axis spans the losses, with a margin below that does not go under 0", () => {
  const [low, high] = lossRange([curveOf([1, 3])], false);
  assert.ok(Math.abs(low - 0.9) < 1e-12);
  assert.equal(high, 3);
  assert.deepEqual(lossRange([curveOf([0.01, 1])], false), [0, 1]);
  assert.deepEqual(lossRange([curveOf([0.01, 1])], true), [0.01, 1]);
});

test("an axis spans all curves", () => {
  assert.deepEqual(lossRange([curveOf([1]), curveOf([2]), curveOf([4])], true), [1, 4]);
});

test("one loss in hundreds does not flatten the rest, and every smoothed one is in", () => {
  for (const length of [300, 5000]) {
    const losses = Array.from({ length }, (_, index) => 1 + 0.1 * Math.sin(index));
    losses[length / 2] = 1e6;
    losses[length / 4] = 1e-3;
    const curve = curveOf(losses);
    const smooth = [...curve.smooth.subarray(0, length)];
    const [low, high] = lossRange([curve], true);
    assert.equal(high, Math.max(...smooth));
    assert.ok(high < 1e5);
    assert.ok(low >= 0.9 && low < 0.91);
    assert.equal(lossRange([curve], false)[1], high);
  }
});

test("raw losses are in but for one in a hundred, though the smoothed ones are closer together", () => {
  const losses = Array.from({ length: 1000 }, (_, index) => 2 + Math.cos(index));
  const [low, high] = lossRange([curveOf(losses)], true);
  assert.ok(low > 1 && low < 1.01 && high > 2.99 && high <= 3, `${low} to ${high}`);
});

test("a range goes upwards, whatever the losses", () => {
  const odd = [0, 1e-300, 1e-9, 1, 1e9, 1e300];
  for (const first of odd) {
    for (const second of odd) {
      for (const log of AXES) {
        const [low, high] = lossRange([curveOf([first, second, first])], log);
        assert.ok(low < high && low >= 0 && Number.isFinite(high), `${first}, ${second}: ${low} to ${high}`);
        const heightOf = heightScale(low, high, log);
        for (const value of [first, second]) assert.ok(heightOf(value) >= 0 && heightOf(value) <= 1);
      }
    }
  }
});

test("a scale goes from 0 to 1 and no further", () => {
  for (const log of AXES) {
    const heightOf = heightScale(0.1, 10, log);
    assert.deepEqual([0.1, 10, 0, 99].map(heightOf), [0, 1, 0, 1]);
  }
  assert.ok(Math.abs(heightScale(0.1, 10, false)(5.05) - 0.5) < 1e-12);
  assert.ok(Math.abs(heightScale(0.1, 10, true)(1) - 0.5) < 1e-12);
});

test("ticks are evenly spaced on their axis", () => {
  for (const log of AXES) {
    const heights = ticks(0.1, 10, log).map(heightScale(0.1, 10, log));
    for (const [index, height] of heights.entries()) assert.ok(Math.abs(height - index / 3) < 1e-12);
  }
});

test("a column of pixels has the extremes of its losses and the newest smoothed one", () => {
  const curve = curveOf([5, 1, 3, 2, 8, 4]);
  const columns = pixelColumns(curve, (step) => 100 + Math.floor((step - 1) / 3));
  const smooth = [...curve.smooth.subarray(0, 6)];
  assert.deepEqual(
    [...columns],
    [
      [100, { low: 1, high: 5, smooth: smooth[2] }],
      [101, { low: 2, high: 8, smooth: smooth[5] }],
    ],
  );
});

test("steps that are missing make no column", () => {
  const curve = new Curve("loss");
  curve.append({ steps: [1, 2, 9], losses: [1, null, 3], rates: [] });
  assert.deepEqual([...pixelColumns(curve, (step) => step).keys()], [1, 9]);
});

test("ten thousand steps make no more columns than there are pixels", () => {
  const curve = curveOf(Array.from({ length: 10_000 }, () => 1));
  assert.equal(pixelColumns(curve, (step) => (step / 10_000) * 300).size, 301);
});
