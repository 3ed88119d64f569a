// @ts-check
// A run's progress in words and as a fraction.

import { duration } from "./dom.js";
import { named, t } from "./texts.js";

/**
 * What is shown of a run: facts that the server sent (types/answers.d.ts, NodeFacts), or that stand in the run's folder.
 * @typedef {object} Facts
 * @property {string} [state] "starting", a phase's name, "training", "running" (in another node), or one of `ENDED`.
 * @property {string} [name]
 * @property {string} [run]
 * @property {number} [at]
 * @property {number} [step]
 * @property {number} [steps]
 * @property {number} [done]
 * @property {number} [total]
 * @property {number | null} [rate]
 * @property {number | null} [seconds_left]
 * @property {number | null} [memory]
 * @property {number} [best]
 * @property {string} [problem]
 * @property {string} [remedy]
 */

export const ENDED = ["done", "stopped", "failed"];

/**
 * What may be done with a run: its graph can be loaded if it was kept, and it can be resumed if that graph, or what the
 * host knows of how it was begun, goes on with it.
 * @param {{ state: string, workflow: string | null, settings: Record<string, unknown>, resumable?: boolean }} run
 * @returns {{ load: boolean, resume: boolean, delete: boolean }}
 */
export function possibleActions({ state, workflow, settings, resumable = Boolean(workflow) }) {
  const isEndedEarly = state === "stopped" || state === "failed";
  return {
    load: Boolean(workflow),
    resume: resumable && isEndedEarly && settings.resume !== "never", // else another run would begin
    delete: state !== "running",
  };
}

/** @param {string} state */
export function stateText(state) {
  return state === "stopped" ? t("training.stopped") : named(state);
}

/**
 * What is read out when a run's state changes: that it trains, or how it ended. Phases of a training are left out.
 * @param {string} state
 * @param {string} [name] Of the run.
 */
export function announcement(state, name = "") {
  if (state === "idle") return "";
  const text = stateText(["waiting", ...ENDED].includes(state) ? state : "training");
  return name ? `${name}: ${text}` : text;
}

/**
 * Whether work other than training steps is under way, with a progress of its own.
 * @param {Facts} facts
 */
function isPhase({ state = "", total }) {
  return Boolean(total) && !["training", "running", ...ENDED].includes(state);
}

/**
 * How much is done of the phase or the run, from 0 to 1.
 * @param {Facts} facts
 */
export function fraction(facts) {
  const [done = 0, total = 0] = isPhase(facts) ? [facts.done, facts.total] : [facts.step, facts.steps];
  return total ? done / total : 0;
}

/** @param {Facts} facts */
export function progressText(facts) {
  const { done = 0, total = 0, step = 0, steps, rate, seconds_left: left, memory, best } = facts;
  const parts = isPhase(facts) ? [t("progress.phase", { done, total })] : [];
  if (steps) {
    parts.push(t("progress.step", { step, steps }));
    if (facts.state === "training") {
      if (rate) parts.push(t("progress.rate", { rate: rate.toPrecision(3) }));
      if (left != null) parts.push(t("progress.left", { time: duration(left) }));
      if (memory) parts.push(t("progress.memory", { memory: (memory / 2 ** 30).toFixed(1) }));
    }
    if (best) parts.push(t("progress.best", { step: best }));
  }
  return parts.join(" · ");
}

/**
 * Why a run failed, and what to do; "" if it did not.
 * @param {Facts} facts
 */
export function failureText({ state, problem, remedy }) {
  return state === "failed" ? [remedy, problem].filter(Boolean).join("\n") : "";
}
