"""The pack's pages in a real browser on a real ComfyUI, in both of its node renderers."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import find_browser, load, opened_page
from checkpoints import sd15_checkpoint
from comfy_graphs import CHECKPOINT
from comfy_host import ComfyServer, find_comfyui
from helpers import DEMO, ROOT

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI"),
    pytest.mark.skipif(find_browser() is None, reason="no browser: install Chromium and playwright"),
]
SHOTS = os.environ.get("SCREENSHOTS")  # a folder, to look at what the test saw
PANEL = """
() => {
  const element = document.querySelector(".dreambooth-training");
  return {
    state: element?.querySelector(".dreambooth-state").dataset.state,
    text: element?.querySelector(".dreambooth-head").textContent,
    legend: element?.querySelector(".dreambooth-legend").textContent,
    samples: [...(element?.querySelectorAll(".samples img") ?? [])].filter((one) => one.naturalWidth).length,
    subject: [...(element?.querySelectorAll(".subject img") ?? [])].filter((one) => one.naturalWidth).length,
    steps: Number(element?.querySelector("input[type=range]").max) + 1,
  };
}
"""
SMALL = {"resolution": 64, "width": 64, "height": 64, "rank": 4, "batch_size": 1, "targets": "attention"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI with the slim checkpoint and the demo's subject."""
    base_dir = tmp_path_factory.mktemp("comfy page ü")
    checkpoint = sd15_checkpoint(base_dir / "models" / "checkpoints" / CHECKPOINT)
    shutil.copytree(DEMO / "subject", base_dir / "input" / "dog")
    with ComfyServer(base_dir, pack=ROOT, pack_name="dreambooth-lora") as running:
        yield running
    checkpoint.unlink()


