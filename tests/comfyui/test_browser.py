"""The pack's pages in a real browser on a real ComfyUI, in both of its node renderers."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from accessibility import faults
from browser import find_browser, load, opened_page
from comfy_graphs import graph, seed_of_test
from comfy_host import PATIENCE_S, ComfyServer
from helpers import DEMO, ROOT
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.index import RunIndex

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
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
CHOSEN = "window.app.graph.nodes.find((one) => one.type === 'DreamBoothSubject').widgets[0].value"
SMALL = {"resolution": 64, "width": 64, "height": 64, "rank": 4, "batch_size": 1, "targets": "attention"}


def open_template(page: Any, name: str, changes: dict[str, Any]) -> None:
    """Open a template as the browser would, and set widgets by name."""
    workflow = (ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")
    page.evaluate("async (text) => { await window.app.loadGraphData(JSON.parse(text)); }", workflow)
    page.locator(".dreambooth-panel").first.wait_for(state="attached")
    set_widgets(page, {"seed": seed_of_test()} | changes)


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


def wait_for(page: Any, state: str) -> None:
    """Wait until the panel of the training shows a state."""
    page.wait_for_function(
        "(state) => document.querySelector('.dreambooth-training .dreambooth-state')?.dataset.state === state",
        arg=state,
    )


def wait_for_panel(page: Any, **facts: Any) -> None:
    """Wait until the panel of the training shows these: numbers at least, texts among others."""
    page.wait_for_function(
        f"""(wanted) => {{
          const shown = ({PANEL})();
          return Object.entries(wanted).every(([name, value]) =>
            typeof value === "number" ? shown[name] >= value : shown[name]?.includes(value));
        }}""",
        arg=facts,
    )


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_training_is_watched_reloaded_cancelled_and_resumed(renderer: str, server: ComfyServer) -> None:
    changes = SMALL | {"name": f"dog-{renderer}", "preview_every": 8, "steps": 100_000}
    with opened_page(server.url, vue=renderer == "vue") as page:
        open_template(page, "train_then_generate", changes)
        show_node(page, "DreamBoothTrainLora")
        wait_for(page, "idle")
        shot(page, f"{renderer}-1-waiting")
        page.get_by_role("button", name="Run", exact=True).first.click()
        wait_for(page, "training")
        wait_for_panel(page, text="step", legend="loss", steps=2, samples=1, subject=5)
        shot(page, f"{renderer}-2-training")
        load(page, server.url)  # in the middle
        open_template(page, "train_then_generate", changes)
        show_node(page, "DreamBoothTrainLora")
        wait_for(page, "training")
        wait_for_panel(page, text="step", legend="loss", steps=2, samples=1, subject=5)
        shot(page, f"{renderer}-3-reloaded")
        server.interrupt()
        wait_for(page, "stopped")
        shot(page, f"{renderer}-4-stopped")
        [done] = re.findall(r"step (\d+) of 100000", page.evaluate(PANEL)["text"])
        last = 8 * (int(done) // 8 + 1)
        set_widgets(page, {"steps": last})
        page.get_by_role("button", name="Run", exact=True).first.click()
        wait_for(page, "done")
        wait_for_panel(page, text=f"step {last} of {last}", legend=f"step {last} · loss")
        wait_for_panel(page, steps=1 + last // 8)  # the base, and every eighth step
        assert page.evaluate(PANEL)["steps"] == 1 + last // 8
        shot(page, f"{renderer}-5-done")
    assert server.log().count(f"Resuming from step {done}") >= 1


def test_a_node_inside_a_subgraph_is_watched(server: ComfyServer) -> None:
    with opened_page(server.url) as page:
        open_template(page, "train_then_generate", SMALL | {"name": "inside", "preview_every": 2, "steps": 2})
        page.evaluate(
            """() => {
              const graph = window.app.graph;
              const node = graph.nodes.find((one) => one.type === "DreamBoothTrainLora");
              const made = graph.convertToSubgraph(new Set([node]));
              window.app.canvas.setGraph(made.subgraph);
            }"""
        )
        wait_for(page, "idle")
        page.evaluate("window.app.queuePrompt(0, 1)")
        wait_for(page, "done")
        wait_for_panel(page, text="step 2 of 2")
        shot(page, "subgraph")


def test_a_failed_run_says_what_to_do(server: ComfyServer) -> None:
    with opened_page(server.url) as page:
        open_template(page, "train_then_generate", SMALL | {"name": "failed", "steps": 2, "rank": 1000})
        show_node(page, "DreamBoothTrainLora")
        page.evaluate("window.app.queuePrompt(0, 1)")
        wait_for(page, "failed")
        error = page.evaluate("document.querySelector('.dreambooth-training .dreambooth-error').textContent")
        assert error.startswith("Set rank to")
        shot(page, "failed")


def test_runs_are_listed_compared_opened_and_deleted(server: ComfyServer) -> None:
    server.wait(server.queue(graph(name="listed", preview_every=1)))
    index = RunIndex(server.base_dir / "output" / "dreambooth" / "runs")
    made_run(index.root, "another")
    [listed] = index.root.glob("listed-*")
    shutil.copy(ROOT / "example_workflows" / "train_then_generate.json", listed / "workflow.json")
    count = len(index.names())
    with opened_page(server.url) as page:
        page.get_by_role("button", name="DreamBooth runs").first.click()
        page.wait_for_selector(".dreambooth-run")
        assert page.locator(".dreambooth-run").count() == count
        for tick in page.locator(".dreambooth-run input").all():
            tick.check()
        page.wait_for_function(
            "(count) => document.querySelectorAll('.dreambooth-runs .dreambooth-legend span').length === count",
            arg=count,
        )
        row(page, "listed").locator(".dreambooth-open").click()
        page.wait_for_selector(".dreambooth-details .actions")
        shot(page, "runs")
        page.get_by_role("button", name="Load graph").click()
        page.wait_for_function("window.app.graph.nodes.some((one) => one.type === 'DreamBoothTrainLora')")
        page.locator("summary", has_text="Checkpoints").click()
        page.get_by_role("button", name="Use", exact=True).first.click()
        page.get_by_text("is in the LoRA folder").wait_for()
        assert [*(server.base_dir / "models" / "loras").glob("listed-0*.safetensors")]
        page.get_by_role("button", name="Delete…").click()
        page.locator("button", has_text=re.compile(r"^\s*Delete\s*$")).last.click()
        page.wait_for_function(f"document.querySelectorAll('.dreambooth-run').length === {count - 1}")
    assert not listed.exists()


def made_run(runs: Path, name: str) -> str:
    """Make a run of three steps without files of its own, of a new name; returns its id."""
    run = RunFolder.open(runs, name, f"{name:0<64}", {"steps": 3})
    lines = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in (1, 2, 3)]
    run.metrics_path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run.path.name


def row(page: Any, name: str) -> Any:
    """The row of a run in the list."""
    return page.locator(".dreambooth-run").filter(has=page.locator("b", has_text=re.compile(f"^{name}$")))


def test_pictures_are_shown_dropped_and_warned_of(server: ComfyServer) -> None:
    folder = server.base_dir / "input" / "one is broken"
    folder.mkdir()
    shutil.copy(DEMO / "subject" / "0.png", folder)
    (folder / "broken.png").write_bytes(b"no picture")
    with opened_page(server.url) as page:
        open_template(page, "train_then_generate", {})
        show_node(page, "DreamBoothSubject")
        page.wait_for_function("document.querySelectorAll('.dreambooth-subject img').length === 5")
        page.locator(".dreambooth-subject select").select_option(folder.name)
        page.wait_for_function("document.querySelector('.dreambooth-warnings').textContent.includes('broken.png')")
        page.wait_for_function("document.querySelectorAll('.dreambooth-subject img').length === 1")
        shot(page, "subject")
        assert page.evaluate(CHOSEN) == folder.name
        drop_picture(page, "dropped ü.png")
        page.wait_for_function("document.querySelectorAll('.dreambooth-subject img').length === 2")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Add pictures…").focus()
            page.keyboard.press("Enter")
        chooser.value.set_files(DEMO / "subject" / "1.png")
        page.wait_for_function("document.querySelectorAll('.dreambooth-subject img').length === 3")
    assert (folder / "dropped ü.png").is_file()
    assert (folder / "1.png").is_file()


def drop_picture(page: Any, name: str) -> None:
    """Drop a picture on the panel of Subject."""
    page.evaluate(
        """async (name) => {
          const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
          const blob = await new Promise((done) => canvas.toBlob(done));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([blob], name, { type: "image/png" }));
          const panel = document.querySelector(".dreambooth-subject");
          panel.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        name,
    )


