// What the sidebar shows of runs, and what its buttons do.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { answers, drawFrame, openPage, questions, refusal, settled, textsOf } from "./comfyui.js";

const { Chart } = await import("../../web/lib/chart.js");
const { shortTime } = await import("../../web/lib/dom.js");
const { RunsPanel } = await import("../../web/lib/runs_panel.js");

const RUNS = "/dreambooth/runs";
const summary = (id, facts = {}) => ({
  ...{ id, name: id.split("-")[0], base: "base", started_at: 0, changed_at: 1_700_000_000, step: 4, steps: 10 },
  ...{ state: "done", loss: 0.123456, preview: null, ...facts },
});
const details = (id, facts = {}) => ({
  ...{ ...summary(id), settings: {}, adapters: [], previews: {}, subject: [], workflow: null, folder: `/out/${id}` },
  ...{ bytes: 12_345_678, ...facts },
});
const points = (...losses) => ({
  ...{ steps: losses.map((_, index) => index + 1), losses, rates: losses.map(() => 1e-4), scores: [] },
});

let panel;
let told;
let confirms;
let refused; // what ComfyUI can't do

beforeEach(() => {
  refused = "";
  told = [];
  confirms = true;
});

const tell = (call, ...given) => {
  if (call === refused) throw new Error(`${call} is refused.`);
  told.push([call, ...given]);
};
const host = {
  loadGraph: async (graph, name) => tell("loadGraph", graph, name),
  none: "Nothing yet.",
  useSettings: null,
  resume: async () => tell("queue"),
  confirm: async (message) => {
    tell("confirm", message);
    return confirms;
  },
  refreshLists: async () => tell("refreshLists"),
  notify: (text) => tell("notify", text),
};

/** The panel of a server that has these runs, each with its details and its curve. */
async function opened(...runs) {
  openPage({ [`GET ${RUNS}`]: runs.map(({ curve, ...run }) => run) });
  for (const { curve = points(1), ...run } of runs) {
    answers[`GET ${RUNS}/${run.id}`] = run;
    answers[`GET ${RUNS}/${run.id}/curve?after=-1`] = curve;
  }
  panel?.dispose();
  panel = new RunsPanel(host);
  document.body.append(panel.element);
  assert.equal(panel.comparison.hidden, true);
  panel.refresh();
  await settled();
}

const rows = () => [...panel.list.querySelectorAll(".dreambooth-run")];
const rowOf = (id) => rows().find((row) => row.title === id);
const openerOf = (id) => rowOf(id).querySelector(".dreambooth-open");
const texts = (selector) => textsOf(panel.element, selector);
const cells = (title) => {
  const folded = [...panel.list.querySelectorAll("details")].find((one) => textsOf(one, "summary")[0] === title);
  return [...folded.querySelectorAll("tr")].map((row) => textsOf(row, "td"));
};

async function click(element) {
  element.click();
  await settled();
}

async function press(text) {
  await click([...panel.element.querySelectorAll("button")].find((button) => button.textContent === text));
}

async function tick(id, checked = true) {
  const box = rowOf(id).querySelector("input");
  box.checked = checked;
  box.onchange();
  await settled();
}

/** Legend of the comparison; [] while it is hidden. */
function compared() {
  drawFrame();
  return panel.comparison.hidden ? [] : textsOf(panel.comparison, "span");
}

test("runs are listed as the server sends them, each with its state, how far it is and its newest sample", async () => {
  await opened(
    summary("dog-2", { state: "running", loss: null }),
    summary("dog-1", { state: "failed", preview: "/dreambooth/dog.png" }),
    summary("cat-1", { state: "stopped", step: 0, loss: 0 }),
  );
  assert.deepEqual(texts("b"), ["dog", "dog", "cat"]);
  assert.deepEqual(
    rows().map((row) => row.title),
    ["dog-2", "dog-1", "cat-1"],
  );
  const when = shortTime(1_700_000_000);
  assert.deepEqual(texts(".dreambooth-run small"), [
    `step 4 of 10 · ${when}`,
    `step 4 of 10 · loss 0.123 · ${when}`,
    `step 0 of 10 · loss 0.00 · ${when}`,
  ]);
  const states = [...panel.list.querySelectorAll(".dreambooth-state")].map((one) => [
    one.textContent,
    one.dataset.state,
  ]);
  assert.deepEqual(
    states,
    ["running", "failed", "stopped"].map((state) => [state, state]),
  );
  const images = rows().map((row) => row.querySelector("img")?.getAttribute("src"));
  assert.deepEqual(images, [undefined, "/comfy/dreambooth/dog.png", undefined]);
  assert.deepEqual(compared(), []);
});

