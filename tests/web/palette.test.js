// Whether what the pages write and draw can be read on the backgrounds of both hosts: WCAG 2.2, level AA.

import assert from "node:assert/strict";
import { test } from "node:test";
import { DARK, declarations, LIGHT, OPACITY, STATE } from "../../web/lib/palette.js";

const TEXT = 4.5; // success criterion 1.4.3
const GRAPHICS = 3; // success criterion 1.4.11
// ComfyUI's own palettes: what panels lie on, the letters there, and the fields with theirs.
const COMFYUI_LIGHT = [{ panel: "#ffffff", ink: "#222222", field: "#c9c9c9", fieldInk: "#222222" }];
const COMFYUI_DARK = [
  { panel: "#171718", ink: "#ffffff", field: "#222222", fieldInk: "#dddddd" },
  { panel: "#242730", ink: "#ffffff", field: "#2b2f38", fieldInk: "#dddddd" }, // Arc
  { panel: "#161b22", ink: "#e5eaf0", field: "#2e3440", fieldInk: "#bcc2c8" }, // Nord
  { panel: "#13171d", ink: "#e5eaf0", field: "#161b22", fieldInk: "#bcc2c8" }, // GitHub
  { panel: "#073642", ink: "#fdf6e3", field: "#002b36", fieldInk: "#93a1a1" }, // Solarized
];
// gradio's default theme, which Automatic1111 and Forge have: also what messages outside of panels lie on.
const WEBUI_LIGHT = ["#ffffff", "#f9fafb"].map((panel) => webui(panel, "#1f2937", "#ffffff"));
const WEBUI_DARK = ["#0b0f19", "#111827", "#1f2937"].map((panel) => webui(panel, "#f3f4f6", "#1f2937"));

function webui(panel, ink, field) {
  return { panel, ink, field, fieldInk: ink };
}

const channels = (color) => [1, 3, 5].map((at) => Number.parseInt(color.slice(at, at + 2), 16));

/** Relative luminance of an sRGB colour, as WCAG defines it. */
function luminance(rgb) {
  const [red, green, blue] = rgb.map((channel) => {
    const value = channel / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

/** Contrast of a colour, which may let the other one through, on that other one. */
function contrast(color, background, opacity = 1) {
  const below = channels(background);
  const seen = channels(color).map((channel, index) => opacity * channel + (1 - opacity) * below[index]);
  const [low, high] = [luminance(seen), luminance(below)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

test("contrast is as WCAG computes it", () => {
  assert.equal(contrast("#000000", "#ffffff"), 21);
  assert.equal(contrast("#ffffff", "#ffffff"), 1);
  assert.equal(contrast("#777777", "#ffffff").toFixed(2), "4.48");
  assert.equal(contrast("#000000", "#ffffff", 0.5).toFixed(2), "3.98");
});

for (const [theme, palette, hosts] of [
  ["light", LIGHT, [...COMFYUI_LIGHT, ...WEBUI_LIGHT]],
  ["dark", DARK, [...COMFYUI_DARK, ...WEBUI_DARK]],
]) {
  for (const { panel, ink, field, fieldInk } of hosts) {
    test(`texts on ${panel} of a ${theme} host can be read`, () => {
      const { error, warning, link } = palette;
      for (const color of [error, warning, link, ink]) assert.ok(contrast(color, panel) >= TEXT, color);
      for (const opacity of [OPACITY.text, OPACITY.axis]) assert.ok(contrast(ink, panel, opacity) >= TEXT, opacity);
      assert.ok(contrast(fieldInk, field) >= TEXT, `${fieldInk} on ${field}`);
    });

    test(`lines on ${panel} of a ${theme} host can be seen`, () => {
      for (const color of [palette.accent, ...palette.series]) assert.ok(contrast(color, panel) >= GRAPHICS, color);
      assert.ok(contrast(palette.accent, field) >= GRAPHICS, `the focus on ${field}`);
      assert.ok(contrast(palette.series[0], panel, OPACITY.raw) >= GRAPHICS, "losses that are not smoothed");
      assert.ok(contrast(ink, panel, OPACITY.rate) >= GRAPHICS, "the learning rate");
    });
  }
}

test("white letters on the colour of a state can be read", () => {
  for (const [state, color] of Object.entries(STATE)) assert.ok(contrast("#ffffff", color) >= TEXT, state);
});

test("both palettes have the same variables", () => {
  const names = (palette) => declarations(palette).replace(/#[0-9a-f]{6}/g, "");
  assert.equal(names(LIGHT), names(DARK));
  assert.match(declarations(LIGHT), /^--dreambooth-error: #[0-9a-f]{6};.* --dreambooth-series-6: #[0-9a-f]{6};$/);
});