# Folder that the node has → the one that dropped pictures go to.
DROPPED_INTO = {
    name: name for name in ("rex (2024)", "(x)", "a)", "()", "(connected images) 2", "in/(side)", "new (1)")
}
DROPPED_INTO |= {"archive.zip": "subject", "(connected images)": "subject", "folder.zip": "folder.zip"}


def test_pictures_are_dropped_into_the_folder_that_is_chosen(server: ComfyServer) -> None:
    """Whatever it is called; where none is chosen, or a zip file, into a new one."""
    root = server.base_dir / "input"
    for name in set(DROPPED_INTO) - {"(connected images)", "archive.zip", "new (1)"}:
        (root / name).mkdir(parents=True)
    with zipfile.ZipFile(root / "archive.zip", "w") as archive:
        archive.write(DEMO / "subject" / "0.png", "0.png")
    landed = {}
    with opened_page(server.url) as page:
        open_template(page, "train_then_generate", {})
        for number, name in enumerate(DROPPED_INTO):
            file = f"dropped-{number}.png"
            set_widgets(page, {"folder": name})
            page.wait_for_timeout(300)
            drop_picture(page, file)
            page.wait_for_selector(f".dreambooth-subject img[title^='{file}']", state="attached")
            [path] = root.rglob(file)
            landed[name] = path.parent.relative_to(root).as_posix()
            assert page.evaluate(CHOSEN) == landed[name]
    assert landed == DROPPED_INTO


