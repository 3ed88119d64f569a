"""Loads the pack once under the name `pack`, as ComfyUI does under a name of its own, and makes small real models."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worlds import Finished, World

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin while the CPU is shared

import hypothesis
import numpy as np
import pytest
from checkpoints import sd15_checkpoint
from comfy_fixtures import comfy, server  # noqa: F401
from helpers import DEMO, ROOT, TINY
from PIL import Image
from webui_fixtures import bare_webui, webui  # noqa: F401

# The same examples on every run: a gate must not open and close by chance.
hypothesis.settings.register_profile("everyday", max_examples=10, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=200, deadline=None, derandomize=True, database=None)

if "pack" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["pack"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["pack"])


@pytest.fixture(scope="module")
def heard_signals() -> Iterator[None]:
    """Programs that tests start hear signals, also where the suite ignores them: in the background, under nohup."""
    heard = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): handler for name, handler in heard.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start a host come first: they take longest, so the processes end together, and one starts it."""
    items.sort(key=lambda item: not (item.get_closest_marker("comfy") or "webui" in getattr(item, "fixturenames", ())))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file SD 1.x checkpoint of a few MB, with the tokenizer folder beside it. Read-only by convention."""
    folder = tmp_path_factory.mktemp("base model")
    shutil.copytree(DEMO / "base" / "tokenizer", folder / "tokenizer")
    return sd15_checkpoint(folder / "tiny.safetensors", size=TINY)


@pytest.fixture(scope="session")
def tiny_world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny SD 1.x and three pictures. Read-only, as all that is shared."""
    from worlds import make_world

    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("world") / "subject")


@pytest.fixture(scope="session")
def world(tiny_world: World) -> World:
    """The world of most tests; files that need other pictures have a `world` of their own."""
    return tiny_world


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The smallest SDXL and three pictures."""
    from worlds import make_xl_world

    return make_xl_world(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="session")
def finished(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A plain run of four steps that has ended, with previews of steps 0, 2 and 4."""
    from worlds import finish

    return finish(tiny_world, tmp_path_factory.mktemp("finished"), preview_every=2, preview_steps=1, preview_count=1)


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes folders of small noisy pictures: picture_folder(count=4, side=64, name="dog")."""

    def make(count: int = 4, side: int = 64, name: str = "dog") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side, side)).save(folder / f"{number}.png")
        return folder

    return make


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """For modules that train the tiny model often: it computes fastest in one thread, and the recipe, which collects
    garbage several times a run, need not search what was imported."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    search_no_imports()
    yield
    torch.set_num_threads(threads)


def search_no_imports() -> None:
    """Import what every run imports, and let the garbage collector leave it alone from now on."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_of_several_processes() -> None:
    """Where all tests run, in two processes, every module is a quick one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
        search_no_imports()


@pytest.fixture(scope="module", autouse=True)
def _leave_alone_what_is_older(_one_of_several_processes: None) -> None:
    """What the modules before imported and made for all need not be searched again, either."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        gc.collect()
        gc.freeze()
