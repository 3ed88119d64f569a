"""Measures the pages inside a real ComfyUI with a real browser; see CONTRIBUTING.md for both.

    python benchmarks/face.py [--steps 60] [--rounds 3] [--out benchmarks/results]

Reported:
    chart      frame of ten thousand steps: the time that drawing takes in the page (median and slowest of 60 frames,
               the pointer moving), and the memory of the curve's numbers
    messages   from the server to a page, per second, while a small model trains as fast as it can
    slower     seconds of a training with a listening page over those without one, in turns; the page listens on a bare
               websocket, since a browser that draws without a graphics card takes the processor from the training
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]
sys.dont_write_bytecode = True

from browser import opened_page  # noqa: E402
from checkpoints import sd15_checkpoint  # noqa: E402
from comfy_host import ComfyServer  # noqa: E402

CHECKPOINT = "slim.safetensors"
_CHART = """
async () => {
  const { Chart } = await import("/extensions/dreambooth-lora/lib/chart.js");
  const { Curve } = await import("/extensions/dreambooth-lora/lib/curve.js");
  const curve = new Curve("run"), chart = new Chart([curve]);
  const place = { position: "fixed", left: 0, top: 0, width: "600px", height: "300px", zIndex: 9 };
  Object.assign(chart.element.style, place);
  document.body.append(chart.element, chart.legend);
  const steps = Array.from({ length: 10000 }, (_, step) => step + 1);
  const score = (_, at) => ({ step: 100 * at, scores: { "CLIP-I": Math.random(), "CLIP-T": 0.3 } });
  const losses = steps.map((step) => 0.1 + Math.random() / step), rates = steps.map(() => 1e-4);
  curve.append({ steps, losses, rates, scores: Array.from({ length: 100 }, score) });
  chart.draw(); // the first one compiles
  const times = [];
  for (let frame = 0; frame < 60; frame += 1) {
    chart.pointer = frame / 60;
    const began = performance.now();
    chart.draw();
    chart.canvas.getContext("2d").getImageData(0, 0, 1, 1); // waits until it is drawn
    times.push(performance.now() - began);
  }
  times.sort((a, b) => a - b);
  const bytes = ["steps", "losses", "smooth", "rates"].reduce((sum, name) => sum + curve[name].byteLength, 0);
  return { frame_ms: times[30], slowest_ms: times[59], megabytes: (bytes + 200 * 100) / 1e6 };
}
"""


def graph(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Load Checkpoint → Subject → Train LoRA."""
    values = {"name": name, "steps": steps, "learning_rate": 1e-4, "text_encoder_lr": 0.0, "adapter": "lora", "rank": 4}
    values |= {"targets": "attention", "resolution": 64, "seed": seed, "base_lora_strength": 1.0, "preview_every": 0}
    sources = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "subject": ["subject", 0]}
    words = {"folder": "dog", "token": "sks", "class_noun": "dog", "caption": "a {token} {class}"}
    return {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "subject": {"class_type": "DreamBoothSubject", "inputs": words},
        "train": {"class_type": "DreamBoothTrainLora", "inputs": sources | values},
    }


class Page:
    """Listens as a page does, without drawing."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("http", "ws") + "/ws?clientId=bench"
        self._open = True
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Page:
        self._thread.start()
        time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join(timeout=5)

    def _listen(self) -> None:
        from websockets.sync.client import connect

        with connect(self._url, max_size=None, proxy=None) as socket:
            while self._open:
                try:
                    socket.recv(timeout=0.2)
                except TimeoutError:
                    continue
                self.times.append(time.monotonic())

    def most_in_a_second(self) -> int:
        """The most messages in any second."""
        return max((sum(0 <= moment - start < 1 for moment in self.times) for start in self.times), default=0)


def trained_seconds(server: ComfyServer, name: str, steps: int) -> float:
    """Seconds from the first reported step to the last, by the run's own record."""
    server.wait(server.queue(graph(name, steps, seed=0)), timeout=1200)
    [run] = (server.base_dir / "output" / "dreambooth" / "runs").glob(f"{name}-*")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = [line["rate"] for line in lines if "rate" in line]
    shutil.rmtree(run)
    return steps / statistics.median(rates[len(rates) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base_dir = Path(scratch)
        sd15_checkpoint(base_dir / "models" / "checkpoints" / CHECKPOINT)
        shutil.copytree(ROOT / "demo" / "subject", base_dir / "input" / "dog")
        with ComfyServer(base_dir, pack=ROOT, pack_name="dreambooth-lora") as server:
            with opened_page(server.url) as page:
                facts: dict[str, Any] = {"chart": page.evaluate(_CHART)}
            trained_seconds(server, "warm-up", 10)
            pairs = []
            most_messages = 0
            for number in range(arguments.rounds):
                alone = trained_seconds(server, f"alone-{number}", arguments.steps)
                with Page(server.url) as listening:
                    watched = trained_seconds(server, f"watched-{number}", arguments.steps)
                pairs.append((watched, alone))
                most_messages = max(most_messages, listening.most_in_a_second())
            facts["most messages in a second"] = most_messages
            facts["seconds"] = pairs
            facts["slower"] = statistics.median(watched / alone for watched, alone in pairs)
    print(json.dumps(facts, indent=1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "face.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
