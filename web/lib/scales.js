// @ts-check
// Where a chart's numbers lie: pure functions of curves, without a canvas.

/** @import { Curve } from "./curve.js" */

const SMALLEST = 1e-6; // of a logarithmic axis
const SAMPLED = 1000; // points of a curve whose raw losses are sorted

/**
 * The losses that the axis spans: all of the smoothed ones, and the raw ones but for the outermost hundredths.
 * @param {Iterable<Curve>} curves
 * @param {boolean} log
 * @returns {[low: number, high: number]} low < high; both above 0 if `log`.
 */
export function lossRange(curves, log) {
  const raw = [];
  let low = Infinity;
  let high = -Infinity;
  for (const curve of curves) {
    const stride = Math.max(1, Math.floor(curve.length / SAMPLED));
    for (let index = 0; index < curve.length; index += 1) {
      if (index % stride === 0) raw.push(curve.at("losses", index));
      low = Math.min(low, curve.at("smooth", index));
      high = Math.max(high, curve.at("smooth", index));
    }
  }
  if (!raw.length) return [log ? 0.01 : 0, 1];
  raw.sort((a, b) => a - b);
  low = Math.min(low, raw[Math.floor(0.01 * raw.length)] ?? low);
  high = Math.max(high, raw[Math.ceil(0.99 * (raw.length - 1))] ?? high);
  if (log) {
    low = Math.max(low, SMALLEST);
    return [low, Math.max(high, 2 * low)];
  }
  return [Math.max(0, low - 0.05 * (high - low)), high > low ? high : low + Math.max(1, 0.01 * low)];
}

/**
 * A function that says how far up a value lies: 0 at `low` or below, 1 at `high` or above.
 * @param {number} low
 * @param {number} high
 * @param {boolean} log
 * @returns {(value: number) => number}
 */
export function heightScale(low, high, log) {
  const scale = log ? Math.log : (/** @type {number} */ value) => value;
  const span = scale(high) - scale(low);
  return (value) => (scale(Math.min(Math.max(value, low), high)) - scale(low)) / span;
}

/**
 * Four values from `low` to `high`, evenly spaced on the axis.
 * @param {number} low
 * @param {number} high
 * @param {boolean} log
 */
export function ticks(low, high, log) {
  return [0, 1, 2, 3].map((tick) => (log ? low * (high / low) ** (tick / 3) : low + (tick / 3) * (high - low)));
}

/**
 * A curve in columns of pixels: x → the lowest and the highest loss, and the newest smoothed one.
 * @param {Curve} curve
 * @param {(step: number) => number} across Where a step lies.
 * @returns {Map<number, { low: number, high: number, smooth: number }>} In the order of the steps.
 */
export function pixelColumns(curve, across) {
  const columns = new Map();
  for (let index = 0; index < curve.length; index += 1) {
    const x = Math.round(across(curve.at("steps", index)));
    const loss = curve.at("losses", index);
    const smooth = curve.at("smooth", index);
    const column = columns.get(x);
    if (column) {
      column.low = Math.min(column.low, loss);
      column.high = Math.max(column.high, loss);
      column.smooth = smooth;
    } else columns.set(x, { low: loss, high: loss, smooth });
  }
  return columns;
}
