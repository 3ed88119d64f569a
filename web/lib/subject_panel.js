// @ts-check
// On Subject: the folders with their counts, the pictures of the chosen one, warnings, and a place to drop pictures.

import { addressOf, folderPictures, pictureFolders } from "./api.js";
import { described, icon, make } from "./dom.js";
import { t } from "./texts.js";

/** @import { PictureFolder } from "../types/answers.js" */

const NEW_FOLDER = "subject"; // for pictures that are dropped while no folder is chosen

/**
 * What only ComfyUI's page can do.
 * @typedef {object} SubjectHost
 * @property {() => string} chosen The folder that the node has.
 * @property {(folder: string) => Promise<void>} choose Set it.
 * @property {(folder: string, file: File) => Promise<void>} upload Put a file into a folder of the input folder.
 */

export class SubjectPanel {
  /** @type {PictureFolder[]} */
  #folders = [];
  /** What the node's folder is called while pictures come from its input; null: not known. @type {string | null} */
  #noFolder = null;
  #isAttached = false;

  /** @param {SubjectHost} host */
  constructor(host) {
    this.host = host;
    this.select = make("select", { title: t("subject.folder") });
    described(this.select, { "aria-label": t("subject.folder") });
    this.select.onchange = async () => {
      await this.host.choose(this.select.value);
      await this.refresh();
    };
    this.refreshButton = make("button", { title: t("subject.refresh"), type: "button" }, icon("⟳"));
    described(this.refreshButton, { "aria-label": t("subject.refresh") });
    this.refreshButton.onclick = () => this.refresh();
    this.files = make("input", { type: "file", multiple: true, accept: "image/*,.txt" });
    this.files.onchange = async () => {
      await this.add([...(this.files.files ?? [])]);
      this.files.value = ""; // so that the same ones can be chosen again
    };
    this.addButton = make("button", { title: t("subject.add"), type: "button" }, icon("+"));
    described(this.addButton, { "aria-label": t("subject.add") });
    this.addButton.onclick = () => this.files.click();
    this.text = described(make("span"), { role: "status" });
    this.error = described(make("div", { className: "dreambooth-error", hidden: true }), { role: "alert" });
    this.grid = make("div", { className: "dreambooth-grid" });
    this.warnings = described(make("div", { className: "dreambooth-warnings", hidden: true }), { role: "status" });
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-subject" },
      make("div", { className: "dreambooth-head" }, this.select, this.refreshButton, this.addButton, this.text),
      this.error,
      this.warnings,
      this.grid,
    );
    this.element.ondragover = (event) => {
      event.preventDefault();
      this.element.classList.add("drop");
    };
    this.element.ondragleave = () => this.element.classList.remove("drop");
    this.element.ondrop = (event) => this.drop(event);
  }

  /** Begin to show the node's folder. */
  attach() {
    this.#isAttached = true;
    this.refresh();
  }

  /** The node is gone: answers that are still under way are dropped. */
  dispose() {
    this.#isAttached = false;
  }

  async refresh() {
    const answer = await pictureFolders().catch(() => null);
    if (!this.#isAttached) return;
    this.#noFolder = answer?.no_folder ?? this.#noFolder;
    this.#folders = answer?.folders ?? [];
    const chosen = this.host.chosen();
    const options = this.#folders.map(({ name, count }) =>
      make("option", { value: name, textContent: count === null ? name : `${name} (${count})` }),
    );
    const exists = this.#folders.some(({ name }) => name === chosen);
    if (!exists) options.unshift(make("option", { value: chosen, textContent: chosen }));
    this.select.replaceChildren(...options);
    this.select.value = chosen;
    await this.showPictures(chosen, exists);
  }

  /**
   * @param {string} folder
   * @param {boolean} exists
   */
  async showPictures(folder, exists) {
    this.grid.replaceChildren();
    this.warnings.hidden = true;
    this.text.textContent = "";
    this.showError("");
    if (!exists) {
      this.grid.append(make("span", { textContent: t("subject.drop") }));
      return;
    }
    const report = await folderPictures(folder).catch((error) => {
      return { pictures: [], warnings: [], problem: String(error.message) };
    });
    if (!this.#isAttached || this.host.chosen() !== folder) return;
    const messages = [report.problem, ...report.warnings.map((warning) => warning.text)].filter(Boolean);
    this.warnings.hidden = !messages.length;
    this.warnings.textContent = messages.join("\n");
    this.text.textContent = t("subject.pictures", { count: report.pictures.length });
    const bad = new Set(report.warnings.map((warning) => warning.picture));
    this.grid.replaceChildren(
      ...report.pictures.map((picture) => {
        const size = `${picture.name}, ${picture.width} × ${picture.height}`;
        const title = picture.caption ? `${size}: ${picture.caption}` : size;
        const className = bad.has(picture.name) ? "bad" : "";
        return make("img", { src: addressOf(picture.thumbnail), loading: "lazy", title, alt: title, className });
      }),
    );
  }

  /** @param {DragEvent} event */
  async drop(event) {
    const files = [...(event.dataTransfer?.files ?? [])].filter((file) => /^(image\/|text\/plain)/.test(file.type));
    this.element.classList.remove("drop");
    if (!files.length) return; // left to the page
    event.preventDefault();
    event.stopPropagation();
    await this.add(files);
  }

  /**
   * Upload files into the chosen folder; into a new one if none is chosen, or a zip file.
   * @param {File[]} files
   */
  async add(files) {
    if (!files.length) return;
    this.showError("");
    try {
      if (this.#noFolder === null) await this.refresh();
      if (this.#noFolder === null) throw new Error(t("subject.noAnswer"));
      const chosen = this.host.chosen();
      const isArchive = this.#folders.some(({ name, archive }) => name === chosen && archive);
      const folder = !chosen || chosen === this.#noFolder || isArchive ? NEW_FOLDER : chosen;
      this.text.textContent = t("subject.uploading", { count: files.length });
      for (const file of files) await this.host.upload(folder, file);
      await this.host.choose(folder);
      await this.refresh();
    } catch (error) {
      this.text.textContent = "";
      this.showError(error instanceof Error ? error.message : String(error));
    }
  }

  /** @param {string} message "" for none. */
  showError(message) {
    this.error.textContent = message;
    this.error.hidden = !message;
  }
}
