// @ts-check
// On Train LoRA and Fine-tune Checkpoint: how far the run is, its curve, its sample pictures.

import * as server from "./api.js";
import { Chart } from "./chart.js";
import { described, make } from "./dom.js";
import { announcement, failureText, fraction, progressText, stateText } from "./progress.js";
import { RunFeed } from "./run_feed.js";
import { t } from "./texts.js";

const SHOWN = 6; // sample pictures of a step

export class TrainingPanel {
  /** Called whenever the state of the run is shown anew. */
  whenShown = () => {};
  /** The step whose sample pictures are shown; null: the newest. @type {number | null} */
  #step = null;
  /** URLs. @type {string[]} */
  #subject = [];
  /** URLs. @type {string[]} */
  #samples = [];

  /**
   * @param {() => string | undefined} runName The name that the node's runs have.
   * @param {string} [hint] What to do while there is no run.
   */
  constructor(runName, hint = t("training.hint")) {
    this.feed = new RunFeed(runName, server, this);
    this.chart = new Chart([this.feed.curve]);
    this.state = make("span", { className: "dreambooth-state" });
    this.text = make("span");
    this.announced = described(make("span", { className: "dreambooth-unseen" }), { role: "status" });
    this.hint = make("div", { textContent: hint });
    this.fill = make("div");
    this.bar = described(make("div", { className: "dreambooth-bar" }, this.fill), {
      role: "progressbar",
      "aria-label": t("progress.label"),
    });
    this.error = described(make("div", { className: "dreambooth-error", hidden: true }), { role: "alert" });
    this.subject = make("div", { className: "subject", title: t("training.subject") });
    this.samples = make("div", { className: "samples" });
    this.strip = make("div", { className: "dreambooth-strip", hidden: true }, this.subject, this.samples);
    this.range = make("input", { type: "range", min: "0", max: "0", value: "0", title: t("training.slider") });
    described(this.range, { "aria-label": t("training.slider") });
    this.range.oninput = () => this.#choose(Number(this.range.value));
    this.rangeText = make("span");
    this.slider = make("div", { className: "dreambooth-slider", hidden: true }, this.range, this.rangeText);
    for (const kind of ["pointerdown", "wheel"]) this.range.addEventListener(kind, (event) => event.stopPropagation());
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-training" },
      make("div", { className: "dreambooth-head" }, this.state, this.text),
      this.hint,
      this.bar,
      this.error,
      this.chart.element,
      this.chart.legend,
      this.strip,
      this.slider,
      this.announced,
    );
    this.showFacts();
  }

  attach() {
    this.chart.attach();
  }

  dispose() {
    this.chart.dispose();
    this.feed.dispose();
  }

  /** Whether there is a run, or one is about to be. */
  get hasRun() {
    return this.feed.run !== null || this.feed.isBusy;
  }

  showFacts() {
    const { state, facts } = this.feed;
    this.state.dataset.state = state;
    this.state.textContent = stateText(state);
    this.text.textContent = progressText(facts);
    queueMicrotask(() => this.#announce()); // another run begins with nothing, for a moment
    const percent = 100 * fraction(facts);
    this.fill.style.width = `${percent}%`;
    described(this.bar, { "aria-valuenow": String(Math.round(percent)) });
    for (const part of [this.bar, this.chart.element, this.chart.legend]) part.hidden = !this.hasRun;
    this.hint.hidden = this.hasRun || state !== "idle";
    const failure = this.feed.waiting ? "" : failureText(facts);
    if (this.error.textContent !== failure) this.error.textContent = failure;
    this.error.hidden = !this.error.textContent;
    this.chart.total = facts.steps ?? 0;
    this.chart.schedule();
    this.whenShown();
  }

  #announce() {
    const { state, facts } = this.feed;
    const text = announcement(state, facts.name);
    if (this.announced.textContent !== text) this.announced.textContent = text;
  }

  showCurve() {
    this.chart.schedule();
  }

  /** Show the subject's pictures, and the samples of the chosen step: the newest ones until another is chosen. */
  showPictures() {
    const { subject, previews, previewSteps: steps } = this.feed;
    if (this.#step === null || !steps.includes(this.#step)) this.#step = null;
    const step = this.#step ?? steps.at(-1);
    this.#subject = showImages(this.subject, this.#subject, subject, () => t("training.subject"));
    const samples = step === undefined ? [] : (previews.get(step) ?? []);
    const describe = (/** @type {string} */ url) => sampleText(step ?? 0, url, this.feed.prompts);
    this.#samples = showImages(this.samples, this.#samples, samples.slice(0, SHOWN), describe);
    this.strip.hidden = !subject.length && !steps.length;
    this.slider.hidden = steps.length < 2;
    this.range.max = String(Math.max(0, steps.length - 1));
    if (step === undefined) return;
    this.range.value = String(steps.indexOf(step));
    this.rangeText.textContent = step ? t("training.step", { step }) : t("training.base");
    described(this.range, { "aria-valuetext": this.rangeText.textContent });
  }

  /** @param {number} index Of a step in `previewSteps`. */
  #choose(index) {
    const steps = this.feed.previewSteps;
    this.#step = index === steps.length - 1 ? null : (steps[index] ?? null);
    this.showPictures();
  }
}

/**
 * Put pictures into an element, unless they are in it.
 * @param {HTMLElement} element
 * @param {string[]} shown URLs of those that are in it.
 * @param {string[]} wanted
 * @param {(url: string) => string} describe
 * @returns {string[]} Those that are in it now.
 */
function showImages(element, shown, wanted, describe) {
  if (shown.length !== wanted.length || shown.some((url, index) => url !== wanted[index])) {
    element.replaceChildren(...wanted.map((url) => make("img", { src: server.addressOf(url), loading: "lazy" })));
  }
  for (const [index, image] of [...element.children].entries())
    image.setAttribute("alt", describe(wanted[index] ?? ""));
  return [...wanted];
}

/**
 * What a sample picture shows.
 * @param {number} step
 * @param {string} url Ends as the engine names previews: subject-00-01.png is the second picture of the first prompt.
 * @param {string[]} prompts
 */
export function sampleText(step, url, prompts) {
  const prompt = prompts[Number(/subject-(\d+)-\d+\.png$/.exec(url)?.[1])];
  if (step) return prompt ? t("training.samplePrompt", { step, prompt }) : t("training.sample", { step });
  return prompt ? t("training.baseSamplePrompt", { prompt }) : t("training.baseSample");
}
