// What a page knows of a run, whatever it saw of it: all of it, its end, or parts in any order.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { failureText, fraction, progressText } from "../../web/lib/progress.js";
import { RunFeed } from "../../web/lib/run_feed.js";
import { generator, Server, Trainer, turns } from "./training.js";

let server;
let page;
let name;

beforeEach(() => {
  server = new Server();
  name = "dog";
  page = openedPage(server);
});

/** A page that keeps what it was told to show. */
function openedPage(of) {
  const words = (feed) => [feed.state, progressText(feed.facts), fraction(feed.facts), failureText(feed.facts)];
  const columns = ({ curve }) =>
    ["steps", "losses", "smooth", "rates"].map((column) => [...curve[column].subarray(0, curve.length)]);
  const pictures = (feed) => [feed.subject, ...feed.previewSteps.map((step) => [step, feed.previews.get(step)])];
  const view = {
    showFacts: () => Object.assign(view, { words: words(feed) }),
    showCurve: () => Object.assign(view, { columns: columns(feed), scores: structuredClone(feed.curve.scores) }),
    showPictures: () => Object.assign(view, { pictures: structuredClone(pictures(feed)) }),
  };
  const feed = new RunFeed(() => name, of, view);
  view.showFacts();
  view.showCurve();
  view.showPictures();
  feed.shown = () => {
    const { words, columns, scores, pictures } = view;
    return { run: feed.run, words, columns, scores, pictures };
  };
  return feed;
}

const receive = (message) => page.receive(message);

/** What a page shows that is opened now. */
async function shownLater(of = server) {
  const later = openedPage(of);
  await later.recover(of.live.node ? of.live : undefined);
  return later.shown();
}

const stepsOf = (feed) => feed.shown().columns[0];

function assertIsWhole(feed, steps) {
  assert.deepEqual(
    stepsOf(feed),
    Array.from({ length: steps }, (_, index) => index + 1),
  );
}

async function train(options = {}, from = 0, end = undefined) {
  for (const _ of new Trainer(server, receive, options).whole(from, end)) await turns();
}

test("a page that sees every message knows all of the run", async () => {
  await train();
  assertIsWhole(page, 12);
  assert.deepEqual(page.previewSteps, [0, 6, 12]);
  assert.equal(page.curve.score("validation_loss", 12), 1.2);
  assert.equal(page.curve.score("CLIP-I", 11), 0.06);
  assert.deepEqual(page.subject, ["dog-1/subject"]);
  assert.equal(page.state, "done");
  assert.equal(progressText(page.facts), "step 12 of 12 · best: step 6");
  assert.deepEqual(page.shown(), await shownLater());
});

test("it asks for the folder when the run begins and when it ends", async () => {
  await train();
  const once = ["details dog-1", "curve dog-1 after -1"];
  assert.deepEqual(server.asked, [...once, "details dog-1", "curve dog-1 after 11"]);
});

test("a page that is opened at any moment knows as much", async () => {
  for (let moment = 0; moment < 20; moment += 1) {
    server = new Server();
    page = null;
    let event = 0;
    const trainer = new Trainer(server, (message) => page?.receive(message));
    for (const _ of trainer.whole()) {
      if (event === moment) {
        page = openedPage(server);
        await page.recover(server.live);
        assert.equal(page.state, server.live.state);
      }
      event += 1;
      await turns();
    }
    page ??= openedPage(server);
    await page.recover(server.live);
    assert.deepEqual(page.shown(), await shownLater());
    assertIsWhole(page, 12);
  }
});

test("a page that is opened after ComfyUI was started anew shows the newest run of the node's name", async () => {
  await train({ id: "dog-1" });
  await train({ id: "dog-2" });
  await train({ id: "cat-1", name: "cat" });
  server.restart();
  const later = openedPage(server);
  await later.recover(undefined);
  assert.equal(later.run, "dog-2");
  assertIsWhole(later, 12);
  assert.equal(later.state, "done");
});

test("what was missed while the connection was lost is fetched", async () => {
  for (let from = 0; from < 16; from += 1) {
    for (const length of [1, 2, 5, 20]) {
      server = new Server();
      page = openedPage(server);
      let event = 0;
      const isLost = () => event >= from && event < from + length;
      const trainer = new Trainer(server, (message) => isLost() || page.receive(message));
      for (const _ of trainer.whole()) {
        event += 1;
        if (event === from + length) page.recover(server.live); // "reconnected"
        await turns();
      }
      await page.recover(server.live);
      assert.deepEqual(page.shown(), await shownLater(), `lost from ${from}, ${length} messages`);
    }
  }
});

