// The pack's part of the web UI's page, when a run's folder tells of its end before its job does.

import assert from "node:assert/strict";
import { test } from "node:test";
import { answers, openPage, settled } from "./comfyui.js";

const { MutationObserver, HTMLElement, HTMLTextAreaElement, HTMLInputElement } = window;
Object.assign(globalThis, { MutationObserver, HTMLElement, HTMLTextAreaElement, HTMLInputElement });
const timer = globalThis.setTimeout;
globalThis.setTimeout = (...given) => timer(...given).unref(); // the page asks for ever
let start;
globalThis.setInterval = (begin) => {
  start = begin;
};

test("a run that has ended can't be stopped, and not yet be resumed", async () => {
  openPage();
  const known = { name: "rex", step: 3, steps: 9, best: null, problem: "", remedy: "" };
  const job = { ...known, node: "webui", at: 1, state: "training", run: "rex-1", warnings: [], measured: 0 };
  answers["GET /comfy/dreambooth/job?after=-1"] = job;
  answers["GET /comfy/dreambooth/runs/rex-1"] = { ...known, state: "stopped", subject: [], previews: {} };
  answers["GET /comfy/dreambooth/runs/rex-1/curve?after=-1"] = { steps: [], losses: [], rates: [], scores: [] };
  document.body.innerHTML = "<div id='dreambooth-training-panel'></div>";
  await import("../../javascript/dreambooth_lora.mjs");
  start();
  await settled();

  assert.equal(document.querySelector(".dreambooth-state").dataset.state, "stopped");
  const shown = [...document.querySelectorAll(".dreambooth-head button")].filter((one) => !one.hidden);
  assert.deepEqual(
    shown.map((one) => one.textContent),
    [],
  );
});
