// The texts of the pages: whole in every language, and nothing that is shown stands anywhere else.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { afterEach, test } from "node:test";
import { dateLocale, ENGLISH, languageFor, named, setLanguage, TRANSLATED, t } from "../../web/lib/texts.js";

const ROOT = new URL("../../", import.meta.url);
const REMAKE = "run python tools/npm.py run texts";
const read = (path) => readFileSync(new URL(path, ROOT), "utf8");
const textsOf = (language) => JSON.parse(read(`locales/${language}/main.json`)).dreambooth;

afterEach(() => setLanguage("en", ENGLISH));

/** The modules of both hosts' pages but the one that holds the texts. */
const modules = () =>
  [
    "web/dreambooth.js",
    "javascript/dreambooth_lora.mjs",
    ...readdirSync(new URL("web/lib/", ROOT)).map((name) => `web/lib/${name}`),
  ].filter((path) => !/texts\.js$/.test(path));

/** Every text by its key, such as "subject.pictures.one". */
function flat(texts, path = []) {
  if (typeof texts === "string") return [[path.join("."), texts]];
  return Object.entries(texts).flatMap(([name, inner]) => flat(inner, [...path, name]));
}

// What another language says as English does.
const LOANS = { de: ["runs.title", "runs.checkpoints", "chart.log"] };
const isPlural = (text) => typeof text === "object";
const valuesOf = (text) => [...text.matchAll(/\{(\w+)\}/g)].map(([, name]) => name).sort();

test("locales/en is a copy of the English texts", () => {
  assert.equal(read("locales/en/main.json"), `${JSON.stringify({ dreambooth: ENGLISH }, null, 2)}\n`, REMAKE);
});

test("the languages are those of the nodes", () => {
  const files = readdirSync(new URL("locales/", ROOT)).sort();
  assert.deepEqual(files, ["en", ...TRANSLATED].sort());
});

for (const language of TRANSLATED) {
  test(`${language} has every text, in all plural forms of that language, with the same values`, () => {
    const texts = textsOf(language);
    assert.deepEqual(Object.keys(texts), Object.keys(ENGLISH));
    const { pluralCategories } = new Intl.PluralRules(language).resolvedOptions();
    for (const [group, english] of Object.entries(ENGLISH)) {
      assert.deepEqual(Object.keys(texts[group]), Object.keys(english), group);
      for (const [name, original] of Object.entries(english)) {
        const text = texts[group][name];
        assert.equal(isPlural(text), isPlural(original), name);
        if (isPlural(text)) assert.deepEqual(Object.keys(text).sort(), [...pluralCategories].sort(), name);
        for (const [, form] of flat(text)) {
          assert.ok(form.trim() === form && form !== "", name);
          assert.deepEqual(valuesOf(form), valuesOf(isPlural(original) ? original.other : original), name);
        }
      }
    }
  });

  test(`${language} is not English`, () => {
    const texts = new Map(flat(textsOf(language)));
    const isLoan = (key) => /^(runs\.size|progress\.memory)$/.test(key) || LOANS[language]?.includes(key);
    const alike = flat(ENGLISH).filter(([key, text]) => texts.get(key) === text && !isLoan(key));
    assert.deepEqual(alike, []);
  });
}

test("no text holds syntax of ComfyUI's translator but values in braces", () => {
  for (const language of ["en", ...TRANSLATED])
    for (const [key, text] of flat(textsOf(language))) assert.doesNotMatch(text.replace(/\{\w+\}/g, ""), /[{}@|]/, key);
});

test("a text is said in the chosen language, with its values and plural form", () => {
  assert.equal(t("progress.step", { step: 3, steps: 12 }), "step 3 of 12");
  assert.deepEqual(
    [1, 2, 0].map((count) => t("subject.pictures", { count })),
    ["1 picture", "2 pictures", "0 pictures"],
  );
  setLanguage("de", textsOf("de"));
  assert.equal(t("progress.step", { step: 3, steps: 12 }), "Schritt 3 von 12");
  assert.deepEqual(
    [1, 2].map((count) => t("subject.pictures", { count })),
    ["1 Bild", "2 Bilder"],
  );
  setLanguage("ja", textsOf("ja"));
  assert.equal(t("subject.pictures", { count: 1 }), "1 枚の画像");
});

