"""The tab in a real browser, in the gradio of Automatic1111 and in that of Forge: from pictures to a prompt."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import QUIET, find_browser
from comfy_host import PATIENCE_S
from webui_host import WebUI

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no browser: install Chromium and playwright"),
]
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


@pytest.fixture(autouse=True)
def _tidy(webui: WebUI) -> Iterator[None]:
    yield
    webui.tidy()


@contextlib.contextmanager
def opened(webui: WebUI) -> Iterator[Any]:
    """The web UI's page with the pack's tab before it; its scripts fail nowhere."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=find_browser(), args=[*QUIET])
        page = program.new_page(viewport={"width": 1400, "height": 1100})
        page.set_default_timeout(1000 * PATIENCE_S)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(webui.url)
        show(page)
        yield page
        program.close()
    assert [error for error in errors if "dreambooth" in error.lower()] == []


def show(page: Any, *tabs: str) -> None:
    """Open the pack's tab, and one inside it."""
    for title in ("DreamBooth LoRA", *tabs):
        page.locator("button", has_text=title).first.click()


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
    """Wait until the panel is so, and say how it is."""
    page.wait_for_function(f"() => {{ const panel = ({PANEL})(); return {condition}; }}")
    return dict(page.evaluate(PANEL))


def shot(page: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_from_pictures_to_a_prompt(webui: WebUI, picture_folder: Callable[..., Path]) -> None:
    name = f"seen-{webui.kind}"
    with opened(webui) as page:
        pictures = sorted(map(str, picture_folder(3).iterdir()))
        page.locator("#dreambooth_images input[type=file]").first.set_input_files(pictures)
        wait_for_text(page, "#dreambooth_report", "3 pictures")
        fill(page, class_noun="dog", name=name, steps=1_000_000, resolution=64)
        shot(page, f"{name}-before")
        page.locator("button#dreambooth_start:visible").first.click()
        wait_for_text(page, "#dreambooth_message", "Begun.")
        page.locator("#dreambooth-training-panel").first.scroll_into_view_if_needed()
        begun = wait_for(page, "panel.state === 'training' && panel.samples > 0")
        assert begun["buttons"] == ["Stop"]
        assert "step " in begun["text"]
        grown = wait_for(page, f"panel.steps > {begun['steps']} && panel.samples > 0")
        shot(page, f"{name}-training")

        page.reload()
        show(page)
        again = wait_for(page, f"panel.steps >= {grown['steps']} && panel.samples > 0")
        assert again["legend"].startswith("step "), "the curve is there again"
        press(page, "Stop")
        stopped = wait_for(page, "panel.state === 'stopped' && panel.buttons.includes('Resume')")
        assert stopped["buttons"] == ["Resume"]
        webui.shorten(name, webui.job()["step"] + 20)
        press(page, "Resume")
        done = wait_for(page, "panel.state === 'done' && panel.buttons.length")
        assert (done["buttons"], done["trouble"]) == (["Send to txt2img"], [])
        shot(page, f"{name}-done")

        show(page, "Runs")
        row = page.locator("#dreambooth-runs-panel .dreambooth-run", has_text=name)
        row.wait_for()
        assert row.locator(".dreambooth-state").text_content() == "done"
        row.locator("b").click()
        page.locator("#dreambooth-runs-panel .dreambooth-details", has_text="safetensors").first.wait_for()
        shot(page, f"{name}-runs")

        show(page, "Train")
        fill(page, class_noun="cat", resolution=512)
        show(page, "Runs")
        page.locator("#dreambooth-runs-panel button", has_text="Use these settings").click()
        wait_for_text(page, "#dreambooth_message", f"These are the settings of '{name}'.")
        page.locator("#dreambooth_resolution input").wait_for(state="visible")
        values = [page.locator(f"#dreambooth_{field}").first for field in ("class_noun", "resolution")]
        assert [one.locator("textarea, input").first.input_value() for one in values] == ["dog", "64"]
        press(page, "Send to txt2img")
        assert page.evaluate("globalThis.went_to_txt2img") is True
        prompt = page.locator("#txt2img_prompt textarea").input_value()
        assert prompt == f"sks dog <lora:{name}:0.9>"
    assert (webui.loras / f"{name}.safetensors").is_file()


def test_a_message_is_shown_with_its_remedy(webui: WebUI) -> None:
    with opened(webui) as page:
        page.locator("button#dreambooth_start:visible").first.click()
        wait_for_text(page, "#dreambooth_message .dreambooth-error", "There are no pictures. Drop some on the field")
        shot(page, f"message-{webui.kind}")


def test_a_process_that_dies_is_shown(webui: WebUI, picture_folder: Callable[..., Path]) -> None:
    """In a page that was open all the time."""
    name = f"killed-{webui.kind}"
    with opened(webui) as page:
        fill(page, folder=picture_folder(3), class_noun="dog", name=name, steps=1_000_000, resolution=64)
        page.locator("button#dreambooth_start:visible").first.click()
        wait_for(page, "panel.state === 'training'")
        psutil.Process(json.loads((webui.data / "jobs" / name / "job.json").read_text())["pid"]).kill()
        failed = wait_for(page, "panel.state === 'failed' && panel.buttons.includes('Resume')")
        assert any("ended without a word" in text for text in failed["trouble"]), failed
        shot(page, name)
