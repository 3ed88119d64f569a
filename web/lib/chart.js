// A chart of a run: loss raw and smoothed, learning rate, scores; hover for values; logarithmic axis.
// Draws on a canvas of its own, only when something changed, a vertical line for each column of pixels: ten thousand
// steps cost what a few hundred do.

import { make } from "./dom.js";

const SMOOTHING = 0.97;
const SCORE_COLORS = ["#e0883a", "#5bb56b", "#c266c9", "#c9b83f", "#4fb8c4", "#d46a6a"];
export const RUN_COLORS = ["#4a90d9", "#e0883a", "#5bb56b", "#c266c9", "#d46a6a", "#c9b83f"];

/** Numbers by step, in typed arrays that grow. */
export class Curve {
  constructor(title = "", color = RUN_COLORS[0]) {
    this.title = title;
    this.color = color;
    this.capacity = 0;
    this.clear();
  }

  clear() {
    this.length = 0;
    this.scores = [];
    this.reserve(1024);
  }

  reserve(capacity) {
    if (capacity <= this.capacity) return;
    for (const name of ["steps", "losses", "smooth", "rates"]) {
      const grown = new Float64Array(capacity);
      if (this[name]) grown.set(this[name].subarray(0, this.length));
      this[name] = grown;
    }
    this.capacity = capacity;
  }

  /** The last step with a loss; -1 if there is none. */
  lastStep() {
    return this.length ? this.steps[this.length - 1] : -1;
  }

  /** Add { steps, losses, rates, scores }, columns in the order of the steps; what is known already is left out. */
  append({ steps = [], losses = [], rates = [], scores = [] }) {
    for (let index = 0; index < steps.length; index += 1) {
      if (steps[index] <= this.lastStep() || losses[index] == null) continue;
      if (this.length === this.capacity) this.reserve(2 * this.capacity);
      const at = this.length;
      // exponential moving average with bias correction (Kingma and Ba 2015, section 3)
      const weight = (1 - SMOOTHING) / (1 - SMOOTHING ** (at + 1));
      this.smooth[at] = at ? this.smooth[at - 1] + weight * (losses[index] - this.smooth[at - 1]) : losses[index];
      this.steps[at] = steps[index];
      this.losses[at] = losses[index];
      this.rates[at] = rates[index] ?? 0;
      this.length += 1;
    }
    for (const point of scores) {
      const known = this.scores.find(({ step }) => step === point.step);
      const merged = { step: point.step, scores: { ...known?.scores, ...point.scores } };
      this.scores = [...this.scores.filter((other) => other !== known), merged].sort((a, b) => a.step - b.step);
    }
  }

  /** Index of the step nearest to `step`; -1 if there is none. */
  nearest(step) {
    let low = 0;
    let high = this.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    if (!this.length) return -1;
    return low > 0 && step - this.steps[low - 1] < this.steps[low] - step ? low - 1 : low;
  }
}

export class Chart {
  static attached = 0; // how many follow the size of their element now

  /** `curves`: one, or several to compare. Nothing is drawn before `attach`. */
  constructor(curves) {
    this.curves = curves;
    this.log = false;
    this.total = 0;
    this.pointer = null;
    this.observer = null;
    this.request = 0;
    this.canvas = make("canvas");
    this.legend = make("div", { className: "dreambooth-legend" });
    this.logButton = make("button", { textContent: "log", title: "Logarithmic loss axis", type: "button" });
    this.logButton.onclick = () => this.setLog(!this.log);
    this.element = make("div", { className: "dreambooth-chart" }, this.canvas);
    this.canvas.onpointermove = (event) => this.point(event.offsetX / Math.max(1, this.canvas.clientWidth));
    this.canvas.onpointerleave = () => this.point(null);
    this.setLog(false);
  }

  /** Draw from now on, whenever something changes, until `dispose`. */
  attach() {
    if (this.observer) return;
    Chart.attached += 1;
    this.observer = new ResizeObserver(() => this.schedule());
    this.observer.observe(this.element);
    this.schedule();
  }

