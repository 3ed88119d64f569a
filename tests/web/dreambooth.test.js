// The pack's part of ComfyUI's page: which nodes get panels, and which panel learns what.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { answers, api, app, openPage, questions, settled, textsOf } from "./comfyui.js";

await import("../../web/dreambooth.js");
const { Chart } = await import("../../web/lib/chart.js");
const { setLanguage } = await import("../../web/lib/texts.js");

const NO_RUNS = { "GET /dreambooth/nodes": {}, "GET /dreambooth/runs": [] };
const FOLDERS = { no_folder: "(none)", folders: [{ name: "dog", archive: false, count: 1 }] };
const REPORT = { pictures: [], warnings: [], problem: null };

let told;

/** A graph of ComfyUI. */
class Graph {
  nodes = [];

  getNodeById(id) {
    return this.nodes.find((node) => node.id === id);
  }

  add(node) {
    this.nodes.push(node);
    node.graph = this;
    node.onAdded?.(this);
    return node;
  }

  remove(node) {
    this.nodes = this.nodes.filter((other) => other !== node);
    node.onRemoved?.();
  }

  change() {
    told.push("change");
  }
}

let lastId = 0;

/** A node of ComfyUI as its page makes it. */
function made(comfyClass, values = {}, more = {}) {
  lastId += 1;
  const node = { id: lastId, comfyClass, size: [200, 100], widgets: [], ...more };
  node.widgets = Object.entries(values).map(([name, value]) => ({
    ...{ name, value, callback: (chosen) => told.push(`${name}: ${chosen}`) },
    options: { values: [value], advanced: /^w[1-9]/.test(name) },
  }));
  node.addWidget = (type, name, value, press, options) => {
    const widget = { type, name, value, press, options, hidden: options.hidden };
    node.widgets.push(widget);
    return widget;
  };
  node.addDOMWidget = (name, type, element, options) => {
    const widget = { name, type, element, options };
    node.widgets.push(widget);
    return widget;
  };
  const isRow = ({ name, hidden }) => /^w[0-9]|advanced/.test(name) && !hidden;
  node.computeSize = () => {
    const rows = node.widgets.filter(isRow).length;
    const panels = node.widgets.reduce((sum, { options }) => sum + (options.getMinHeight?.() ?? 0), 0);
    return [220, (rows ? 20 * rows : 80) + panels];
  };
  node.setSize = (size) => {
    node.size = size;
  };
  app.extension.nodeCreated(node);
  return node;
}

const trained = (name = "dog", kind = "DreamBoothTrainLora") => app.graph.add(made(kind, { name }));
const subject = (folder = "dog") => app.graph.add(made("DreamBoothSubject", { folder }));
const elementOf = (node) => node.widgets.at(-1).element;
const state = (node) => elementOf(node).querySelector(".dreambooth-state")?.dataset.state;
const facts = (node, more) => ({
  node: String(node),
  at: 1,
  name: "dog",
  state: "training",
  step: 1,
  steps: 4,
  ...more,
});

app.graph = new Graph();
openPage({ ...NO_RUNS });
app.extension.setup();
await settled();
const askedAtSetup = questions();
assert.equal(document.querySelectorAll("style#dreambooth-style").length, 1);

beforeEach(async () => {
  for (const node of app.graph.nodes) app.graph.remove(node);
  await settled();
  openPage({ ...NO_RUNS, "GET /dreambooth/folders": FOLDERS, "GET /dreambooth/folders/pictures?folder=dog": REPORT });
  app.calls.length = 0;
  app.confirms = true;
  app.graph = new Graph();
  app.rootGraph = undefined;
  told = [];
});

test("nodes that train and Subject have a panel, others have none", () => {
  const parts = (node) => [...(elementOf(node)?.children ?? [])].map((panel) => panel.className);
  assert.deepEqual(parts(trained()), ["dreambooth dreambooth-training"]);
  assert.deepEqual(parts(trained("dog", "DreamBoothFineTune")), ["dreambooth dreambooth-training"]);
  assert.deepEqual(parts(subject()), ["dreambooth dreambooth-subject"]);
  assert.equal(made("KSampler", { seed: 1 }).widgets.length, 1);
  assert.equal(made("DreamBoothSubject").widgets.length, 0);
});

