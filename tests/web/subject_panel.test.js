// What the panel of Subject shows of folders and pictures, and where pictures go that are dropped on it.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { answers, openPage, questions, refusal, settled, textsOf } from "./comfyui.js";

const { SubjectPanel } = await import("../../web/lib/subject_panel.js");

const NO_FOLDER = "(connected images)";
const FOLDERS = [
  { name: NO_FOLDER, archive: false, count: null },
  { name: "dog", archive: false, count: 2 },
  { name: "empty", archive: false, count: 0 },
  { name: "rex.zip", archive: true, count: null },
];
const picture = (name, facts = {}) => ({
  ...{ name, caption: "", width: 640, height: 480, thumbnail: `/dreambooth/thumbnails/${name}`, ...facts },
});
const reportOf = (...pictures) => ({ pictures, warnings: [], problem: null });
const REPORT = reportOf(picture("1.png"), picture("1.png.png", { caption: "a dog" }));
const PICTURE = new File(["."], "a.png", { type: "image/png" });
const CAPTION = new File(["."], "a.txt", { type: "text/plain" });
const SOUND = new File(["."], "a.wav", { type: "audio/wav" });
const address = (folder) => `GET /dreambooth/folders/pictures?folder=${folder}`;

let panel;
let folder;
let done;

const host = {
  chosen: () => folder,
  choose: async (name) => {
    await new Promise(setImmediate); // ComfyUI reads its lists again
    done.push(["choose", name]);
    folder = name;
  },
  upload: async (into, file) => done.push(["upload", into, file.name]),
};

beforeEach(() => {
  panel?.dispose();
  openPage({
    "GET /dreambooth/folders": { no_folder: NO_FOLDER, folders: FOLDERS },
    [address("dog")]: REPORT,
    [address("empty")]: reportOf(),
    [address("subject")]: reportOf(),
    [address("rex.zip")]: reportOf(picture("2.png")),
    [address("%28connected+images%29")]: reportOf(),
  });
  done = [];
});

async function opened(chosen = "dog") {
  folder = chosen;
  panel = new SubjectPanel(host);
  document.body.append(panel.element);
  assert.equal(panel.warnings.hidden, true);
  panel.attach();
  await settled();
}

const texts = (selector) => textsOf(panel.element, selector);
const images = () => [...panel.grid.querySelectorAll("img")];
const warnings = () => texts(".dreambooth-warnings");
const said = () => panel.text.textContent;
const error = () => texts(".dreambooth-error");

async function drop(...files) {
  const event = Object.assign(new window.Event("drop", { bubbles: true, cancelable: true }), {
    dataTransfer: { files },
  });
  panel.element.dispatchEvent(event);
  await settled();
  return event;
}

test("what is shown says what it is", async () => {
  await opened();
  assert.equal(panel.element.className, "dreambooth dreambooth-subject");
  const titles = [...panel.element.querySelectorAll(".dreambooth-head > [title]")].map((one) => one.title);
  assert.deepEqual(titles, ["Folder in ComfyUI's input folder", "Refresh", "Add pictures…"]);
});

test("folders are offered with their counts, and the node's is chosen", async () => {
  await opened();
  assert.deepEqual(texts("option"), [NO_FOLDER, "dog (2)", "empty (0)", "rex.zip"]);
  const values = [...panel.select.querySelectorAll("option")].map((option) => option.value);
  assert.deepEqual(
    values,
    FOLDERS.map(({ name }) => name),
  );
  assert.equal(panel.select.value, "dog");
});

test("the folder's pictures are shown with their size and caption, and counted", async () => {
  await opened();
  assert.deepEqual(
    images().map((image) => [image.getAttribute("src"), image.title, image.className]),
    [
      ["/comfy/dreambooth/thumbnails/1.png", "1.png, 640 × 480", ""],
      ["/comfy/dreambooth/thumbnails/1.png.png", "1.png.png, 640 × 480: a dog", ""],
    ],
  );
  assert.equal(said(), "2 pictures");
  assert.deepEqual(warnings(), []);
});

test("one picture is one, and none are none", async () => {
  await opened("rex.zip");
  assert.equal(said(), "1 picture");
  await opened("empty");
  assert.equal(said(), "0 pictures");
});

