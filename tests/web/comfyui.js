// ComfyUI's page for tests of panels: a document without a browser, ComfyUI's modules `api` and `app` as far as the pages
// use them, and a server of which a test says what it answers. Import panels after it: `await import("../../web/…")`.

import { registerHooks } from "node:module";
import { Window } from "happy-dom";
import { DARK, declarations } from "../../web/lib/palette.js";

const here = import.meta.url;
registerHooks({
  resolve: (specifier, context, next) =>
    /\/scripts\/(api|app)\.js$/.test(specifier) ? { url: here, shortCircuit: true } : next(specifier, context),
});

export const INK = "#dddddd"; // the colour of texts
/** CSS variable → colour: the palette on a dark host. */
export const colors = new Map(
  declarations(DARK)
    .match(/[^;]+/g)
    .map((declaration) => declaration.split(":").map((part) => part.trim())),
);
const window = new Window({ url: "http://localhost/comfy/" });
/** Callbacks that wait for the next frame, by number. */
const frames = new Map();
let lastFrame = 0;
/** Element → what is called when its size changes. */
export const resizes = new Map();
/** Of every canvas, in pixels of the page. */
export const canvasSize = { width: 248, height: 122 };

/** What a canvas shows: lines and areas with their points, and texts, in the order in which they were drawn. */
export class Pen {
  drawn = [];
  transform = [];
  #path = [];
  #dash = [];

  setTransform(...numbers) {
    this.transform = numbers;
  }

  clearRect(...area) {
    this.cleared = area;
    this.drawn = [];
  }

  beginPath() {
    this.#path = [];
  }

  moveTo(x, y) {
    this.#path.push([x, y]);
  }

  lineTo(x, y) {
    this.#path.push([x, y]);
  }

  arc(x, y, radius, from, to) {
    this.#path.push([x, y, radius, to - from]);
  }

  setLineDash(dash) {
    this.#dash = dash;
  }

  stroke() {
    const { strokeStyle: color, globalAlpha: alpha, lineWidth: width } = this;
    this.drawn.push({ kind: this.#dash.length ? "dashes" : "line", color, alpha, width, points: rounded(this.#path) });
  }

  fill() {
    this.drawn.push({ kind: "area", color: this.fillStyle, points: rounded(this.#path) });
  }

  fillText(text, x, y) {
    const { textAlign: align, textBaseline: baseline, globalAlpha: alpha, font } = this;
    this.drawn.push({ kind: "text", text, align, baseline, alpha, font, points: rounded([[x, y]]) });
  }
}

const rounded = (path) => path.map((point) => point.map((number) => Math.round(10 * number) / 10));

Object.assign(globalThis, {
  window,
  document: window.document,
  getComputedStyle: () => ({ color: INK, getPropertyValue: (name) => colors.get(name) ?? "" }),
  MutationObserver: window.MutationObserver,
  ResizeObserver: class {
    constructor(react) {
      this.react = react;
    }

    observe(element) {
      resizes.set(element, this.react);
    }

    disconnect() {
      for (const [element, react] of resizes) if (react === this.react) resizes.delete(element);
    }
  },
  requestAnimationFrame: (callback) => {
    lastFrame += 1;
    frames.set(lastFrame, callback);
    return lastFrame;
  },
  cancelAnimationFrame: (number) => frames.delete(number),
  fetch: (url, options) => answer(url, options),
});
const canvas = window.HTMLCanvasElement.prototype;
Object.defineProperties(canvas, {
  clientWidth: { get: () => canvasSize.width },
  clientHeight: { get: () => canvasSize.height },
});
canvas.getContext = function (kind) {
  this.pen ??= new Pen();
  return kind === "2d" ? this.pen : null;
};

/** Draw what waits for the next frame. */
export function drawFrame() {
  const waiting = [...frames.values()];
  frames.clear();
  for (const callback of waiting) callback();
}

/** Let answers come that are under way. */
export async function settled() {
  for (let turn = 0; turn < 20; turn += 1) await new Promise(setImmediate);
}

/** "GET /dreambooth/runs" → what the server answers: content, a Response, an Error, or a function that gives one. */
export let answers = {};
/** What was asked, in order. */
export let asked = [];

/** Another page, empty, of a server that answers nothing but these. */
export function openPage(known = {}) {
  answers = known;
  asked = [];
  frames.clear();
  window.document.body.replaceChildren();
}

async function answer(url, { method = "GET", headers = {}, body } = {}) {
  const question = `${method} ${url}`;
  asked.push({ question, headers, body });
  let content = answers[question];
  if (typeof content === "function") content = await content();
  if (content === undefined) throw new Error(`Nobody answers ${question}`);
  if (content instanceof Error) throw content;
  return content instanceof Response ? content : Response.json(content);
}

/** The questions that were asked, each with what was sent. */
export const questions = () => asked.map(({ question, body }) => (body ? `${question} ${body}` : question));

/** An answer that says what is wrong. */
export const refusal = (problem, remedy) =>
  Response.json({ problem, remedy }, { status: 400, statusText: "Bad Request" });

/** ComfyUI's scripts/api.js. */
export const api = Object.assign(new EventTarget(), {
  fetchApi: (route, options) => answer(route, options),
  apiURL: (route) => `/comfy${route}`,
  send: (name, detail) => api.dispatchEvent(Object.assign(new Event(name), { detail })),
});

/** ComfyUI's scripts/app.js; what a page asks it to do stands in `calls`. */
export const app = {
  calls: [],
  graph: undefined,
  extension: undefined,
  tab: undefined,
  confirms: true,
  /** What ComfyUI is set to. */
  settings: {},
  extensionManager: {
    setting: { get: (id) => app.settings[id] },
    dialog: {
      confirm: async (question) => {
        app.calls.push(["confirm", question]);
        return app.confirms;
      },
    },
    toast: { add: (message) => app.calls.push(["toast", message]) },
    registerSidebarTab: (tab) => {
      app.tab = tab;
    },
  },
  registerExtension: (extension) => {
    app.extension = extension;
  },
  loadGraphData: async (...given) => app.calls.push(["loadGraphData", ...given]),
  queuePrompt: async (...given) => app.calls.push(["queuePrompt", ...given]),
  refreshComboInNodes: async () => app.calls.push(["refreshComboInNodes"]),
};

/** Texts of the elements that a selector finds, but for hidden ones. */
export function textsOf(element, selector) {
  return [...element.querySelectorAll(selector)]
    .filter((one) => !one.closest("[hidden]"))
    .map((one) => one.textContent);
}

const { connect } = await import("../../web/lib/api.js");
connect(api);
