"""One ComfyUI for all tests of a process, which skips them where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from checkpoints import sd15_checkpoint
from comfy_host import CHECKPOINT, ComfyServer, find_comfyui
from helpers import DEMO, ROOT
from PIL import Image


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI with the pack, in a folder with a space and an umlaut; a slim checkpoint, and pictures as input.

    Whoever uses it gives new names to runs and files, so that tests may come in any order.
    """
    if find_comfyui() is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI")
    base_dir = tmp_path_factory.mktemp("comfy ü")
    sd15_checkpoint(base_dir / "models" / "checkpoints" / CHECKPOINT)
    for name in ("dog", "cat", "style"):
        folder = base_dir / "input" / name
        folder.mkdir(parents=True)
        for path in (DEMO / "subject").glob("*.png"):
            Image.open(path).convert("RGB").resize((96, 80)).save(folder / f"{path.stem}.jpg")
    loader = base_dir / "custom_nodes" / "small_models.py"
    loader.parent.mkdir()
    shutil.copy(ROOT / "tests" / "support" / "comfy_small_models.py", loader)
    with ComfyServer(base_dir, pack=ROOT, pack_name="dreambooth-lora") as running:
        yield running
    shutil.rmtree(base_dir / "models")


@pytest.fixture
def server(comfy: ComfyServer) -> Iterator[ComfyServer]:
    """The same, idle, with a log that begins now."""
    comfy.begin_log()
    yield comfy
    comfy.empty_queue()
