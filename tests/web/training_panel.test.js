// What the panel of a training node shows: of messages, and of what it reads from the server.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { answers, drawFrame, openPage, settled, textsOf } from "./comfyui.js";
import { Server, Trainer } from "./training.js";

const { Chart } = await import("../../web/lib/chart.js");
const { TrainingPanel } = await import("../../web/lib/training_panel.js");

let panel;
let server;

beforeEach(() => {
  panel?.dispose();
  server = new Server();
  openPage();
  for (const id of ["dog-1", "dog-2"]) {
    answers[`GET /dreambooth/runs/${id}`] = () => server.runDetails(id);
    for (let step = -1; step <= 12; step += 1) {
      answers[`GET /dreambooth/runs/${id}/curve?after=${step}`] = () => server.runCurve(id, step);
    }
  }
  answers["GET /dreambooth/runs"] = () => server.listRuns();
  panel = openedPanel();
});

function openedPanel(name = () => "dog") {
  const made = new TrainingPanel(name);
  document.body.append(made.element);
  made.attach();
  return made;
}

const trainer = (run) => new Trainer(server, (message) => panel.feed.receive(message), run);

async function train(run, end) {
  for (const _ of trainer(run).whole(0, end)) await settled();
}

const texts = (selector) => textsOf(panel.element, selector);
const head = () => [panel.state.dataset.state, ...texts(".dreambooth-head span")];
const bar = () => panel.element.querySelector(".dreambooth-bar > div").style.width;
const imagesIn = (part) => [...panel.element.querySelectorAll(`.dreambooth-strip > .${part} > img`)];
const picturesIn = (part) => imagesIn(part).map((image) => image.getAttribute("src"));
const samples = () => picturesIn("samples");
const sample = (step) => `/comfy/dreambooth/runs/dog-1/files/previews/${step}.png`;
const hidden = () => ["error", "strip", "slider"].filter((part) => panel[part].hidden);

function slide(index) {
  panel.range.value = String(index);
  panel.range.oninput();
}

function legend() {
  drawFrame();
  return texts(".dreambooth-legend span")[0];
}

test("a node that has not trained yet says so, and shows nothing else", () => {
  assert.deepEqual(head(), ["idle", "not trained yet", ""]);
  assert.deepEqual([bar(), hidden(), legend()], ["0%", ["error", "strip", "slider"], undefined]);
});

test("an untrained node has one line of help instead of an empty chart", async () => {
  const shown = () => [panel.hint, panel.bar, panel.chart.element, panel.chart.legend].map((one) => !one.hidden);
  assert.deepEqual(shown(), [true, false, false, false]);
  assert.equal(panel.hint.textContent, "Press Run to train. The curve and samples appear here.");
  panel.feed.queue();
  assert.deepEqual(shown(), [false, false, false, false]);
  trainer().open();
  await settled();
  assert.deepEqual(shown(), [false, true, true, true]);
});

test("changes of the state are announced once, phases and steps are not", async () => {
  assert.deepEqual([panel.announced.getAttribute("role"), panel.error.getAttribute("role")], ["status", "alert"]);
  const announced = [];
  panel.announced = {
    text: "",
    get textContent() {
      return this.text;
    },
    set textContent(text) {
      this.text = text;
      announced.push(text);
    },
  };
  panel.feed.queue();
  await settled();
  const run = trainer();
  await settled();
  const learn = () => {
    run.learn();
    run.tell();
  };
  for (const happen of [
    () => run.open(),
    () => run.phase("encoding pictures", 1, 4),
    learn,
    learn,
    () => run.phase("preview", 1, 4),
    learn,
    () => run.end({ state: "done" }),
  ]) {
    happen();
    await settled();
  }
  assert.deepEqual(announced, ["waiting", "dog: training", "dog: done"]);
});

test("samples are described by their step and prompt, once that is known", async () => {
  const url = "/dreambooth/runs/dog-1/files/previews/6/subject-01-00.png";
  const settings = { preview_prompts: "a dog | a dog in the snow" };
  const details = answers["GET /dreambooth/runs/dog-1"];
  answers["GET /dreambooth/runs/dog-1"] = async () => ({
    ...(await details()),
    previews: { 0: [url], 6: [url] },
    settings,
  });
  trainer().open();
  panel.feed.receive({ ...server.live, at: server.now(), preview: { step: 6, pictures: [url] } });
  const alts = () => imagesIn("samples").map((image) => image.alt);
  assert.deepEqual(alts(), ["Sample at step 6"]);
  await settled();
  assert.deepEqual(alts(), ["Sample at step 6: a dog in the snow"]);
  slide(0);
  assert.deepEqual(alts(), ["Sample of the base model: a dog in the snow"]);
  assert.deepEqual(
    imagesIn("subject").map((image) => image.alt),
    ["Pictures of the subject"],
  );
});