test("warnings stand below each other, and just their pictures are marked", async () => {
  const about = [
    { picture: "1.png.png", text: "1.png.png is small." },
    { picture: "broken.png", text: "broken.png can't be read." },
  ];
  answers[address("dog")] = { ...REPORT, warnings: about };
  await opened();
  assert.deepEqual(warnings(), ["1.png.png is small.\nbroken.png can't be read."]);
  assert.deepEqual(
    images().map((image) => image.className),
    ["", "bad"],
  );
});

test("a problem with the folder comes before the warnings", async () => {
  answers[address("dog")] = {
    ...reportOf(),
    problem: "No picture.",
    warnings: [{ picture: "a", text: "a is broken." }],
  };
  await opened();
  assert.deepEqual(warnings(), ["No picture.\na is broken."]);
});

test("a folder that the server refuses says why, and what to do", async () => {
  answers[address("dog")] = refusal("dog can't be read.", "Allow it.");
  await opened();
  assert.deepEqual([warnings(), images().length, said()], [["dog can't be read. Allow it."], 0, "0 pictures"]);
});

test("a folder that is not there stays chosen, and invites to drop pictures", async () => {
  await opened("gone");
  assert.deepEqual(texts("option"), ["gone", NO_FOLDER, "dog (2)", "empty (0)", "rex.zip"]);
  assert.equal(panel.select.value, "gone");
  assert.deepEqual(texts(".dreambooth-grid"), ["Drop 3 to 20 pictures here."]);
  assert.equal(said(), "");
  assert.deepEqual(questions(), ["GET /dreambooth/folders"]);
});

test("what was said of another folder is gone", async () => {
  answers[address("dog")] = { ...REPORT, problem: "Too few." };
  await opened();
  folder = "gone";
  await panel.refresh();
  assert.deepEqual([warnings(), images().length, said()], [[], 0, ""]);
});

test("another folder that is chosen is set on the node, and its pictures are shown", async () => {
  await opened();
  panel.select.value = "rex.zip";
  panel.select.onchange();
  await settled();
  assert.deepEqual(done, [["choose", "rex.zip"]]);
  assert.deepEqual(
    images().map((image) => image.title),
    ["2.png, 640 × 480"],
  );
});

test("the button reads the folder again", async () => {
  await opened();
  answers[address("dog")] = reportOf(picture("3.png"));
  panel.refreshButton.click();
  await settled();
  assert.deepEqual(
    images().map((image) => image.title),
    ["3.png, 640 × 480"],
  );
});

test("pictures of a folder that is chosen no longer are not shown", async () => {
  await opened("rex.zip");
  let send;
  answers[address("dog")] = () => new Promise((resolve) => (send = resolve));
  folder = "dog";
  panel.refresh();
  await settled();
  folder = "rex.zip";
  await panel.refresh();
  send(REPORT);
  await settled();
  assert.deepEqual(
    images().map((image) => image.title),
    ["2.png, 640 × 480"],
  );
});

test("answers that come when the node is gone are dropped", async () => {
  await opened();
  folder = "empty";
  panel.refresh();
  panel.dispose();
  await settled();
  assert.deepEqual([panel.select.value, said()], ["dog", "2 pictures"]);
  await opened();
  let send;
  answers[address("dog")] = () => new Promise((resolve) => (send = resolve));
  panel.refresh();
  await settled();
  panel.dispose();
  send(REPORT);
  await settled();
  assert.equal(images().length, 0);
});

test("pictures and captions that are dropped go into the chosen folder, whose pictures are shown", async () => {
  await opened();
  answers[address("dog")] = reportOf(picture("a.png"));
  const event = await drop(PICTURE, SOUND, CAPTION);
  assert.deepEqual(done, [
    ["upload", "dog", "a.png"],
    ["upload", "dog", "a.txt"],
    ["choose", "dog"],
  ]);
  assert.equal(event.defaultPrevented, true);
  assert.deepEqual(
    images().map((image) => image.title),
    ["a.png, 640 × 480"],
  );
});

