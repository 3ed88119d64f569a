// @ts-check
// The numbers of a run by step, in typed arrays that grow, and the running mean of the loss.

/** @import { Points, ScorePoint } from "../types/answers.js" */

const SMOOTHING = 0.97;
const FIRST_CAPACITY = 1024;

export class Curve {
  /** Scores by step, ascending; what is measured of one step at several times is joined. @type {ScorePoint[]} */
  scores = [];
  /** How many points there are; the arrays are longer. */
  length = 0;
  /** The last step that was added, also one whose loss was left out; -1 if there is none. */
  lastStep = -1;
  steps = new Float64Array(FIRST_CAPACITY);
  losses = new Float64Array(FIRST_CAPACITY);
  /** Exponential moving average of the losses, with bias correction. */
  smooth = new Float64Array(FIRST_CAPACITY);
  rates = new Float64Array(FIRST_CAPACITY);

  /** @param {string} title */
  constructor(title) {
    this.title = title;
  }

  clear() {
    this.length = 0;
    this.lastStep = -1;
    this.scores = [];
  }

  /**
   * Forget what comes after a step.
   * @param {number} step
   */
  cut(step) {
    while (this.length && this.at("steps", this.length - 1) > step) this.length -= 1;
    this.lastStep = Math.min(this.lastStep, step);
    this.scores = this.scores.filter((point) => point.step <= step);
  }

  /**
   * A number of the point at an index below `length`.
   * @param {"steps" | "losses" | "smooth" | "rates"} column
   * @param {number} index
   */
  at(column, index) {
    return /** @type {number} */ (this[column][index]);
  }

  /**
   * Add columns in the order of the steps. What is known already is left out, and so is a loss that is no finite number:
   * it would spoil every mean after it.
   * @param {Partial<Points>} points
   */
  append({ steps = [], losses = [], rates = [], scores = [] }) {
    for (const [index, step] of steps.entries()) {
      if (step <= this.lastStep) continue;
      this.lastStep = step;
      const loss = losses[index];
      if (isFiniteNumber(loss)) this.#add(step, loss, rates[index]);
    }
    for (const { step, scores: added } of scores) {
      const known = this.scores.find((point) => point.step === step);
      const joined = { step, scores: { ...known?.scores, ...added } };
      this.scores = [...this.scores.filter((point) => point !== known), joined].sort((a, b) => a.step - b.step);
    }
  }

  /** Names of the metrics that are drawn. */
  scoreNames() {
    const names = new Set(this.scores.flatMap(({ scores }) => Object.keys(scores)));
    names.delete("CLIPScore"); // 100 × CLIP-T
    return [...names];
  }

  /**
   * The newest value of a metric up to a step; null if there is none.
   * @param {string} name
   * @param {number} step
   */
  score(name, step) {
    return (
      this.scores.findLast((point) => point.step <= step && isFiniteNumber(point.scores[name]))?.scores[name] ?? null
    );
  }

  /**
   * Index of the step nearest to `step`; -1 if there is none.
   * @param {number} step
   */
  nearest(step) {
    if (!this.length) return -1;
    let low = 0;
    let high = this.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.at("steps", middle) < step) low = middle + 1;
      else high = middle;
    }
    const isBeforeNearer = low > 0 && step - this.at("steps", low - 1) < this.at("steps", low) - step;
    return isBeforeNearer ? low - 1 : low;
  }

  /**
   * @param {number} step
   * @param {number} loss
   * @param {number | null | undefined} rate
   */
  #add(step, loss, rate) {
    if (this.length === this.steps.length) this.#grow();
    const index = this.length;
    // exponential moving average with bias correction (Kingma and Ba 2015, section 3)
    const weight = (1 - SMOOTHING) / (1 - SMOOTHING ** (index + 1));
    const before = index ? this.at("smooth", index - 1) : loss;
    this.smooth[index] = before + weight * (loss - before);
    this.steps[index] = step;
    this.losses[index] = loss;
    this.rates[index] = isFiniteNumber(rate) ? rate : 0;
    this.length += 1;
  }

  #grow() {
    for (const name of /** @type {const} */ (["steps", "losses", "smooth", "rates"])) {
      const grown = new Float64Array(2 * this[name].length);
      grown.set(this[name]);
      this[name] = grown;
    }
  }
}

/**
 * @param {unknown} value
 * @returns {value is number}
 */
export function isFiniteNumber(value) {
  return Number.isFinite(value);
}
