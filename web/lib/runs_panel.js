// @ts-check
// The sidebar tab: all runs, their curves side by side, their files, and what can be done with them.

import { addressOf, deleteRun, listRuns, runCurve, runDetails, useCheckpoint } from "./api.js";
import { Chart } from "./chart.js";
import { Curve } from "./curve.js";
import { make, shortTime } from "./dom.js";
import { failureText, possibleActions } from "./progress.js";

/** @import { Points, RunDetails, RunSummary } from "../types/answers.js" */

/**
 * What only the host's page can do.
 * @typedef {object} RunsHost
 * @property {string} begins What the host calls that which begins a run.
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
    this.refreshButton = make("button", { textContent: "⟳ Refresh", type: "button" });
    this.refreshButton.onclick = () => this.refresh();
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-runs" },
      make(
        "div",
        { className: "dreambooth-head" },
        this.refreshButton,
        make("small", { textContent: "Tick runs to compare their losses." }),
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
      if (!runs.length) rows.push(make("p", { textContent: `No run yet. ${this.host.begins} begins one.` }));
    } catch (error) {
      this.closeDetails();
      rows = [errorText(error)];
    }
    this.list.replaceChildren(...rows);
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
    const tick = make("input", { type: "checkbox", checked: this.compared.has(run.id), title: "Compare" });
    tick.onclick = (event) => event.stopPropagation();
    tick.onchange = () => this.compare(run, tick).catch((error) => this.host.notify(error.message));
    const picture = run.preview
      ? make("img", { src: addressOf(run.preview), loading: "lazy", alt: "newest sample" })
      : make("span", { className: "none" });
    const loss = run.loss == null ? "" : ` · loss ${run.loss.toPrecision(3)}`;
    const state = make("span", { className: "dreambooth-state", textContent: run.state });
    state.dataset.state = run.state;
    const row = make(
      "div",
      { className: "dreambooth-run", title: run.id },
      tick,
      picture,
      make(
        "div",
        {},
        make("b", { textContent: run.name }),
        make("br"),
        make("small", { textContent: `step ${run.step} of ${run.steps}${loss} · ${shortTime(run.changed_at)}` }),
      ),
      state,
    );
    row.onclick = () => this.toggle(run);
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
    const box = make("div", { className: "dreambooth-details" }, make("small", { textContent: "loading…" }));
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
      ...(failure ? [make("div", { className: "dreambooth-error", textContent: failure })] : []),
      make("div", { className: "actions" }, ...this.actions(run)),
      chart.element,
      chart.legend,
      make("div", { className: "dreambooth-grid", hidden: !Object.keys(run.previews).length }, ...samples(run)),
      folded("Checkpoints", make("table", {}, ...run.adapters.map((adapter) => this.adapterRow(run, adapter)))),
      folded("Settings", make("table", {}, ...settingRows(run))),
      make("small", { textContent: `${run.folder} · ${(run.bytes / 1e6).toFixed(0)} MB` }),
    );
    chart.attach();
  }

  /** @param {RunDetails} run */
  actions(run) {
    const possible = possibleActions(run);
    const buttons = [];
    if (possible.load && this.host.loadGraph)
      buttons.push(this.button("Load graph", "Open the graph of this run", () => this.loadGraph(run)));
    if (this.host.useSettings)
      buttons.push(
        this.button("Use these settings", "Fill the fields of Train with them", async () =>
          this.host.useSettings?.(run),
        ),
      );
    if (possible.resume)
      buttons.push(this.button("Resume", "Go on where this run was stopped", () => this.resume(run)));
    if (possible.delete)
      buttons.push(this.button("Delete…", "Remove the run with its checkpoints", () => this.delete(run)));
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
      make("td", {}, make("a", { href: addressOf(url), download: name, textContent: `step ${step}` })),
      make("td", { textContent: `${(bytes / 1e6).toFixed(1)} MB` }),
      make(
        "td",
        {},
        this.button("Use", "Copy this checkpoint into the LoRA folder", () => this.use(run, step)),
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
    if (!response?.ok) throw new Error("The graph of this run is gone.");
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
    this.host.notify(`${file} is in the LoRA folder.`);
  }

  /** @param {RunDetails} run */
  async delete(run) {
    const question = `Delete the run '${run.id}' with all its checkpoints and sample pictures?`;
    if (!(await this.host.confirm(`${question} The finished adapter file in the LoRA folder stays.`))) return;
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
  return Object.entries(run.previews).flatMap(([step, [first]]) =>
    first ? [make("img", { src: addressOf(first), title: `step ${step}`, loading: "lazy" })] : [],
  );
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
  const textContent = error instanceof Error ? error.message : String(error);
  return make("p", { className: "dreambooth-error", textContent });
}

/**
 * @param {string} title
 * @param {HTMLElement} content
 */
function folded(title, content) {
  return make("details", {}, make("summary", { textContent: title }), content);
}