test("the page asks what is known as soon as it is there", () => {
  assert.equal(app.extension.name, "DreamBoothLora");
  assert.deepEqual(askedAtSetup, ["GET /dreambooth/nodes"]);
});

test("the page speaks the language that ComfyUI is set to, or English", async () => {
  const texts = { node: { showAdvanced: "Erweitertes" } };
  for (const [locale, answer, label] of [
    ["de", { de: { nodeDefs: {}, dreambooth: texts } }, "Erweitertes"],
    ["de", {}, "Show advanced inputs"],
    ["de", new TypeError("Failed to fetch"), "Show advanced inputs"],
    ["fr", undefined, "Show advanced inputs"],
  ]) {
    app.settings["Comfy.Locale"] = locale;
    answers["GET /i18n"] = answer;
    await app.extension.init();
    assert.equal(folded().widgets.at(-1).label, label, locale);
    setLanguage("en");
  }
  app.settings = {};
});

test("a panel is not saved, and the node has room for it", () => {
  const node = trained();
  const widget = node.widgets.at(-1);
  assert.deepEqual([widget.name, widget.type], ["dreambooth_training", "dreambooth"]);
  assert.equal(subject().widgets.at(-1).name, "dreambooth_subject");
  assert.equal(widget.element.className, "dreambooth-panel");
  assert.deepEqual([widget.serialize, widget.options.serialize, widget.options.getMinHeight()], [false, false, 92]);
  assert.deepEqual(node.size, [340, 172]);
  assert.deepEqual(subject().size, [340, 230]);
  assert.deepEqual(made("DreamBoothTrainLora", {}, { size: [500, 600] }).size, [500, 600]);
});

test("a node has room for a curve once there is a run, and for a line before", () => {
  const node = trained();
  const sizes = [node.size[1]];
  api.send("dreambooth", facts(node.id));
  sizes.push(node.size[1]);
  node.size = [340, 900];
  api.send("dreambooth", facts(node.id, { at: 2, step: 2 }));
  sizes.push(node.size[1]);
  node.widgets[0].value = "cat"; // which has no run
  node.widgets[0].callback("cat");
  sizes.push(node.size[1]);
  api.send("execution_error", { node_id: String(node.id), exception_message: "model is missing" });
  sizes.push(node.size[1]);
  assert.deepEqual(sizes, [172, 380, 900, 172, 200]);
});

test("a node that was saved with a run, and has none now, is no taller than it needs to be", async () => {
  const node = trained();
  node.size = [340, 700];
  app.extension.afterConfigureGraph();
  await settled();
  assert.deepEqual(node.size, [340, 172]);
  answers["GET /dreambooth/nodes"] = { [node.id]: facts(node.id) };
  node.size = [340, 700];
  app.extension.afterConfigureGraph();
  await settled();
  assert.deepEqual(node.size, [340, 700]);
});

/** A node of ten widgets, of which nine are advanced; each takes 20 pixels. */
function folded(more = {}) {
  const values = Object.fromEntries(Array.from({ length: 10 }, (_, index) => [`w${index}`, index]));
  return made("DreamBoothTrainingSettings", values, more);
}

const shownOf = (node) => node.widgets.filter(({ hidden }) => !hidden).map(({ name }) => name);

test("advanced inputs are folded away until a button shows them", () => {
  const node = folded({ size: [200, 0] });
  const button = node.widgets.at(-1);
  assert.deepEqual([shownOf(node), node.size[1]], [["w0", "dreambooth_advanced"], 40]);
  assert.deepEqual([button.label, button.serialize, button.options.hidden], ["Show advanced inputs", false, true]);
  button.press();
  assert.deepEqual([shownOf(node).length, node.size[1], button.label], [11, 220, "Hide advanced inputs"]);
  assert.equal(node.showAdvanced, true);
  button.press();
  assert.deepEqual([shownOf(node).length, node.size[1]], [2, 40]);
});

test("an advanced input that is connected, or has another value, stays when a graph is loaded", () => {
  const node = folded({ getSlotFromWidget: ({ name }) => ({ link: name === "w3" ? 7 : null }) });
  node.widgets[5].value = -1;
  node.size = [340, 230]; // saved when all of them were shown
  node.onConfigure();
  assert.deepEqual([shownOf(node), node.size[1]], [["w0", "w3", "w5", "dreambooth_advanced"], 90]);
  node.onConfigure();
  assert.equal(node.size[1], 90);
});

