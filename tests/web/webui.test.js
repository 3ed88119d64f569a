// The pack's part of the web UI's page: what it asks of the host's own page.

import assert from "node:assert/strict";
import { test } from "node:test";
import { answers, openPage, settled } from "./comfyui.js";

const { MutationObserver, HTMLElement, HTMLTextAreaElement, HTMLInputElement, MouseEvent, Event } = window;
Object.assign(globalThis, { MutationObserver, HTMLElement, HTMLTextAreaElement, HTMLInputElement, MouseEvent, Event });
const timer = globalThis.setTimeout;
globalThis.setTimeout = (...given) => timer(...given).unref(); // the page asks for ever
let start;
globalThis.setInterval = (begin) => {
  start = begin;
};

const DONE = {
  node: "webui",
  at: 1,
  state: "done",
  name: "rex",
  card: "rex.safetensors",
  words: "sks dog",
  weight: 0.9,
  warnings: [],
};

test("the host's own page learns what was made, and goes to the prompt if it can", async () => {
  openPage();
  answers["GET /comfy/dreambooth/job?after=-1"] = { ...DONE, measured: 0 };
  document.body.innerHTML =
    "<div id='dreambooth-training-panel'></div><div id='txt2img_prompt'><textarea></textarea></div>" +
    "<button id='txt2img_lora_extra_refresh'></button><div id='result'></div>";
  let refreshed = 0;
  document.querySelector("button").addEventListener("click", () => {
    refreshed += 1;
  });
  await import("../../javascript/dreambooth_lora.mjs");
  start();
  await settled();

  const send = [...document.querySelectorAll("button")].find((one) => one.textContent === "Send to txt2img");
  const trouble = document.querySelector(".dreambooth-error");
  assert.equal(send.hidden, false);
  send.click();
  await settled();
  assert.equal(document.querySelector("textarea").value, "sks dog <lora:rex:0.9>");
  assert.match(trouble.textContent, /^The txt2img prompt is filled in/);
  let went = 0;
  globalThis.switch_to_txt2img = () => {
    went += 1;
  };
  send.click();
  await settled();
  assert.deepEqual([went, trouble.textContent], [1, ""]);

  assert.equal(refreshed, 0);
  const result = document.querySelector("#result");
  result.innerHTML = "<p>merging …</p>";
  await settled();
  assert.equal(refreshed, 0);
  result.innerHTML = "<div class='dreambooth-made'></div>";
  await settled();
  assert.equal(refreshed, 1, "after a merge");
  result.append(document.createElement("p"));
  await settled();
  assert.equal(refreshed, 1, "once");
});
