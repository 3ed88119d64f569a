// @ts-check
// The pack's part of the web UI's page: it puts the panels of web/lib into the tab that webui/tab.py builds.

import { connect, currentJob, resumeRun, stopJob } from "../web/lib/api.js";
import { addStyle, described, make } from "../web/lib/dom.js";
import { ENDED } from "../web/lib/progress.js";
import { RunsPanel } from "../web/lib/runs_panel.js";
import { languageFor, setLanguage, t } from "../web/lib/texts.js";
import { TrainingPanel } from "../web/lib/training_panel.js";

/** @import { JobFacts } from "../web/types/answers.js" */

const MILLISECONDS_BETWEEN_LOOKS = 1000;
const root = document.location.pathname.replace(/\/+$/, "");

connect({
  fetchApi: (route, options) => fetch(root + route, options),
  apiURL: (route) => root + route,
});

/** Use the browser's language, if locales/ has it. */
async function loadTexts() {
  const language = languageFor(navigator.language);
  if (language === "en") return;
  const response = await fetch(new URL(`../locales/${language}/main.json`, import.meta.url));
  if (response.ok) setLanguage(language, (await response.json()).dreambooth);
}

await loadTexts().catch(() => {}); // then in English

/** The panel of the job: its progress, Stop or Resume, and what may be done with the result. */
class JobPanel {
  /** @type {JobFacts | null} */
  facts = null;
  #measured = -1;
  #seenState = "";
  #isLost = false; // whether the web UI does not answer

  constructor() {
    this.panel = new TrainingPanel(() => this.facts?.name, t("webui.hint"));
    this.stopButton = button(t("webui.stop"), t("webui.stopTitle"), stopJob);
    this.resumeButton = button(t("webui.resume"), t("webui.resumeTitle"), async () => {
      if (this.facts?.run) await resumeRun(this.facts.run);
    });
    this.sendButton = button(t("webui.send"), t("webui.sendTitle"), async () => this.send());
    this.warnings = described(make("div", { className: "dreambooth-warnings", hidden: true }), { role: "status" });
    this.trouble = described(make("div", { className: "dreambooth-error", hidden: true }), { role: "alert" });
    this.element = make(
      "div",
      { className: "dreambooth" },
      make("div", { className: "dreambooth-head" }, this.stopButton, this.resumeButton, this.sendButton),
      this.trouble,
      this.warnings,
      this.panel.element,
    );
    this.element.style.height = "auto";
    this.panel.attach();
    this.panel.whenShown = () => this.show();
    this.show();
  }

  /** Ask what the job does, now and every second. */
  async follow() {
    for (;;) {
      await this.look().catch((error) => {
        this.#isLost = true;
        this.say(t("webui.noAnswer", { error: error.message }));
      });
      await new Promise((resolve) => setTimeout(resolve, MILLISECONDS_BETWEEN_LOOKS));
    }
  }

