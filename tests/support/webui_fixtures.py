"""One web UI of each gradio for all tests of a process, which skips them where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from make_webui_hosts import GRADIOS
from webui_host import WebUI, make_folder, why_not


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
