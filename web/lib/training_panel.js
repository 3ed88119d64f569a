// @ts-check
// On Train LoRA and Fine-tune Checkpoint: how far the run is, its curve, its sample pictures.

import * as server from "./api.js";
import { Chart } from "./chart.js";
import { make } from "./dom.js";
import { failureText, fraction, progressText, stateText } from "./progress.js";
import { RunFeed } from "./run_feed.js";

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

  /** @param {() => string | undefined} runName The name that the node's runs have. */
  constructor(runName) {
    this.feed = new RunFeed(runName, server, this);
    this.chart = new Chart([this.feed.curve]);
    this.state = make("span", { className: "dreambooth-state" });
    this.text = make("span");
    this.fill = make("div");
    this.error = make("div", { className: "dreambooth-error", hidden: true });
    this.subject = make("div", { className: "subject", title: "The subject's pictures" });
    this.samples = make("div", { className: "samples" });
    this.strip = make("div", { className: "dreambooth-strip", hidden: true }, this.subject, this.samples);
    this.range = make("input", { type: "range", min: "0", max: "0", value: "0", title: "Step of the sample pictures" });
    this.range.oninput = () => this.#choose(Number(this.range.value));
    this.rangeText = make("span");
    this.slider = make("div", { className: "dreambooth-slider", hidden: true }, this.range, this.rangeText);
    for (const kind of ["pointerdown", "wheel"]) this.range.addEventListener(kind, (event) => event.stopPropagation());
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-training" },
      make("div", { className: "dreambooth-head" }, this.state, this.text),
      make("div", { className: "dreambooth-bar" }, this.fill),
      this.error,
      this.chart.element,
      this.chart.legend,
      this.strip,
      this.slider,
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

  showFacts() {
    const { state, facts } = this.feed;
    this.state.dataset.state = state;
    this.state.textContent = stateText(state);
    this.text.textContent = progressText(facts);
    this.fill.style.width = `${100 * fraction(facts)}%`;
    this.error.textContent = this.feed.waiting ? "" : failureText(facts);
    this.error.hidden = !this.error.textContent;
    this.chart.total = facts.steps ?? 0;
    this.chart.schedule();
    this.whenShown();
  }

  showCurve() {
    this.chart.schedule();
  }

  /** Show the subject's pictures, and the samples of the chosen step: the newest ones until another is chosen. */
  showPictures() {
    const { subject, previews, previewSteps: steps } = this.feed;
    if (this.#step === null || !steps.includes(this.#step)) this.#step = null;
    const step = this.#step ?? steps.at(-1);
    this.#subject = showImages(this.subject, this.#subject, subject);
    const samples = step === undefined ? [] : (previews.get(step) ?? []);
    this.#samples = showImages(this.samples, this.#samples, samples.slice(0, SHOWN));
    this.strip.hidden = !subject.length && !steps.length;
    this.slider.hidden = steps.length < 2;
    this.range.max = String(Math.max(0, steps.length - 1));
    if (step === undefined) return;
    this.range.value = String(steps.indexOf(step));
    this.rangeText.textContent = step ? `step ${step}` : "base";
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
 * @returns {string[]} Those that are in it now.
 */
function showImages(element, shown, wanted) {
  if (shown.length !== wanted.length || shown.some((url, index) => url !== wanted[index])) {
    element.replaceChildren(...wanted.map(picture));
  }
  return [...wanted];
}

/** @param {string} url */
function picture(url) {
  const alt = decodeURIComponent(url.split("/").at(-1) ?? "");
  return make("img", { src: server.addressOf(url), loading: "lazy", alt });
}