test("nothing is folded where there is nothing to gain, or ComfyUI is set to show all", () => {
  assert.deepEqual(shownOf(made("DreamBoothTrainingSettings", { w0: 0, w1: 1 })), ["w0", "w1"]);
  app.settings["Comfy.Node.AlwaysShowAdvancedWidgets"] = true;
  assert.equal(shownOf(folded()).length, 10);
  app.settings = {};
});

test("a node has its panel while it is in a graph", () => {
  const hooks = { onAdded: (graph) => told.push(graph), onRemoved: () => told.push("removed") };
  const node = made("DreamBoothTrainLora", { name: "dog" }, hooks);
  const before = Chart.attached;
  const shown = () => [elementOf(node).children.length, Chart.attached - before];
  assert.deepEqual(shown(), [0, 0]);
  app.graph.add(node);
  assert.deepEqual(shown(), [1, 1]);
  node.onAdded(app.graph); // ComfyUI may say so twice
  assert.deepEqual(shown(), [1, 1]);
  app.graph.remove(node);
  assert.deepEqual(shown(), [0, 0]);
  assert.deepEqual(told, [app.graph, app.graph, "removed"]);
});

test("the style sheet is put into the page once", () => {
  const styles = () => document.querySelectorAll("style#dreambooth-style");
  assert.equal(styles().length, 1);
  styles()[0].remove();
  trained();
  assert.equal(styles().length, 1);
});

test("messages go to the panel of their node, also inside of subgraphs", async () => {
  const [first, second] = [trained(), trained()];
  const outer = app.graph.add({ id: 70, subgraph: new Graph() });
  const inner = outer.subgraph.add({ id: 71, subgraph: new Graph() });
  const deep = inner.subgraph.add(made("DreamBoothTrainLora", { name: "dog" }));
  api.send("dreambooth", facts(second.id));
  assert.deepEqual([first, second, deep].map(state), ["idle", "training", "idle"]);
  api.send("dreambooth", facts(`70:71:${deep.id}`, { state: "starting" }));
  assert.deepEqual([first, second, deep].map(state), ["idle", "training", "starting"]);
  for (const node of ["12345", "70:9:1", "x"]) api.send("dreambooth", facts(node));
  await settled();
  assert.deepEqual([first, second, deep].map(state), ["idle", "training", "starting"]);
});

test("in a subgraph that is looked at, ids are still those of the whole graph", () => {
  const node = trained();
  app.rootGraph = app.graph;
  app.graph = new Graph();
  api.send("dreambooth", facts(node.id));
  assert.equal(state(node), "training");
});

test("what is queued waits, but for nodes that are muted or bypassed", () => {
  const nodes = [trained(), trained(), trained()];
  nodes[1].mode = 2;
  nodes[2].mode = 0;
  api.send("promptQueued");
  assert.deepEqual(nodes.map(state), ["waiting", "idle", "waiting"]);
});

test("nodes inside of subgraphs wait too, each graph is visited once, and there may be no graph yet", () => {
  const outer = app.graph.add({ id: 70, subgraph: new Graph() });
  const node = outer.subgraph.add(made("DreamBoothTrainLora", { name: "dog" }));
  outer.subgraph.add({ id: 71, subgraph: outer.subgraph });
  api.send("promptQueued");
  assert.equal(state(node), "waiting");
  const { graph } = app;
  app.graph = undefined;
  api.send("promptQueued");
  app.graph = graph;
});

test("a node whose result was known already waits no longer", () => {
  const nodes = [trained(), trained()];
  api.send("promptQueued");
  api.send("execution_cached", { nodes: [String(nodes[0].id), "999"] });
  api.send("execution_cached", {});
  assert.deepEqual(nodes.map(state), ["idle", "waiting"]);
});

