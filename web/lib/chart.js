// @ts-check
// A chart of a run: loss raw and smoothed, learning rate, scores; hover for values; logarithmic axis.
// Draws on a canvas of its own, only when something changed, a vertical line for each column of pixels: ten thousand
// steps cost what a few hundred do.

import { described, make } from "./dom.js";
import { OPACITY } from "./palette.js";
import { heightScale, lossRange, pixelColumns, ticks } from "./scales.js";
import { t } from "./texts.js";

/** @import { Curve } from "./curve.js" */

const MARGIN = { left: 40, right: 8, top: 6, bottom: 16 }; // pixels around the plot
const SERIES = 7; // colours of curves in the palette
const KEY_STEPS = 100; // presses of an arrow key from one end of the plot to the other

/**
 * Where things lie on the canvas, in pixels.
 * @typedef {object} Frame
 * @property {number} left
 * @property {number} right
 * @property {number} top
 * @property {number} bottom
 * @property {string} ink
 * @property {string[]} series Colours of curves; the first one is the loss's.
 * @property {number} last The step at the right end.
 * @property {(step: number) => number} across Where a step lies.
 */

/** @typedef {CanvasRenderingContext2D} Pen */

export class Chart {
  static attached = 0; // how many follow the size of their element now

  /** @type {number | null} */
  pointer = null;
  /** @type {ResizeObserver | null} */
  #observer = null;
  /** @type {MutationObserver | null} */
  #theme = null;
  #request = 0;

  /** @param {Curve[]} curves One, or several to compare. Nothing is drawn before `attach`. */
  constructor(curves) {
    this.curves = curves;
    this.log = false;
    this.total = 0;
    this.canvas = described(make("canvas", { tabIndex: 0 }), { role: "img", "aria-label": t("chart.empty") });
    this.legend = make("div", { className: "dreambooth-legend" });
    this.logButton = make("button", { textContent: t("chart.log"), title: t("chart.logTitle"), type: "button" });
    this.logButton.onclick = () => this.setLog(!this.log);
    this.element = make("div", { className: "dreambooth-chart" }, this.canvas);
    this.canvas.onpointermove = (event) => this.point(event.offsetX / Math.max(1, this.canvas.clientWidth));
    this.canvas.onpointerleave = this.canvas.onblur = () => this.point(null);
    this.canvas.onkeydown = (event) => this.pointByKey(event);
    this.setLog(false);
  }