  /** Let go of the page; `attach` brings the chart back. */
  dispose() {
    if (!this.observer) return;
    Chart.attached -= 1;
    this.observer.disconnect();
    this.observer = null;
    cancelAnimationFrame(this.request);
    this.request = 0;
  }

  setLog(log) {
    this.log = log;
    this.logButton.setAttribute("aria-pressed", log);
    this.schedule();
  }

  /** Show the values below a point, given as a fraction of the width; null: the newest ones. */
  point(fraction) {
    this.pointer = fraction;
    this.schedule();
  }

  /** Draw with the next frame. */
  schedule() {
    if (this.request || !this.observer) return;
    this.request = requestAnimationFrame(() => {
      this.request = 0;
      if (this.element.isConnected) this.draw();
    });
  }

  draw() {
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (width < 10 || height < 10) return;
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const pen = this.canvas.getContext("2d");
    const style = getComputedStyle(this.element);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const frame = { left: 40, right: width - 8, top: 6, bottom: height - 16, ink: style.color };
    const last = Math.max(1, this.total, ...this.curves.map((curve) => curve.lastStep()));
    const across = (step) => frame.left + ((frame.right - frame.left) * step) / last;
    const [low, high] = this.range();
    const scale = this.log ? Math.log : (value) => value;
    const up = (value) =>
      frame.bottom - ((frame.bottom - frame.top) * (scale(Math.min(Math.max(value, low), high)) - scale(low))) / (scale(high) - scale(low));
    this.drawAxes(pen, frame, last, low, high, across, up);
    const several = this.curves.length > 1;
    for (const curve of this.curves) {
      if (!several) this.drawRate(pen, frame, curve, across);
      this.drawLoss(pen, frame, curve, across, up, several);
      if (!several) this.drawScores(pen, frame, curve, across);
    }
    this.drawPointer(pen, frame, last, across);
  }

  /** The losses that the axis spans: all of the smoothed ones, and the raw ones but for the outermost hundredths. */
  range() {
    const raw = [];
    let low = Infinity;
    let high = -Infinity;
    for (const curve of this.curves) {
      const stride = Math.max(1, Math.floor(curve.length / 1000));
      for (let at = 0; at < curve.length; at += stride) {
        raw.push(curve.losses[at]);
        low = Math.min(low, curve.smooth[at]);
        high = Math.max(high, curve.smooth[at]);
      }
    }
    if (!raw.length) return [this.log ? 0.01 : 0, 1];
    raw.sort((a, b) => a - b);
    low = Math.min(low, raw[Math.floor(0.01 * raw.length)]);
    high = Math.max(high, raw[Math.ceil(0.99 * (raw.length - 1))]);
    if (this.log) return [Math.max(low, 1e-6), Math.max(high, 2 * Math.max(low, 1e-6))];
    return [Math.max(0, low - 0.05 * (high - low)), high > low ? high : low + 1];
  }

  drawAxes(pen, frame, last, low, high, across, up) {
    pen.font = "10px system-ui, sans-serif";
    pen.fillStyle = pen.strokeStyle = frame.ink;
    pen.lineWidth = 1;
    pen.globalAlpha = 0.7;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (let tick = 0; tick <= 3; tick += 1) {
      const fraction = tick / 3;
      const value = this.log ? low * (high / low) ** fraction : low + fraction * (high - low);
      pen.globalAlpha = 0.75;
      pen.fillText(value.toPrecision(2), frame.left - 4, up(value));
      pen.globalAlpha = 0.15;
      line(pen, [frame.left, up(value)], [frame.right, up(value)]);
    }
    pen.globalAlpha = 0.75;
    pen.textBaseline = "top";
    for (const [fraction, align] of [[0, "left"], [0.5, "center"], [1, "right"]]) {
      pen.textAlign = align;
      pen.fillText(String(Math.round(fraction * last)), across(fraction * last), frame.bottom + 3);
    }
    pen.globalAlpha = 1;
  }

