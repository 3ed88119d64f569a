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
    Object.assign(this, { title, color, length: 0, scores: [], capacity: 0 });
    this.clear();
  }

  clear() {
    this.length = 0;
    this.scores = [];
    this.reserve(1024);
  }

  /** Forget what lies beyond a step: the run went another way from there. */
  cut(step) {
    while (this.length && this.steps[this.length - 1] > step) this.length -= 1;
    this.scores = this.scores.filter((one) => one.step <= step);
  }

  reserve(capacity) {
    if (capacity <= this.capacity && this.steps) return;
    for (const name of ["steps", "losses", "smooth", "rates"]) {
      const grown = new Float64Array(capacity);
      if (this[name]) grown.set(this[name].subarray(0, this.length));
      this[name] = grown;
    }
    this.capacity = capacity;
  }

  /** Add { steps, losses, rates, scores }, columns in the order of the steps; what is known already is left out. */
  append({ steps = [], losses = [], rates = [], scores = [] }) {
    for (let index = 0; index < steps.length; index += 1) {
      if (this.length && steps[index] <= this.steps[this.length - 1]) continue;
      if (losses[index] == null) continue;
      if (this.length === this.capacity) this.reserve(2 * this.capacity);
      const at = this.length;
      // an average that forgets, without the pull of its start (Kingma and Ba 2015, section 3)
      const weight = (1 - SMOOTHING) / (1 - SMOOTHING ** (at + 1));
      this.smooth[at] = at ? this.smooth[at - 1] + weight * (losses[index] - this.smooth[at - 1]) : losses[index];
      this.steps[at] = steps[index];
      this.losses[at] = losses[index];
      this.rates[at] = rates[index] ?? 0;
      this.length += 1;
    }
    for (const one of scores) {
      const known = this.scores.find((other) => other.step === one.step);
      const whole = { step: one.step, scores: { ...known?.scores, ...one.scores } };
      this.scores = [...this.scores.filter((other) => other !== known), whole].sort((a, b) => a.step - b.step);
    }
  }

  /** Place of the step nearest to `step`; -1 if there is none. */
  nearest(step) {
    let [low, high] = [0, this.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - this.steps[low - 1] < this.steps[low] - step ? low - 1 : this.length ? low : -1;
  }
}

export class Chart {
  /** `curves`: one, or several to compare. */
  constructor(curves) {
    this.curves = curves;
    this.log = false;
    this.total = 0;
    this.pointer = null;
    this.frames = 0;
    this.slowest = 0;
    this.canvas = make("canvas");
    this.legend = make("div", { className: "dreambooth-legend" });
    this.logButton = make("button", { textContent: "log", title: "Logarithmic loss axis", type: "button" });
    this.logButton.onclick = () => this.setLog(!this.log);
    this.element = make("div", { className: "dreambooth-chart" }, this.canvas);
    this.canvas.onpointermove = (event) => this.point(event.offsetX / Math.max(1, this.canvas.clientWidth));
    this.canvas.onpointerleave = () => this.point(null);
    this.observer = new ResizeObserver(() => this.schedule());
    this.observer.observe(this.element);
    this.setLog(false);
  }

  setLog(log) {
    this.log = log;
    this.logButton.setAttribute("aria-pressed", log);
    this.schedule();
  }

  point(share) {
    this.pointer = share;
    this.schedule();
  }

  dispose() {
    this.observer.disconnect();
    cancelAnimationFrame(this.request);
  }

  schedule() {
    if (this.request) return;
    this.request = requestAnimationFrame(() => {
      this.request = 0;
      const began = performance.now();
      if (this.element.isConnected) this.draw();
      this.frames += 1;
      this.slowest = Math.max(this.slowest, performance.now() - began);
    });
  }

  draw() {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
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
    const last = Math.max(1, this.total, ...this.curves.map((one) => (one.length ? one.steps[one.length - 1] : 0)));
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
    let [low, high] = [Infinity, -Infinity];
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
      const share = tick / 3;
      const value = this.log ? low * (high / low) ** share : low + share * (high - low);
      pen.globalAlpha = 0.75;
      pen.fillText(value.toPrecision(2), frame.left - 4, up(value));
      pen.globalAlpha = 0.15;
      line(pen, [frame.left, up(value)], [frame.right, up(value)]);
    }
    pen.globalAlpha = 0.75;
    pen.textBaseline = "top";
    for (const share of [0, 0.5, 1]) {
      pen.textAlign = share === 1 ? "right" : share ? "center" : "left";
      pen.fillText(String(Math.round(share * last)), across(share * last), frame.bottom + 3);
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
      for (const [x, one] of columns) {
        if (previous !== null) pen.lineTo(x, up(one.high));
        else pen.moveTo(x, up(one.high));
        pen.lineTo(x, up(one.low));
        previous = x;
      }
      pen.stroke();
    }
    pen.globalAlpha = 1;
    pen.lineWidth = 1.6;
    pen.beginPath();
    for (const [x, one] of columns) pen.lineTo(x, up(one.smooth));
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
      const points = curve.scores.filter((one) => one.scores[name] != null);
      const at = (one) => [across(one.step), frame.bottom - (frame.bottom - frame.top) * Math.min(1, Math.max(0, one.scores[name]))];
      pen.beginPath();
      for (const one of points) pen.lineTo(...at(one));
      pen.stroke();
      for (const one of points) {
        pen.beginPath();
        pen.arc(...at(one), 2.5, 0, 2 * Math.PI);
        pen.fill();
      }
    });
  }

  scoreNames(curve) {
    const names = new Set(curve.scores.flatMap((one) => Object.keys(one.scores)));
    names.delete("CLIPScore"); // CLIP-T once more, a hundred times as large
    return [...names];
  }

  drawPointer(pen, frame, last, across) {
    const step = this.pointer === null ? Infinity : ((this.pointer * this.canvas.clientWidth - frame.left) / (frame.right - frame.left)) * last;
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
      const before = curve.scores.filter((one) => one.step <= curve.steps[at]);
      this.scoreNames(curve).forEach((name, number) => {
        const value = before.findLast((one) => one.scores[name] != null)?.scores[name];
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
  const mark = make("i");
  mark.style.background = color;
  return make("span", {}, mark, text);
}

function line(pen, from, to) {
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}
