// On Subject: the folders with their counts, the pictures of the chosen one, warnings, and a place to drop pictures.

import { get, thumbnailUrl } from "./api.js";
import { make } from "./dom.js";

export class SubjectPanel {
  /**
   * `chosen` gives the folder that the node has, `choose` sets it, `upload` puts files into a folder of the input folder.
   */
  constructor({ chosen, choose, upload }) {
    Object.assign(this, { chosen, choose, upload });
    this.select = make("select", { title: "Folder in ComfyUI's input folder" });
    this.select.onchange = () => {
      this.choose(this.select.value);
      this.refresh();
    };
    this.again = make("button", { textContent: "⟳", title: "Look again", type: "button" });
    this.again.onclick = () => this.refresh();
    this.text = make("span");
    this.grid = make("div", { className: "dreambooth-grid" });
    this.warnings = make("div", { className: "dreambooth-warnings", hidden: true });
    this.element = make(
      "div",
      { className: "dreambooth dreambooth-subject" },
      make("div", { className: "dreambooth-head" }, this.select, this.again, this.text),
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

  async refresh() {
    const folders = await get("/folders").catch(() => []);
    const chosen = this.chosen();
    const options = folders.map(({ name, count }) =>
      make("option", { value: name, textContent: count === null ? name : `${name} (${count})` }),
    );
    if (!folders.some(({ name }) => name === chosen)) options.unshift(make("option", { value: chosen, textContent: chosen }));
    this.select.replaceChildren(...options);
    this.select.value = chosen;
    await this.look(chosen, folders.some(({ name }) => name === chosen));
  }

  async look(folder, exists) {
    this.grid.replaceChildren();
    this.warnings.hidden = true;
    this.text.textContent = "";
    if (!exists) {
      this.grid.append(make("span", { textContent: "Drop 3 to 20 pictures here." }));
      return;
    }
    const query = new URLSearchParams({ folder });
    const report = await get(`/folders/pictures?${query}`).catch((error) => ({ pictures: [], warnings: [], problem: error.message }));
    if (this.chosen() !== folder) return;
    const troubles = [report.problem, ...report.warnings].filter(Boolean);
    this.warnings.hidden = !troubles.length;
    this.warnings.textContent = troubles.join("\n");
    this.text.textContent = `${report.pictures.length} picture${report.pictures.length === 1 ? "" : "s"}`;
    this.grid.replaceChildren(
      ...report.pictures.map((one) =>
        make("img", {
          src: thumbnailUrl(folder, one.name),
          loading: "lazy",
          title: `${one.name}, ${one.width} × ${one.height}${one.caption ? `: ${one.caption}` : ""}`,
          className: report.warnings.some((text) => text.startsWith(one.name)) ? "bad" : "",
        }),
      ),
    );
  }

  async drop(event) {
    const files = [...(event.dataTransfer?.files ?? [])].filter((file) => /^(image\/|text\/plain)/.test(file.type));
    this.element.classList.remove("drop");
    if (!files.length) return;
    event.preventDefault();
    event.stopPropagation();
    await this.take(files);
  }

  /** Upload files into the chosen folder, or into a new one. */
  async take(files) {
    const folder = this.select.selectedOptions[0]?.value.match(/^[^()]+$/) && !this.chosen().endsWith(".zip") ? this.chosen() : "subject";
    this.text.textContent = `uploading ${files.length}…`;
    try {
      for (const file of files) await this.upload(folder, file);
      await this.choose(folder);
      await this.refresh();
    } catch (error) {
      this.text.textContent = String(error.message ?? error);
    }
  }
}
