"""A web UI's page with the pack's tab in it, in headless Chromium through playwright."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser import QUIET, find_browser
from comfy_host import PATIENCE_S
from webui_host import WebUI

SHOTS = os.environ.get("SCREENSHOTS")  # a folder, to look at what the test saw
PANEL = """
() => {
  const element = document.querySelector("#dreambooth-training-panel .dreambooth-training");
  const all = (selector) => [...document.querySelectorAll(`#dreambooth-training-panel ${selector}`)];
  const texts = (selector) => all(selector).filter((one) => one.offsetParent).map((one) => one.textContent);
  return {
    state: element?.querySelector(".dreambooth-state").dataset.state,
    text: element?.querySelector(".dreambooth-head").textContent,
    legend: element?.querySelector(".dreambooth-legend").textContent,
    samples: [...(element?.querySelectorAll(".samples img") ?? [])].filter((one) => one.naturalWidth).length,
    steps: Number(element?.querySelector("input[type=range]").max) + 1,
    buttons: texts(".dreambooth-head button"),
    trouble: texts(".dreambooth-error"),
  };
}
"""


@contextlib.contextmanager
def opened(webui: WebUI, locale: str = "en-US") -> Iterator[Any]:
    """The web UI's page with the pack's tab before it; its scripts fail nowhere."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=find_browser(), args=[*QUIET])
        page = program.new_page(viewport={"width": 1400, "height": 1100}, locale=locale)
        page.set_default_timeout(1000 * PATIENCE_S)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(webui.url)
        show(page)
        yield page
        program.close()
    assert [error for error in errors if "dreambooth" in error.lower()] == []


def show(page: Any, *tabs: str) -> None:
    """Open the pack's tab, and one inside it; the host may have another of the same title outside."""
    for title in ("DreamBooth LoRA", *tabs):
        title_alone = re.compile(rf"^\s*{title}\s*$")
        page.locator(".tab-nav > button:visible", has_text=title_alone).last.click()


def fill(page: Any, **values: object) -> None:
    for name, value in values.items():
        field = page.locator(f"#dreambooth_{name} textarea, #dreambooth_{name} input").first
        field.fill(str(value))
        field.dispatch_event("change")
        field.blur()


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.textContent.includes(text)", arg=[selector, text]
    )


def press(page: Any, text: str) -> None:
    page.locator("#dreambooth-training-panel button:visible", has_text=text).click()


def wait_for(page: Any, condition: str) -> dict[str, Any]:
    """Wait until the panel is so, and say how it is then."""
    found = page.wait_for_function(f"() => {{ const panel = ({PANEL})(); return ({condition}) && panel; }}")
    return dict(found.json_value())


def shot(page: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)