test("messages that come twice, or in another order, change nothing", async () => {
  await train();
  const before = page.shown();
  for (const seed of [1, 2, 3, 4, 5, 6, 7, 8]) {
    const random = generator(seed);
    server = new Server(random);
    page = openedPage(server);
    const messages = [];
    for (const _ of new Trainer(server, (message) => messages.push(message)).whole());
    const shuffled = [...messages, ...messages].map((message) => [random(), message]).sort((a, b) => a[0] - b[0]);
    for (const [, message] of shuffled) {
      page.receive(message);
      await turns(10 * random());
    }
    await turns(1000);
    assert.deepEqual(page.shown(), before, `seed ${seed}`);
  }
});

test("an older message does not take back the state", async () => {
  await train();
  page.receive({ node: "1", name: "dog", run: "dog-1", state: "training", at: 1, step: 2, steps: 12 });
  page.receive({ node: "1", name: "dog", run: "dog-0", state: "training", at: 1, step: 2, steps: 12 });
  assert.deepEqual([page.state, page.run], ["done", "dog-1"]);
});

test("nothing of a run stays when another takes its place", async () => {
  await train({ id: "dog-1", steps: 12 });
  const second = new Trainer(server, receive, { id: "dog-2", steps: 4 });
  assert.equal(page.state, "starting");
  assert.equal(progressText(page.facts), "");
  second.open();
  const { columns, scores, pictures } = page.shown(); // before anything is answered
  assert.deepEqual([columns[0], scores, pictures], [[], [], [[]]]);
  await turns();
  assert.equal(progressText(page.facts), "step 0 of 4");
  second.learn();
  second.tell();
  second.end({ state: "stopped" });
  await turns();
  assertIsWhole(page, 1);
  assert.deepEqual(page.subject, ["dog-2/subject"]);
  assert.equal(progressText(page.facts), "step 1 of 4");
});

test("answers about the run before are dropped, however late they come", async () => {
  await train({ id: "dog-1", steps: 12 });
  server = new Server(() => 1);
  page = openedPage(server);
  const first = new Trainer(server, receive, { id: "dog-1" });
  first.open();
  first.step = 8;
  first.learn();
  first.tell(); // steps before are missing
  const second = new Trainer(server, receive, { id: "dog-2" });
  second.open();
  server.runs.delete("dog-1"); // the first request fails
  for (let step = 0; step < 12; step += 1) second.learn();
  second.tell();
  const third = new Trainer(server, receive, { id: "dog-1", steps: 6 });
  for (const _ of third.whole());
  await turns(1000);
  assertIsWhole(page, 6);
  assert.equal(page.run, "dog-1");
  assert.deepEqual(page.shown(), await shownLater());
});

test("a run whose first request fails is read when the next one is told", async () => {
  const second = new Trainer(server, receive, { id: "dog-2" });
  server.isDown = true;
  second.open();
  await turns();
  assert.deepEqual(page.subject, []);
  server.isDown = false;
  second.learn();
  second.tell();
  await turns();
  assert.deepEqual(page.subject, ["dog-2/subject"]);
});

test("a run that goes on is one curve", async () => {
  await train({ steps: 5 }, 0, { state: "stopped" });
  assert.equal(page.state, "stopped");
  for (const opened of [page, openedPage(server)]) {
    page = opened;
    await page.recover(server.live);
    const before = page.curve.length;
    await train({ steps: before + 3 }, before, { state: "done", best: 2 });
    assertIsWhole(page, before + 3);
    assert.equal(progressText(page.facts), `step ${before + 3} of ${before + 3} · best: step 2`);
    assert.deepEqual(page.shown(), await shownLater());
  }
});

test("a run that goes on after a checkpoint behind its last step does not show steps twice", async () => {
  const first = new Trainer(server, receive, { steps: 12 });
  first.open();
  for (let step = 0; step < 8; step += 1) first.learn();
  first.tell();
  server.restart(); // killed; the last checkpoint is that of step 5
  await page.recover(undefined);
  assert.deepEqual([page.state, progressText(page.facts)], ["stopped", "step 8 of 12"]);
  const second = new Trainer(server, receive, { steps: 12 });
  const events = second.whole(5);
  events.next(); // the run is open
  assertIsWhole(page, 5);
  for (const _ of events) await turns();
  assertIsWhole(page, 12);
  assert.deepEqual(page.shown(), await shownLater());
});

test("so does one whose beginning was missed", async () => {
  await train({ steps: 12 });
  const second = new Trainer(server, () => {}, { steps: 12 });
  second.open(5);
  second.learn(8);
  second.learn(9);
  second.send = receive;
  second.tell();
  assertIsWhole(page, 7);
  assert.deepEqual(page.shown().columns[1].slice(5), [8, 9]);
});