test("a list without a run says how one begins", async () => {
  await opened();
  assert.deepEqual(texts("p"), ["Nothing yet."]);
  await opened(summary("dog-1"));
  assert.deepEqual(texts("p"), []);
});

test("a server that can't list them is quoted, until it can", async () => {
  await opened(details("dog-1"));
  await click(openerOf("dog-1"));
  assert.equal(Chart.attached, 2);
  answers[`GET ${RUNS}`] = () => refusal("The folder can't be read.", "Allow it.");
  await press("⟳ Refresh");
  assert.deepEqual([rows().length, texts(".dreambooth-error")], [0, ["The folder can't be read. Allow it."]]);
  assert.equal(Chart.attached, 1);
  answers[`GET ${RUNS}`] = [summary("dog-2")];
  await press("⟳ Refresh");
  assert.deepEqual([texts(".dreambooth-error"), rows().map((row) => row.title)], [[], ["dog-2"]]);
});

test("a run is opened below its row and closed by a click, and one at a time", async () => {
  await opened(details("dog-1"), details("cat-1"));
  const open = () => [...panel.list.querySelectorAll(".dreambooth-details")].map((one) => one.previousSibling.title);
  for (const [clicked, shown] of [
    ["dog-1", ["dog-1"]],
    ["cat-1", ["cat-1"]],
    ["cat-1", []],
  ]) {
    await click(openerOf(clicked));
    assert.deepEqual(open(), shown);
    assert.equal(Chart.attached, 1 + shown.length);
  }
});

test("an open run shows its curve up to its last step, its folder and its size", async () => {
  await opened(details("dog-1", { curve: points(2, 1) }));
  await click(openerOf("dog-1"));
  drawFrame();
  const box = panel.list.querySelector(".dreambooth-details");
  assert.equal(textsOf(box, ".dreambooth-legend span")[0], "step 2 · loss 1.00 · smoothed 1.49");
  const drawn = box.querySelector("canvas").pen.drawn.filter(({ kind }) => kind === "text");
  assert.equal(drawn.at(-1).text, "10");
  assert.deepEqual(textsOf(box, "small"), ["/out/dog-1 · 12 MB"]);
  assert.deepEqual(textsOf(box, ".dreambooth-error"), []);
});

test("a run that failed says first what to do", async () => {
  await opened(details("dog-1", { state: "failed", problem: "The loss is NaN.", remedy: "Lower learning_rate." }));
  await click(openerOf("dog-1"));
  assert.deepEqual(texts(".dreambooth-error"), ["Lower learning_rate.\nThe loss is NaN."]);
  assert.equal(panel.list.querySelector(".dreambooth-details").firstChild.className, "dreambooth-error");
});

test("a run that failed for a reason without a remedy says the reason alone", async () => {
  await opened(details("dog-1", { state: "failed", problem: "KeyError: 'x'", remedy: "" }));
  await click(openerOf("dog-1"));
  assert.deepEqual(texts(".dreambooth-error"), ["KeyError: 'x'"]);
});

test("a run that is being trained again shows no error of before", async () => {
  await opened(details("dog-1", { state: "running", problem: "The loss is NaN.", remedy: "Lower learning_rate." }));
  await click(openerOf("dog-1"));
  assert.deepEqual(texts(".dreambooth-error"), []);
});

test("each state offers what can be done with the run", async () => {
  const workflow = "/dreambooth/workflow.json";
  await opened(
    details("stopped-1", { state: "stopped", workflow }),
    details("failed-1", { state: "failed", workflow }),
    details("done-1", { state: "done", workflow }),
    details("running-1", { state: "running", workflow }),
    details("running-2", { state: "running" }),
    details("stopped-2", { state: "stopped" }),
  );
  for (const [id, buttons] of [
    ["stopped-1", ["Load graph", "Resume", "Delete…"]],
    ["failed-1", ["Load graph", "Resume", "Delete…"]],
    ["done-1", ["Load graph", "Delete…"]],
    ["running-1", ["Load graph"]],
    ["running-2", []],
    ["stopped-2", ["Delete…"]],
  ]) {
    await click(openerOf(id));
    assert.deepEqual(texts(".actions button"), buttons, id);
  }
});

