// The pack's part of ComfyUI's page: panels on nodes and a sidebar tab. Everything else is in lib/.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { get } from "./lib/api.js";
import { addStyle } from "./lib/dom.js";
import { RunsPanel } from "./lib/runs_panel.js";
import { SubjectPanel } from "./lib/subject_panel.js";
import { TrainingPanel } from "./lib/training_panel.js";

const TRAINING = ["DreamBoothTrainLora", "DreamBoothFineTune"];
const panels = new Map(); // node → panel
const waitingFor = new Set(); // panels of queued nodes

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** The node of an execution id: its own id, after those of the subgraphs around it. */
function nodeOf(executionId) {
  let graph = app.rootGraph ?? app.graph;
  const ids = String(executionId).split(":");
  for (const id of ids.slice(0, -1)) graph = graph?.getNodeById(Number(id))?.subgraph;
  return graph?.getNodeById(Number(ids.at(-1)));
}

function addPanel(node, name, panel, height) {
  panels.set(node, panel);
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => height };
  const widget = node.addDOMWidget(name, "dreambooth", panel.element, options);
  widget.serialize = false;
  const removed = node.onRemoved;
  node.onRemoved = function (...given) {
    panels.delete(node);
    panel.dispose?.();
    return removed?.apply(this, given);
  };
  const [width, needed] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 340), Math.max(node.size[1], needed)]);
}

function addTrainingPanel(node) {
  const panel = new TrainingPanel(() => widgetOf(node, "name")?.value);
  addPanel(node, "dreambooth_training", panel, 300);
  const name = widgetOf(node, "name");
  const changed = name?.callback;
  if (name) {
    name.callback = function (...given) {
      const result = changed?.apply(this, given);
      panel.recover(); // another name is another run
      return result;
    };
  }
}

function addSubjectPanel(node) {
  const folder = widgetOf(node, "folder");
  const panel = new SubjectPanel({
    chosen: () => folder.value,
    choose: async (name) => {
      const values = folder.options.values;
      if (Array.isArray(values) && !values.includes(name)) await app.refreshComboInNodes();
      folder.value = name;
      folder.callback?.(name);
      node.graph?.change?.();
    },
    upload: async (name, file) => {
      const form = new FormData();
      form.append("image", file);
      form.append("subfolder", name);
      const response = await api.fetchApi("/upload/image", { method: "POST", body: form });
      if (response.status !== 200) throw new Error(`${file.name}: ${response.statusText}`);
    },
  });
  const changed = folder.callback;
  folder.callback = function (...given) {
    const result = changed?.apply(this, given);
    panel.refresh();
    return result;
  };
  node.onDragOver = () => true;
  node.onDragDrop = (event) => {
    const files = [...event.dataTransfer.files].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return false;
    panel.take(files);
    return true;
  };
  addPanel(node, "dreambooth_subject", panel, 150);
  panel.refresh();
}

/** Every training panel, once the graph is there. */
async function recover() {
  const live = await get("/nodes").catch(() => ({}));
  const byNode = new Map(Object.values(live).map((facts) => [nodeOf(facts.node), facts]));
  for (const [node, panel] of panels) {
    if (panel instanceof TrainingPanel) panel.recover(byNode.get(node));
    else panel.refresh();
  }
}

function listen() {
  api.addEventListener("dreambooth", ({ detail }) => {
    const panel = panels.get(nodeOf(detail.node));
    waitingFor.delete(panel);
    panel?.receive?.(detail);
  });
  api.addEventListener("promptQueued", () => {
    for (const [node, panel] of panels) {
      if (!(panel instanceof TrainingPanel) || (node.mode ?? 0) !== 0) continue;
      if (["training", "starting"].includes(panel.facts.state)) continue;
      waitingFor.add(panel);
      panel.tell({ state: "waiting" });
    }
  });
  const settle = (state) => {
    for (const panel of waitingFor) panel.tell({ state });
    waitingFor.clear();
  };
  api.addEventListener("execution_cached", ({ detail }) => {
    for (const id of detail.nodes ?? []) {
      const panel = panels.get(nodeOf(id));
      if (waitingFor.delete(panel)) panel.tell({ state: panel.run ? "done" : "idle" });
    }
  });
  api.addEventListener("execution_interrupted", () => settle("idle"));
  api.addEventListener("execution_error", ({ detail }) => {
    const panel = panels.get(nodeOf(detail.node_id));
    if (panel instanceof TrainingPanel) panel.end("failed", { problem: detail.exception_message, remedy: "" });
    waitingFor.delete(panel);
    settle("idle");
  });
  api.addEventListener("reconnected", recover);
}

function addSidebar() {
  let panel = null;
  const say = (detail) => app.extensionManager.toast.add({ severity: "info", summary: "DreamBooth LoRA", detail, life: 5000 });
  const host = {
    loadGraph: (graph, name) => app.loadGraphData(graph, true, true, name),
    queue: () => app.queuePrompt(0, 1),
    confirm: async (message) =>
      app.extensionManager.dialog?.confirm
        ? app.extensionManager.dialog.confirm({ title: "DreamBooth LoRA", message, type: "delete" })
        : window.confirm(message),
    refreshLists: () => app.refreshComboInNodes(),
    say,
  };
  app.extensionManager.registerSidebarTab({
    id: "dreambooth-runs",
    icon: "pi pi-chart-line",
    title: "Trainings",
    tooltip: "DreamBooth runs",
    type: "custom",
    render: (element) => {
      panel = new RunsPanel(host);
      element.replaceChildren(panel.element);
      element.style.height = "100%";
      panel.refresh();
    },
    destroy: () => panel?.dispose(),
  });
}

app.registerExtension({
  name: "DreamBoothLora",
  setup() {
    addStyle();
    listen();
    addSidebar();
    recover();
  },
  nodeCreated(node) {
    addStyle();
    if (TRAINING.includes(node.comfyClass)) addTrainingPanel(node);
    else if (node.comfyClass === "DreamBoothSubject") addSubjectPanel(node);
  },
  afterConfigureGraph() {
    recover();
  },
});