  async look() {
    const { feed } = this.panel;
    const facts = await currentJob(this.facts?.run === feed.run ? feed.curve.lastStep : -1);
    if (this.#isLost) this.say(""); // what a button said stays until the next one is pressed
    this.#isLost = false;
    if (!("state" in facts)) return;
    const { points, measured, warnings, ...known } = /** @type {JobFacts} */ (facts);
    const isNews = this.facts === null || measured !== this.#measured || (known.run ?? null) !== feed.run;
    this.facts = /** @type {JobFacts} */ ({ ...known, measured, warnings });
    this.#measured = measured;
    if (isNews) await feed.recover(known);
    else feed.receive(points?.steps.length ? { ...known, points } : known);
    this.show();
    if (this.#seenState !== known.state) {
      if (this.#seenState && ENDED.includes(known.state)) this.ended(known.state);
      this.#seenState = known.state;
    }
  }

  show() {
    const state = this.facts?.state ?? "idle";
    const hasEnded = [state, this.panel.feed.state].some((one) => ENDED.includes(one)); // the run's folder may tell first
    this.stopButton.hidden = hasEnded || state === "idle";
    this.resumeButton.hidden = !(this.facts?.run && (state === "stopped" || state === "failed"));
    this.sendButton.hidden = !this.facts?.card;
    this.panel.element.style.height = this.panel.hasRun ? "420px" : "auto";
    const warnings = (this.facts?.warnings ?? []).join("\n");
    if (this.warnings.textContent !== warnings) this.warnings.textContent = warnings;
    this.warnings.hidden = !warnings;
  }

  /** @param {string} trouble */
  say(trouble) {
    if (this.trouble.textContent !== trouble) this.trouble.textContent = trouble;
    this.trouble.hidden = !trouble;
  }

  /** @param {string} state */
  ended(state) {
    if (state === "done") refreshCards();
    runs?.refresh();
  }

  send() {
    if (this.facts?.card) sendToPrompt(this.facts.words, this.facts.card, this.facts.weight);
  }
}

/** Have the Extra Networks browser show the LoRA files that there are now. */
function refreshCards() {
  document.querySelector("#txt2img_lora_extra_refresh, #txt2img_extra_refresh")?.dispatchEvent(new MouseEvent("click"));
}

/** @type {RunsPanel | null} */
let runs = null;

/**
 * Have webui/tab.py fill the fields of Train with the settings of a run, and go there.
 * @param {string} run
 */
function useSettings(run) {
  const field = document.querySelector("#dreambooth_settings_of textarea, #dreambooth_settings_of input");
  if (!(field instanceof HTMLTextAreaElement || field instanceof HTMLInputElement))
    throw new Error(t("webui.noFields"));
  field.value = run;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  for (const tab of document.querySelectorAll("#tab_dreambooth .tab-nav button"))
    if (tab instanceof HTMLElement && tab.textContent?.trim() === "Train") tab.click();
}

/**
 * Put words and a LoRA into the prompt of txt2img, and go there.
 * @param {string} words
 * @param {string} file
 * @param {number} weight
 */
function sendToPrompt(words, file, weight) {
  const field = document.querySelector("#txt2img_prompt textarea");
  if (!(field instanceof HTMLTextAreaElement)) throw new Error(t("webui.noPrompt"));
  field.value = `${words} <lora:${file.replace(/\.safetensors$/, "")}:${weight}>`;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  const go = /** @type {any} */ (globalThis).switch_to_txt2img;
  if (go) go();
  else notify(t("webui.sent"));
}

/**
 * @param {string} text
 * @param {string} title
 * @param {() => Promise<unknown>} action
 */
function button(text, title, action) {
  const element = make("button", { textContent: text, title, type: "button" });
  element.onclick = () => {
    notify("");
    action().catch((error) => notify(error.message));
  };
  return element;
}

/** @param {string} text */
function notify(text) {
  if (job) job.say(text);
}

/** @type {JobPanel | null} */
let job = null;

function mountJob() {
  const container = document.getElementById("dreambooth-training-panel");
  if (!container || container.childElementCount) return;
  job ??= new JobPanel();
  container.replaceChildren(job.element);
}

function mountRuns() {
  const container = document.getElementById("dreambooth-runs-panel");
  if (!container || container.childElementCount) return;
  runs ??= new RunsPanel({
    none: t("webui.noRuns"),
    loadGraph: null,
    useSettings: async (run) => useSettings(run.id),
    resume: (run) => resumeRun(run.id),
    confirm: async (message) => window.confirm(message),
    refreshLists: async () => refreshCards(),
    notify: (text) => window.alert(text),
  });
  container.replaceChildren(runs.element);
  runs.refresh();
}

/** gradio builds the page piece by piece, and tabs anew. */
function mount() {
  mountJob();
  mountRuns();
  const made = document.querySelectorAll(".dreambooth-made:not([data-seen])"); // by a tool, see webui/tools_tab.py
  for (const result of made) result.setAttribute("data-seen", "");
  if (made.length) refreshCards();
}

/** The panels' colours are ComfyUI's; here they are those of the web UI's theme, which colours every element anew. */
const COLOURS = `
#dreambooth-training-panel, #dreambooth-runs-panel { --fg-color: var(--body-text-color); --input-text: var(--body-text-color);
  --comfy-menu-bg: var(--background-fill-secondary); --comfy-input-bg: var(--input-background-fill);
  --border-color: var(--border-color-primary); }
#dreambooth-training-panel *, #dreambooth-runs-panel * { color: inherit; }
:is(#dreambooth-training-panel, #dreambooth-runs-panel) :is(.dreambooth-state, button[aria-pressed=true]) { color: #fff; }
:is(#dreambooth-training-panel, #dreambooth-runs-panel) .dreambooth-warnings { color: var(--dreambooth-warning); }
:is(#dreambooth-training-panel, #dreambooth-runs-panel) a { color: var(--dreambooth-link); }
#dreambooth-runs-panel input[type=checkbox] { appearance: auto; background-image: none; accent-color: var(--color-accent); }
#dreambooth-runs-panel button { margin-block: 2px; }
:is(#dreambooth-training-panel, #dreambooth-runs-panel) button:not(.dreambooth-open) { padding: 1px 7px; }
#dreambooth-runs-panel :is(table, tr, th, td) { border: 0; padding: 1px 12px 1px 0; text-align: left; }
#dreambooth-training-panel .dreambooth-error, #dreambooth-runs-panel .dreambooth-error, #dreambooth_message .dreambooth-error,
#dreambooth_report .dreambooth-error, #dreambooth_tools .dreambooth-error { color: var(--dreambooth-error); }
#dreambooth_tools pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.dreambooth-report figure { display: inline-block; margin: 0 4px 4px 0; width: 96px; vertical-align: top; }
.dreambooth-report figcaption { font-size: 11px; overflow-wrap: anywhere; }
`;
document.head.append(make("style", { textContent: COLOURS }));
addStyle();
new MutationObserver(mount).observe(document.documentElement, { childList: true, subtree: true });
mount();
const started = setInterval(() => {
  if (!job) return;
  clearInterval(started);
  job.follow();
}, 200);
