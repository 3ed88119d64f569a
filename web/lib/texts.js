// @ts-check
// The texts of the pages, in the language of the host. English is here; locales/<language>/main.json has the others,
// and a copy of it.

/** Group → name → text, or its plural forms. A word in braces stands for a value. */
export const ENGLISH = {
  state: {
    idle: "not trained yet",
    waiting: "waiting",
    starting: "starting",
    training: "training",
    running: "running",
    done: "done",
    stopped: "stopped",
    failed: "failed",
  },
  // as the engine names them
  phase: {
    "class pictures": "generating class pictures",
    "looking at pictures": "checking pictures",
    "encoding pictures": "encoding pictures",
    preview: "generating previews",
    scoring: "scoring previews",
  },
  progress: {
    label: "Progress",
    phase: "{done} of {total}",
    step: "step {step} of {steps}",
    rate: "{rate} steps/s",
    left: "{time} left",
    memory: "{memory} GB",
    best: "best: step {step}",
  },
  training: {
    hint: "Press Run to train. The curve and samples appear here.",
    subject: "Pictures of the subject",
    stopped: "stopped, progress saved",
    slider: "Step of the samples",
    step: "step {step}",
    base: "base model",
    sample: "Sample at step {step}",
    samplePrompt: "Sample at step {step}: {prompt}",
    baseSample: "Sample of the base model",
    baseSamplePrompt: "Sample of the base model: {prompt}",
  },
  chart: {
    log: "log",
    logTitle: "Logarithmic loss axis",
    values: "step {step} · loss {loss} · smoothed {smooth}",
    rate: "lr {rate}",
    validationLoss: "validation loss",
    empty: "Loss curve, no values yet",
    summary: "Loss curve from step {first} to {last}: smoothed loss from {start} to {end}",
    compared: "Smoothed loss curves: {runs}",
    comparedRun: "{name} {loss} at step {step}",
  },
  runs: {
    title: "Trainings",
    tooltip: "DreamBooth runs",
    refresh: "Refresh",
    compareHint: "Select runs to compare their losses.",
    compare: "Compare {name}",
    none: "No runs yet. Train LoRA (DreamBooth) starts one.",
    newest: "Newest sample of {name}",
    loss: "loss {loss}",
    details: "Details of {name}",
    loading: "Loading…",
    checkpoints: "Checkpoints",
    settings: "Settings",
    loadGraph: "Load graph",
    loadGraphTitle: "Open the graph of this run",
    useSettings: "Use these settings",
    useSettingsTitle: "Copy them to the Train tab",
    resume: "Resume",
    resumeTitle: "Continue this run where it stopped",
    delete: "Delete…",
    deleteTitle: "Delete the run and its checkpoints",
    use: "Use",
    useTitle: "Copy the checkpoint of step {step} to the LoRA folder",
    used: "{file} is in the LoRA folder.",
    graphGone: "The graph of this run no longer exists.",
    confirmDelete:
      "Delete the run “{run}” with all its checkpoints and samples? The finished adapter file in the LoRA folder stays.",
    size: "{size} MB",
  },
  node: {
    showAdvanced: "Show advanced inputs",
    hideAdvanced: "Hide advanced inputs",
  },
  subject: {
    folder: "Folder in ComfyUI's input folder",
    refresh: "Refresh",
    add: "Add pictures…",
    drop: "Drop 3 to 20 pictures here.",
    pictures: { one: "{count} picture", other: "{count} pictures" },
    uploading: { one: "Uploading {count} file…", other: "Uploading {count} files…" },
    noAnswer: "ComfyUI is not responding.",
  },
  webui: {
    stop: "Stop",
    stopTitle: "Stop after this step; progress is saved",
    resume: "Resume",
    resumeTitle: "Continue where it stopped",
    send: "Send to txt2img",
    sendTitle: "Put the subject and its LoRA into the prompt",
    sent: "The txt2img prompt is filled in. Open the txt2img tab to use it.",
    noPrompt: "This page has no txt2img prompt.",
    noFields: "This page has no Train tab. Reload it.",
    noAnswer: "The web UI is not responding: {error}",
    noRuns: "No runs yet. The Train tab starts one.",
    hint: "Press Train to begin. The curve and samples appear here.",
  },
};

/** @typedef {string | Record<string, string>} Text One, or by plural category: "one", "other". */
/** @typedef {Record<string, Record<string, Text>>} Texts Group → name → text. */
/**
 * Group and name of a text.
 * @typedef {{ [Group in keyof typeof ENGLISH]:
 *   `${Group}.${string & keyof (typeof ENGLISH)[Group]}` }[keyof typeof ENGLISH]} TextKey
 */

/** Those in locales/, beside English. */
export const TRANSLATED = ["de", "ja", "zh"];

/** @type {Texts} */
let texts = ENGLISH;
let language = "en";

/**
 * The language of locales/ for a reader's locale, such as "de-AT"; English where there is none. Traditional Chinese is
 * none of them.
 * @param {string} locale
 */
export function languageFor(locale) {
  const [code = ""] = locale.toLowerCase().split(/[-_]/);
  const isTraditional = /^zh[-_](tw|hk|mo|hant)/i.test(locale);
  return TRANSLATED.includes(code) && !isTraditional ? code : "en";
}

/**
 * Set the language of panels that are made from now on.
 * @param {string} code
 * @param {Texts} [translations] What is missing is shown in English.
 */
export function setLanguage(code, translations = {}) {
  language = code;
  texts = translations;
}

/** The locale of dates: the reader's own where it is one of the language that is spoken. */
export function dateLocale() {
  return navigator.language.startsWith(language) ? undefined : language;
}

/**
 * The text of a key, with its values; a "count" among them chooses the plural form.
 * @param {TextKey} key
 * @param {Record<string, string | number>} [values]
 */
export function t(key, values = {}) {
  const text = known(key, texts) ?? known(key, ENGLISH) ?? key;
  const form = typeof text === "string" ? text : (text[plural(Number(values.count))] ?? text.other ?? key);
  return form.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

/**
 * The text for a state or a phase of a run; its own name if it is not known here.
 * @param {string} name
 */
export function named(name) {
  for (const group of ["state", "phase"]) {
    const key = /** @type {TextKey} */ (`${group}.${name}`);
    if (known(key, ENGLISH) !== undefined) return t(key);
  }
  return name;
}

/**
 * @param {TextKey} key
 * @param {Texts} among
 */
function known(key, among) {
  const [group = "", name = ""] = key.split(".");
  return Object.hasOwn(among, group) && Object.hasOwn(among[group] ?? {}, name) ? among[group]?.[name] : undefined;
}

/** @param {number} count */
function plural(count) {
  return new Intl.PluralRules(language).select(count);
}