def test_the_pictures_that_are_marked_are_those_that_warnings_are_about(server: ComfyServer) -> None:
    """Not those whose name begins like another one's."""
    folder = server.base_dir / "input" / "alike"
    folder.mkdir()
    for name in ("0.png", "1.png", "2.png.png"):
        shutil.copy(DEMO / "subject" / "0.png", folder / name)
    for number, name in enumerate(("1.png.png", "2.png"), start=1):
        shutil.copy(DEMO / "subject" / f"{number}.png", folder / name)
    with opened_page(server.url) as page:
        open_template(page, "train_then_generate", {"folder": "alike"})
        page.wait_for_selector(".dreambooth-subject img[title^='2.png.png']", state="attached")
        marked = page.evaluate("[...document.querySelectorAll('.dreambooth-subject img.bad')].map((one) => one.title)")
        assert [title.split(", ")[0] for title in marked] == ["1.png", "2.png.png"]


FULL_HD = {"width": 1920, "height": 1080}


@pytest.mark.parametrize("palette", ["dark", "light"])
@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_panels_can_be_used_by_everybody(renderer: str, palette: str, server: ComfyServer) -> None:
    """By axe-core's rules, in every state that a panel has, and by keyboard alone."""
    name, failed = f"used-{renderer}-{palette}", f"unusable-{renderer}-{palette}"
    server.wait(server.queue(graph(name=name, preview_every=1)))
    runs = server.base_dir / "output" / "dreambooth" / "runs"
    other = made_run(runs, failed)
    end = {"step": 3, "state": "failed", "problem": "The loss is not a number.", "remedy": "Lower learning_rate."}
    with (runs / other / "metrics.jsonl").open("a") as file:
        file.write(f"{json.dumps(end)}\n")
    folder = server.base_dir / "input" / name
    folder.mkdir()
    shutil.copy(DEMO / "subject" / "0.png", folder)
    (folder / "broken.png").write_bytes(b"no picture")
    with opened_page(server.url, vue=renderer == "vue", palette=palette, **FULL_HD) as page:
        for run, state in ((f"no {name}", "idle"), (name, "done"), (failed, "failed")):
            open_template(page, "train_then_generate", {"name": run, "folder": folder.name})
            wait_for(page, state)
            page.wait_for_function("document.querySelector('.dreambooth-warnings').textContent.includes('broken.png')")
            show_node(page, "DreamBoothTrainLora")
            shot(page, f"panel-{renderer}-{palette}-{state}")
            assert faults(page, ".dreambooth") == []
        show_node(page, "DreamBoothSubject")
        shot(page, f"subject-{renderer}-{palette}")
        assert faults(page, ".dreambooth-subject") == []
        page.get_by_role("button", name="DreamBooth runs").first.click()
        page.wait_for_selector(".dreambooth-run")
        for run in (name, failed):
            row(page, run).locator("input").focus()
            page.keyboard.press("Space")
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            page.locator(".dreambooth-details .actions").wait_for()
            opened = "document.activeElement.matches('.dreambooth-open[aria-expanded=true]')"
            page.wait_for_function(opened)
            page.wait_for_timeout(300)
            shot(page, f"runs-{renderer}-{palette}-{run.split('-')[0]}")
            assert faults(page, ".dreambooth-runs") == []
        page.wait_for_function("document.querySelectorAll('.dreambooth-runs .dreambooth-legend span').length > 3")
        chart = page.locator(".dreambooth-details canvas")
        chart.focus()
        page.keyboard.press("Home")
        legend = page.locator(".dreambooth-details .dreambooth-legend")
        legend.get_by_text("step 1 ·").wait_for()
        assert chart.get_attribute("aria-label") == "Loss curve from step 1 to 3: smoothed loss from 1.00 to 0.604"
    shutil.rmtree(runs / other)


