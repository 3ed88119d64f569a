"""A real browser on a real ComfyUI: headless Chromium through playwright."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def find_browser() -> str | None:
    """The browser's program: the one that CHROMIUM names, or the first that is installed; None without playwright."""
    if importlib.util.find_spec("playwright") is None:
        return None
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _PROGRAMS)), None)


@contextlib.contextmanager
def opened_page(url: str, *, vue: bool = False, width: int = 1600, height: int = 1000) -> Iterator[Any]:
    """ComfyUI's page, loaded and quiet; `vue` chooses the Vue node renderer."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=find_browser(), args=[*_QUIET, "--disable-sync"])
        page = program.new_page(viewport={"width": width, "height": height})
        load(page, url)
        page.evaluate(
            """async (vue) => {
              const settings = window.app.extensionManager.setting;
              await settings.set("Comfy.VueNodes.Enabled", vue);
              await settings.set("Comfy.TutorialCompleted", true);
              await settings.set("Comfy.Workflow.ShowMissingModelsWarning", false);
              await settings.set("Comfy.Minimap.Visible", false);
              await settings.set("LiteGraph.Canvas.MinFontSizeForLOD", 0);
            }""",
            vue,
        )
        load(page, url)
        yield page
        program.close()


def load(page: Any, url: str) -> None:
    """Load the page and wait until nodes can be made."""
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types?.KSampler)")
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