test("a node whose result was known already is done, where its run was shown", async () => {
  const node = trained();
  const run = { id: "dog-1", name: "dog", state: "stopped", step: 2, steps: 4, previews: {}, subject: [] };
  answers["GET /dreambooth/runs/dog-1"] = run;
  answers["GET /dreambooth/runs/dog-1/curve?after=-1"] = { steps: [], losses: [], rates: [], scores: [] };
  answers["GET /dreambooth/runs"] = [run];
  api.send("reconnected");
  await settled();
  assert.equal(state(node), "stopped");
  api.send("promptQueued");
  api.send("execution_cached", { nodes: [String(node.id)] });
  assert.equal(state(node), "done");
});

test("after an interruption nothing waits", () => {
  const nodes = [trained(), trained()];
  api.send("promptQueued");
  api.send("execution_interrupted");
  assert.deepEqual(nodes.map(state), ["idle", "idle"]);
});

test("an error is that of its node, and nothing else waits", () => {
  const nodes = [trained(), trained()];
  api.send("promptQueued");
  api.send("execution_error", { node_id: String(nodes[1].id), exception_message: "model is missing" });
  assert.deepEqual(nodes.map(state), ["idle", "failed"]);
  assert.deepEqual(textsOf(elementOf(nodes[1]), ".dreambooth-error"), ["model is missing"]);
  api.send("promptQueued");
  api.send("execution_error", { node_id: "999", exception_message: "no" });
  assert.deepEqual(nodes.map(state), ["idle", "failed"]);
});

test("a graph that was loaded, and a connection that is back, show what the server knows", async () => {
  for (const begin of [() => app.extension.afterConfigureGraph(), () => api.send("reconnected")]) {
    const [node, other, pictures] = [trained(), trained("cat"), subject()];
    await settled();
    answers["GET /dreambooth/nodes"] = { a: facts(node.id), b: facts(other.id) }; // another graph's has that id
    answers["GET /dreambooth/folders"] = { ...FOLDERS, folders: [{ name: "dog", archive: false, count: 5 }] };
    begin();
    await settled();
    assert.deepEqual([node, other].map(state), ["training", "idle"]);
    assert.deepEqual(textsOf(elementOf(pictures), "option"), ["dog (5)"]);
  }
});

test("while the server does not answer, panels stay as they are", async () => {
  const node = trained();
  api.send("dreambooth", facts(node.id));
  answers["GET /dreambooth/nodes"] = new TypeError("Failed to fetch");
  api.send("reconnected");
  await settled();
  assert.equal(state(node), "training");
});

test("a node that gets another name shows another run", async () => {
  const node = trained();
  api.send("dreambooth", facts(node.id));
  const [name] = node.widgets;
  name.value = "cat";
  name.callback("cat");
  await settled();
  assert.deepEqual([state(node), told], ["idle", ["name: cat"]]);
});

test("Subject shows another folder when its widget changes", async () => {
  const node = subject();
  await settled();
  const [folder] = node.widgets;
  folder.value = "cat";
  folder.callback("cat");
  await settled();
  assert.equal(elementOf(node).querySelector("select").value, "cat");
  assert.deepEqual(told, ["folder: cat"]);
});

test("pictures dropped on Subject are uploaded into its folder; a new folder joins the lists", async () => {
  const node = subject("(none)");
  await settled();
  const sent = [];
  answers["POST /upload/image"] = () => new Response("{}");
  const { fetchApi } = api;
  const { refreshComboInNodes } = app;
  api.fetchApi = (route, options = {}) => {
    if (options.body instanceof FormData) sent.push([...options.body]);
    return fetchApi(route, options);
  };
  const [image, text] = ["image/png", "text/html"].map((type) => new File(["."], "a.png", { type }));
  app.refreshComboInNodes = async () => {
    await new Promise(setImmediate);
    told.push("lists");
  };
  assert.equal(node.onDragOver(), true);
  assert.equal(node.onDragDrop({ dataTransfer: { files: [text] } }), false);
  assert.equal(node.onDragDrop({ dataTransfer: { files: [image, text] } }), true);
  await settled();
  api.fetchApi = fetchApi;
  const [[[imageKey, file], subfolder], ...others] = sent;
  assert.deepEqual([imageKey, file.name, subfolder, others], ["image", "a.png", ["subfolder", "subject"], []]);
  app.refreshComboInNodes = refreshComboInNodes;
  assert.deepEqual([node.widgets[0].value, told], ["subject", ["lists", "folder: subject", "change"]]);
});

