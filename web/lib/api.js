// What the pack's pages ask the server.

import { api } from "../../../scripts/api.js";

const PREFIX = "/dreambooth";

/** Read JSON; throws an Error with the server's words. */
export async function get(path) {
  return answer(await api.fetchApi(PREFIX + path));
}

/** Change something; the header tells the server that it is our own page who asks. */
export async function send(method, path, body = {}) {
  const headers = { "Content-Type": "application/json", "X-DreamBooth": "1" };
  return answer(await api.fetchApi(PREFIX + path, { method, headers, body: JSON.stringify(body) }));
}

async function answer(response) {
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error([content.problem, content.remedy].filter(Boolean).join(" ") || response.statusText);
  return content;
}

/** Address in this page of a URL that the server sent: ComfyUI may be served below some other path. */
export function addressOf(url) {
  return api.apiURL(url);
}

/** Path of a run, to `get`. */
export function runPath(run, rest = "") {
  return `/runs/${encodeURIComponent(run)}${rest}`;
}
