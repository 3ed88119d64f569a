// @ts-check
// What a page knows of the run of a node: messages as they come, and what it missed from the run's folder. A page that
// was opened late, or lost its connection, ends up knowing what one knows that saw everything.

import { Curve } from "./curve.js";
import { ENDED } from "./progress.js";

/** @import { Facts } from "./progress.js" */
/** @import { NodeFacts, Novelties, Points, Preview, RunDetails, RunSummary } from "../types/answers.js" */

/**
 * @typedef {object} Server
 * @property {() => Promise<RunSummary[]>} listRuns The newest first.
 * @property {(run: string) => Promise<RunDetails>} runDetails
 * @property {(run: string, after: number) => Promise<Points>} runCurve
 */

/**
 * Who shows it.
 * @typedef {object} View
 * @property {() => void} showFacts
 * @property {() => void} showCurve
 * @property {() => void} showPictures
 */

export class RunFeed {
  /** Id of the run that is shown. @type {string | null} */
  run = null;
  /** @type {Facts} */
  facts = {};
  /** Whether the node is in the queue. */
  waiting = false;
  curve = new Curve("loss");
  /** Step → URLs of its sample pictures. @type {Map<number, string[]>} */
  previews = new Map();
  /** URLs of the subject's pictures. @type {string[]} */
  subject = [];
  /** Of the sample pictures; empty while they are not known. @type {string[]} */
  prompts = [];

  #runName;
  #server;
  #view;
  #isLive = false; // whether the facts are those of the newest message; else they are the folder's
  #messages = 0; // how many came, but for old ones
  #generation = 0; // how often another run was begun: answers about one before are dropped
  #isComplete = true; // whether the run's folder was read, and no message was missed since
  #isBehind = false; // whether it is to be read again
  /** @type {Promise<void> | null} */
  #catchingUp = null;
  /** Points after some that were missed. @type {Partial<Points>[]} */
  #early = [];

  /**
   * @param {() => string | undefined} runName The name that the node's runs have.
   * @param {Server} server
   * @param {View} view
   */
  constructor(runName, server, view) {
    this.#runName = runName;
    this.#server = server;
    this.#view = view;
  }

  /** What the node does; "idle" if there is nothing to show. */
  get state() {
    return this.waiting ? "waiting" : (this.facts.state ?? "idle");
  }

  /** Whether the node is at work, as far as messages say. */
  get isBusy() {
    return this.#isLive && !ENDED.includes(this.facts.state ?? "idle");
  }

  /** Steps with sample pictures, ascending. */
  get previewSteps() {
    return [...this.previews.keys()].sort((a, b) => a - b);
  }

  /**
   * Take in a message: all that is known of the node, and what is new. Those of a node of another graph are left out, which
   * may have had the same id.
   * @param {NodeFacts & Novelties} message
   */
  receive({ points, preview, scores, ...facts }) {
    if (facts.name !== this.#runName()) return;
    const isOld = facts.at <= (this.facts.at ?? 0); // or came already
    const isOther = facts.run !== undefined && facts.run !== this.run;
    if (isOld && isOther) return;
    if (isOther) this.#begin(facts.run ?? null);
    if (!isOld) this.#show(facts);
    if (!isOld && facts.run !== undefined) this.#cutTo(points?.steps, facts.step ?? 0);
    if (points) this.#addPoints(points);
    if (preview) this.#addPreview(preview);
    if (scores) this.curve.append({ scores: [scores] });
    this.#view.showCurve();
    if (!isOld && (!this.#isComplete || !this.isBusy)) this.#catchUp();
  }

  /**
   * Show the node's run after a reload, a lost connection or a restart of ComfyUI.
   * @param {NodeFacts | undefined} live What the server knows of the node.
   */
  async recover(live) {
    const name = this.#runName();
    this.#isComplete = false;
    if (live && live.name === name) {
      this.receive(live);
      await this.#catchUp();
    } else await this.#showNewest(name); // ComfyUI was started anew
  }

  /** The node's runs may have another name now. */
  async rename() {
    const name = this.#runName();
    if (this.facts.name !== name) await this.#showNewest(name);
  }

  /** The node was put into the queue, unless it is at work already. */
  queue() {
    if (this.isBusy) return;
    this.waiting = true;
    this.#view.showFacts();
  }

  /** The node left the queue; `finished`: its result was known already. */
  leaveQueue(finished = false) {
    if (!this.waiting) return;
    this.waiting = false;
    if (finished && this.run !== null) this.facts = { ...this.facts, state: "done" };
    this.#view.showFacts();
  }

  /**
   * ComfyUI itself says that the node failed, perhaps before it was at work.
   * @param {string} problem
   */
  fail(problem) {
    const isKnown = this.#isLive && !this.isBusy;
    if (isKnown && !this.waiting) return;
    this.waiting = false;
    this.facts = { ...this.facts, state: "failed", problem, remedy: "" };
    this.#view.showFacts();
  }

  /** Show nothing more: answers that are still under way are dropped. */
  dispose() {
    this.#generation += 1;
    this.run = null;
  }

  /**
   * Show the newest run of that name; nothing if there is none.
   * @param {string | undefined} name
   */
  async #showNewest(name) {
    if (this.facts.name !== name) this.#begin(null);
    this.#isLive = false;
    const generation = this.#generation;
    const runs = await this.#server.listRuns().catch(() => null);
    if (!runs || generation !== this.#generation || this.#isLive) return; // a message came first
    const newest = runs.find((run) => run.name === name)?.id ?? null;
    if (newest === null || newest !== this.run) this.#begin(newest);
    await this.#catchUp();
  }

  /**
   * Forget one run and begin to show another.
   * @param {string | null} run
   */
  #begin(run) {
    this.#generation += 1;
    this.run = run;
    this.facts = {};
    this.#isLive = false;
    this.#isComplete = false;
    this.#early = [];
    this.curve.clear();
    this.previews.clear();
    this.subject = [];
    this.prompts = [];
    this.#view.showCurve();
    this.#view.showPictures();
    this.#view.showFacts();
  }

  /** @param {NodeFacts} facts */
  #show(facts) {
    this.#messages += 1;
    this.facts = facts;
    this.#isLive = true;
    this.waiting = false;
    this.#view.showFacts();
  }

  /**
   * A run may go on after a checkpoint that lies behind the last step that was shown.
   * @param {number[] | undefined} news Steps of the newest message.
   * @param {number} step Where the run is.
   */
  #cutTo(news, step) {
    if (step < this.curve.lastStep) this.curve.cut(news?.[0] ? news[0] - 1 : step);
  }

