// @ts-check
// Elements made in one line, and the pack's style sheet.

import { DARK, declarations, LIGHT, OPACITY, STATE } from "./palette.js";
import { dateLocale } from "./texts.js";

/**
 * An element with properties and children: make("div", { className: "x" }, "text", other).
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Partial<HTMLElementTagNameMap[Tag]>} properties
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const CSS = `
:root { ${declarations(LIGHT)} --dreambooth-scheme: light; }
.dark-theme, .dark { ${declarations(DARK)} --dreambooth-scheme: dark; }
.dreambooth-panel { width: 100%; height: 100%; min-height: 0; }
.dreambooth { box-sizing: border-box; display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%;
  min-height: 0; padding: 6px; overflow: hidden; font: 12px/1.35 system-ui, sans-serif; color: var(--fg-color, #ddd);
  background: var(--comfy-menu-bg, #222); border-radius: 6px; color-scheme: var(--dreambooth-scheme); }
.dreambooth * { box-sizing: border-box; }
.dreambooth [hidden] { display: none !important; }
.dreambooth :focus-visible { outline: 2px solid var(--dreambooth-accent); outline-offset: -2px; }
.dreambooth button, .dreambooth select, .dreambooth input[type=text] { font: inherit; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #333); border: 1px solid var(--border-color, #555); border-radius: 4px; padding: 1px 7px; }
.dreambooth button { cursor: pointer; }
.dreambooth button, .dreambooth select { min-height: 24px; }
.dreambooth button[aria-pressed=true] { border-color: ${STATE.work}; background: ${STATE.work}; color: #fff; }
.dreambooth-unseen { position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.dreambooth-head { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: baseline; }
.dreambooth-head select { min-width: 0; max-width: 100%; }
.dreambooth-state { flex: none; padding: 0 7px; border-radius: 9px; background: ${STATE.other}; color: #fff; }
.dreambooth-state[data-state=training], .dreambooth-state[data-state=running] { background: ${STATE.work}; }
.dreambooth-state[data-state=done] { background: ${STATE.done}; }
.dreambooth-state[data-state=stopped] { background: ${STATE.stopped}; }
.dreambooth-state[data-state=failed] { background: ${STATE.failed}; }
.dreambooth-bar { height: 3px; flex: none; background: var(--border-color, #444); border-radius: 2px; }
.dreambooth-bar > div { height: 100%; width: 0; background: var(--dreambooth-accent); border-radius: 2px; }
.dreambooth-chart { position: relative; flex: 1 1 110px; min-height: 90px; }
.dreambooth-chart canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.dreambooth-legend { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: center; font-size: 11px; }
.dreambooth-legend i { display: inline-block; width: 10px; height: 3px; margin-right: 4px; vertical-align: middle; }
.dreambooth-strip { display: flex; gap: 4px; flex: none; align-items: flex-end; overflow: hidden; }
.dreambooth-strip img { flex: none; height: 72px; border-radius: 3px; image-rendering: auto; }
.dreambooth-strip > div { display: flex; gap: 2px; overflow: hidden; }
.dreambooth-strip .samples { flex: none; max-width: 75%; }
.dreambooth-strip .subject { padding-right: 6px; border-right: 1px solid var(--border-color, #555); }
.dreambooth-strip .subject img { height: 48px; }
.dreambooth-strip .subject:empty { display: none; }
.dreambooth-error { flex: none; color: var(--dreambooth-error); white-space: pre-wrap; max-height: 5.4em; overflow: auto; }
.dreambooth-slider { display: flex; gap: 6px; align-items: center; flex: none; }
.dreambooth-slider input { flex: 1; min-width: 0; accent-color: var(--dreambooth-accent); }
.dreambooth-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(56px, 1fr)); gap: 3px; overflow: auto;
  flex: 1 1 60px; min-height: 60px; align-content: start; }
.dreambooth-grid > span { grid-column: 1 / -1; }
.dreambooth-grid img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 3px; }
.dreambooth-grid .bad { outline: 2px solid var(--dreambooth-warning); outline-offset: -2px; }
.dreambooth.drop { outline: 2px dashed var(--dreambooth-accent); outline-offset: -3px; }
.dreambooth-warnings { flex: none; max-height: 5.4em; overflow: auto; color: var(--dreambooth-warning); white-space: pre-wrap; }
.dreambooth-runs { overflow: auto; border-radius: 0; }
.dreambooth-run { display: flex; gap: 8px; align-items: center; padding: 6px 4px; border-bottom: 1px solid var(--border-color, #444); }
.dreambooth-run input { flex: none; width: 24px; height: 24px; margin: 0; }
.dreambooth button.dreambooth-open { flex: 1; min-width: 0; display: grid; grid-template-columns: 44px 1fr auto; gap: 2px 8px;
  align-items: center; padding: 2px 6px 2px 2px; border: 0; background: none; color: inherit; text-align: left; }
.dreambooth-run img, .dreambooth-run .none { width: 44px; height: 44px; object-fit: cover; border-radius: 3px; background: #8884; }
.dreambooth-run b { overflow-wrap: anywhere; }
.dreambooth small { opacity: ${OPACITY.text}; }
.dreambooth-details { padding: 6px 4px; display: flex; flex-direction: column; gap: 6px; border-bottom: 1px solid var(--border-color, #444); }
.dreambooth-details .actions { display: flex; flex-wrap: wrap; gap: 4px; }
.dreambooth-details a { color: var(--dreambooth-link); }
.dreambooth-details table { border-collapse: collapse; font-size: 11px; }
.dreambooth-details td { padding: 0 8px 0 0; vertical-align: top; overflow-wrap: anywhere; }
`;

/**
 * Set attributes that are not properties in every browser, such as "role" and "aria-label".
 * @template {HTMLElement} Element
 * @param {Element} element
 * @param {Record<string, string>} attributes
 * @returns {Element}
 */
export function described(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/**
 * A sign that is not read out.
 * @param {string} textContent
 */
export function icon(textContent) {
  return described(make("span", { textContent }), { "aria-hidden": "true" });
}

/** Put the style sheet into the page, once. */
export function addStyle() {
  if (!document.getElementById("dreambooth-style")) {
    document.head.append(make("style", { id: "dreambooth-style", textContent: CSS }));
  }
}

/**
 * A Unix time as "20 Nov, 14:05".
 * @param {number} seconds
 */
export function shortTime(seconds) {
  /** @type {Intl.DateTimeFormatOptions} */
  const options = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" };
  return new Date(seconds * 1000).toLocaleString(dateLocale(), options);
}

/**
 * Seconds as "8:35" or "1:02:03".
 * @param {number} seconds
 */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (!parts[0]) parts.shift();
  return parts.map((part, index) => (index ? String(part).padStart(2, "0") : part)).join(":");
}
