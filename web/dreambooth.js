// The pack's part of ComfyUI's page: panels on nodes and a sidebar tab. Everything else is in lib/.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { get } from "./lib/api.js";
import { addStyle, make } from "./lib/dom.js";
import { RunsPanel } from "./lib/runs_panel.js";
import { SubjectPanel } from "./lib/subject_panel.js";
import { TrainingPanel } from "./lib/training_panel.js";

const TRAINING = ["DreamBoothTrainLora", "DreamBoothFineTune"];
const panels = new WeakMap(); // node → panel; a node that is gone takes its panel with it

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** The node of an execution id: its own id, after those of the subgraphs around it. */
function nodeOf(executionId) {
  let graph = app.rootGraph ?? app.graph;
  const ids = String(executionId).split(":");
  for (const id of ids.slice(0, -1)) graph = graph?.getNodeById(Number(id))?.subgraph;
  return graph?.getNodeById(Number(ids.at(-1)));
}

/** [node, panel] of every node in the graph that has a panel, also of those inside of subgraphs. */
function* nodesWithPanels(graph = app.rootGraph ?? app.graph, visited = new Set()) {
  if (!graph || visited.has(graph)) return;
  visited.add(graph);
  for (const node of graph.nodes) {
    if (panels.has(node)) yield [node, panels.get(node)];
    if (node.subgraph) yield* nodesWithPanels(node.subgraph, visited);
  }
}

/** ComfyUI keeps a widget's options when its node is gone, so nothing in them may refer to the node or its panel. */
const widgetOptions = (height) => ({ serialize: false, hideOnZoom: false, getMinHeight: () => height });

/**
 * Give a node a panel while it is in a graph: nodes are also made only to be copied, and ComfyUI may keep those that
 * were removed. So nothing but `panels` leads from a node to its panel.
 */
function addPanel(node, name, height, makePanel) {
  const container = make("div", { className: "dreambooth-panel" });
  const widget = node.addDOMWidget(name, "dreambooth", container, widgetOptions(height));
  widget.serialize = false;
  const { onAdded, onRemoved } = node;
  node.onAdded = function (...args) {
    panels.get(node)?.dispose();
    const panel = makePanel();
    panels.set(node, panel);
    container.replaceChildren(panel.element);
    panel.attach();
    return onAdded?.apply(this, args);
  };
  node.onRemoved = function (...args) {
    panels.get(node)?.dispose();
    panels.delete(node);
    container.replaceChildren();
    return onRemoved?.apply(this, args);
  };
  const [width, needed] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 340), Math.max(node.size[1], needed)]);
}

/** Call `react` after a widget's own callback. */
function onChange(widget, react) {
  const { callback } = widget;
  widget.callback = function (...args) {
    const result = callback?.apply(this, args);
    react();
    return result;
  };
}

function addTrainingPanel(node) {
  addPanel(node, "dreambooth_training", 300, () => new TrainingPanel(() => widgetOf(node, "name")?.value));
  const name = widgetOf(node, "name");
  if (name) onChange(name, () => panels.get(node)?.recover()); // another name is another run
}

function addSubjectPanel(node) {
  const folder = widgetOf(node, "folder");
  const choose = async (name) => {
    const values = folder.options.values;
    if (Array.isArray(values) && !values.includes(name)) await app.refreshComboInNodes();
    folder.value = name;
    folder.callback?.(name);
    node.graph?.change?.();
  };
  addPanel(node, "dreambooth_subject", 150, () => new SubjectPanel({ chosen: () => folder.value, choose, upload }));
  onChange(folder, () => panels.get(node)?.refresh());
  node.onDragOver = () => true;
  node.onDragDrop = (event) => {
    const files = [...event.dataTransfer.files].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return false;
    panels.get(node)?.add(files);
    return true;
  };
}

/** Upload a file into a folder of ComfyUI's input folder. */
async function upload(folder, file) {
  const form = new FormData();
  form.append("image", file);
  form.append("subfolder", folder);
  const response = await api.fetchApi("/upload/image", { method: "POST", body: form });
  if (response.status !== 200) throw new Error(`${file.name}: ${response.statusText}`);
}

/** Show on every panel what the server knows, once the graph is there. */
async function recover() {
  const live = await get("/nodes").catch(() => ({}));
  const byNode = new Map(Object.values(live).map((facts) => [nodeOf(facts.node), facts]));
  for (const [node, panel] of nodesWithPanels()) {
    if (panel instanceof TrainingPanel) panel.recover(byNode.get(node));
    else panel.refresh();
  }
}

/** The training panel of an execution id; undefined for another node. */
function trainingPanelOf(executionId) {
  const panel = panels.get(nodeOf(executionId));
  return panel instanceof TrainingPanel ? panel : undefined;
}

/** Nodes that were queued and will not run. */
function endWaiting(state) {
  for (const [, panel] of nodesWithPanels()) {
    if (panel.facts?.state === "waiting") panel.update({ state });
  }
}

function listen() {
  api.addEventListener("dreambooth", ({ detail }) => trainingPanelOf(detail.node)?.receive(detail));
  api.addEventListener("promptQueued", () => {
    for (const [node, panel] of nodesWithPanels()) {
      if (!(panel instanceof TrainingPanel) || (node.mode ?? 0) !== 0) continue;
      if (!["training", "starting"].includes(panel.facts.state)) panel.update({ state: "waiting" });
    }
  });
  api.addEventListener("execution_cached", ({ detail }) => {
    for (const id of detail.nodes ?? []) {
      const panel = trainingPanelOf(id);
      if (panel?.facts.state === "waiting") panel.update({ state: panel.run ? "done" : "idle" });
    }
  });
  api.addEventListener("execution_interrupted", () => endWaiting("idle"));
  api.addEventListener("execution_error", ({ detail }) => {
    trainingPanelOf(detail.node_id)?.end("failed", { problem: detail.exception_message, remedy: "" });
    endWaiting("idle");
  });
  api.addEventListener("reconnected", recover);
}

function addSidebar() {
  let panel = null;
  const host = {
    loadGraph: (graph, name) => app.loadGraphData(graph, true, true, name),
    queue: () => app.queuePrompt(0, 1),
    confirm: async (message) =>
      app.extensionManager.dialog?.confirm
        ? app.extensionManager.dialog.confirm({ title: "DreamBooth LoRA", message, type: "delete" })
        : window.confirm(message),
    refreshLists: () => app.refreshComboInNodes(),
    notify: (detail) => app.extensionManager.toast.add({ severity: "info", summary: "DreamBooth LoRA", detail, life: 5000 }),
  };
  const close = () => {
    panel?.dispose();
    panel = null;
  };
  app.extensionManager.registerSidebarTab({
    id: "dreambooth-runs",
    icon: "pi pi-chart-line",
    title: "Trainings",
    tooltip: "DreamBooth runs",
    type: "custom",
    render: (element) => {
      close();
      panel = new RunsPanel(host);
      element.replaceChildren(panel.element);
      element.style.height = "100%";
      panel.refresh();
    },
    destroy: close,
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