test("an upload that ComfyUI refuses says which file", async () => {
  const node = subject();
  await settled();
  answers["POST /upload/image"] = new Response("", { status: 413, statusText: "Too Large" });
  node.onDragDrop({ dataTransfer: { files: [new File(["."], "a.png", { type: "image/png" })] } });
  await settled();
  assert.deepEqual(textsOf(elementOf(node), ".dreambooth-error"), ["a.png: Too Large"]);
  assert.deepEqual([node.widgets[0].value, app.calls], ["dog", []]);
});

test("a folder that the node offers already is chosen without reading the lists again", async () => {
  const node = subject();
  await settled();
  const select = elementOf(node).querySelector("select");
  select.value = "dog";
  select.onchange();
  await settled();
  assert.deepEqual([app.calls, told], [[], ["folder: dog", "change"]]);
});

/** The sidebar as it is with one run, which is open. */
async function openedSidebar(run) {
  const known = { ...{ id: "dog-1", name: "dog", state: "stopped", step: 1, steps: 4, loss: null }, ...run };
  const rest = { changed_at: 0, preview: null, adapters: [], previews: {}, settings: {}, folder: "/out", bytes: 0 };
  answers["GET /dreambooth/runs"] = [{ ...known, ...rest }];
  answers["GET /dreambooth/runs/dog-1"] = { ...known, ...rest, workflow: "/workflow.json" };
  answers["GET /dreambooth/runs/dog-1/curve?after=-1"] = { steps: [], losses: [], rates: [], scores: [] };
  answers["GET /comfy/workflow.json"] = () => Response.json({ nodes: [] });
  const element = document.createElement("div");
  document.body.append(element);
  app.tab.render(element);
  await settled();
  element.querySelector(".dreambooth-open").click();
  await settled();
  return element;
}

async function press(element, text) {
  [...element.querySelectorAll("button")].find((button) => button.textContent === text).click();
  await settled();
}

test("the sidebar lists the runs, and resumes one by its graph", async () => {
  const { id, title, tooltip, type, icon } = app.tab;
  assert.deepEqual([id, title, tooltip, type], ["dreambooth-runs", "Trainings", "DreamBooth runs", "custom"]);
  assert.equal(icon, "pi pi-chart-line");
  const element = await openedSidebar();
  assert.equal(element.style.height, "100%");
  await press(element, "Resume");
  assert.deepEqual(app.calls, [
    ["loadGraphData", { nodes: [] }, true, true, "dog"],
    ["queuePrompt", 0, 1],
  ]);
  app.tab.destroy();
});

test("who deletes a run is asked by ComfyUI, or by the browser where ComfyUI can't", async () => {
  const element = await openedSidebar();
  app.confirms = false;
  await press(element, "Delete…");
  const [[kind, { title, type, message }]] = app.calls;
  assert.deepEqual([kind, title, type], ["confirm", "DreamBooth LoRA", "delete"]);
  assert.match(message, /“dog-1”/);
  const { dialog } = app.extensionManager;
  app.extensionManager.dialog = undefined;
  const asked = [];
  window.confirm = (question) => {
    asked.push(question);
    return true;
  };
  answers["DELETE /dreambooth/runs/dog-1"] = {};
  await press(element, "Delete…");
  app.extensionManager.dialog = dialog;
  assert.deepEqual(asked, [message]);
  assert.equal(questions().includes("DELETE /dreambooth/runs/dog-1 {}"), true);
  app.tab.destroy();
});

test("what the sidebar has to say is a message of ComfyUI", async () => {
  const element = await openedSidebar();
  answers["GET /comfy/workflow.json"] = () => new Response("", { status: 404 });
  await press(element, "Load graph");
  const message = {
    severity: "info",
    summary: "DreamBooth LoRA",
    detail: "The graph of this run no longer exists.",
    life: 5000,
  };
  assert.deepEqual(app.calls, [["toast", message]]);
  app.tab.destroy();
});

test("a sidebar that is opened again is a new one", async () => {
  const before = Chart.attached;
  const first = await openedSidebar();
  assert.equal(Chart.attached, before + 2);
  await openedSidebar();
  assert.equal(Chart.attached, before + 2);
  app.tab.destroy();
  assert.equal(Chart.attached, before);
  assert.equal(textsOf(first, ".dreambooth-run").length, 1);
});