@pytest.mark.parametrize("locale", ["ja", "zh"])
def test_panels_speak_comfyuis_language(locale: str, server: ComfyServer) -> None:
    texts = json.loads((ROOT / "locales" / locale / "main.json").read_text(encoding="utf-8"))["dreambooth"]
    with opened_page(server.url, locale=locale) as page:
        open_template(page, "train_then_generate", {"name": f"none-{locale}"})
        wait_for(page, "idle")
        shown = page.locator(".dreambooth-training").text_content()
        assert texts["training"]["hint"] in shown
        page.get_by_role("button", name=texts["runs"]["tooltip"]).first.click()
        page.get_by_text(texts["runs"]["compareHint"]).wait_for()
        shot(page, f"language-{locale}")


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_a_new_node_has_no_widget_below_the_screen(palette: str, server: ComfyServer) -> None:
    """In ComfyUI's classic nodes, which fold nothing away themselves, on a screen of 1080 lines."""
    made = """
    (kind) => {
      const { LiteGraph, app } = window;
      app.graph.clear();
      const node = LiteGraph.createNode(kind);
      node.pos = [0, 0];
      app.graph.add(node);
      app.canvas.ds.scale = 1;
      app.canvas.ds.offset = [200, 120];
      app.canvas.setDirty(true, true);
      return node;
    }
    """
    height = f"(kind) => {{ const node = ({made})(kind); return node.size[1] + LiteGraph.NODE_TITLE_HEIGHT; }}"
    with opened_page(server.url, palette=palette, **FULL_HD) as page:
        kinds = [kind for kind in server.object_info() if kind.startswith("DreamBooth")]
        heights = {kind: page.evaluate(height, kind) for kind in kinds}
        assert {kind: height for kind, height in heights.items() if height > 1080 - 120} == {}
        for kind in ("DreamBoothTrainLora", "DreamBoothTrainingSettings"):
            page.evaluate(f"(kind) => {{ ({made})(kind); }}", kind)
            page.wait_for_timeout(300)
            shot(page, f"new-{kind}-{palette}")
        page.evaluate("window.app.graph.nodes[0].widgets.find((one) => one.name === 'dreambooth_advanced').callback()")
        shown = "window.app.graph.nodes[0].widgets.every((one) => !one.hidden)"
        assert page.evaluate(shown)
        assert page.evaluate("window.app.graph.nodes[0].size[1]") > 1080


# How many objects of each class are alive, after garbage is collected.
COUNTED = {
    "TrainingPanel": "training_panel.js",
    "SubjectPanel": "subject_panel.js",
    "RunsPanel": "runs_panel.js",
    "Chart": "chart.js",
    "Curve": "curve.js",
}
NOTHING = dict.fromkeys(COUNTED, 0)


