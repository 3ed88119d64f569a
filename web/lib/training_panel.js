// On Train LoRA and Fine-tune Checkpoint: how far the run is, its curve, its sample pictures.

import { addressOf, get, runPath } from "./api.js";
import { Chart, Curve } from "./chart.js";
import { duration, make } from "./dom.js";

const ENDED = ["done", "stopped", "failed"];
const SHOWN = 6; // sample pictures of a step
const STATE_TEXTS = {
  idle: "not trained yet",
  waiting: "waiting",
  starting: "starting",
  done: "done",
  stopped: "stopped, can be resumed",
  failed: "failed",
};

export class TrainingPanel {
  /** `runName` gives the name that the node's runs have. */
  constructor(runName) {
    this.runName = runName;
    this.run = null; // id of the run that is shown
    this.recoveredName = null;
    this.previews = new Map(); // step → URLs of its pictures
    this.shownStep = null;
    this.facts = {};
    this.curve = new Curve("loss");
    this.chart = new Chart([this.curve]);
    this.state = make("span", { className: "dreambooth-state" });
    this.text = make("span");
    this.fill = make("div");
    this.error = make("div", { className: "dreambooth-error", hidden: true });
    this.subject = make("div", { className: "subject", title: "The subject's pictures" });
    this.samples = make("div", { className: "samples" });
    this.strip = make("div", { className: "dreambooth-strip", hidden: true }, this.subject, this.samples);
    this.range = make("input", { type: "range", min: 0, max: 0, value: 0, title: "Step of the sample pictures" });
    this.range.oninput = () => this.show(Number(this.range.value));
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
    this.setState("idle");
  }

  attach() {
    this.chart.attach();
  }

  dispose() {
    this.chart.dispose();
    this.run = null; // so answers that are still under way are dropped
  }

  /** Take in what the server sends of this node; a node of another graph may have had the same id. */
  receive(facts) {
    if (facts.name !== this.runName()) return;
    if (facts.run && facts.run !== this.run) {
      this.follow(facts.run);
    } else if (facts.points) {
      const [first] = facts.points.steps;
      if (first > Math.max(0, this.curve.lastStep()) + 1) this.catchUp(); // messages were missed
      else this.curve.append(facts.points);
    } else if (ENDED.includes(facts.state)) {
      this.catchUp();
      this.chart.schedule();
    }
    if (facts.preview) this.addPreview(facts.preview);
    if (facts.scores) this.curve.append({ scores: [facts.scores] });
    this.update(facts);
  }

  /** Show a run: what is on the disk, and from then on what is sent. */
  async follow(run) {
    this.run = run;
    this.previews.clear();
    this.curve.clear();
    this.subject.replaceChildren();
    this.samples.replaceChildren();
    this.strip.hidden = this.slider.hidden = true;
    const details = await get(runPath(run)).catch(() => null);
    if (!details || this.run !== run) return;
    this.subject.replaceChildren(...details.subject.map(picture));
    for (const [step, pictures] of Object.entries(details.previews)) {
      this.addPreview({ step: Number(step), pictures });
    }
    this.strip.hidden = !details.subject.length && !this.previews.size;
    if (details.state !== "running" || this.facts.state === undefined) this.update(details);
    await this.catchUp();
  }

  /** Fetch what the curve lacks; once more if something was missed meanwhile. */
  async catchUp() {
    this.behind = true;
    if (this.catching) return;
    this.catching = true;
    try {
      while (this.behind && this.run) {
        this.behind = false;
        const run = this.run;
        const points = await get(runPath(run, `/curve?after=${this.curve.lastStep()}`));
        if (this.run === run) this.curve.append(points);
        else this.behind = true;
      }
    } catch {
      this.behind = false; // the run has not written anything yet
    } finally {
      this.catching = false;
    }
    this.chart.schedule();
  }

  /** Show the newest run of the node's name, if nothing is shown: after a reload, or a restart of ComfyUI. */
  async recover(live) {
    const name = this.runName();
    if (live?.name === name) {
      this.receive(live);
      return;
    }
    if (this.facts.name === name || this.recoveredName === name) return;
    const runs = await get("/runs").catch(() => []);
    const newest = runs.find((run) => run.name === name);
    if (!newest || this.runName() !== name) return;
    this.recoveredName = name;
    await this.follow(newest.id);
  }

  /** Show facts, on top of what is known. */
  update(facts) {
    this.facts = { ...this.facts, ...facts };
    if (facts.state) this.setState(facts.state);
    const { step, steps, total, done, state } = this.facts;
    const isPhase = total && !["training", "running", ...ENDED].includes(state);
    const [finished, wanted] = isPhase ? [done, total] : [step, steps];
    if (steps) this.chart.total = steps;
    this.fill.style.width = wanted ? `${(100 * finished) / wanted}%` : "0";
    this.text.textContent = [isPhase ? `${done} of ${total}` : "", this.progress()].filter(Boolean).join(" · ");
    const failed = state === "failed" && (this.facts.problem || this.facts.remedy);
    this.error.hidden = !failed;
    if (failed) this.error.textContent = [this.facts.remedy, this.facts.problem].filter(Boolean).join("\n");
    this.chart.schedule();
  }

  progress() {
    const { step, steps, rate, seconds_left: left, memory, state, best } = this.facts;
    if (!steps) return "";
    const parts = [`step ${step} of ${steps}`];
    if (state === "training") {
      if (rate) parts.push(`${rate.toPrecision(3)} steps/s`);
      if (left != null) parts.push(`${duration(left)} left`);
      if (memory) parts.push(`${(memory / 2 ** 30).toFixed(1)} GB`);
    }
    if (best) parts.push(`best: step ${best}`);
    return parts.join(" · ");
  }

  setState(state) {
    this.state.dataset.state = state;
    this.state.textContent = STATE_TEXTS[state] ?? state;
  }

  /** ComfyUI itself reports the end, such as a stop while the node waited. */
  end(state, facts = {}) {
    if (!ENDED.includes(this.facts.state)) this.update({ state, ...facts });
  }

  addPreview({ step, pictures, scores }) {
    this.previews.set(step, pictures);
    if (scores && Object.keys(scores).length) this.curve.append({ scores: [{ step, scores }] });
    const steps = this.steps();
    const showsNewest = this.shownStep === null || Number(this.range.value) >= this.range.max;
    this.range.max = steps.length - 1;
    this.strip.hidden = false;
    this.slider.hidden = steps.length < 2;
    if (showsNewest) {
      this.range.value = steps.length - 1;
      this.show(steps.length - 1);
    }
  }

  /** Steps with sample pictures, ascending. */
  steps() {
    return [...this.previews.keys()].sort((a, b) => a - b);
  }

  /** Show the sample pictures of a step, given by its index in `steps`. */
  show(index) {
    const step = this.steps()[index];
    if (step === undefined) return;
    this.shownStep = step;
    this.samples.replaceChildren(...this.previews.get(step).slice(0, SHOWN).map(picture));
    this.rangeText.textContent = step ? `step ${step}` : "base";
  }
}

function picture(url) {
  return make("img", { src: addressOf(url), loading: "lazy", alt: decodeURIComponent(url.split("/").at(-1)) });
}
