// What is asked of the server, and what becomes of its answers.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { answers, asked, openPage, questions, refusal } from "./comfyui.js";

const api = await import("../../web/lib/api.js");
const OURS = { "Content-Type": "application/json", "X-DreamBooth": "1" };
const RUN = "rex (2024)/#1 ü";
const PATH = "/dreambooth/runs/rex%20(2024)%2F%231%20%C3%BC";

beforeEach(() => openPage());

test("what is read is asked for at its address, and is what the server says", async () => {
  for (const [ask, path] of [
    [() => api.liveNodes(), "/dreambooth/nodes"],
    [() => api.listRuns(), "/dreambooth/runs"],
    [() => api.runDetails(RUN), PATH],
    [() => api.runCurve(RUN), `${PATH}/curve?after=-1`],
    [() => api.runCurve(RUN, 0), `${PATH}/curve?after=0`],
    [() => api.runCurve(RUN, 12), `${PATH}/curve?after=12`],
    [() => api.pictureFolders(), "/dreambooth/folders"],
    [() => api.folderPictures("in/(a&b) #1 ü"), "/dreambooth/folders/pictures?folder=in%2F%28a%26b%29+%231+%C3%BC"],
  ]) {
    answers[`GET ${path}`] = { told: path };
    assert.deepEqual(await ask(), { told: path });
    assert.deepEqual(asked.at(-1), { question: `GET ${path}`, headers: {}, body: undefined });
  }
});

test("what changes something says that it is our own page who asks", async () => {
  answers[`POST ${PATH}/use`] = { file: "rex-00012.safetensors" };
  assert.deepEqual(await api.useCheckpoint(RUN, 12), { file: "rex-00012.safetensors" });
  assert.deepEqual(asked.at(-1), { question: `POST ${PATH}/use`, headers: OURS, body: '{"step":12}' });
  answers[`DELETE ${PATH}`] = {};
  assert.deepEqual(await api.deleteRun(RUN), {});
  assert.deepEqual(asked.at(-1), { question: `DELETE ${PATH}`, headers: OURS, body: "{}" });
});

test("an answer that something is wrong becomes an error of its problem and its remedy", async () => {
  answers["GET /dreambooth/runs"] = () => refusal("The folder runs can't be read.", "Allow it.");
  await assert.rejects(api.listRuns(), { message: "The folder runs can't be read. Allow it." });
  answers["GET /dreambooth/runs"] = () => refusal("The folder runs can't be read.", "");
  await assert.rejects(api.listRuns(), { message: "The folder runs can't be read." });
  answers[`DELETE ${PATH}`] = () => refusal("The run is being trained.", "Stop it first.");
  await assert.rejects(api.deleteRun(RUN), { message: "The run is being trained. Stop it first." });
});

test("an answer without words is named by its status", async () => {
  for (const body of ["<html>Bad Gateway</html>", "{}"]) {
    answers["GET /dreambooth/runs"] = new Response(body, { status: 502, statusText: "Bad Gateway" });
    await assert.rejects(api.listRuns(), { message: "Bad Gateway" });
  }
});

test("no answer at all is an error too", async () => {
  answers["GET /dreambooth/nodes"] = new TypeError("Failed to fetch");
  await assert.rejects(api.liveNodes(), { message: "Failed to fetch" });
  assert.deepEqual(questions(), ["GET /dreambooth/nodes"]);
});

test("an address of the server is one below the path that ComfyUI is served at", () => {
  assert.equal(api.addressOf("/dreambooth/runs/a/x.png"), "/comfy/dreambooth/runs/a/x.png");
});