def alive(page: Any) -> dict[str, int]:
    """Objects of the pack's classes that the page still holds."""
    session = page.context.new_cdp_session(page)
    counts = {}
    for name, file in COUNTED.items():
        code = f'import("/extensions/dreambooth-lora/lib/{file}").then((module) => module.{name}.prototype)'
        prototype = session.send("Runtime.evaluate", {"expression": code, "awaitPromise": True})["result"]["objectId"]
        objects = session.send("Runtime.queryObjects", {"prototypeObjectId": prototype})["objects"]["objectId"]
        count = {"objectId": objects, "functionDeclaration": "function () { return this.length; }"}
        counts[name] = session.send("Runtime.callFunctionOn", count | {"returnByValue": True})["result"]["value"]
        session.send("Runtime.releaseObject", {"objectId": objects})
    session.detach()
    return counts


def left_over(page: Any, expected: dict[str, int]) -> dict[str, int]:
    """What is alive, once it is what is expected.

    Answers that are under way hold a panel until they come, and Chromium keeps the layouts of the last sizes of the
    page with elements that were in them.
    """
    size = page.viewport_size
    deadline = time.monotonic() + PATIENCE_S
    number = 0
    while (counts := alive(page)) != expected and time.monotonic() < deadline:
        number += 1
        page.set_viewport_size({"width": size["width"] - number % 10, "height": size["height"] - number % 7})
        page.wait_for_timeout(200)
    return counts


def attached(page: Any) -> int:
    """Charts that follow the size of their element."""
    return page.evaluate('import("/extensions/dreambooth-lora/lib/chart.js").then(({ Chart }) => Chart.attached)')


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_nodes_that_are_removed_leave_nothing(renderer: str, server: ComfyServer) -> None:
    """Nor do nodes that were only made to be copied, and graphs that were left."""
    with opened_page(server.url, vue=renderer == "vue") as page:
        for _ in range(3):
            open_template(page, "train_then_generate", {})
        assert attached(page) == 1
        page.evaluate(
            """async () => {
              const graph = window.app.graph;
              for (let round = 0; round < 5; round += 1) {
                for (const type of ["DreamBoothTrainLora", "DreamBoothFineTune", "DreamBoothSubject"]) {
                  const node = window.LiteGraph.createNode(type);
                  graph.add(node);
                  node.clone();
                  await new Promise((done) => setTimeout(done, 50));
                  graph.remove(node);
                }
              }
            }"""
        )
        assert attached(page) == 1
        page.evaluate("window.app.graph.clear()")
        page.evaluate("window.app.graph.add(window.LiteGraph.createNode('KSampler'))")
        assert attached(page) == 0
        assert left_over(page, NOTHING) == NOTHING


def test_runs_that_are_closed_leave_nothing(server: ComfyServer) -> None:
    runs = server.base_dir / "output" / "dreambooth" / "runs"
    ids = {name: made_run(runs, name) for name in ("first", "second")}
    with opened_page(server.url) as page:
        page.evaluate("window.app.graph.clear()")
        tab = page.get_by_role("button", name="DreamBooth runs").first
        tab.click()

        def click(name: str, opened: str | None) -> None:
            row(page, name).locator(".dreambooth-open").click()
            page.wait_for_function(
                """(opened) => {
                  const details = [...document.querySelectorAll(".dreambooth-details")];
                  return String(details.map((one) => one.previousElementSibling.title)) === opened;
                }""",
                arg=ids[opened] if opened else "",
            )

        click("first", "first")
        click("first", None)
        click("second", "second")
        click("first", "first")
        click("second", "second")
        page.locator(".dreambooth-details canvas").wait_for()
        assert attached(page) == 2  # of the comparison, and of the run that is open
        opened = NOTHING | {"RunsPanel": 1, "Chart": 2, "Curve": 1}
        assert left_over(page, opened) == opened
        click("second", None)
        assert attached(page) == 1
        for count in (0, 1, 0):
            tab.click()
            page.wait_for_function(f"document.querySelectorAll('.dreambooth-runs').length === {count}")
        assert attached(page) == 0
        assert left_over(page, NOTHING) == NOTHING
    for run in ids.values():
        shutil.rmtree(runs / run)
