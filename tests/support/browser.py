"""A real browser on a real ComfyUI: headless Chromium through playwright."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from typing import Any

from comfy_host import PATIENCE_S

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.Persist": False,  # every page begins with the same graph
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
_READY = """
() => {
  const app = window.app, types = window.LiteGraph?.registered_node_types;
  return Boolean(app?.graph && types?.KSampler && app.extensionManager?.workflow?.activeWorkflow);
}
"""


def find_browser() -> str | None:
    """The browser's program: the one that CHROMIUM names, or the first that is installed; None without playwright."""
    if importlib.util.find_spec("playwright") is None:
        return None
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _PROGRAMS)), None)


@contextlib.contextmanager
def opened_page(
    url: str, *, vue: bool = False, palette: str = "dark", locale: str = "en", width: int = 1600, height: int = 1000
) -> Iterator[Any]:
    """ComfyUI's page, loaded and quiet; `vue` chooses the Vue node renderer."""
    from playwright.sync_api import sync_playwright

    chosen = {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": palette, "Comfy.Locale": locale}
    _keep_settings(url, _SETTINGS | chosen)
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=find_browser(), args=[*QUIET, "--disable-sync"])
        page = program.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * PATIENCE_S)
        load(page, url)
        yield page
        program.close()


def load(page: Any, url: str) -> None:
    """Load the page and wait until nodes can be made and the first graph is there."""
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function(_READY)
    page.wait_for_load_state("networkidle")
    page.keyboard.press("Escape")


def _keep_settings(url: str, settings: dict[str, Any]) -> None:
    """Let the server give these settings to pages that are opened from now on."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = json.dumps(settings).encode()
    request = urllib.request.Request(f"{url}/settings", body, {"Content-Type": "application/json"})
    opener.open(request, timeout=PATIENCE_S).close()
