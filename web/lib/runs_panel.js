// @ts-check
// The sidebar tab: all runs, their curves side by side, their files, and what can be done with them.

import { addressOf, deleteRun, listRuns, runCurve, runDetails, useCheckpoint } from "./api.js";
import { Chart } from "./chart.js";
import { Curve } from "./curve.js";
import { described, icon, make, shortTime } from "./dom.js";
import { failureText, possibleActions } from "./progress.js";
import { promptsOf } from "./run_feed.js";
import { named, t } from "./texts.js";
import { sampleText } from "./training_panel.js";

/** @import { Points, RunDetails, RunSummary } from "../types/answers.js" */

/**
 * What only the host's page can do.
 * @typedef {object} RunsHost
 * @property {string} none What is shown while there is no run: how to start one.
 * @property {((graph: unknown, name: string) => Promise<void>) | null} loadGraph null: runs have no graph there.
 * @property {((run: RunDetails) => Promise<void>) | null} useSettings Begin another training with the settings of a run;
 *   null: that is what loading its graph does.
 * @property {(run: RunDetails) => Promise<unknown>} resume Go on with a run, whose graph was loaded if there is one.
 * @property {(message: string) => Promise<boolean | null>} confirm
 * @property {() => Promise<void>} refreshLists
 * @property {(detail: string) => void} notify
 */

/** @typedef {{ box: HTMLElement, chart: Chart | null }} OpenDetails */

export class RunsPanel {
  /** Id of the run whose details are shown. @type {string | null} */
  opened = null;
  /** @type {OpenDetails | null} */
  details = null;
  /** Id → curve. @type {Map<string, Curve>} */
  compared = new Map();
  disposed = false;

