// @ts-check
// What a training panel says of a run in words and as a bar.

import { duration } from "./dom.js";

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
/** @type {Record<string, string>} */
const STATE_TEXTS = {
  idle: "not trained yet",
  waiting: "waiting",
  starting: "starting",
  done: "done",
  stopped: "stopped, its work is kept",
  failed: "failed",
};

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
  return STATE_TEXTS[state] ?? state;
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
  const parts = isPhase(facts) ? [`${facts.done} of ${facts.total}`] : [];
  const { step, steps, rate, seconds_left: left, memory, best } = facts;
  if (steps) {
    parts.push(`step ${step} of ${steps}`);
    if (facts.state === "training") {
      if (rate) parts.push(`${rate.toPrecision(3)} steps/s`);
      if (left != null) parts.push(`${duration(left)} left`);
      if (memory) parts.push(`${(memory / 2 ** 30).toFixed(1)} GB`);
    }
    if (best) parts.push(`best: step ${best}`);
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