test("what a language lacks is said in English", () => {
  setLanguage("de", { runs: {} });
  assert.deepEqual([t("runs.resume"), t("node.showAdvanced")], ["Resume", "Show advanced inputs"]);
  setLanguage("de", undefined);
  assert.equal(t("runs.resume"), "Resume");
});

test("a locale chooses its language, or English", () => {
  const chosen = {
    "de-AT": "de",
    ja: "ja",
    "zh-CN": "zh",
    zh: "zh",
    "zh-TW": "en",
    "zh-Hant-HK": "en",
    fr: "en",
    "": "en",
  };
  for (const [locale, language] of Object.entries(chosen)) assert.equal(languageFor(locale), language, locale);
});

test("states and phases that are not known keep their name", () => {
  assert.deepEqual([named("done"), named("preview"), named("folding")], ["done", "generating previews", "folding"]);
  assert.deepEqual([named("toString"), named("constructor")], ["toString", "constructor"]);
});

test("dates are the reader's own where that is the language that is spoken", () => {
  const { language } = navigator;
  setLanguage(language.slice(0, 2), ENGLISH);
  assert.equal(dateLocale(), undefined);
  setLanguage("ja", ENGLISH);
  assert.equal(dateLocale(), language.startsWith("ja") ? undefined : "ja");
});

test("nothing that is shown stands outside of the texts", () => {
  assert.ok(modules().length > 10);
  for (const path of modules()) assert.deepEqual(shownLiterals(read(path)), [], path);
});

test("every text is used", () => {
  const code = modules().map(read).join();
  const keys = Object.entries(ENGLISH).flatMap(([group, texts]) =>
    Object.keys(texts).map((name) => `${group}.${name}`),
  );
  const unused = keys.filter((key) => !/^(state|phase)\./.test(key) && !code.includes(`"${key}"`));
  assert.deepEqual(unused, []);
});

test("a literal that is shown is found", () => {
  for (const code of [
    'make("b", { textContent: "Stop" })',
    'button.title = "stop"',
    'described(box, { "aria-label": "Progress" })',
    "notify(`$" + "{file} is here`)",
    'throw new Error("The graph is gone.")',
  ])
    assert.equal(shownLiterals(code).length, 1, code);
});

const SHOWN_BY =
  /(?:textContent|title|alt|placeholder|summary|label|tooltip|"aria-(?:label|valuetext|description)")\s*[:=]\s*$/;
// The pack's own name; names of classes and fonts; selectors.
const NOT_SHOWN = /^(DreamBooth LoRA|dreambooth[\w -]*|pi pi-[\w-]+|#?[\w-]+ textarea, .*|\d+px [\w-]+, [\w-]+)$/;

/** String literals of a module that are words for people: of several words, or put where such words are shown. */
function shownLiterals(code) {
  const bare = code
    .replace(/\/\*[\s\S]*?\*\//g, "")
    .replace(/^\s*\/\/.*$|\s\/\/ .*$/gm, "")
    .replace(/const (?:CSS|COLOURS) = `[\s\S]*?`;/g, "");
  const found = [];
  for (const match of bare.matchAll(/"((?:[^"\\\n]|\\.)*)"|`((?:[^`\\]|\\.)*)`/g)) {
    const text = (match[1] ?? match[2]).replace(/\$\{[^}]*\}/g, "…");
    const before = bare.slice(Math.max(0, match.index - 40), match.index);
    const isSentence = /[a-z…,.'] +[a-z]|[a-z] +[a-z…]/i.test(text) && !/[#[\]]/.test(text);
    const isShown = SHOWN_BY.test(before) && /[a-z]{2}/i.test(text);
    if ((isSentence || isShown) && !NOT_SHOWN.test(text)) found.push(text);
  }
  return found;
}