  /** Draw from now on, whenever something changes, until `dispose`. */
  attach() {
    if (this.#observer) return;
    Chart.attached += 1;
    this.#observer = new ResizeObserver(() => this.schedule());
    this.#observer.observe(this.element);
    this.#theme = new MutationObserver(() => this.schedule());
    this.#theme.observe(document.body, { attributeFilter: ["class"] });
    this.schedule();
  }

  /** Let go of the page; `attach` brings the chart back. */
  dispose() {
    if (!this.#observer) return;
    Chart.attached -= 1;
    this.#observer.disconnect();
    this.#observer = null;
    this.#theme?.disconnect();
    cancelAnimationFrame(this.#request);
    this.#request = 0;
  }

  /** @param {boolean} log */
  setLog(log) {
    this.log = log;
    this.logButton.setAttribute("aria-pressed", String(log));
    this.schedule();
  }

  /**
   * Show the values below a point.
   * @param {number | null} fraction Of the width; null: the newest values.
   */
  point(fraction) {
    this.pointer = fraction;
    this.schedule();
  }

  /**
   * Move the pointer by arrow keys, Home and End; Escape takes it away.
   * @param {KeyboardEvent} event
   */
  pointByKey(event) {
    const width = Math.max(1, this.canvas.clientWidth);
    const [left, right] = [MARGIN.left, width - MARGIN.right];
    const stride = (right - left) / Math.max(1, Math.min(KEY_STEPS, this.#last()));
    const at = this.pointer === null ? right : this.pointer * width;
    /** @type {Record<string, number | null>} */
    const places = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: left, End: right, Escape: null };
    const place = places[event.key];
    if (place === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.point(place === null ? null : Math.min(Math.max(place, left), right) / width);
  }

  /** The step at the right end. */
  #last() {
    return Math.max(1, this.total, ...this.curves.map((curve) => curve.lastStep));
  }

  /** What the curves show, for those who don't see them. */
  summary() {
    const shown = this.curves.filter((curve) => curve.length);
    const [curve] = shown;
    if (!curve) return t("chart.empty");
    const number = (/** @type {number} */ value) => value.toPrecision(3);
    if (this.curves.length > 1) {
      const runs = shown.map((one) => {
        const loss = number(one.at("smooth", one.length - 1));
        return t("chart.comparedRun", { name: one.title, loss, step: one.at("steps", one.length - 1) });
      });
      return t("chart.compared", { runs: runs.join("; ") });
    }
    const newest = curve.length - 1;
    return t("chart.summary", {
      first: curve.at("steps", 0),
      last: curve.at("steps", newest),
      start: number(curve.at("smooth", 0)),
      end: number(curve.at("smooth", newest)),
    });
  }

  /** Draw with the next frame. */
  schedule() {
    if (this.#request || !this.#observer) return;
    this.#request = requestAnimationFrame(() => {
      this.#request = 0;
      if (this.element.isConnected) this.draw();
    });
  }

  draw() {
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    const pen = this.canvas.getContext("2d");
    if (width < 10 || height < 10 || !pen) return;
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const { left, top } = MARGIN;
    const edges = { left, right: width - MARGIN.right, top, bottom: height - MARGIN.bottom };
    const last = this.#last();
    const across = (/** @type {number} */ step) => edges.left + ((edges.right - edges.left) * step) / last;
    const style = getComputedStyle(this.element);
    const series = Array.from({ length: SERIES }, (_, index) =>
      style.getPropertyValue(`--dreambooth-series-${index}`).trim(),
    );
    const frame = { ...edges, ink: style.color, series, last, across };
    const [low, high] = lossRange(this.curves, this.log);
    const heightOf = heightScale(low, high, this.log);
    const up = (/** @type {number} */ value) => frame.bottom - (frame.bottom - frame.top) * heightOf(value);
    drawAxes(pen, frame, ticks(low, high, this.log), up);
    const several = this.curves.length > 1;
    for (const [number, curve] of this.curves.entries()) {
      if (!several) drawRate(pen, frame, curve);
      pen.strokeStyle = runColor(frame, number);
      drawLoss(pen, frame, curve, up, several);
      if (!several) drawScores(pen, frame, curve);
    }
    this.drawPointer(pen, frame);
    const summary = this.summary();
    if (this.canvas.getAttribute("aria-label") !== summary) described(this.canvas, { "aria-label": summary });
  }

  /**
   * A line below the pointer, and the values there in the legend.
   * @param {Pen} pen
   * @param {Frame} frame
   */
  drawPointer(pen, frame) {
    let step = Infinity;
    if (this.pointer !== null) {
      const fraction = (this.pointer * this.canvas.clientWidth - frame.left) / (frame.right - frame.left);
      step = fraction * frame.last;
    }
    const items = [];
    for (const [number, curve] of this.curves.entries()) {
      const index = curve.nearest(step);
      if (index < 0) continue;
      const smooth = curve.at("smooth", index).toPrecision(3);
      if (this.curves.length > 1) {
        items.push(legendItem(runColor(frame, number), `${curve.title} ${smooth}`));
        continue;
      }
      const at = curve.at("steps", index);
      const loss = curve.at("losses", index).toPrecision(3);
      items.push(legendItem(runColor(frame, number), t("chart.values", { step: at, loss, smooth })));
      items.push(legendItem(frame.ink, t("chart.rate", { rate: curve.at("rates", index).toPrecision(2) })));
      for (const [place, name] of curve.scoreNames().entries()) {
        const value = curve.score(name, at);
        if (value !== null) items.push(legendItem(scoreColor(frame, place), `${metricName(name)} ${value.toFixed(3)}`));
      }
      if (this.pointer !== null) {
        pen.strokeStyle = frame.ink;
        pen.globalAlpha = OPACITY.rate;
        line(pen, [frame.across(at), frame.top], [frame.across(at), frame.bottom]);
        pen.globalAlpha = 1;
      }
    }
    this.legend.replaceChildren(...items, this.logButton);
  }
}

/**
 * @param {Frame} frame
 * @param {number} number
 */
function runColor({ series }, number) {
  return series[number % series.length] ?? "";
}

/**
 * Another one than the loss's.
 * @param {Frame} frame
 * @param {number} number
 */
function scoreColor({ series }, number) {
  return series[1 + (number % (series.length - 1))] ?? "";
}

/** @param {string} name */
function metricName(name) {
  return name === "validation_loss" ? t("chart.validationLoss") : name;
}

/**
 * @param {Pen} pen
 * @param {Frame} frame
 * @param {number[]} values Of the loss.
 * @param {(value: number) => number} up
 */
function drawAxes(pen, frame, values, up) {
  pen.font = "10px system-ui, sans-serif";
  pen.fillStyle = pen.strokeStyle = frame.ink;
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const value of values) {
    pen.globalAlpha = OPACITY.axis;
    pen.fillText(value.toPrecision(2), frame.left - 4, up(value));
    pen.globalAlpha = 0.15;
    line(pen, [frame.left, up(value)], [frame.right, up(value)]);
  }
  pen.globalAlpha = OPACITY.axis;
  pen.textBaseline = "top";
  for (const [fraction, align] of /** @type {const} */ ([
    [0, "left"],
    [0.5, "center"],
    [1, "right"],
  ])) {
    pen.textAlign = align;
    pen.fillText(String(Math.round(fraction * frame.last)), frame.across(fraction * frame.last), frame.bottom + 3);
  }
  pen.globalAlpha = 1;
}

/**
 * @param {Pen} pen
 * @param {Frame} frame
 * @param {Curve} curve
 * @param {(value: number) => number} up
 * @param {boolean} several
 */
function drawLoss(pen, frame, curve, up, several) {
  const columns = pixelColumns(curve, frame.across);
  if (!several) {
    pen.globalAlpha = OPACITY.raw;
    pen.beginPath();
    for (const [x, { low, high }] of columns) {
      pen.lineTo(x, up(high)); // the first one of a path moves there
      pen.lineTo(x, up(low));
    }
    pen.stroke();
  }
  pen.globalAlpha = 1;
  pen.lineWidth = 1.6;
  pen.beginPath();
  for (const [x, { smooth }] of columns) pen.lineTo(x, up(smooth));
  pen.stroke();
  pen.lineWidth = 1;
}

/**
 * @param {Pen} pen
 * @param {Frame} frame
 * @param {Curve} curve
 */
function drawRate(pen, frame, curve) {
  let highest = 0;
  for (let index = 0; index < curve.length; index += 1) highest = Math.max(highest, curve.at("rates", index));
  if (!highest) return;
  const stride = Math.max(1, Math.floor(curve.length / (frame.right - frame.left)));
  pen.strokeStyle = frame.ink;
  pen.globalAlpha = OPACITY.rate;
  pen.setLineDash([3, 3]);
  pen.beginPath();
  for (let index = 0; index < curve.length; index += stride) {
    const height = 0.95 * (curve.at("rates", index) / highest);
    pen.lineTo(frame.across(curve.at("steps", index)), frame.bottom - (frame.bottom - frame.top) * height);
  }
  pen.stroke();
  pen.setLineDash([]);
  pen.globalAlpha = 1;
}

/**
 * Scores from 0 at the bottom to 1 at the top.
 * @param {Pen} pen
 * @param {Frame} frame
 * @param {Curve} curve
 */
function drawScores(pen, frame, curve) {
  for (const [number, name] of curve.scoreNames().entries()) {
    pen.strokeStyle = pen.fillStyle = scoreColor(frame, number);
    const points = [];
    for (const { step, scores } of curve.scores) {
      const value = scores[name];
      if (value == null) continue;
      const height = Math.min(1, Math.max(0, value));
      points.push({ x: frame.across(step), y: frame.bottom - (frame.bottom - frame.top) * height });
    }
    pen.beginPath();
    for (const { x, y } of points) pen.lineTo(x, y);
    pen.stroke();
    for (const { x, y } of points) {
      pen.beginPath();
      pen.arc(x, y, 2.5, 0, 2 * Math.PI);
      pen.fill();
    }
  }
}

/**
 * @param {string} color
 * @param {string} text
 */
function legendItem(color, text) {
  const swatch = make("i");
  swatch.style.background = color;
  return make("span", {}, swatch, text);
}

/**
 * @param {Pen} pen
 * @param {[x: number, y: number]} from
 * @param {[x: number, y: number]} to
 */
function line(pen, from, to) {
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}
