// @ts-check
// What the pack's pages ask the server.

/**
 * How to reach the server of the host.
 * @typedef {object} Connection
 * @property {(route: string, options?: RequestInit) => Promise<Response>} fetchApi
 * @property {(route: string) => string} apiURL Address in this page of a route: the host may be served below some path.
 */

/** @import { Folders, JobFacts, NodeFacts, PictureReport, Points, RunDetails, RunSummary } from "../types/answers.js" */

const PREFIX = "/dreambooth";
/** @type {Connection} */
let api;

/**
 * Ask this host from now on.
 * @param {Connection} connection
 */
export function connect(connection) {
  api = connection;
}

/**
 * Node → what is known of it.
 * @returns {Promise<Record<string, NodeFacts>>}
 */
export const liveNodes = () => get("/nodes");

/**
 * The newest first.
 * @returns {Promise<RunSummary[]>}
 */
export const listRuns = () => get("/runs");

/**
 * @param {string} run
 * @returns {Promise<RunDetails>}
 */
export const runDetails = (run) => get(runPath(run));

/**
 * @param {string} run
 * @param {number} [after] Only what comes after this step.
 * @returns {Promise<Points>}
 */
export const runCurve = (run, after = -1) => get(`${runPath(run)}/curve?after=${after}`);

/**
 * Copy the adapter of a step into the LoRA folder.
 * @param {string} run
 * @param {number} step
 * @returns {Promise<{ file: string }>}
 */
export const useCheckpoint = (run, step) => send("POST", `${runPath(run)}/use`, { step });

/** @param {string} run */
export const deleteRun = (run) => send("DELETE", runPath(run));

/** @returns {Promise<Folders>} */
export const pictureFolders = () => get("/folders");

/**
 * @param {string} folder
 * @returns {Promise<PictureReport>}
 */
export const folderPictures = (folder) => get(`/folders/pictures?${new URLSearchParams({ folder })}`);

/**
 * Address in this page of a URL that the server sent.
 * @param {string} url
 */
export function addressOf(url) {
  return api.apiURL(url);
}

/**
 * What the job at work does, or how the newest one ended; of the web UI alone.
 * @param {number} after Points of its curve come after this step.
 * @returns {Promise<JobFacts | Record<string, never>>}
 */
export const currentJob = (after) => get(`/job?after=${after}`);

/** Have the job at work stop. */
export const stopJob = () => send("POST", "/job/stop");

/** @param {string} run */
export const resumeRun = (run) => send("POST", `${runPath(run)}/resume`);

/** @param {string} run */
function runPath(run) {
  return `/runs/${encodeURIComponent(run)}`;
}

/**
 * Read JSON; throws an Error with the server's words.
 * @param {string} path
 */
async function get(path) {
  return answer(await api.fetchApi(PREFIX + path));
}

/**
 * Change something; the header tells the server that it is our own page who asks.
 * @param {string} method
 * @param {string} path
 * @param {object} [body]
 */
async function send(method, path, body = {}) {
  const headers = { "Content-Type": "application/json", "X-DreamBooth": "1" };
  return answer(await api.fetchApi(PREFIX + path, { method, headers, body: JSON.stringify(body) }));
}

/**
 * @param {Response} response
 * @returns {Promise<any>}
 */
async function answer(response) {
  if (response.ok) return await response.json();
  const { problem, remedy } = await response.json().catch(() => ({}));
  throw new Error([problem, remedy].filter(Boolean).join(" ") || response.statusText);
}
