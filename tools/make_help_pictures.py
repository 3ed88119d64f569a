"""Writes web/docs/pictures/<node id>.png, every node as a real ComfyUI shows it, for the help pages.

python tools/make_help_pictures.py [NODE_ID ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "tests" / "support")]

from browser import opened_page  # noqa: E402
from comfy_host import ComfyServer  # noqa: E402
from make_workflows import ROOT, prepare  # noqa: E402
from PIL import Image  # noqa: E402

PICTURES = ROOT / "web" / "docs" / "pictures"
_SHOW = """
async (type) => {
  const graph = window.app.graph, canvas = window.app.canvas;
  graph.clear();
  const node = window.LiteGraph.createNode(type);
  graph.add(node);
  node.pos = [0, 0];
  const folder = node.widgets?.find((widget) => widget.name === "folder");
  if (folder) { folder.value = "dog"; folder.callback?.("dog"); }
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, 330), Math.max(height, node.size[1])]);
  canvas.ds.scale = 1;
  canvas.ds.offset = [260, 170];
  canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 900));
  return [260, 140, node.size[0], node.size[1] + 30];
}
"""


def picture(page: Any, node_id: str) -> Image.Image:
    """The node alone, with a small margin."""
    left, top, width, height = page.evaluate(_SHOW, node_id)
    area = page.evaluate("(() => { const r = window.app.canvas.canvas.getBoundingClientRect(); return [r.x, r.y]; })()")
    clip = {"x": area[0] + left - 8, "y": area[1] + top - 8, "width": width + 16, "height": height + 16}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "shot.png")
        page.screenshot(path=str(path), clip=clip)
        return Image.open(path).convert("RGB").quantize(128)


def main() -> None:
    """Write the pictures of the named nodes, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*", metavar="NODE_ID", help="default: all")
    parser.add_argument("--out", type=Path, default=PICTURES, metavar="FOLDER", help="default: web/docs/pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        with ComfyServer(Path(scratch), pack=ROOT) as server, opened_page(server.url, height=1500) as page:
            ours = [name for name in server.object_info() if name.startswith("DreamBooth")]
            for node_id in arguments.nodes or ours:
                picture(page, node_id).save(arguments.out / f"{node_id}.png", optimize=True)


if __name__ == "__main__":
    main()
