"""One web UI of each gradio for all tests of a process, which skips them where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from make_webui_hosts import GRADIOS
from webui_host import LAUNCH, WebUI, make_folder, why_not


@pytest.fixture(scope="session", params=list(GRADIOS))
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A web UI with the pack, in a folder with a space and an umlaut, and a tiny checkpoint.

    Whoever uses it gives new names to runs and files, and takes away what is in the way of others.
    """
    if why_not(request.param):
        pytest.skip(why_not(request.param))
    checkpoint: Path = request.getfixturevalue("tiny_checkpoint")
    folder = make_folder(tmp_path_factory.mktemp(f"{request.param} ü"), request.param, checkpoint)
    with WebUI(request.param, folder) as running:
        yield running


@pytest.fixture
def bare_webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a web UI whose `modules` can be imported in this process, for what needs no gradio."""
    folder = tmp_path / "web ü"
    (folder / "models" / "Lora").mkdir(parents=True)
    (folder / "models" / "Stable-diffusion").mkdir()
    monkeypatch.setenv("FAKE_WEBUI", str(folder))
    monkeypatch.syspath_prepend(LAUNCH.parent)
    _forget_host()
    yield folder
    _forget_host()


def _forget_host() -> None:
    """So that the next test's host has its own folder and state."""
    for name in [*sys.modules]:
        if name in ("modules", "networks", "pack.webui.queue") or name.startswith("modules."):
            del sys.modules[name]
    webui = sys.modules.get("pack.webui")
    if webui is not None and hasattr(webui, "queue"):
        del webui.queue