test("checkpoints have a link with the file's name, their size, and can be used", async () => {
  const adapters = [
    { step: 4, file: "4", url: "/dreambooth/4.safetensors", name: "dog-4.safetensors", bytes: 1_260_000 },
    { step: 8, file: "8", url: "/dreambooth/8.safetensors", name: "dog-8.safetensors", bytes: 12_000_000 },
  ];
  await opened(details("dog-1", { adapters }));
  await click(openerOf("dog-1"));
  assert.deepEqual(cells("Checkpoints"), [
    ["step 4", "1.3 MB", "Use"],
    ["step 8", "12.0 MB", "Use"],
  ]);
  const links = [...panel.list.querySelectorAll("a")].map((link) => [link.getAttribute("href"), link.download]);
  assert.deepEqual(links, [
    ["/comfy/dreambooth/4.safetensors", "dog-4.safetensors"],
    ["/comfy/dreambooth/8.safetensors", "dog-8.safetensors"],
  ]);
  const last = [...panel.list.querySelectorAll("tr button")].at(-1);
  answers[`POST ${RUNS}/dog-1/use`] = { file: "dog-00008.safetensors" };
  await click(last);
  assert.equal(questions().at(-1), `POST ${RUNS}/dog-1/use {"step":8}`);
  assert.deepEqual(told, [["refreshLists"], ["notify", "dog-00008.safetensors is in the LoRA folder."]]);
  told = [];
  answers[`POST ${RUNS}/dog-1/use`] = refusal("The disk is full.", "Make room.");
  await click(last);
  assert.deepEqual(told, [["notify", "The disk is full. Make room."]]);
});

test("settings that have a value are listed", async () => {
  const settings = { steps: 10, prompt: "a dog", class_prompt: "", seed: 0, dora: false, unet: null, rates: [1, 2] };
  await opened(details("dog-1", { settings }));
  await click(openerOf("dog-1"));
  assert.deepEqual(cells("Settings"), [
    ["steps", "10"],
    ["prompt", "a dog"],
    ["seed", "0"],
    ["dora", "false"],
    ["rates", "1,2"],
  ]);
});

test("the first sample of each step is shown", async () => {
  const previews = { 0: ["/a.png", "/b.png"], 4: [], 8: ["/c.png"] };
  await opened(details("dog-1", { previews }), details("cat-1"));
  await click(openerOf("dog-1"));
  const grid = panel.list.querySelector(".dreambooth-grid");
  const images = [...grid.querySelectorAll("img")].map((image) => [image.title, image.getAttribute("src")]);
  assert.deepEqual(
    [grid.hidden, images],
    [
      false,
      [
        ["Sample of the base model", "/comfy/a.png"],
        ["Sample at step 8", "/comfy/c.png"],
      ],
    ],
  );
  await click(openerOf("cat-1"));
  assert.equal(panel.list.querySelector(".dreambooth-grid").hidden, true);
});

test("details that can't be read say why", async () => {
  await opened(details("dog-1"));
  answers[`GET ${RUNS}/dog-1`] = refusal("There is no run 'dog-1'.", "Refresh the list.");
  await click(openerOf("dog-1"));
  assert.deepEqual(texts(".dreambooth-details .dreambooth-error"), ["There is no run 'dog-1'. Refresh the list."]);
});

test("details that come after the run was closed are dropped", async () => {
  await opened(details("dog-1"));
  let send;
  answers[`GET ${RUNS}/dog-1`] = () => new Promise((resolve) => (send = resolve));
  await click(openerOf("dog-1"));
  assert.deepEqual(texts(".dreambooth-details"), ["Loading…"]);
  await click(openerOf("dog-1"));
  send(details("dog-1"));
  await settled();
  assert.deepEqual([texts(".dreambooth-details"), Chart.attached], [[], 1]);
});

