// @ts-check
// The colours of the pack's pages on light and on dark hosts. tests/web/palette.test.js holds them to WCAG AA.

/** CSS variable → colour; `series` are those of curves and scores in charts. */
export const LIGHT = {
  error: "#a8201a",
  warning: "#6e4a00",
  link: "#0b57a4",
  accent: "#1f6fc4",
  series: ["#0b57a4", "#b04a00", "#1b6e37", "#8a3a9c", "#b3261e", "#6b5a00", "#0b6a78"],
};

/** @type {typeof LIGHT} */
export const DARK = {
  error: "#ff9b94",
  warning: "#e8b84a",
  link: "#7dbbff",
  accent: "#58a6ff",
  series: ["#58a6ff", "#f0984a", "#5fce7c", "#d68be0", "#ff8a84", "#d9c24a", "#56c7d6"],
};

/** Below white letters, on every host. @type {Record<string, string>} */
export const STATE = {
  other: "#5f6368",
  work: "#1f68ad",
  done: "#1b7a3d",
  stopped: "#875a00",
  failed: "#b3261e",
};

/** How opaque text and lines are that are less important. */
export const OPACITY = { text: 0.8, axis: 0.8, raw: 0.65, rate: 0.65 };

/**
 * The declarations of a palette's CSS variables.
 * @param {typeof LIGHT} palette
 */
export function declarations({ series, ...colors }) {
  const named = Object.entries(colors).map(([name, color]) => `--dreambooth-${name}: ${color};`);
  return [...named, ...series.map((color, index) => `--dreambooth-series-${index}: ${color};`)].join(" ");
}
