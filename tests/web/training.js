// A ComfyUI that trains, for tests of what pages make of it: run folders, the answers about them, and the messages.

/** Numbers from 0 to 1 that depend on the seed alone (mulberry32). */
export function generator(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), 1 | state);
    bits = (bits + Math.imul(bits ^ (bits >>> 7), 61 | bits)) ^ bits;
    return ((bits ^ (bits >>> 14)) >>> 0) / 4294967296;
  };
}

const loss = (run, step) => 1 / step + run.length / 100;
const url = (run, step) => `/dreambooth/runs/${run}/files/previews/${step}.png`;

/** Answers as nodes/host_routes.py does: what stands in the folders when a request comes, after a while. */
export class Server {
  runs = new Map(); // id → folder, in the order of their last change
  live = {}; // facts about the node
  isDown = false;
  asked = []; // what was asked, in order
  #now = 0;
  #delay;

  /** @param {() => number} [random] How long answers take, from 0 to 1. */
  constructor(random = () => 0) {
    this.#delay = random;
  }

  listRuns() {
    const summary = ({ id, name }) => ({ id, name, state: this.#state(id) });
    return this.#answer("runs", () => [...this.runs.values()].reverse().map(summary));
  }

  runDetails(id) {
    return this.#answer(`details ${id}`, () => {
      const { name, previews, steps, end } = this.#folder(id);
      const step = Math.max(0, ...this.#folder(id).lines.map((line) => line.step));
      return { id, name, step, steps, subject: [`${id}/subject`], previews, ...end, state: this.#state(id) };
    });
  }

  runCurve(id, after) {
    return this.#answer(`curve ${id} after ${after}`, () => {
      const lines = this.#folder(id).lines.filter((line) => line.step > after);
      const steps = lines.filter((line) => "loss" in line);
      return {
        steps: steps.map((line) => line.step),
        losses: steps.map((line) => line.loss),
        rates: steps.map(() => 1e-4),
        scores: lines.filter((line) => "scores" in line).map(({ step, scores }) => ({ step, scores })),
      };
    });
  }

  /** What is known of the node after the server was started anew. */
  restart() {
    this.live = {};
  }

  now() {
    this.#now += 1;
    return this.#now;
  }

  #folder(id) {
    const folder = this.runs.get(id);
    if (!folder) throw new Error(`There is no run '${id}'.`);
    return folder;
  }

  #state(id) {
    const isTrained = this.live.run === id && !["done", "stopped", "failed"].includes(this.live.state);
    return isTrained ? "running" : this.#folder(id).end.state;
  }

  async #answer(question, answer) {
    this.asked.push(question);
    await turns(20 * this.#delay());
    if (this.isDown) throw new Error("Failed to fetch");
    const content = structuredClone(answer());
    await turns(20 * this.#delay());
    return content;
  }
}

/** A node that trains, as nodes/host_progress.py reports it: the folder gets everything first, then comes a message. */
export class Trainer {
  step = 0;
  #points = { steps: [], losses: [], rates: [] };

  /**
   * @param {Server} server
   * @param {(message: object) => void} send
   * @param {{ name?: string, id?: string, steps?: number }} [run]
   */
  constructor(server, send, { name = "dog", id = "dog-1", steps = 12 } = {}) {
    Object.assign(this, { server, send, name, id, steps });
    server.live = {};
    this.#send({ state: "starting", name });
  }

  /** Find the run's folder, or make it; what it holds beyond `from` is dropped. */
  open(from = 0) {
    const { id, name, steps, server } = this;
    const folder = server.runs.get(id) ?? { id, name, lines: [], previews: {} };
    server.runs.delete(id);
    folder.lines = folder.lines.filter((line) => line.step <= from);
    server.runs.set(id, Object.assign(folder, { steps, end: { state: "stopped" } }));
    this.step = from;
    this.#send({ run: id, step: from, steps });
  }

  phase(name, done, total) {
    this.#send({ state: name, done, total });
  }

  /** A step, which is told with the next message. */
  learn(value = loss(this.id, this.step + 1)) {
    this.step += 1;
    this.#folder.lines.push({ step: this.step, loss: value });
    this.#points.steps.push(this.step);
    this.#points.losses.push(value);
    this.#points.rates.push(1e-4);
  }

  tell() {
    this.#send({ state: "training", steps: this.steps, rate: 2, seconds_left: 10, memory: 2 ** 30 });
  }

  preview() {
    const pictures = [url(this.id, this.step)];
    const scores = { "CLIP-I": this.step / 100 };
    this.#folder.previews[this.step] = pictures;
    this.#folder.lines.push({ step: this.step, scores });
    this.#send({ state: "preview", preview: { step: this.step, pictures, scores } });
  }

  validate() {
    const scores = { validation_loss: this.step / 10 };
    this.#folder.lines.push({ step: this.step, scores });
    this.#send({ scores: { step: this.step, scores } });
  }

  /** @param {{ state: string, best?: number, problem?: string, remedy?: string }} end */
  end(end) {
    const { best, ...told } = end;
    this.#folder.end = end;
    this.#send(told);
  }

  /** A whole run, from `from` on: everything twice, but for what stands at its ends. */
  *whole(from = 0, end = { state: "done", best: 6 }) {
    yield this.open(from);
    yield this.phase("reading pictures", 1, 2);
    if (!from) yield this.preview();
    while (this.step < this.steps) {
      this.learn();
      if (this.step % 2 === 0) yield this.tell();
      if (this.step % 3 === 0) yield this.validate();
      if (this.step % 6 === 0) yield this.preview();
    }
    yield this.end(end);
  }

  get #folder() {
    return this.server.runs.get(this.id);
  }

  #send(facts) {
    const points = this.#points;
    this.#points = { steps: [], losses: [], rates: [] };
    if (points.steps.length) facts.step = points.steps.at(-1);
    const { preview, scores, ...lasting } = facts;
    this.server.live = { ...this.server.live, ...lasting, node: "1", at: this.server.now() };
    this.send(structuredClone({ ...this.server.live, ...facts, ...(points.steps.length ? { points } : {}) }));
  }
}

/** Let answers come that are under way. */
export async function turns(count = 200) {
  for (let turn = 0; turn < count; turn += 1) await null;
}