test("the bar and the slider have names and values", async () => {
  await train();
  const attributes = (element, ...names) => names.map((name) => element.getAttribute(name));
  const { bar, range } = panel;
  assert.deepEqual(attributes(bar, "role", "aria-label", "aria-valuenow"), ["progressbar", "Progress", "100"]);
  assert.deepEqual(attributes(range, "aria-label", "aria-valuetext"), ["Step of the samples", "step 12"]);
  slide(0);
  assert.deepEqual(attributes(range, "aria-valuetext"), ["base model"]);
});

test("a training run is shown as it goes", async () => {
  const run = trainer();
  assert.deepEqual(head(), ["starting", "starting", ""]);
  run.open();
  await settled();
  assert.deepEqual(hidden(), ["error", "slider"]); // the subject's pictures are shown before there are samples
  run.phase("reading pictures", 1, 4);
  assert.deepEqual(head(), ["reading pictures", "reading pictures", "1 of 4 · step 0 of 12"]);
  assert.equal(bar(), "25%");
  for (let step = 0; step < 6; step += 1) run.learn();
  run.tell();
  await settled();
  assert.deepEqual(head(), ["training", "training", "step 6 of 12 · 2.00 steps/s · 0:10 left · 1.0 GB"]);
  assert.equal(bar(), "50%");
  assert.match(legend(), /^step 6 · loss 0\.217/);
  assert.equal(panel.chart.canvas.pen.drawn.filter(({ kind }) => kind === "text").at(-1).text, "12");
  run.end({ state: "stopped" });
  await settled();
  assert.deepEqual(head(), ["stopped", "stopped, progress saved", "step 6 of 12"]);
});

test("a run that is done has its best step, its pictures, and a slider over the steps that have samples", async () => {
  await train();
  assert.deepEqual(head(), ["done", "done", "step 12 of 12 · best: step 6"]);
  assert.deepEqual([bar(), hidden()], ["100%", ["error"]]);
  assert.deepEqual(picturesIn("subject"), ["/comfydog-1/subject"]);
  assert.deepEqual(samples(), [sample(12)]);
  const [{ alt, loading }] = imagesIn("samples");
  assert.deepEqual([alt, loading], ["Sample at step 12", "lazy"]);
  assert.deepEqual([panel.range.min, panel.range.max, panel.range.value], ["0", "2", "2"]);
  assert.deepEqual(texts(".dreambooth-slider span"), ["step 12"]);
});

test("a failure says first what to do, until the node is queued again", async () => {
  await train({}, { state: "failed", problem: "The loss is NaN.", remedy: "Lower learning_rate." });
  assert.deepEqual(head(), ["failed", "failed", "step 12 of 12"]);
  assert.deepEqual(texts(".dreambooth-error"), ["Lower learning_rate.\nThe loss is NaN."]);
  panel.feed.queue();
  assert.deepEqual(head(), ["waiting", "waiting", "step 12 of 12"]);
  assert.deepEqual(texts(".dreambooth-error"), []);
});

test("ComfyUI's own error is shown of a node that never began", () => {
  panel.feed.queue();
  panel.feed.fail("model is missing");
  assert.deepEqual([head()[0], texts(".dreambooth-error")], ["failed", ["model is missing"]]);
});

test("the samples of a step that was chosen stay, while newer ones come", async () => {
  const run = trainer();
  run.open();
  run.preview();
  await settled();
  assert.deepEqual([hidden(), samples(), panel.range.max], [["error", "slider"], [sample(0)], "0"]);
  for (const until of [6, 9]) {
    while (run.step < until) run.learn();
    run.preview();
    assert.deepEqual(hidden(), ["error"]);
  }
  await settled();
  assert.deepEqual([panel.range.max, samples()], ["2", [sample(9)]]);
  slide(0);
  assert.deepEqual([samples(), texts(".dreambooth-slider span")], [[sample(0)], ["base model"]]);
  slide(1);
  assert.deepEqual([samples(), texts(".dreambooth-slider span")], [[sample(6)], ["step 6"]]);
  while (run.step < 12) run.learn();
  run.preview();
  assert.deepEqual([samples(), panel.range.value, panel.range.max], [[sample(6)], "1", "3"]);
});