test("a single step that was missed is fetched", async () => {
  const trainer = new Trainer(server, receive);
  trainer.open();
  await turns();
  for (const send of [receive, () => {}, receive]) {
    trainer.learn();
    trainer.send = send;
    trainer.tell();
  }
  assertIsWhole(page, 1);
  await turns();
  assertIsWhole(page, 3);
});

test("pictures and scores are shown when they are told", async () => {
  const trainer = new Trainer(server, receive);
  trainer.open();
  await turns();
  trainer.learn();
  trainer.preview();
  trainer.validate();
  const { scores, pictures } = page.shown();
  assert.deepEqual(scores, [{ step: 1, scores: { "CLIP-I": 0.01, validation_loss: 0.1 } }]);
  assert.deepEqual(pictures.slice(1), [[1, ["/dreambooth/runs/dog-1/files/previews/1.png"]]]);
  assertIsWhole(page, 1);
});

test("two runs that ended unseen are not mixed up", async () => {
  await train({ id: "dog-1", steps: 4 });
  for (const _ of new Trainer(server, () => {}, { id: "dog-2", steps: 2 }).whole());
  page.receive(server.live);
  await turns();
  assert.equal(page.run, "dog-2");
  assert.deepEqual(page.shown(), await shownLater());
});

test("what is shown stays while the server does not answer", async () => {
  await train();
  server.isDown = true;
  server.restart();
  const before = page.shown();
  await page.recover(undefined);
  assert.deepEqual(page.shown(), before);
});

test("a message that comes before the list of runs counts", async () => {
  await train({ id: "dog-1" });
  server = new Server(() => 1);
  page = openedPage(server);
  const recovered = page.recover(undefined);
  const second = new Trainer(server, receive, { id: "dog-2" });
  await recovered;
  assert.deepEqual([page.run, page.state], [null, "starting"]);
  const again = page.recover(undefined);
  second.open();
  server.runs.set("dog-3", { ...server.runs.get("dog-2"), id: "dog-3" });
  await again;
  assert.equal(page.run, "dog-2");
});

test("a run that ended while nobody could tell is not shown as training", async () => {
  const trainer = new Trainer(server, receive);
  trainer.open();
  trainer.learn();
  trainer.tell();
  await turns();
  assert.equal(page.state, "training");
  server.restart();
  await page.recover(undefined);
  assert.equal(page.state, "stopped");
  assert.ok(!page.isBusy);
});

test("a node that waited for a run when ComfyUI was started anew is idle", async () => {
  new Trainer(server, receive);
  assert.equal(page.state, "starting");
  server.restart();
  await page.recover(undefined);
  assert.equal(page.state, "idle");
});

test("steps whose loss is no number are passed over", async () => {
  const trainer = new Trainer(server, receive);
  trainer.open();
  await turns();
  for (const value of [1, null, 3]) {
    trainer.learn(value);
    trainer.tell();
  }
  await turns();
  assert.deepEqual([...page.curve.losses.subarray(0, page.curve.length)], [1, 3]);
  assert.equal(server.asked.length, 2); // nothing is missing
});

test("points that the folder lacks are taken from messages", async () => {
  const trainer = new Trainer(server, receive);
  trainer.open();
  await turns();
  for (let step = 0; step < 4; step += 1) trainer.learn();
  server.runs.get("dog-1").lines = []; // the metrics file was removed
  trainer.step = 8;
  trainer.tell();
  page.receive({ ...server.live, at: 99, points: { steps: [9, 10], losses: [1, 1], rates: [0, 0] } });
  await turns();
  assert.deepEqual([...page.curve.steps.subarray(0, page.curve.length)], [1, 2, 3, 4, 9, 10]);
});

test("another name is another run, or none", async () => {
  await train({ id: "dog-1" });
  await train({ id: "cat-1", name: "cat" });
  name = "cat";
  const renamed = page.rename();
  assert.deepEqual([page.run, ...page.shown().words], [null, "idle", "", 0, ""]);
  await renamed;
  assert.equal(page.run, "cat-1");
  assertIsWhole(page, 12);
  name = "bird";
  await page.rename();
  assert.deepEqual([page.run, page.state, page.curve.length], [null, "idle", 0]);
  name = "dog";
  await page.rename();
  assert.equal(page.run, "dog-1");
  const asked = server.asked.length;
  await page.rename();
  assert.equal(server.asked.length, asked);
});

