// @ts-check
// The pack's part of ComfyUI's page: panels on nodes and a sidebar tab. Everything else is in lib/.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { connect, liveNodes } from "./lib/api.js";
import { addStyle, make } from "./lib/dom.js";
import { RunsPanel } from "./lib/runs_panel.js";
import { SubjectPanel } from "./lib/subject_panel.js";
import { TrainingPanel } from "./lib/training_panel.js";

/** @import { Graph, GraphNode, Widget } from "../../scripts/app.js" */

/** @typedef {TrainingPanel | SubjectPanel} Panel */

connect(api);
const TRAINING = ["DreamBoothTrainLora", "DreamBoothFineTune"];
/** Node → panel; a node that is gone takes its panel with it. @type {WeakMap<GraphNode, Panel>} */
const panels = new WeakMap();

/**
 * @param {GraphNode} node
 * @param {string} name
 */
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/**
 * The node of an execution id: its own id, after those of the subgraphs around it.
 * @param {string} executionId
 */
function nodeOf(executionId) {
  /** @type {Graph | undefined} */
  let graph = app.rootGraph ?? app.graph;
  const ids = String(executionId).split(":");
  for (const id of ids.slice(0, -1)) graph = graph?.getNodeById(Number(id))?.subgraph;
  return graph?.getNodeById(Number(ids.at(-1)));
}

/**
 * Every node in the graph that has a panel, also those inside of subgraphs.
 * @param {Graph} [graph]
 * @param {Set<Graph>} [visited]
 * @returns {Generator<[GraphNode, Panel]>}
 */
function* nodesWithPanels(graph = app.rootGraph ?? app.graph, visited = new Set()) {
  if (!graph || visited.has(graph)) return;
  visited.add(graph);
  for (const node of graph.nodes) {
    const panel = panels.get(node);
    if (panel) yield [node, panel];
    if (node.subgraph) yield* nodesWithPanels(node.subgraph, visited);
  }
}

/**
 * ComfyUI keeps a widget's options when its node is gone, so nothing in them may refer to the node or its panel.
 * @param {number} height
 */
const widgetOptions = (height) => ({ serialize: false, hideOnZoom: false, getMinHeight: () => height });

/**
 * Give a node a panel while it is in a graph: nodes are also made only to be copied, and ComfyUI may keep those that
 * were removed. So nothing but `panels` leads from a node to its panel.
 * @param {GraphNode} node
 * @param {string} name
 * @param {number} height
 * @param {() => Panel} makePanel
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

/**
 * Call `react` after a widget's own callback.
 * @param {Widget} widget
 * @param {() => void} react
 */
function onChange(widget, react) {
  const { callback } = widget;
  widget.callback = function (...args) {
    const result = callback?.apply(this, args);
    react();
    return result;
  };
}

/** @param {GraphNode} node */
function addTrainingPanel(node) {
  addPanel(node, "dreambooth_training", 300, () => new TrainingPanel(() => widgetOf(node, "name")?.value));
  const name = widgetOf(node, "name");
  if (name) onChange(name, () => trainingPanel(node)?.feed.rename()); // another name is another run
}

/** @param {GraphNode} node */
function addSubjectPanel(node) {
  const folder = widgetOf(node, "folder");
  if (!folder) return;
  const choose = async (/** @type {string} */ name) => {
    const { values } = folder.options;
    if (Array.isArray(values) && !values.includes(name)) await app.refreshComboInNodes();
    folder.value = name;
    folder.callback?.(name);
    node.graph?.change?.();
  };
  addPanel(node, "dreambooth_subject", 150, () => new SubjectPanel({ chosen: () => folder.value, choose, upload }));
  onChange(folder, () => subjectPanel(node)?.refresh());
  node.onDragOver = () => true;
  node.onDragDrop = (event) => {
    const files = [...(event.dataTransfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return false;
    subjectPanel(node)?.add(files);
    return true;
  };
}

/** @param {GraphNode | null | undefined} node */
function trainingPanel(node) {
  const panel = node && panels.get(node);
  return panel instanceof TrainingPanel ? panel : undefined;
}

/** @param {GraphNode} node */
function subjectPanel(node) {
  const panel = panels.get(node);
  return panel instanceof SubjectPanel ? panel : undefined;
}

/**
 * Upload a file into a folder of ComfyUI's input folder.
 * @param {string} folder
 * @param {File} file
 */
async function upload(folder, file) {
  const form = new FormData();
  form.append("image", file);
  form.append("subfolder", folder);
  const response = await api.fetchApi("/upload/image", { method: "POST", body: form });
  if (response.status !== 200) throw new Error(`${file.name}: ${response.statusText}`);
}

/** Show on every panel what the server knows, once the graph is there. */
async function recover() {
  const live = await liveNodes().catch(() => null);
  if (!live) return; // "reconnected" will come
  const byNode = new Map(Object.values(live).map((facts) => [nodeOf(facts.node), facts]));
  for (const [node, panel] of nodesWithPanels()) {
    if (panel instanceof TrainingPanel) panel.feed.recover(byNode.get(node));
    else panel.refresh();
  }
}

/**
 * What is known of the run of a node; undefined for one that does not train.
 * @param {string} executionId
 */
function feedOf(executionId) {
  return trainingPanel(nodeOf(executionId))?.feed;
}

/** @returns {Generator<[GraphNode, TrainingPanel]>} */
function* trainingNodes() {
  for (const [node, panel] of nodesWithPanels()) if (panel instanceof TrainingPanel) yield [node, panel];
}

/** Nodes that were queued will not run. */
function endWaiting() {
  for (const [, panel] of trainingNodes()) panel.feed.leaveQueue();
}

function listen() {
  api.addEventListener("dreambooth", ({ detail }) => feedOf(detail.node)?.receive(detail));
  api.addEventListener("promptQueued", () => {
    for (const [node, panel] of trainingNodes()) if ((node.mode ?? 0) === 0) panel.feed.queue();
  });
  api.addEventListener("execution_cached", ({ detail }) => {
    for (const id of detail.nodes ?? []) feedOf(id)?.leaveQueue(true);
  });
  api.addEventListener("execution_interrupted", endWaiting);
  api.addEventListener("execution_error", ({ detail }) => {
    feedOf(detail.node_id)?.fail(detail.exception_message);
    endWaiting();
  });
  api.addEventListener("reconnected", recover);
}

function addSidebar() {
  /** @type {RunsPanel | null} */
  let panel = null;
  /** @type {import("./lib/runs_panel.js").RunsHost} */
  const host = {
    begins: "Train LoRA (DreamBooth)",
    loadGraph: (graph, name) => app.loadGraphData(graph, true, true, name),
    useSettings: null,
    resume: () => app.queuePrompt(0, 1),
    confirm: async (message) =>
      app.extensionManager.dialog?.confirm
        ? app.extensionManager.dialog.confirm({ title: "DreamBooth LoRA", message, type: "delete" })
        : window.confirm(message),
    refreshLists: () => app.refreshComboInNodes(),
    notify: (detail) => {
      app.extensionManager.toast.add({ severity: "info", summary: "DreamBooth LoRA", detail, life: 5000 });
    },
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
    if (TRAINING.includes(node.comfyClass ?? "")) addTrainingPanel(node);
    else if (node.comfyClass === "DreamBoothSubject") addSubjectPanel(node);
  },
  afterConfigureGraph() {
    recover();
  },
});
