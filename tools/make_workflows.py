"""Writes example_workflows/ and subgraphs/ as `workflow_recipes.py` describes them, in the browser of a real ComfyUI.

The first template's picture is also docs/graph.png.

    python tools/make_workflows.py [NAME ...] [--out FOLDER]

The frontend itself creates the nodes, sets their widgets and connects them, so that the files are as a user would save
them. The thumbnail is the graph as the browser shows it. Needs a ComfyUI (see CONTRIBUTING.md) and Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "tests" / "support")]

from browser import opened_page  # noqa: E402
from comfy_host import ComfyServer  # noqa: E402
from PIL import Image  # noqa: E402
from workflow_recipes import (  # noqa: E402
    ANIMA,
    BLUEPRINTS,
    CHECKPOINT,
    KLEIN,
    KREA_2,
    KREA_2_TURBO,
    LORAS,
    RECIPES,
    XL_CHECKPOINT,
    Z_IMAGE,
    Blueprint,
    Recipe,
)

ROOT = Path(__file__).resolve().parents[1]
FIRST = "train_then_generate"
_BUILD = """
async ([nodes, note]) => {
  const graph = window.app.graph;
  const created = {};
  graph.clear();
  for (const [id, recipe] of Object.entries(nodes)) {
    const node = window.LiteGraph.createNode(recipe.type);
    if (!node) throw new Error("no node " + recipe.type);
    graph.add(node);
    created[id] = node;
    node.pos = recipe.at;
    if (recipe.title) node.title = recipe.title;
    for (const [name, value] of Object.entries(recipe.values)) {
      const widget = name ? node.widgets.find((candidate) => candidate.name === name) : node.widgets[0];
      if (!widget) throw new Error("no widget " + recipe.type + "." + name);
      widget.value = value;
      widget.callback?.(value);
    }
  }
  for (const [id, recipe] of Object.entries(nodes)) {
    for (const [name, [source, slot]] of Object.entries(recipe.links)) {
      const to = created[id].inputs.findIndex((input) => input.name === name);
      const from = created[source].outputs.findIndex((output) => output.name === slot || output.type === slot);
      if (to < 0 || from < 0) throw new Error("no input " + id + "." + name + " or output " + source + "." + slot);
      created[source].connect(from, created[id], to);
      await new Promise((done) => setTimeout(done, 60));
    }
    const [width, height] = created[id].computeSize();
    created[id].setSize(recipe.size || [Math.max(width, 270), height]);
  }
  const saved = graph.serialize();
  for (const node of saved.nodes) {
    const name = node.properties["Node name for S&R"];
    node.properties = name ? { "Node name for S&R": name } : {};
  }
  window.app.canvas.setDirty(true, true);
  return saved;
}
"""
_FIT = """
() => {
  const canvas = window.app.canvas, bounds = [Infinity, Infinity, -Infinity, -Infinity];
  for (const node of window.app.graph.nodes) {
    bounds[0] = Math.min(bounds[0], node.pos[0]);
    bounds[1] = Math.min(bounds[1], node.pos[1] - 30);
    bounds[2] = Math.max(bounds[2], node.pos[0] + node.size[0]);
    bounds[3] = Math.max(bounds[3], node.pos[1] + node.size[1]);
  }
  const area = canvas.canvas.getBoundingClientRect();
  const scale = 0.9 * Math.min(area.width / (bounds[2] - bounds[0]), area.height / (bounds[3] - bounds[1]));
  canvas.ds.scale = scale;
  canvas.ds.offset = [
    (area.width / scale - bounds[2] - bounds[0]) / 2 + 25 / scale,
    (area.height / scale - bounds[3] - bounds[1]) / 2,
  ];
  canvas.setDirty(true, true);
}
"""


_NODES = """
() => {
  const { ds, canvas } = window.app.canvas;
  const area = canvas.getBoundingClientRect();
  const nodes = window.app.graph.nodes.filter((node) => node.type !== "MarkdownNote");
  const onPage = (value, axis) => (value + ds.offset[axis]) * ds.scale + (axis ? area.y : area.x);
  const edge = (pick, axis, inside) => onPage(pick(...nodes.map(inside)), axis);
  return [
    edge(Math.min, 0, (node) => node.pos[0] - 15),
    edge(Math.min, 1, (node) => node.pos[1] - 60),
    edge(Math.max, 0, (node) => node.pos[0] + node.size[0] + 15),
    edge(Math.max, 1, (node) => node.pos[1] + node.size[1] + 15),
  ];
}
"""  # where the nodes are in the page, notes left out: left, top, right, bottom


_WRAP = """
([title, description, inside, shown]) => {
  const graph = window.app.graph, nodes = [...graph.nodes];
  const within = nodes.filter((node) => inside.includes(node.type));
  const { node, subgraph } = graph.convertToSubgraph(new Set(within));
  for (const other of nodes.filter((node) => !inside.includes(node.type))) graph.remove(other);
  node.title = subgraph.name = title;
  const saved = graph.serialize();
  saved.nodes[0].properties.proxyWidgets = shown.map(([type, name]) => {
    return [String(subgraph.nodes.find((node) => node.type === type).id), name];
  });
  saved.definitions.subgraphs[0].category = "DreamBooth LoRA";
  saved.definitions.subgraphs[0].description = description;
  for (const savedNode of [...saved.nodes, ...saved.definitions.subgraphs[0].nodes]) {
    delete savedNode.properties.cnr_id;
    delete savedNode.properties.aux_id;
    delete savedNode.properties.ver;
  }
  return saved;
}
"""


def prepare(base_dir: Path) -> None:
    """Write the files that the workflows choose, so that the browser accepts them; empty, since nothing runs."""
    for name in (CHECKPOINT, XL_CHECKPOINT):
        (base_dir / "models" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (base_dir / "models" / "checkpoints" / name).write_bytes(b"")
    turbo = ("diffusion_models", KREA_2_TURBO)
    for folder, name in [*KLEIN.items(), *Z_IMAGE.items(), *KREA_2.items(), *ANIMA.items(), turbo]:
        (base_dir / "models" / folder).mkdir(parents=True, exist_ok=True)
        (base_dir / "models" / folder / name).write_bytes(b"")
    for name in LORAS:
        (base_dir / "models" / "loras").mkdir(parents=True, exist_ok=True)
        (base_dir / "models" / "loras" / name).write_bytes(b"")
    for name in ("dog", "cat", "style"):
        shutil.copytree(ROOT / "demo" / "subject", base_dir / "input" / name)


def write(page: Any, name: str, recipe: Recipe, folder: Path) -> None:
    """Build one workflow; write the file and its thumbnail."""
    nodes = {key: node.as_json() for key, node in recipe.nodes.items()}
    saved = page.evaluate(_BUILD, [nodes, recipe.note])
    saved["extra"] = {"ds": {"scale": 0.7, "offset": [60, 300]}}
    (folder / f"{name}.json").write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page.evaluate(_FIT)
    page.wait_for_timeout(1200)
    complaint = page.get_by_text("Dismiss", exact=True)  # of models that are empty files here
    if complaint.count():
        complaint.first.click()
        page.wait_for_timeout(600)
    shot = folder / f"{name}.png"
    page.screenshot(path=str(shot))
    picture = Image.open(shot).convert("RGB")
    graph_area = picture.crop((70, 50, picture.width, picture.height - 10))  # without ComfyUI's bars
    height = 800 * graph_area.height // graph_area.width
    graph_area.resize((800, height)).save(folder / f"{name}.jpg", quality=85)
    if name == FIRST:
        (folder.parent / "docs").mkdir(exist_ok=True)
        graph = picture.crop(page.evaluate(_NODES))
        height = 1600 * graph.height // graph.width
        graph.resize((1600, height)).quantize(256).save(folder.parent / "docs" / "graph.png", optimize=True)
    shot.unlink()


def write_blueprint(page: Any, name: str, blueprint: Blueprint, folder: Path) -> None:
    """Build a workflow, and write some of its nodes as a subgraph."""
    nodes = {key: node.as_json() for key, node in blueprint.recipe.nodes.items()}
    page.evaluate(_BUILD, [nodes, ""])
    saved = page.evaluate(_WRAP, [name, blueprint.description, list(blueprint.inside), list(blueprint.shown)])
    (folder / f"{name}.json").write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Write the named workflows and blueprints, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT, metavar="FOLDER", help="where both folders are")
    arguments = parser.parse_args()
    for folder in ("example_workflows", "subgraphs"):
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        with ComfyServer(Path(scratch), pack=ROOT) as server, opened_page(server.url, width=2400, height=1350) as page:
            for name in arguments.names or [*RECIPES, *BLUEPRINTS]:
                if name in RECIPES:
                    write(page, name, RECIPES[name], arguments.out / "example_workflows")
                else:
                    write_blueprint(page, name, BLUEPRINTS[name], arguments.out / "subgraphs")


if __name__ == "__main__":
    main()