test("pictures can be chosen instead of dropped", async () => {
  await opened();
  let chosen = 0;
  panel.files.click = () => {
    chosen += 1;
  };
  panel.addButton.click();
  assert.deepEqual([chosen, panel.files.multiple, panel.files.accept], [1, true, "image/*,.txt"]);
  for (const [files, uploads] of [
    [[], []],
    [
      [PICTURE, CAPTION],
      [
        ["upload", "dog", "a.png"],
        ["upload", "dog", "a.txt"],
        ["choose", "dog"],
      ],
    ],
  ]) {
    Object.defineProperty(panel.files, "files", { value: files, configurable: true });
    panel.files.onchange();
    await settled();
    assert.deepEqual(done, uploads);
  }
});

test("where none is chosen, or a zip file, dropped pictures go into a new folder", async () => {
  for (const chosen of ["", NO_FOLDER, "rex.zip"]) {
    done = [];
    await opened(chosen);
    await drop(PICTURE);
    assert.deepEqual(done, [
      ["upload", "subject", "a.png"],
      ["choose", "subject"],
    ]);
  }
});

test("a folder called like a zip file, or not there yet, is one to drop pictures into", async () => {
  answers["GET /dreambooth/folders"].folders = [...FOLDERS, { name: "folder.zip", archive: false, count: 0 }];
  answers[address("folder.zip")] = reportOf();
  for (const chosen of ["folder.zip", "new (1)"]) {
    await opened(chosen);
    await drop(PICTURE);
    assert.deepEqual(done.splice(0), [
      ["upload", chosen, "a.png"],
      ["choose", chosen],
    ]);
  }
});

test("files that are no pictures are left to the page", async () => {
  await opened();
  let isSeen = false;
  document.body.addEventListener("drop", () => {
    isSeen = true;
  });
  const event = await drop(SOUND);
  assert.deepEqual([done, event.defaultPrevented, isSeen], [[], false, true]);
  isSeen = false;
  await drop(PICTURE);
  assert.equal(isSeen, false);
});

test("while pictures are uploaded their number is shown, and an upload that fails says why", async () => {
  await opened();
  let refuse;
  const slow = { ...host, upload: () => new Promise((_, reject) => (refuse = reject)) };
  panel.host = slow;
  await drop(PICTURE, CAPTION);
  assert.equal(said(), "Uploading 2 files…");
  refuse(new Error("a.png: Request Entity Too Large"));
  await settled();
  assert.deepEqual([said(), error(), done], ["", ["a.png: Request Entity Too Large"], []]);
});

test("nothing is uploaded while the server does not answer", async () => {
  const folders = answers["GET /dreambooth/folders"];
  answers["GET /dreambooth/folders"] = new TypeError("Failed to fetch");
  await opened();
  await drop(PICTURE);
  assert.deepEqual([said(), error(), done], ["", ["ComfyUI is not responding."], []]);
  answers["GET /dreambooth/folders"] = folders;
  await drop(PICTURE);
  assert.deepEqual(done[0], ["upload", "dog", "a.png"]);
});

test("the panel is outlined while pictures are held over it", async () => {
  await opened();
  const isOutlined = () => panel.element.classList.contains("drop");
  for (const [kind, outlined] of [
    ["dragover", true],
    ["dragleave", false],
    ["dragover", true],
    ["drop", false],
  ]) {
    const event = Object.assign(new window.Event(kind, { cancelable: true }), { dataTransfer: { files: [] } });
    panel.element.dispatchEvent(event);
    assert.equal(isOutlined(), outlined);
    assert.equal(event.defaultPrevented, kind === "dragover");
  }
});

test("the folder, the button and the pictures have names for those who don't see them", async () => {
  await opened();
  assert.deepEqual(
    [panel.select, panel.refreshButton].map((one) => one.getAttribute("aria-label")),
    [panel.select.title, "Refresh"],
  );
  assert.deepEqual(
    images().map((image) => image.alt),
    ["1.png, 640 × 480", "1.png.png, 640 × 480: a dog"],
  );
  const roles = [panel.text, panel.error, panel.warnings].map((one) => one.getAttribute("role"));
  assert.deepEqual(roles, ["status", "alert", "status"]);
});
