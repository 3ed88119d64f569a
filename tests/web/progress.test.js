// How far a run is, in words and as a bar.

import assert from "node:assert/strict";
import { test } from "node:test";
import { duration, shortTime } from "../../web/lib/dom.js";
import { failureText, fraction, possibleActions, progressText, stateText } from "../../web/lib/progress.js";

const TRAINING = { state: "training", step: 5, steps: 20, rate: 1.2345, seconds_left: 75, memory: 2 ** 31 };

test("nothing is known at first", () => {
  assert.deepEqual(
    [progressText({}), fraction({}), failureText({}), stateText("idle")],
    ["", 0, "", "not trained yet"],
  );
});

test("a training run has a rate, a time and its memory", () => {
  assert.equal(progressText(TRAINING), "step 5 of 20 · 1.23 steps/s · 1:15 left · 2.0 GB");
  assert.equal(fraction(TRAINING), 0.25);
  assert.equal(stateText("training"), "training");
});

test("what is not known, or no number, is left out", () => {
  const facts = { ...TRAINING, rate: 0, seconds_left: null, memory: null };
  assert.equal(progressText(facts), "step 5 of 20");
});

test("a run that has ended says where, and which step was best", () => {
  for (const state of ["done", "stopped", "failed"]) {
    assert.equal(progressText({ ...TRAINING, state, best: 3 }), "step 5 of 20 · best: step 3");
  }
});

test("a phase has a progress of its own until training begins", () => {
  const phase = { state: "encoding pictures", done: 3, total: 4, step: 5, steps: 20 };
  assert.equal(progressText(phase), "3 of 4 · step 5 of 20");
  assert.equal(fraction(phase), 0.75);
  for (const state of ["training", "running", "done", "stopped", "failed"]) {
    assert.equal(fraction({ ...phase, state }), 0.25);
  }
});

test("a failure begins with what to do, and only a failed run has one", () => {
  const facts = { state: "failed", problem: "The loss is NaN.", remedy: "Lower learning_rate." };
  assert.equal(failureText(facts), "Lower learning_rate.\nThe loss is NaN.");
  assert.equal(failureText({ ...facts, remedy: "" }), "The loss is NaN.");
  assert.equal(failureText({ ...facts, state: "training" }), "");
});

test("durations are read as on a clock", () => {
  const seconds = [0, 5, 59.6, 60, 515, 3600, 3723, 90_000, -3];
  const texts = ["0:00", "0:05", "1:00", "1:00", "8:35", "1:00:00", "1:02:03", "25:00:00", "0:00"];
  assert.deepEqual(seconds.map(duration), texts);
});

test("a time has its day, month, hour and minute, in the order of the page's language", () => {
  const seconds = new Date(2026, 10, 20, 8, 35, 59).getTime() / 1000;
  const parts = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" };
  assert.equal(shortTime(seconds), new Intl.DateTimeFormat(undefined, parts).format(new Date(2026, 10, 20, 8, 35)));
  assert.match(shortTime(seconds), /20.*35/);
});

test("a run that ended early can be resumed by its graph", () => {
  const graph = { workflow: "workflow.json", settings: { resume: "auto" } };
  const possible = (/** @type {string} */ state) => possibleActions({ ...graph, state });
  assert.deepEqual(possible("stopped"), { load: true, resume: true, delete: true });
  assert.deepEqual(possible("failed"), { load: true, resume: true, delete: true });
  assert.deepEqual(possible("done"), { load: true, resume: false, delete: true });
  assert.deepEqual(possible("running"), { load: true, resume: false, delete: false });
});

test("a graph that would begin another run is not offered to resume it, nor is one that was not kept", () => {
  const never = { state: "stopped", workflow: "workflow.json", settings: { resume: "never" } };
  assert.deepEqual(possibleActions(never), { load: true, resume: false, delete: true });
  const none = { state: "failed", workflow: null, settings: {} };
  assert.deepEqual(possibleActions(none), { load: false, resume: false, delete: true });
});