  /** @param {Omit<Points, "scores">} points */
  #addPoints(points) {
    const [first] = points.steps;
    if (first === undefined) return;
    if (first <= Math.max(0, this.curve.lastStep) + 1) this.curve.append(points);
    else {
      this.#early.push(points); // messages were missed
      this.#catchUp();
    }
  }

  /** @param {Preview} preview */
  #addPreview({ step, pictures, scores = {} }) {
    this.previews.set(step, pictures);
    if (Object.keys(scores).length) this.curve.append({ scores: [{ step, scores }] });
    this.#view.showPictures();
  }

  /** Read from the run's folder what is not known; once more if something was missed meanwhile. */
  async #catchUp() {
    if (this.run === null) return;
    this.#isBehind = true;
    this.#catchingUp ??= this.#readWhileBehind();
    await this.#catchingUp;
  }

  async #readWhileBehind() {
    try {
      while (this.#isBehind && this.run !== null) {
        this.#isBehind = false;
        await this.#read(this.run);
      }
    } finally {
      this.#catchingUp = null;
    }
  }

  /** @param {string} run */
  async #read(run) {
    const generation = this.#generation;
    const messages = this.#messages;
    const early = this.#early; // the folder has what came before these
    const after = this.#isComplete ? this.curve.lastStep - 1 : -1; // that step may have got its scores meanwhile
    this.#early = [];
    this.#isComplete = true;
    const [details, points] = await Promise.all([
      this.#server.runDetails(run).catch(() => null),
      this.#server.runCurve(run, after).catch(() => null),
    ]);
    if (generation !== this.#generation) return;
    if (!details || !points) this.#isComplete = false;
    const isNewest = messages === this.#messages;
    if (points) {
      if (isNewest && after < 0) this.curve.clear();
      for (const added of [points, ...early]) this.curve.append(added);
      this.#view.showCurve();
    }
    if (!details) return;
    this.subject = details.subject;
    this.prompts = promptsOf(details.settings);
    if (isNewest) this.previews.clear();
    for (const [step, pictures] of Object.entries(details.previews)) this.previews.set(Number(step), pictures);
    this.#view.showPictures();
    if (isNewest) this.#takeFacts(details);
  }

  /**
   * Take over what a run's folder says, unless messages say it better.
   * @param {RunDetails} details Newer than the newest message.
   */
  #takeFacts({ state, name, step, steps, best, problem, remedy }) {
    const facts = { state, name, step, steps, best, problem, remedy };
    if (!this.#isLive) this.facts = facts;
    else if (this.facts.run !== this.run || state === "running") return;
    else this.facts = this.isBusy ? { ...this.facts, ...facts } : { ...facts, ...this.facts };
    this.#view.showFacts();
  }
}

/**
 * The prompts of a run's sample pictures; none if it has none of its own.
 * @param {Record<string, unknown>} [settings]
 */
export function promptsOf(settings) {
  const text = settings?.preview_prompts;
  return typeof text === "string" && text ? text.split("|").map((prompt) => prompt.trim()) : [];
}