  /** @param {RunsHost} host */
  constructor(host) {
    this.host = host;
    this.chart = new Chart([]);
    this.chart.attach();
    this.chart.element.style.flex = "none";
    this.chart.element.style.height = "160px";
    this.comparison = make("div", { hidden: true }, this.chart.element, this.chart.legend);
    this.list = make("div");
    this.refreshButton = make("button", { type: "button" }, icon("⟳ "), t("runs.refresh"));
    this.refreshButton.onclick = () => this.refresh();
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-runs" },
      make(
        "div",
        { className: "dreambooth-head" },
        this.refreshButton,
        make("small", { textContent: t("runs.compareHint") }),
      ),
      this.comparison,
      this.list,
    );
  }

  dispose() {
    this.disposed = true;
    this.chart.dispose();
    this.closeDetails();
  }

  async refresh() {
    let rows;
    try {
      const runs = await listRuns();
      if (this.disposed) return;
      this.closeDetails();
      this.forgetAllBut(runs);
      rows = runs.flatMap((run) => this.row(run));
      if (!runs.length) rows.push(make("p", { textContent: this.host.none }));
    } catch (error) {
      this.closeDetails();
      rows = [errorText(error)];
    }
    this.replaceRows(rows);
  }

  /**
   * Whatever had the focus has it afterwards, too; where its run is gone, the first button has it.
   * @param {HTMLElement[]} rows
   */
  replaceRows(rows) {
    const { activeElement } = document;
    const hadFocus = this.list.contains(activeElement);
    const run = activeElement?.closest("[data-run]")?.getAttribute("data-run");
    const kind = activeElement?.matches("input") ? "input" : ".dreambooth-open";
    this.list.replaceChildren(...rows);
    if (!hadFocus) return;
    const row = rows.find((one) => one.dataset.run === run && one.matches(".dreambooth-run"));
    const focused = /** @type {HTMLElement | null | undefined} */ (row?.querySelector(kind));
    (focused ?? this.refreshButton).focus();
  }

  /**
   * Runs that are gone are compared no longer.
   * @param {RunSummary[]} runs
   */
  forgetAllBut(runs) {
    const ids = new Set(runs.map((run) => run.id));
    for (const id of this.compared.keys()) if (!ids.has(id)) this.compared.delete(id);
    this.showComparison();
  }

  /**
   * @param {RunSummary} run
   * @returns {HTMLElement[]}
   */
  row(run) {
    const title = t("runs.compare", { name: run.name });
    const tick = make("input", { type: "checkbox", checked: this.compared.has(run.id), title });
    described(tick, { "aria-label": title });
    tick.onchange = () => this.compare(run, tick).catch((error) => this.host.notify(error.message));
    const picture = run.preview
      ? make("img", { src: addressOf(run.preview), loading: "lazy", alt: t("runs.newest", { name: run.name }) })
      : make("span", { className: "none" });
    const facts = [t("progress.step", { step: run.step, steps: run.steps }), shortTime(run.changed_at)];
    if (run.loss != null) facts.splice(1, 0, t("runs.loss", { loss: run.loss.toPrecision(3) }));
    const state = make("span", { className: "dreambooth-state", textContent: named(run.state) });
    state.dataset.state = run.state;
    const open = make(
      "button",
      { className: "dreambooth-open", type: "button" },
      picture,
      make(
        "span",
        {},
        make("b", { textContent: run.name }),
        make("br"),
        make("small", { textContent: facts.join(" · ") }),
      ),
      state,
    );
    const row = make("div", { className: "dreambooth-run", title: run.id }, tick, open);
    row.dataset.run = run.id;
    described(open, { "aria-expanded": String(this.opened === run.id) });
    open.onclick = () => this.toggle(run);
    return this.opened === run.id ? [row, this.openDetails(run)] : [row];
  }

  /**
   * Open a run's details, or close them.
   * @param {RunSummary} run
   */
  async toggle(run) {
    this.opened = this.opened === run.id ? null : run.id;
    await this.refresh();
  }

  /** @param {RunSummary} run */
  openDetails(run) {
    const box = described(
      make("div", { className: "dreambooth-details" }, make("small", { textContent: t("runs.loading") })),
      { role: "region", "aria-label": t("runs.details", { name: run.name }) },
    );
    box.dataset.run = run.id;
    /** @type {OpenDetails} */
    const details = { box, chart: null };
    this.details = details;
    Promise.all([runDetails(run.id), runCurve(run.id)])
      .then(([facts, points]) => {
        if (this.details === details) this.fill(details, facts, points);
      })
      .catch((error) => box.replaceChildren(errorText(error)));
    return box;
  }

  closeDetails() {
    this.details?.chart?.dispose();
    this.details = null;
  }

  /**
   * @param {OpenDetails} details
   * @param {RunDetails} run
   * @param {Points} points
   */
  fill(details, run, points) {
    const curve = new Curve(run.name);
    curve.append(points);
    const chart = new Chart([curve]);
    details.chart = chart;
    chart.total = run.steps;
    Object.assign(chart.element.style, { flex: "none", height: "130px" });
    const failure = failureText(run);
    details.box.replaceChildren(
      ...(failure ? [errorBox("div", failure)] : []),
      make("div", { className: "actions" }, ...this.actions(run)),
      chart.element,
      chart.legend,
      make("div", { className: "dreambooth-grid", hidden: !Object.keys(run.previews).length }, ...samples(run)),
      folded(t("runs.checkpoints"), make("table", {}, ...run.adapters.map((adapter) => this.adapterRow(run, adapter)))),
      folded(t("runs.settings"), make("table", {}, ...settingRows(run))),
      make("small", { textContent: `${run.folder} · ${t("runs.size", { size: (run.bytes / 1e6).toFixed(0) })}` }),
    );
    chart.attach();
  }

  /** @param {RunDetails} run */
  actions(run) {
    const possible = possibleActions(run);
    const buttons = [];
    if (possible.load && this.host.loadGraph)
      buttons.push(this.button(t("runs.loadGraph"), t("runs.loadGraphTitle"), () => this.loadGraph(run)));
    if (this.host.useSettings)
      buttons.push(
        this.button(t("runs.useSettings"), t("runs.useSettingsTitle"), async () => this.host.useSettings?.(run)),
      );
    if (possible.resume) buttons.push(this.button(t("runs.resume"), t("runs.resumeTitle"), () => this.resume(run)));
    if (possible.delete) buttons.push(this.button(t("runs.delete"), t("runs.deleteTitle"), () => this.delete(run)));
    return buttons;
  }

  /**
   * @param {RunDetails} run
   * @param {RunDetails["adapters"][number]} adapter
   */
  adapterRow(run, { step, url, name, bytes }) {
    return make(
      "tr",
      {},
      make("td", {}, make("a", { href: addressOf(url), download: name, textContent: t("training.step", { step }) })),
      make("td", { textContent: t("runs.size", { size: (bytes / 1e6).toFixed(1) }) }),
      make(
        "td",
        {},
        this.button(t("runs.use"), t("runs.useTitle", { step }), () => this.use(run, step)),
      ),
    );
  }

  /**
   * @param {string} text
   * @param {string} title
   * @param {() => Promise<void>} action
   */
  button(text, title, action) {
    const button = make("button", { textContent: text, title, type: "button" });
    button.onclick = () => action().catch((error) => this.host.notify(error.message));
    return button;
  }

  /**
   * @param {RunSummary} run
   * @param {HTMLInputElement} tick Whether it is wanted; it may change while the curve is on its way.
   */
  async compare(run, tick) {
    if (tick.checked) {
      const curve = new Curve(run.name);
      curve.append(await runCurve(run.id));
      if (tick.checked) this.compared.set(run.id, curve);
    } else this.compared.delete(run.id);
    this.showComparison();
  }

  showComparison() {
    this.chart.curves = [...this.compared.values()];
    this.comparison.hidden = !this.chart.curves.length;
    this.chart.schedule();
  }

  /** @param {RunDetails} run */
  async loadGraph(run) {
    const response = run.workflow ? await fetch(addressOf(run.workflow)) : null;
    if (!response?.ok) throw new Error(t("runs.graphGone"));
    await this.host.loadGraph?.(await response.json(), run.name);
  }

  /** @param {RunDetails} run */
  async resume(run) {
    if (this.host.loadGraph) await this.loadGraph(run);
    await this.host.resume(run);
  }

  /**
   * @param {RunDetails} run
   * @param {number} step
   */
  async use(run, step) {
    const { file } = await useCheckpoint(run.id, step);
    await this.host.refreshLists();
    this.host.notify(t("runs.used", { file }));
  }

  /** @param {RunDetails} run */
  async delete(run) {
    if (!(await this.host.confirm(t("runs.confirmDelete", { run: run.id })))) return;
    await deleteRun(run.id);
    this.opened = null;
    await this.refresh();
  }
}

/**
 * The first sample picture of each step.
 * @param {RunDetails} run
 */
function samples(run) {
  const prompts = promptsOf(run.settings);
  return Object.entries(run.previews).flatMap(([step, [first]]) => {
    if (!first) return [];
    const title = sampleText(Number(step), first, prompts);
    return [make("img", { src: addressOf(first), title, alt: title, loading: "lazy" })];
  });
}

/** @param {RunDetails} run */
function settingRows(run) {
  return Object.entries(run.settings)
    .filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) =>
      make("tr", {}, make("td", { textContent: name }), make("td", { textContent: String(value) })),
    );
}

/** @param {unknown} error */
function errorText(error) {
  return errorBox("p", error instanceof Error ? error.message : String(error));
}

/**
 * @param {"p" | "div"} tag
 * @param {string} textContent
 */
function errorBox(tag, textContent) {
  return described(make(tag, { className: "dreambooth-error", textContent }), { role: "alert" });
}

/**
 * @param {string} title
 * @param {HTMLElement} content
 */
function folded(title, content) {
  return make("details", {}, make("summary", { textContent: title }), content);
}
