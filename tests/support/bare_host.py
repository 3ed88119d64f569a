"""The least of ComfyUI that the pack needs: its folders, and its server's routes on a bare aiohttp application.

No module of ComfyUI's is loaded. Errors are worded plainly: `rank = 4` instead of where a widget is.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from bare_io import IO, UI
from helpers import ROOT
from pack.trainer.core.errors import plain

FOLDERS = ("input", "output", "models/loras", "models/checkpoints")
_LARGEST_UPLOAD = 100 * 2**20  # bytes, as in ComfyUI


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


@contextmanager
def host_modules(base_dir: Path, routes: web.RouteTableDef) -> Iterator[None]:
    """Let `pack.nodes.host*` be imported, for a host with these folders and routes.

    Modules of `pack.nodes` are loaded anew inside the block, and gone after it.
    """
    for folder in FOLDERS:
        (base_dir / folder).mkdir(parents=True, exist_ok=True)
    models = base_dir / "models"
    instance = SimpleNamespace(routes=routes, sockets={}, send_progress_text=lambda text, node_id: None)
    execution = SimpleNamespace(set_progress=lambda **progress: None)
    modules = {
        "server": _module("server", PromptServer=SimpleNamespace(instance=instance)),
        "folder_paths": _module(
            "folder_paths",
            get_input_directory=lambda: str(base_dir / "input"),
            get_output_directory=lambda: str(base_dir / "output"),
            get_folder_paths=lambda kind: [str(models / kind), str(models / "more" / kind)],
            get_filename_list=lambda kind: sorted(path.name for path in (models / kind).iterdir()),
            get_full_path=lambda kind, name: str(models / kind / name) if (models / kind / name).is_file() else None,
            get_full_path_or_raise=lambda kind, name: str(models / kind / name),
            models_dir=str(models),
        ),
        "pack.nodes": _module("pack.nodes", __path__=[str(ROOT / "nodes")]),
        "pack.nodes.api": _module(
            "pack.nodes.api",
            io=IO,
            ui=UI,
            ComfyAPISync=lambda: SimpleNamespace(execution=execution),
            ComfyExtension=type("ComfyExtension", (), {}),
        ),
        "pack.nodes.wording": _module("pack.nodes.wording", wording_of=lambda node: plain),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("pack.nodes")]:
            patch.delitem(sys.modules, name)
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield
        for name in [name for name in sys.modules if name.startswith("pack.nodes") and name not in modules]:
            del sys.modules[name]


@contextmanager
def all_nodes(base_dir: Path) -> Iterator[Any]:
    """The package of the nodes as ComfyUI loads it, with the nodes' own words for settings."""
    with host_modules(base_dir, web.RouteTableDef()), pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "pack.nodes.wording")
        spec = importlib.util.spec_from_file_location(
            "pack.nodes", ROOT / "nodes" / "__init__.py", submodule_search_locations=[str(ROOT / "nodes")]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "pack.nodes", package)
        spec.loader.exec_module(package)
        yield package


@contextmanager
def bare_host(base_dir: Path) -> Iterator[str]:
    """Serve the pack's routes for the folders in `base_dir`, as ComfyUI does, and below /api; gives the URL."""
    routes = web.RouteTableDef()
    with host_modules(base_dir, routes):
        importlib.import_module("pack.nodes.host_routes").register()
        application = web.Application(client_max_size=_LARGEST_UPLOAD)
        for prefix in ("/api", ""):
            for route in routes:
                assert isinstance(route, web.RouteDef)
                application.router.add_route(route.method, prefix + route.path, route.handler)
        with _served(application) as url:
            yield url


@contextmanager
def _served(application: web.Application) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(application, access_log=None)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    async def stop() -> None:
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # connections that were cut off while they were served
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result()
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
