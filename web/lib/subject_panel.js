// @ts-check
// On Subject: the folders with their counts, the pictures of the chosen one, warnings, and a place to drop pictures.

import { addressOf, folderPictures, pictureFolders } from "./api.js";
import { make } from "./dom.js";

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
    this.select = make("select", { title: "Folder in ComfyUI's input folder" });
    this.select.onchange = async () => {
      await this.host.choose(this.select.value);
      await this.refresh();
    };
    this.refreshButton = make("button", { textContent: "⟳", title: "Refresh", type: "button" });
    this.refreshButton.onclick = () => this.refresh();
    this.text = make("span");
    this.grid = make("div", { className: "dreambooth-grid" });
    this.warnings = make("div", { className: "dreambooth-warnings", hidden: true });
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-subject" },
      make("div", { className: "dreambooth-head" }, this.select, this.refreshButton, this.text),
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
    if (!exists) {
      this.grid.append(make("span", { textContent: "Drop 3 to 20 pictures here." }));
      return;
    }
    const report = await folderPictures(folder).catch((error) => {
      return { pictures: [], warnings: [], problem: String(error.message) };
    });
    if (!this.#isAttached || this.host.chosen() !== folder) return;
    const messages = [report.problem, ...report.warnings.map((warning) => warning.text)].filter(Boolean);
    this.warnings.hidden = !messages.length;
    this.warnings.textContent = messages.join("\n");
    this.text.textContent = `${report.pictures.length} picture${report.pictures.length === 1 ? "" : "s"}`;
    const bad = new Set(report.warnings.map((warning) => warning.picture));
    this.grid.replaceChildren(
      ...report.pictures.map((picture) =>
        make("img", {
          src: addressOf(picture.thumbnail),
          loading: "lazy",
          title: `${picture.name}, ${picture.width} × ${picture.height}${picture.caption ? `: ${picture.caption}` : ""}`,
          className: bad.has(picture.name) ? "bad" : "",
        }),
      ),
    );
  }

  /** @param {DragEvent} event */
  async drop(event) {
    const files = [...(event.dataTransfer?.files ?? [])].filter((file) => /^(image\/|text\/plain)/.test(file.type));
    this.element.classList.remove("drop");
    if (!files.length) return;
    event.preventDefault();
    event.stopPropagation();
    await this.add(files);
  }

  /**
   * Upload files into the chosen folder; into a new one if none is chosen, or a zip file.
   * @param {File[]} files
   */
  async add(files) {
    try {
      if (this.#noFolder === null) await this.refresh();
      if (this.#noFolder === null) throw new Error("ComfyUI does not answer.");
      const chosen = this.host.chosen();
      const isArchive = this.#folders.some(({ name, archive }) => name === chosen && archive);
      const folder = !chosen || chosen === this.#noFolder || isArchive ? NEW_FOLDER : chosen;
      this.text.textContent = `uploading ${files.length}…`;
      for (const file of files) await this.host.upload(folder, file);
      await this.host.choose(folder);
      await this.refresh();
    } catch (error) {
      this.text.textContent = error instanceof Error ? error.message : String(error);
    }
  }
}
