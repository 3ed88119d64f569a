// The pack's part of the web UI's page, in a browser that speaks another language.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { answers, openPage, settled, textsOf } from "./comfyui.js";

const { HTMLElement, HTMLTextAreaElement, HTMLInputElement } = window;
Object.assign(globalThis, { HTMLElement, HTMLTextAreaElement, HTMLInputElement });
globalThis.setInterval = () => {};
Object.defineProperty(globalThis, "navigator", { value: { language: "de-AT" } });

test("the web UI's page speaks the browser's language", async () => {
  openPage();
  const texts = new URL("../../locales/de/main.json", import.meta.url);
  answers[`GET ${texts}`] = JSON.parse(readFileSync(texts, "utf8"));
  document.body.innerHTML = "<div id='dreambooth-training-panel'></div>";
  await import("../../javascript/dreambooth_lora.mjs");
  await settled();
  assert.deepEqual(textsOf(document, ".dreambooth-state"), ["noch nicht trainiert"]);
  assert.match(textsOf(document, ".dreambooth-training").join(), /„Train“ startet das Training/);
});
