"""The tab in a real browser, in the gradio of Automatic1111 and in that of Forge: from pictures to a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from accessibility import faults
from browser import find_browser
from helpers import ROOT
from webui_host import WebUI
from webui_page import fill, opened, press, shot, show, wait_for, wait_for_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no browser: install Chromium and playwright"),
]


@pytest.fixture(autouse=True)
def _tidy(webui: WebUI) -> Iterator[None]:
    yield
    webui.tidy()


def test_from_pictures_to_a_prompt(webui: WebUI, picture_folder: Callable[..., Path]) -> None:
    name = f"seen-{webui.kind}"
    with opened(webui) as page:
        pictures = sorted(map(str, picture_folder(3).iterdir()))
        page.locator("#dreambooth_images input[type=file]").first.set_input_files(pictures)
        wait_for_text(page, "#dreambooth_report", "3 pictures")
        fill(page, class_noun="dog", name=name, steps=1_000_000, resolution=64)
        shot(page, f"{name}-before")
        page.locator("button#dreambooth_start:visible").first.click()
        wait_for_text(page, "#dreambooth_message", "Training started.")
        page.locator("#dreambooth-training-panel").first.scroll_into_view_if_needed()
        begun = wait_for(page, "panel.state === 'training' && panel.samples > 0")
        assert begun["buttons"] == ["Stop"]
        assert "step " in begun["text"]
        grown = wait_for(page, f"panel.steps > {begun['steps']} && panel.samples > 0")
        shot(page, f"{name}-training")

        page.reload()
        show(page)
        as_before = f"panel.steps >= {grown['steps']} && panel.samples > 0"
        wait_for(page, f"{as_before} && panel.legend.startsWith('step ')")  # the curve is drawn in a frame of its own
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

        for theme in ("light", "dark"):
            page.goto(f"{webui.url}/?__theme={theme}")
            show(page, "Train")
            wait_for(page, "panel.state === 'done' && panel.buttons.length && panel.legend.startsWith('step ')")
            shot(page, f"{name}-{theme}")
            page.locator("button#dreambooth_start:visible").first.click()  # without pictures
            page.locator("#dreambooth_message .dreambooth-error").wait_for()
            assert faults(page, "#dreambooth-training-panel, #dreambooth_message") == []
            show(page, "Runs")
            page.locator("#dreambooth-runs-panel .dreambooth-open", has_text=name).focus()
            page.keyboard.press("Enter")
            page.locator("#dreambooth-runs-panel .dreambooth-details", has_text="safetensors").first.wait_for()
            shot(page, f"{name}-runs-{theme}")
            assert faults(page, "#dreambooth-runs-panel") == []

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
        assert prompt == f"sks dog <lora:{name}:1>"
    assert (webui.loras / f"{name}.safetensors").is_file()


def test_panels_speak_the_browsers_language(webui: WebUI) -> None:
    texts = json.loads((ROOT / "locales" / "de" / "main.json").read_text(encoding="utf-8"))["dreambooth"]
    with opened(webui, locale="de-AT") as page:
        show(page, "Runs")
        wait_for_text(page, "#dreambooth-runs-panel", texts["runs"]["compareHint"])
        shot(page, f"language-{webui.kind}")


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
        assert any("ended unexpectedly" in text for text in failed["trouble"]), failed
        shot(page, name)