test("ticked runs are compared, until they are ticked off", async () => {
  await opened(summary("dog-1", { curve: points(2) }), summary("cat-1", { curve: points(0.5) }));
  drawFrame();
  await tick("dog-1");
  assert.equal(panel.comparison.hidden, false);
  await tick("cat-1");
  assert.deepEqual(compared(), ["dog 2.00", "cat 0.500"]);
  assert.equal(panel.opened, null);
  await tick("dog-1", false);
  await tick("cat-1", false);
  assert.deepEqual([panel.comparison.hidden, compared()], [true, []]);
});

test("what is compared stays ticked when the list is read again, but for runs that are gone", async () => {
  await opened(summary("dog-1"), summary("cat-1"), summary("rex-1"));
  await tick("dog-1");
  await tick("cat-1");
  answers[`GET ${RUNS}`] = [summary("dog-1"), summary("rex-1")];
  await press("⟳ Refresh");
  assert.deepEqual(
    rows().map((row) => row.querySelector("input").checked),
    [true, false],
  );
  assert.deepEqual(panel.chart.curves.length, 1);
});

test("a curve that comes after its run was ticked off is not shown", async () => {
  await opened(summary("dog-1"));
  let send;
  answers[`GET ${RUNS}/dog-1/curve?after=-1`] = () => new Promise((resolve) => (send = resolve));
  await tick("dog-1");
  await tick("dog-1", false);
  send(points(1));
  await settled();
  assert.equal(panel.comparison.hidden, true);
});

test("a curve that can't be read is told", async () => {
  await opened(summary("dog-1"));
  answers[`GET ${RUNS}/dog-1/curve?after=-1`] = refusal("There is no run 'dog-1'.", "");
  await tick("dog-1");
  assert.deepEqual([told, panel.comparison.hidden], [[["notify", "There is no run 'dog-1'."]], true]);
});

test("a click on a tick does not open the run", async () => {
  await opened(details("dog-1"));
  await click(rowOf("dog-1").querySelector("input"));
  assert.deepEqual(texts(".dreambooth-details"), []);
});

test("a run's graph is loaded, and queued to resume", async () => {
  const workflow = "/dreambooth/runs/dog-1/files/workflow.json";
  await opened(details("dog-1", { state: "stopped", workflow }));
  answers[`GET /comfy${workflow}`] = { nodes: [1] };
  await click(openerOf("dog-1"));
  await press("Load graph");
  const load = ["loadGraph", { nodes: [1] }, "dog"];
  assert.deepEqual(told, [load]);
  await press("Resume");
  assert.deepEqual(told, [load, load, ["queue"]]);
});

test("the settings of a run are used where a host has fields for them", async () => {
  host.useSettings = async (run) => tell("useSettings", run.id);
  try {
    await opened(details("dog-1", { state: "done" }));
    await click(openerOf("dog-1"));
    assert.deepEqual(texts(".actions button"), ["Use these settings", "Delete…"]);
    await press("Use these settings");
    assert.deepEqual(told, [["useSettings", "dog-1"]]);
    refused = "useSettings";
    await press("Use these settings");
    assert.deepEqual(told.slice(1), [["notify", "useSettings is refused."]]);
  } finally {
    host.useSettings = null;
  }
});

test("what ComfyUI can't do is told, and nothing follows", async () => {
  const adapters = [{ step: 4, file: "4", url: "/4", name: "4", bytes: 1 }];
  await opened(details("dog-1", { state: "stopped", workflow: "/workflow.json", adapters }));
  answers["GET /comfy/workflow.json"] = () => Response.json({});
  answers[`POST ${RUNS}/dog-1/use`] = { file: "dog" };
  await click(openerOf("dog-1"));
  for (const [call, button, before] of [
    ["loadGraph", "Resume", 0],
    ["queue", "Resume", 1],
    ["refreshLists", "Use", 0],
  ]) {
    told = [];
    refused = call;
    await press(button);
    assert.deepEqual(told.slice(before), [["notify", `${call} is refused.`]]);
  }
});

test("what can be ticked and pressed says what it does", async () => {
  const adapters = [{ step: 4, file: "4", url: "/4", name: "4", bytes: 1 }];
  await opened(details("dog-1", { state: "stopped", workflow: "/workflow.json", adapters }));
  await click(openerOf("dog-1"));
  const [tickBox] = panel.list.querySelectorAll("input");
  assert.deepEqual([tickBox.type, tickBox.title], ["checkbox", "Compare dog"]);
  assert.deepEqual(texts(".dreambooth-head small"), ["Select runs to compare their losses."]);
  const titles = [...panel.list.querySelectorAll("button[title]")].map(({ textContent, title }) => [
    textContent,
    title,
  ]);
  assert.deepEqual(
    titles.filter(([text]) => text !== "log"),
    [
      ["Load graph", "Open the graph of this run"],
      ["Resume", "Continue this run where it stopped"],
      ["Delete…", "Delete the run and its checkpoints"],
      ["Use", "Copy the checkpoint of step 4 to the LoRA folder"],
    ],
  );
});