  drawLoss(pen, frame, curve, across, up, several) {
    const columns = new Map();
    for (let at = 0; at < curve.length; at += 1) {
      const x = Math.round(across(curve.steps[at]));
      const known = columns.get(x);
      if (known) {
        known.low = Math.min(known.low, curve.losses[at]);
        known.high = Math.max(known.high, curve.losses[at]);
        known.smooth = curve.smooth[at];
      } else columns.set(x, { low: curve.losses[at], high: curve.losses[at], smooth: curve.smooth[at] });
    }
    pen.strokeStyle = curve.color;
    if (!several) {
      pen.globalAlpha = 0.35;
      pen.beginPath();
      let previous = null;
      for (const [x, { low, high }] of columns) {
        if (previous !== null) pen.lineTo(x, up(high));
        else pen.moveTo(x, up(high));
        pen.lineTo(x, up(low));
        previous = x;
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

  drawRate(pen, frame, curve, across) {
    let highest = 0;
    for (let at = 0; at < curve.length; at += 1) highest = Math.max(highest, curve.rates[at]);
    if (!highest) return;
    const stride = Math.max(1, Math.floor(curve.length / (frame.right - frame.left)));
    pen.strokeStyle = frame.ink;
    pen.globalAlpha = 0.45;
    pen.setLineDash([3, 3]);
    pen.beginPath();
    for (let at = 0; at < curve.length; at += stride) {
      pen.lineTo(across(curve.steps[at]), frame.bottom - 0.95 * (frame.bottom - frame.top) * (curve.rates[at] / highest));
    }
    pen.stroke();
    pen.setLineDash([]);
    pen.globalAlpha = 1;
  }

  /** Scores from 0 at the bottom to 1 at the top. */
  drawScores(pen, frame, curve, across) {
    this.scoreNames(curve).forEach((name, number) => {
      pen.strokeStyle = pen.fillStyle = SCORE_COLORS[number % SCORE_COLORS.length];
      const points = [];
      for (const { step, scores } of curve.scores) {
        if (scores[name] == null) continue;
        const value = Math.min(1, Math.max(0, scores[name]));
        points.push({ x: across(step), y: frame.bottom - (frame.bottom - frame.top) * value });
      }
      pen.beginPath();
      for (const { x, y } of points) pen.lineTo(x, y);
      pen.stroke();
      for (const { x, y } of points) {
        pen.beginPath();
        pen.arc(x, y, 2.5, 0, 2 * Math.PI);
        pen.fill();
      }
    });
  }

  scoreNames(curve) {
    const names = new Set(curve.scores.flatMap(({ scores }) => Object.keys(scores)));
    names.delete("CLIPScore"); // 100 × CLIP-T
    return [...names];
  }

  /** A line below the pointer, and the values there in the legend. */
  drawPointer(pen, frame, last, across) {
    let step = Infinity;
    if (this.pointer !== null) {
      step = ((this.pointer * this.canvas.clientWidth - frame.left) / (frame.right - frame.left)) * last;
    }
    const items = [];
    for (const curve of this.curves) {
      const at = curve.nearest(step);
      if (at < 0) continue;
      if (this.curves.length > 1) {
        items.push(item(curve.color, `${curve.title} ${curve.smooth[at].toPrecision(3)}`));
        continue;
      }
      items.push(item(curve.color, `step ${curve.steps[at]} · loss ${curve.losses[at].toPrecision(3)} · smoothed ${curve.smooth[at].toPrecision(3)}`));
      items.push(item(frame.ink, `lr ${curve.rates[at].toPrecision(2)}`));
      const before = curve.scores.filter((point) => point.step <= curve.steps[at]);
      this.scoreNames(curve).forEach((name, number) => {
        const value = before.findLast((point) => point.scores[name] != null)?.scores[name];
        if (value != null) items.push(item(SCORE_COLORS[number % SCORE_COLORS.length], `${name} ${value.toFixed(3)}`));
      });
      if (this.pointer !== null) {
        pen.strokeStyle = frame.ink;
        pen.globalAlpha = 0.5;
        line(pen, [across(curve.steps[at]), frame.top], [across(curve.steps[at]), frame.bottom]);
        pen.globalAlpha = 1;
      }
    }
    this.legend.replaceChildren(...items, this.logButton);
  }
}

function item(color, text) {
  const swatch = make("i");
  swatch.style.background = color;
  return make("span", {}, swatch, text);
}

function line(pen, from, to) {
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}