test("who slides to the newest samples sees newer ones when they come", async () => {
  const run = trainer();
  run.open();
  run.preview();
  while (run.step < 6) run.learn();
  run.preview();
  slide(0);
  slide(1);
  while (run.step < 12) run.learn();
  run.preview();
  await settled();
  assert.deepEqual([samples(), panel.range.value], [[sample(12)], "2"]);
});

test("at most six samples of a step are shown", () => {
  const run = trainer();
  run.open();
  const pictures = Array.from({ length: 8 }, (_, index) => `/dreambooth/${index}.png`);
  panel.feed.receive({ ...server.live, at: server.now(), preview: { step: 1, pictures } });
  assert.deepEqual(
    samples(),
    pictures.slice(0, 6).map((url) => `/comfy${url}`),
  );
  assert.deepEqual(hidden(), ["error", "slider"]); // also while the subject's are not known yet
});

test("a picture that is shown is not loaded again", async () => {
  const run = trainer();
  run.open();
  run.preview();
  await settled();
  const before = [panel.samples.firstChild, panel.subject.firstChild];
  panel.showPictures();
  assert.equal(panel.samples.firstChild, before[0]);
  assert.equal(panel.subject.firstChild, before[1]);
});

test("a panel that was opened late, or lost its connection, catches up", async () => {
  const run = trainer();
  run.open();
  run.preview();
  while (run.step < 8) run.learn();
  const late = openedPanel();
  run.tell();
  panel.dispose();
  panel = late;
  const recovered = late.feed.recover(server.live);
  assert.equal(legend(), undefined);
  await recovered;
  assert.deepEqual(head().slice(0, 2), ["training", "training"]);
  assert.deepEqual([samples(), picturesIn("subject")], [[sample(0)], ["/comfydog-1/subject"]]);
  assert.match(legend(), /^step 8 · loss 0\.175/);
});

test("after a restart of ComfyUI the newest run of the node's name is shown", async () => {
  await train({ id: "dog-1" });
  await train({ id: "cat-1", name: "cat" });
  server.restart();
  panel.dispose();
  panel = openedPanel();
  await panel.feed.recover(undefined);
  assert.deepEqual([panel.feed.run, ...head()], ["dog-1", "done", "done", "step 12 of 12 · best: step 6"]);
});

test("a run whose curve can't be read has an axis of its steps", async () => {
  await train();
  server.restart();
  panel.dispose();
  panel = openedPanel();
  drawFrame();
  answers["GET /dreambooth/runs/dog-1/curve?after=-1"] = new TypeError("Failed to fetch");
  await panel.feed.recover(undefined);
  assert.equal(legend(), undefined);
  assert.equal(panel.chart.canvas.pen.drawn.filter(({ kind }) => kind === "text").at(-1).text, "12");
});

test("another run begins with another curve and other pictures", async () => {
  await train();
  slide(1);
  const run = trainer({ id: "dog-2" });
  run.open();
  await settled();
  assert.deepEqual([bar(), samples(), panel.slider.hidden, legend()], ["0%", [], true, undefined]);
  run.preview();
  assert.deepEqual(samples(), [sample(0).replace("dog-1", "dog-2")]);
});

test("what is shown says what it is", () => {
  assert.equal(panel.element.className, "dreambooth dreambooth-training");
  const [subject, range] = [".subject", ".dreambooth-slider input"].map((part) => panel.element.querySelector(part));
  assert.deepEqual(
    [subject.title, range.type, range.title],
    ["Pictures of the subject", "range", "Step of the samples"],
  );
});

test("sliding and scrolling on the slider do not move the graph", () => {
  for (const kind of ["pointerdown", "wheel"]) {
    let isSeen = false;
    const see = () => {
      isSeen = true;
    };
    panel.element.addEventListener(kind, see);
    panel.range.dispatchEvent(new window.Event(kind, { bubbles: true }));
    assert.equal(isSeen, false, kind);
    panel.rangeText.dispatchEvent(new window.Event(kind, { bubbles: true }));
    assert.equal(isSeen, true, kind);
  }
});

test("a panel that is gone lets go of its chart, and shows no answer", async () => {
  const before = Chart.attached;
  server.runs.set("dog-1", { id: "dog-1", name: "dog", lines: [], previews: {}, steps: 12, end: { state: "done" } });
  panel.feed.recover(undefined);
  panel.dispose();
  await settled();
  assert.deepEqual([Chart.attached, head()[0]], [before - 1, "idle"]);
});