test("a graph that is gone is told, and nothing is queued", async () => {
  const workflow = "/dreambooth/runs/dog-1/files/workflow.json";
  await opened(details("dog-1", { state: "stopped", workflow }));
  answers[`GET /comfy${workflow}`] = () => new Response("", { status: 404 });
  await click(openerOf("dog-1"));
  await press("Resume");
  assert.deepEqual(told, [["notify", "The graph of this run no longer exists."]]);
});

test("a run is deleted only if that is confirmed, and leaves the list", async () => {
  await opened(details("dog-1"), details("cat-1"));
  await click(openerOf("dog-1"));
  confirms = false;
  await press("Delete…");
  assert.match(
    told[0][1],
    /^Delete the run “dog-1” with all its checkpoints.* adapter file in the LoRA folder stays\.$/,
  );
  assert.equal(questions().filter((question) => question.startsWith("DELETE")).length, 0);
  assert.equal(rows().length, 2);
  confirms = true;
  answers[`DELETE ${RUNS}/dog-1`] = () => {
    answers[`GET ${RUNS}`] = [summary("cat-1")];
    return {};
  };
  await press("Delete…");
  assert.deepEqual(
    rows().map((row) => row.title),
    ["cat-1"],
  );
  assert.deepEqual([texts(".dreambooth-details"), panel.opened], [[], null]);
});

test("a run that can't be deleted stays open, and it is told why", async () => {
  await opened(details("dog-1"));
  await click(openerOf("dog-1"));
  answers[`DELETE ${RUNS}/dog-1`] = refusal("The run is being trained.", "Stop it first.");
  await press("Delete…");
  assert.deepEqual(told.at(-1), ["notify", "The run is being trained. Stop it first."]);
  assert.equal(texts(".dreambooth-details").length, 1);
});

test("a closed sidebar shows no answer, and lets go of its charts", async () => {
  await opened(details("dog-1"));
  await click(openerOf("dog-1"));
  assert.equal(Chart.attached, 2);
  answers[`GET ${RUNS}`] = [details("cat-1")];
  panel.refresh();
  panel.dispose();
  await settled();
  assert.deepEqual([Chart.attached, rows().map((row) => row.title)], [0, ["dog-1"]]);
});

test("a run is a button that says whether it is open, and keeps the focus", async () => {
  await opened(details("dog-1", { preview: "/dog.png" }), details("cat-1"));
  const opener = () => openerOf("dog-1");
  assert.deepEqual([opener().tagName, opener().getAttribute("aria-expanded")], ["BUTTON", "false"]);
  assert.equal(opener().querySelector("img").alt, "Newest sample of dog");
  opener().focus();
  await click(opener());
  assert.deepEqual([opener().getAttribute("aria-expanded"), document.activeElement === opener()], ["true", true]);
  assert.equal(panel.list.querySelector("[role=region]").getAttribute("aria-label"), "Details of dog");
  rowOf("cat-1").querySelector("input").focus();
  await panel.refresh();
  assert.equal(document.activeElement, rowOf("cat-1").querySelector("input"));
  answers[`GET ${RUNS}`] = [summary("dog-1")];
  await panel.refresh();
  assert.equal(document.activeElement, panel.refreshButton);
  document.activeElement.blur();
  await panel.refresh();
  assert.equal(document.activeElement, document.body);
});

test("errors are alerts", async () => {
  await opened(details("dog-1", { state: "failed", problem: "The loss is NaN.", remedy: "" }));
  await click(openerOf("dog-1"));
  assert.deepEqual(texts("[role=alert]"), ["The loss is NaN."]);
  answers[`GET ${RUNS}`] = refusal("The folder can't be read.", "");
  await panel.refresh();
  assert.deepEqual(texts("[role=alert]"), ["The folder can't be read."]);
});