test("messages of a run with another name are those of another graph's node", async () => {
  await train({ id: "cat-1", name: "cat" });
  assert.deepEqual([page.run, page.state], [null, "idle"]);
});

test("a failed run says why, and one that could not begin, too", async () => {
  await train({}, 0, { state: "failed", problem: "The loss is NaN.", remedy: "Lower learning_rate." });
  assert.equal(failureText(page.facts), "Lower learning_rate.\nThe loss is NaN.");
  page.fail("Lower learning_rate.\n\nThe loss is NaN."); // ComfyUI says it, too
  assert.equal(failureText(page.facts), "Lower learning_rate.\nThe loss is NaN.");
  page.queue();
  page.fail("No CLIP.");
  assert.deepEqual([page.shown().words[0], page.shown().words[3]], ["failed", "No CLIP."]);
  await train({ id: "dog-2" });
  assert.equal(page.shown().words[3], "");
  server.restart();
  const later = openedPage(server);
  await later.recover(undefined);
  later.fail("No VAE."); // another page queued it
  assert.equal(later.shown().words[3], "No VAE.");
});

test("a node that waited in vain shows again what it did before", async () => {
  await train({}, 0, { state: "stopped" });
  const state = () => page.shown().words[0];
  page.queue();
  assert.equal(state(), "waiting");
  page.leaveQueue();
  page.leaveQueue(true);
  assert.equal(state(), "stopped");
  page.queue();
  page.leaveQueue(true); // its result was known
  assert.equal(state(), "done");
  page.queue();
  new Trainer(server, receive);
  assert.equal(state(), "starting");
});

test("a node at work does not wait", async () => {
  const trainer = new Trainer(server, receive);
  for (const work of [() => trainer.open(), () => trainer.phase("encoding pictures", 1, 2), () => trainer.tell()]) {
    work();
    page.queue();
    assert.notEqual(page.state, "waiting");
  }
  name = "cat"; // of another run
  await page.rename();
  page.queue();
  assert.equal(page.state, "waiting");
});

test("a panel that is gone asks nothing more", async () => {
  server = new Server(() => 1);
  page = openedPage(server);
  const trainer = new Trainer(server, receive);
  trainer.open();
  trainer.end({ state: "done" }); // there is more to ask when the first answer comes
  const asked = server.asked.length;
  page.dispose();
  await turns(1000);
  assert.equal(server.asked.length, asked);
  assert.equal(page.subject.length, 0);
});

test("whatever happens, in the end a page shows what one shows that is opened then", async () => {
  for (let seed = 0; seed < 150; seed += 1) {
    const random = generator(seed);
    const chance = (probability) => random() < probability;
    server = new Server(random);
    page = openedPage(server);
    let isConnected = true;
    const send = (message) => {
      if (isConnected) page.receive(message);
      if (isConnected && chance(0.1)) page.receive(message);
    };
    const steps = { "dog-1": 0, "dog-2": 0 };
    for (let execution = 0; execution < 4; execution += 1) {
      const id = chance(0.5) ? "dog-1" : "dog-2";
      const trainer = new Trainer(server, send, { id, steps: steps[id] + Math.ceil(8 * random()) });
      for (const _ of trainer.whole(steps[id], { state: "done", best: 1 })) {
        if (chance(0.15)) {
          if (!isConnected) page.recover(server.live);
          isConnected = !isConnected;
        }
        server.isDown = !isConnected;
        if (chance(0.2)) page.queue();
        await turns(30 * random());
        if (isConnected && chance(0.05)) break; // cut off without a word
      }
      steps[id] = Math.floor(trainer.step * random() ** 0.2); // of the newest checkpoint
      if (chance(0.2)) server.restart();
    }
    server.isDown = false;
    page.leaveQueue();
    await page.recover(server.live.node ? server.live : undefined);
    assert.deepEqual(page.shown(), await shownLater(), `seed ${seed}`);
  }
});

test("a run of which one request failed is read whole with the next message", async () => {
  for (const failing of ["runDetails", "runCurve"]) {
    server = new Server();
    await train({}, 0);
    const answer = server[failing];
    server[failing] = () => Promise.reject(new Error("no answer"));
    page = openedPage(server);
    await page.recover(server.live);
    server[failing] = answer;
    page.receive({ ...server.live, state: "training", at: server.live.at + 1 });
    server.live = { ...server.live, state: "training" };
    await turns();
    assert.deepEqual(page.shown(), await shownLater(), failing);
  }
});

test("sample pictures that the run's folder has no longer are not shown", async () => {
  await train();
  page.previews.set(10_000, ["/gone.png"]);
  await page.recover(server.live);
  assert.deepEqual(page.shown(), await shownLater());
});
