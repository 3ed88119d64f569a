// @ts-check
// The pack's part of ComfyUI's page: panels on nodes and a sidebar tab. Everything else is in lib/.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { connect, liveNodes } from "./lib/api.js";
import { addStyle, make } from "./lib/dom.js";
import { RunsPanel } from "./lib/runs_panel.js";
import { SubjectPanel } from "./lib/subject_panel.js";
import { languageFor, setLanguage, t } from "./lib/texts.js";
import { TrainingPanel } from "./lib/training_panel.js";

/** @import { Graph, GraphNode, Widget } from "../../scripts/app.js" */
/** @import { NodeFacts } from "./types/answers.js" */

/** @typedef {TrainingPanel | SubjectPanel} Panel */

connect(api);
const TRAINING = ["DreamBoothTrainLora", "DreamBoothFineTune"];
const ROOM = { training: 300, failed: 120, empty: 92, subject: 150 }; // least height of a panel, in pixels
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

/** Use the language that ComfyUI is set to, if locales/ has it: ComfyUI serves those of all packs together. */
async function loadTexts() {
  const language = languageFor(app.extensionManager.setting?.get("Comfy.Locale") ?? navigator.language);
  if (language === "en") return;
  const response = await api.fetchApi("/i18n");
  if (response.ok) setLanguage(language, (await response.json())[language]?.dreambooth);
}

/**
 * ComfyUI keeps a widget's options when its node is gone, so nothing in them may refer to the node or its panel.
 * @param {{ height: number }} room
 */
const widgetOptions = (room) => ({ serialize: false, hideOnZoom: false, getMinHeight: () => room.height });

/**
 * Give a node a panel while it is in a graph: nodes are also made only to be copied, and ComfyUI may keep those that
 * were removed. So nothing but `panels` leads from a node to its panel.
 * @param {GraphNode} node
 * @param {string} name
 * @param {{ height: number }} room Which the panel wants at least.
 * @param {() => Panel} makePanel
 */
function addPanel(node, name, room, makePanel) {
  const container = make("div", { className: "dreambooth-panel" });
  const widget = node.addDOMWidget(name, "dreambooth", container, widgetOptions(room));
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
  const room = { height: ROOM.empty };
  addPanel(node, "dreambooth_training", room, () => {
    const panel = new TrainingPanel(() => widgetOf(node, "name")?.value);
    panel.whenShown = () => makeRoom(node, panel, room);
    return panel;
  });
  const name = widgetOf(node, "name");
  if (name) onChange(name, () => trainingPanel(node)?.feed.rename()); // another name is another run
}

/**
 * A node without a run has a small panel. It grows when there is one, and shrinks to what it needs when there is none.
 * @param {GraphNode} node
 * @param {TrainingPanel} panel
 * @param {{ height: number }} room
 */
function makeRoom(node, panel, room) {
  const height = panel.hasRun ? ROOM.training : panel.error.hidden ? ROOM.empty : ROOM.failed;
  if (room.height === height) return;
  room.height = height;
  fitHeight(node, panel.hasRun);
}

/**
 * @param {GraphNode} node
 * @param {boolean} isTallerKept Whether a node that is taller than it needs to be stays so.
 */
function fitHeight(node, isTallerKept) {
  const [, needed] = node.computeSize();
  const height = isTallerKept ? Math.max(node.size[1], needed) : needed;
  if (height !== node.size[1]) node.setSize([node.size[0], height]);
}

/**
 * Fold away a node's advanced inputs in ComfyUI's classic nodes, which show them all: 2000 pixels of Training Settings.
 * A button at the end shows them. What is connected, or was changed, stays. (Vue nodes fold them themselves; there the
 * button is hidden.)
 * @param {GraphNode} node
 */
function addFold(node) {
  const advanced = node.widgets?.filter((widget) => widget.options?.advanced) ?? [];
  if (advanced.length < 2 || app.extensionManager.setting?.get("Comfy.Node.AlwaysShowAdvancedWidgets")) return;
  const defaults = new Map(advanced.map((widget) => [widget.name, widget.value]));
  const toggle = () => {
    node.showAdvanced = !node.showAdvanced;
    fold(node, button, defaults);
  };
  const button = node.addWidget("button", "dreambooth_advanced", "", toggle, { serialize: false, hidden: true });
  button.serialize = false;
  button.hidden = false;
  const { onConfigure } = node;
  node.onConfigure = function (...args) {
    const result = onConfigure?.apply(this, args);
    fold(node, button, defaults);
    return result;
  };
  fold(node, button, defaults);
}

/**
 * A node that had room for all of its inputs loses that of those that are folded away.
 * @param {GraphNode} node
 * @param {Widget} button
 * @param {Map<string, unknown>} defaults Of the advanced inputs.
 */
function fold(node, button, defaults) {
  const advanced = node.widgets?.filter((widget) => defaults.has(widget.name)) ?? [];
  for (const widget of advanced) widget.hidden = false;
  const [, whole] = node.computeSize();
  for (const widget of advanced) {
    const isConnected = node.getSlotFromWidget?.(widget)?.link != null;
    widget.hidden = !node.showAdvanced && !isConnected && widget.value === defaults.get(widget.name);
  }
  const [, needed] = node.computeSize();
  button.label = t(node.showAdvanced ? "node.hideAdvanced" : "node.showAdvanced");
  const [width, height] = node.size;
  node.setSize([width, height >= whole ? height - (whole - needed) : Math.max(height, needed)]);
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
  addPanel(
    node,
    "dreambooth_subject",
    { height: ROOM.subject },
    () => new SubjectPanel({ chosen: () => folder.value, choose, upload }),
  );
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
    if (panel instanceof TrainingPanel) recoverTraining(node, panel, byNode.get(node));
    else panel.refresh();
  }
}

/**
 * A node that was saved with a run, and has none now, gives back its room.
 * @param {GraphNode} node
 * @param {TrainingPanel} panel
 * @param {NodeFacts | undefined} facts
 */
async function recoverTraining(node, panel, facts) {
  await panel.feed.recover(facts);
  if (panels.get(node) === panel && panel.feed.state === "idle" && !panel.hasRun) fitHeight(node, false);
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
    none: t("runs.none"),
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
    title: t("runs.title"),
    tooltip: t("runs.tooltip"),
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
  async init() {
    await loadTexts().catch(() => {}); // then in English
  },
  setup() {
    addStyle();
    listen();
    addSidebar();
    recover();
  },
  nodeCreated(node) {
    addStyle();
    if (node.comfyClass?.startsWith("DreamBooth")) addFold(node);
    if (TRAINING.includes(node.comfyClass ?? "")) addTrainingPanel(node);
    else if (node.comfyClass === "DreamBoothSubject") addSubjectPanel(node);
  },
  afterConfigureGraph() {
    recover();
  },
});
