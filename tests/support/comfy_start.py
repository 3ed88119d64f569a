"""Measures what loading the pack costs ComfyUI's start, beside what ComfyUI itself takes: CPU seconds, as JSON.

    python comfy_start.py COMFYUI

Runs in ComfyUI's environment; importing is what its start mostly is.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
comfyui = sys.argv[1]
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu"]


def host() -> None:
    """Import what ComfyUI has imported when it loads its packs."""
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_api.latest  # noqa: F401
    import server  # noqa: F401

    import nodes  # noqa: F401


async def load_pack() -> int:
    """Load the pack as ComfyUI does; returns the number of its nodes."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return len(await (await pack.comfy_entrypoint()).get_node_list())


began = time.process_time()
host()
loaded = time.process_time()
count = asyncio.run(load_pack())
sys.stdout.write(json.dumps({"host": loaded - began, "pack": time.process_time() - loaded, "nodes": count}) + "\n")