def open_template(page: Any, name: str, changes: dict[str, Any]) -> None:
    """Open a template as the browser would, and set widgets by name."""
    graph = (ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")
    page.evaluate("async (text) => { await window.app.loadGraphData(JSON.parse(text)); }", graph)
    page.wait_for_timeout(500)
    set_widgets(page, changes)


def set_widgets(page: Any, changes: dict[str, Any]) -> None:
    """Set widgets by name, on every node that has one."""
    page.evaluate(
        """(changes) => {
          for (const node of window.app.graph.nodes)
            for (const widget of node.widgets ?? [])
              if (widget.name in changes) { widget.value = changes[widget.name]; widget.callback?.(widget.value); }
        }""",
        changes,
    )


def show_node(page: Any, kind: str) -> None:
    """Bring a node into the middle, large enough to read."""
    page.evaluate(
        """(kind) => {
          const node = window.app.graph.nodes.find((one) => one.type === kind), canvas = window.app.canvas;
          const area = canvas.canvas.getBoundingClientRect();
          const scale = Math.min(1.1, (0.9 * area.height) / (node.size[1] + 40));
          canvas.ds.scale = scale;
          canvas.ds.offset = [area.width / 2 / scale - node.pos[0] - node.size[0] / 2, 50 / scale - node.pos[1] + 20];
          canvas.setDirty(true, true);
        }""",
        kind,
    )
    page.wait_for_timeout(400)


def shot(page: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def wait_for(page: Any, state: str, timeout: float = 120) -> None:
    page.wait_for_function(
        "(state) => document.querySelector('.dreambooth-training .dreambooth-state')?.dataset.state === state",
        arg=state,
        timeout=1000 * timeout,
    )


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_training_is_watched_reloaded_cancelled_and_resumed(renderer: str, server: ComfyServer) -> None:
    changes = SMALL | {"name": f"dog-{renderer}", "preview_every": 8, "steps": 1000, "seed": int(renderer == "vue")}
    with opened_page(server.url, vue=renderer == "vue") as page:
        open_template(page, "train_then_generate", changes)
        show_node(page, "DreamBoothTrainLora")
        assert page.evaluate(PANEL)["state"] == "idle"
        shot(page, f"{renderer}-1-waiting")
        page.get_by_role("button", name="Run", exact=True).first.click()
        wait_for(page, "training")
        page.wait_for_function("() => document.querySelector('.dreambooth-training input').max >= 1", timeout=120_000)
        seen = page.evaluate(PANEL)
        assert "step" in seen["text"]
        assert "loss" in seen["legend"]
        assert seen["subject"] == 5
        shot(page, f"{renderer}-2-training")
        load(page, server.url)  # in the middle
        show_node(page, "DreamBoothTrainLora")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.dreambooth-training .samples img')].some((one) => one.naturalWidth)"
        )
        wait_for(page, "training")
        assert "loss" in page.evaluate(PANEL)["legend"]
        shot(page, f"{renderer}-3-reloaded")
        server.interrupt()
        wait_for(page, "stopped")
        shot(page, f"{renderer}-4-stopped")
        [done] = re.findall(r"step (\d+) of 1000", page.evaluate(PANEL)["text"])
        last = 8 * (int(done) // 8 + 1)
        set_widgets(page, {"steps": last})
        page.get_by_role("button", name="Run", exact=True).first.click()
        wait_for(page, "done", 240)
        page.wait_for_function(
            "(words) => document.querySelector('.dreambooth-training .dreambooth-legend').textContent.includes(words)",
            arg=f"step {last} · loss",  # no point of the curve was missed
        )
        end = page.evaluate(PANEL)
        shot(page, f"{renderer}-5-done")
        assert f"step {last} of {last}" in end["text"]
        assert end["steps"] == 1 + last // 8  # the base, and every eighth step
    server.interrupt()  # nobody looks at what is drawn afterwards
    assert server.log().count(f"Going on after step {done}") >= 1


def test_a_node_inside_a_subgraph_is_watched(server: ComfyServer) -> None:
    with opened_page(server.url) as page:
        open_template(
            page, "train_then_generate", SMALL | {"name": "inside", "preview_every": 2, "steps": 2, "seed": 2}
        )
        page.evaluate(
            """() => {
              const graph = window.app.graph;
              const node = graph.nodes.find((one) => one.type === "DreamBoothTrainLora");
              const made = graph.convertToSubgraph(new Set([node]));
              window.app.canvas.setGraph(made.subgraph);
            }"""
        )
        page.wait_for_timeout(500)
        page.evaluate("window.app.queuePrompt(0, 1)")
        wait_for(page, "done")
        assert "step 2 of 2" in page.evaluate("document.querySelector('.dreambooth-training').textContent")
        shot(page, "subgraph")
    server.interrupt()


def test_a_failed_run_says_what_to_do(server: ComfyServer) -> None:
    with opened_page(server.url) as page:
        open_template(page, "train_then_generate", SMALL | {"name": "failed", "steps": 2, "rank": 1000})
        show_node(page, "DreamBoothTrainLora")
        page.evaluate("window.app.queuePrompt(0, 1)")
        wait_for(page, "failed")
        error = page.evaluate("document.querySelector('.dreambooth-training .dreambooth-error').textContent")
        assert error.startswith("Set the rank")
        shot(page, "failed")


def test_runs_are_listed_compared_opened_and_deleted(server: ComfyServer) -> None:
    """Goes on from the runs of the tests before."""
    runs = server.base_dir / "output" / "dreambooth" / "runs"
    there = {path.name for path in runs.iterdir()}
    assert len(there) >= 2
    with opened_page(server.url) as page:
        page.get_by_role("button", name="DreamBooth runs").first.click()
        page.wait_for_selector(".dreambooth-run")
        assert page.locator(".dreambooth-run").count() == len(there)
        for tick in page.locator(".dreambooth-run input").all():
            tick.check()
        page.wait_for_timeout(300)
        page.locator(".dreambooth-run b", has_text="dog-classic").click()
        page.wait_for_selector(".dreambooth-details .actions")
        shot(page, "runs")
        page.get_by_role("button", name="Load graph").click()
        page.wait_for_function("window.app.graph.nodes.some((one) => one.type === 'DreamBoothTrainLora')")
        page.locator("summary", has_text="Checkpoints").click()
        page.get_by_role("button", name="Use", exact=True).first.click()
        page.wait_for_timeout(500)
        used = [path.name for path in (server.base_dir / "models" / "loras").glob("dog-classic-0*.safetensors")]
        assert used
        page.get_by_role("button", name="Delete…").click()
        page.locator("button", has_text=re.compile(r"^\s*Delete\s*$")).last.click()
        page.wait_for_function(f"document.querySelectorAll('.dreambooth-run').length === {len(there) - 1}")
    gone = there - {path.name for path in runs.iterdir()}
    assert [name.startswith("dog-classic-") for name in gone] == [True]


def test_pictures_are_shown_dropped_and_warned_of(server: ComfyServer) -> None:
    (server.base_dir / "input" / "bad").mkdir()
    shutil.copy(DEMO / "subject" / "0.png", server.base_dir / "input" / "bad")
    (server.base_dir / "input" / "bad" / "broken.png").write_bytes(b"no picture")
    with opened_page(server.url) as page:
        open_template(page, "train_then_generate", {})
        show_node(page, "DreamBoothSubject")
        page.wait_for_function("document.querySelectorAll('.dreambooth-subject img').length === 5")
        page.locator(".dreambooth-subject select").select_option("bad")
        page.wait_for_function("document.querySelector('.dreambooth-warnings').textContent.includes('broken.png')")
        assert page.evaluate("document.querySelectorAll('.dreambooth-subject img').length") == 1
        shot(page, "subject")
        folder = "window.app.graph.nodes.find((one) => one.type === 'DreamBoothSubject').widgets[0].value"
        assert page.evaluate(folder) == "bad"
        page.evaluate(
            """async () => {
              const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
              const blob = await new Promise((done) => canvas.toBlob(done));
              const dataTransfer = new DataTransfer();
              dataTransfer.items.add(new File([blob], "dropped ü.png", { type: "image/png" }));
              const panel = document.querySelector(".dreambooth-subject");
              panel.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
            }"""
        )
        page.wait_for_function("document.querySelectorAll('.dreambooth-subject img').length === 2")
    assert (server.base_dir / "input" / "bad" / "dropped ü.png").is_file()
