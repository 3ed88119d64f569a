// The sidebar tab: all runs, their curves side by side, their files, and what can be done with them.

import { fileUrl, get, runPath, send } from "./api.js";
import { Chart, Curve, RUN_COLORS } from "./chart.js";
import { make, shortTime } from "./dom.js";

export class RunsPanel {
  /** `host` does what the page's frame can: loadGraph, queue, confirm, refreshLists, say. */
  constructor(host) {
    this.host = host;
    this.opened = null;
    this.compared = new Map();
    this.chart = new Chart([]);
    this.chart.element.style.flex = "none";
    this.chart.element.style.height = "160px";
    this.comparison = make("div", { hidden: true }, this.chart.element, this.chart.legend);
    this.list = make("div");
    this.again = make("button", { textContent: "⟳ Refresh", type: "button" });
    this.again.onclick = () => this.refresh();
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-runs" },
      make("div", { className: "dreambooth-head" }, this.again, make("small", { textContent: "Tick runs to compare their losses." })),
      this.comparison,
      this.list,
    );
  }

  dispose() {
    this.chart.dispose();
  }

  async refresh() {
    try {
      const runs = await get("/runs");
      this.list.replaceChildren(...runs.flatMap((run) => this.row(run)));
      if (!runs.length) this.list.append(make("p", { textContent: "No run yet. Train LoRA (DreamBooth) begins one." }));
    } catch (error) {
      this.list.replaceChildren(make("p", { className: "dreambooth-error", textContent: error.message }));
    }
  }

  row(run) {
    const tick = make("input", { type: "checkbox", checked: this.compared.has(run.id), title: "Compare" });
    tick.onclick = (event) => event.stopPropagation();
    tick.onchange = () => this.compare(run, tick.checked);
    const picture = run.preview
      ? make("img", { src: fileUrl(run.id, run.preview), loading: "lazy", alt: "newest sample" })
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
    row.onclick = () => this.open(run);
    return this.opened === run.id ? [row, this.details(run)] : [row];
  }

  async open(run) {
    this.opened = this.opened === run.id ? null : run.id;
    await this.refresh();
  }

  details(run) {
    const box = make("div", { className: "dreambooth-details" }, make("small", { textContent: "loading…" }));
    Promise.all([get(runPath(run.id)), get(runPath(run.id, "/curve"))])
      .then(([details, columns]) => this.fill(box, details, columns))
      .catch((error) => box.replaceChildren(make("p", { className: "dreambooth-error", textContent: error.message })));
    return box;
  }

  fill(box, run, columns) {
    const curve = new Curve(run.name);
    curve.append(columns);
    const chart = new Chart([curve]);
    chart.total = run.steps;
    Object.assign(chart.element.style, { flex: "none", height: "130px" });
    const button = (text, title, work) => {
      const made = make("button", { textContent: text, title, type: "button" });
      made.onclick = () => work().catch((error) => this.host.say(error.message));
      return made;
    };
    const actions = [];
    if (run.workflow) {
      actions.push(button("Load graph", "Open the graph of this run", () => this.loadGraph(run)));
      if (run.state === "stopped" || run.state === "failed") {
        actions.push(button("Resume", "Open the graph of this run and queue it", () => this.resume(run)));
      }
    }
    if (run.state !== "running") actions.push(button("Delete…", "Remove the run with its checkpoints", () => this.delete(run)));
    const adapters = run.adapters.map(({ step, file, bytes }) =>
      make(
        "tr",
        {},
        make("td", {}, make("a", { href: fileUrl(run.id, file), download: `${run.name}-${step}.safetensors`, textContent: `step ${step}` })),
        make("td", { textContent: `${(bytes / 1e6).toFixed(1)} MB` }),
        make("td", {}, button("Use", "Copy this checkpoint into the LoRA folder", () => this.use(run, step))),
      ),
    );
    const settings = Object.entries(run.settings)
      .filter(([, value]) => value !== null && value !== "")
      .map(([name, value]) => make("tr", {}, make("td", { textContent: name }), make("td", { textContent: String(value) })));
    const samples = Object.entries(run.previews).map(([step, names]) =>
      make("img", { src: fileUrl(run.id, `previews/step-${step.padStart(8, "0")}/${names[0]}`), title: `step ${step}`, loading: "lazy" }),
    );
    box.replaceChildren(
      ...(run.problem ? [make("div", { className: "dreambooth-error", textContent: `${run.remedy}\n${run.problem}` })] : []),
      make("div", { className: "actions" }, ...actions),
      chart.element,
      chart.legend,
      make("div", { className: "dreambooth-grid", hidden: !samples.length }, ...samples),
      folded("Checkpoints", make("table", {}, ...adapters)),
      folded("Settings", make("table", {}, ...settings)),
      make("small", { textContent: `output/dreambooth/runs/${run.id} · ${(run.bytes / 1e6).toFixed(0)} MB` }),
    );
    chart.schedule();
  }

  async compare(run, wanted) {
    if (wanted) {
      const curve = new Curve(run.name);
      curve.append(await get(runPath(run.id, "/curve")));
      this.compared.set(run.id, curve);
    } else this.compared.delete(run.id);
    this.chart.curves = [...this.compared.values()];
    this.chart.curves.forEach((curve, number) => (curve.color = RUN_COLORS[number % RUN_COLORS.length]));
    this.comparison.hidden = !this.chart.curves.length;
    this.chart.schedule();
  }

  async loadGraph(run) {
    const response = await fetch(fileUrl(run.id, "workflow.json"));
    if (!response.ok) throw new Error("The graph of this run is gone.");
    await this.host.loadGraph(await response.json(), run.name);
  }

  async resume(run) {
    await this.loadGraph(run);
    await this.host.queue();
  }

  async use(run, step) {
    const { file } = await send("POST", runPath(run.id, "/use"), { step });
    await this.host.refreshLists();
    this.host.say(`${file} is in the LoRA folder.`);
  }

  async delete(run) {
    const sure = await this.host.confirm(`Delete the run '${run.id}' with all its checkpoints and sample pictures? The finished adapter file in the LoRA folder stays.`);
    if (!sure) return;
    await send("DELETE", runPath(run.id));
    this.compared.delete(run.id);
    this.opened = null;
    await this.refresh();
  }
}

function folded(title, content) {
  return make("details", {}, make("summary", { textContent: title }), content);
}
