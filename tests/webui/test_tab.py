"""The tab in the real gradio of Automatic1111 and of Forge: its widgets, its messages, and what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ROOT
from pack.trainer.core.toml import read_toml
from PIL import Image
from webui_host import WebUI, text_of

_WIDGETS = {"textbox", "file", "dropdown", "number", "checkbox", "button", "slider", "radio", "checkboxgroup", "image"}
_GIVEN_OTHERWISE = {"images", "output_dir", "instance_prompt", "class_prompt", "device", "resume"}


def train_settings() -> list[dict[str, Any]]:
    return json.loads((ROOT / "webui" / "settings.json").read_text(encoding="utf-8"))["train"]


# Widgets


def below(node: dict[str, Any], webui: WebUI, *, folded: bool) -> Iterator[dict[str, Any]]:
    """The components in a part of the page's layout, also those that are folded away or not."""
    by_id = {component["id"]: component for component in webui.configuration["components"]}
    component = by_id[node["id"]]
    is_folded = component["type"] == "accordion" and not component["props"].get("open", True)
    if is_folded and not folded:
        return
    yield component
    for child in node.get("children") or []:
        yield from below(child, webui, folded=folded)


def found(webui: WebUI, id: int) -> dict[str, Any]:
    """The part of the layout that begins with a component."""
    parts = [webui.configuration["layout"]]
    while parts:
        part = parts.pop()
        if part.get("id") == id:
            return part
        parts += part.get("children") or []
    raise LookupError(id)


def train_tab(webui: WebUI) -> dict[str, Any]:
    return found(webui, webui.components()["dreambooth_train"]["id"])


def test_at_most_twelve_widgets_are_shown_at_once(webui: WebUI) -> None:
    shown = [one for one in below(train_tab(webui), webui, folded=False) if one["type"] in _WIDGETS]
    names = [one["props"].get("elem_id") for one in shown]
    assert len(names) <= 12, names
    assert {"dreambooth_images", "dreambooth_folder", "dreambooth_base", "dreambooth_name", "dreambooth_start"} <= {
        *names
    }


def test_every_setting_has_a_widget_that_begins_with_its_default(webui: WebUI) -> None:
    """But those that the tab gives by itself; what nobody changes comes from the preset."""
    widgets = {one["props"].get("elem_id"): one for one in below(train_tab(webui), webui, folded=True)}
    for setting in train_settings():
        name = setting["name"]
        if name in _GIVEN_OTHERWISE:
            assert name == "images" or f"dreambooth_{name}" not in widgets
            continue
        properties = widgets[f"dreambooth_{name}"]["props"]
        if name in ("base", "preview_every"):  # as the host has it; whoever watches wants to see samples
            continue
        default = setting["default"]
        if setting["kind"] == "choice":
            choices = [choice if isinstance(choice, str) else choice[1] for choice in properties["choices"]]
            assert choices == setting["choices"], name
            assert properties["value"] == default, name
        elif setting["kind"] == "list":
            assert properties["value"] == "\n".join(default), name
        else:
            assert properties["value"] == (default if default is not None else ""), name
        assert properties["label"], name
    ids = [one["props"]["elem_id"] for one in webui.configuration["components"] if one["props"].get("elem_id")]
    assert len(ids) == len({*ids}), "an element's id is its own"


def test_the_base_is_one_of_the_hosts(webui: WebUI) -> None:
    base = webui.components()["dreambooth_base"]["props"]
    title = base["value"]
    assert title.startswith("tiny.safetensors")
    added = webui.folder / "models" / "Stable-diffusion" / "another.safetensors"
    added.symlink_to(webui.folder / "models" / "Stable-diffusion" / "tiny.safetensors")
    try:
        [update] = webui.call("refresh")
    finally:
        added.unlink()
        titles = [choice if isinstance(choice, str) else choice[1] for choice in update["choices"]]
    assert titles[0] == title, "the loaded one comes first"
    assert [one.partition(" ")[0] for one in titles] == ["tiny.safetensors", "another.safetensors"]


def test_the_page_loads_the_panels(webui: WebUI) -> None:
    """The module of the pack, and all that it imports, as JavaScript."""
    page = webui.ask("/").content.decode()
    [script] = re.findall(r'<script type="module" src="(file=extensions/[^"]*dreambooth_lora\.mjs[^"]*)"', page)
    seen, left = set(), [f"/{script}"]
    while left:
        target = left.pop()
        if target in seen:
            continue
        seen.add(target)
        reply = webui.ask(target)
        assert reply.status == 200, target
        assert "javascript" in reply.headers["Content-Type"], target
        folder = Path(target.partition("?")[0]).parent
        for name in re.findall(r'^(?:import|export) [^"]*from "(\.[^"]*)"', reply.content.decode(), re.MULTILINE):
            left.append(os.path.normpath(folder / name))
    assert len(seen) > 8


def test_others_are_left_alone(webui: WebUI) -> None:
    """Another extension has a `trainer`, too; its own it gets, loaded before the pack and after it."""
    facts = webui.facts()
    assert Path(facts["trainer"]).parent.parent.name.endswith("_other")
    assert facts["late"] == "other"
    assert "dreambooth_lora_extension.trainer.core.errors" in facts["modules"]
    assert not {"webui", "pages", "install", "nodes"} & {*facts["modules"]}
    if webui.kind == "gradio3":
        assert not [path for path in facts["path"] if "dreambooth-lora" in path]
    assert not {"pydantic.v1", "diffusers", "transformers", "peft"} & {
        name for name in facts["modules"] if name != "pydantic.v1"
    }


# Pictures and their report


@pytest.fixture
def pictures(picture_folder: Callable[..., Path]) -> Path:
    return picture_folder(3)


@pytest.fixture(autouse=True)
def _tidy(webui: WebUI) -> Iterator[None]:
    yield
    webui.tidy()


def test_uploaded_pictures_are_reported_and_nothing_is_kept(webui: WebUI, pictures: Path) -> None:
    (pictures / "0.txt").write_text("a <b>sks</b> dog", encoding="utf-8")
    shutil.copy(pictures / "1.png", pictures / "twice.png")
    [report] = webui.call("images", "change", images=webui.upload(*sorted(pictures.iterdir())))
    assert text_of(report).startswith("4 pictures")
    assert "a &lt;b&gt;sks&lt;/b&gt; dog" in report
    assert "twice.png is the same picture as 1.png" in report
    assert report.count("<img ") == 4
    assert not (webui.data / "pictures").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_that_are_no_utf8_are_reported(webui: WebUI, pictures: Path) -> None:
    shutil.copy(pictures / "1.png", pictures / os.fsdecode(b"d\xff.png"))
    [report] = webui.call("folder", "change", folder=str(pictures))
    assert text_of(report).startswith("4 pictures")
    assert r"d\xff.png is the same picture as 1.png" in report


def test_uploaded_pictures_are_kept_once_for_training(webui: WebUI, pictures: Path) -> None:
    for name in ("dog", "dog", "cat"):
        with drawing(webui):
            uploaded = webui.upload(*sorted(pictures.iterdir()))
            assert train(webui, images=uploaded, name=name, class_noun="dog").startswith("Training started.")
            webui.post("/job/stop")
    kept = sorted((webui.data / "pictures").iterdir())
    assert [folder.name.split("-")[0] for folder in kept] == ["cat", "dog"]
    for folder in kept:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in pictures.iterdir()
        }


def test_a_folder_and_a_zip_file_are_reported(webui: WebUI, pictures: Path, tmp_path: Path) -> None:
    [report] = webui.call("folder", "change", folder=f' "{pictures}" ')
    assert text_of(report).startswith("3 pictures")
    archive = tmp_path / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(pictures / "0.png", "0.png")
    [report] = webui.call("images", "change", images=webui.upload(archive))
    assert text_of(report).startswith("1 picture ")
    assert not (webui.data / "pictures").exists()
    [report] = webui.call("folder", "change", folder=str(archive))
    assert text_of(report).startswith("1 picture ")
    [report] = webui.call("folder", "change", folder="")
    assert report == ""
    [report] = webui.call("folder", "change", folder=str(tmp_path / "nowhere"))
    assert "nowhere" in report


# Messages


def train(webui: WebUI, **values: Any) -> str:
    [message] = webui.call("start", **values)
    return text_of(message)


def test_what_is_missing_is_said(webui: WebUI, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = {"folder": str(pictures), "name": "dog", "class_noun": "dog"}
    upload = webui.upload(pictures / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    twice = webui.upload(pictures / "0.png", tmp_path / "0.png")
    for values, problem in (
        ({"folder": ""}, "There are no pictures."),
        ({"images": upload}, "Pictures were uploaded, but a folder was also entered."),
        ({"images": twice, "folder": ""}, "Two files are called 0.png."),
        ({"folder": str(tmp_path / "empty")}, "contains no pictures"),
        ({"folder": str(tmp_path / "nowhere")}, "nowhere"),
        ({"base": None}, "No base model is chosen."),
        ({"name": ""}, "The name is empty."),
        ({"name": "a/b"}, "'a/b' is not a valid file name."),
        ({"name": ".."}, "'..' is not a valid file name."),
        ({"name": "dog?"}, "'dog?' is not a valid file name."),
        ({"alpha": "x"}, "Alpha: 'x' is not a number. Enter one such as 0.5."),
        ({"preview_prompts": "d\udcff"}, r"Preview prompts: 'd\udcff' is not valid UTF-8"),
        ({"name": "d\udcff"}, r"Name: 'd\udcff' is not valid UTF-8"),
        ({"folder": str(tmp_path / "d\udcff")}, r"\xff does not exist"),
    ):
        message = train(webui, **good | values)
        assert problem in message, (values, message)
    assert not (webui.data / "jobs").exists()


def test_a_name_leads_nowhere(webui: WebUI, pictures: Path) -> None:
    """Uploaded pictures are kept under the name; nothing is written outside of the pack's folder."""
    before = {path.name for path in webui.folder.iterdir()}
    for name in ("../../up", "a/b", "..", "/tmp/x"):
        message = train(webui, images=webui.upload(pictures / "0.png"), name=name, class_noun="dog")
        assert message.startswith(f"'{name}' is not a valid file name."), message
    assert {path.name for path in webui.folder.iterdir()} == before
    assert not (webui.data / "pictures").exists()


def test_a_base_that_is_gone_is_said(webui: WebUI, pictures: Path) -> None:
    added = webui.folder / "models" / "Stable-diffusion" / "gone.safetensors"
    added.symlink_to(webui.folder / "models" / "Stable-diffusion" / "tiny.safetensors")
    [update] = webui.call("refresh")
    titles = [choice if isinstance(choice, str) else choice[1] for choice in update["choices"]]
    [title] = [title for title in titles if title.startswith("gone")]
    added.unlink()
    webui.call("refresh", page="another page")
    message = train(webui, folder=str(pictures), name="dog", base=title)
    assert message.startswith(f"There is no checkpoint '{title}'.")
    webui.call("refresh")


def test_a_folder_for_loras_that_can_not_be_written_is_said(webui: WebUI, pictures: Path) -> None:
    kept = webui.loras.rename(webui.loras.with_name("Lora there"))
    webui.loras.write_text("a file")
    try:
        message = train(webui, folder=str(pictures), name="dog", class_noun="dog")
    finally:
        webui.loras.unlink()
        kept.rename(webui.loras)
    assert "Lora" in message
    assert not (webui.data / "jobs").exists(), "said before anything begins"


def test_one_training_at_a_time(webui: WebUI, pictures: Path) -> None:
    folder = webui.data / "jobs" / "first"
    folder.mkdir(parents=True)
    born_at = psutil.Process().create_time()
    record = {"kind": "train", "name": "first", "made_at": 1.0, "pid": os.getpid(), "born_at": born_at}
    (folder / "job.json").write_text(json.dumps(record))
    message = train(webui, folder=str(pictures), name="second", class_noun="dog")
    assert message == "'first' is still running. Wait until it is done, or press Stop; only one job can run at a time."
    assert [path.name for path in folder.parent.iterdir()] == ["first"]


@contextlib.contextmanager
def drawing(webui: WebUI) -> Iterator[None]:
    """The host draws meanwhile, so that a job waits."""
    webui.ask("/fake/hold", "POST")
    try:
        yield
    finally:
        webui.ask("/fake/release", "POST")
        webui.wait_for_idle()


def test_a_training_waits_until_the_host_has_drawn(webui: WebUI, pictures: Path) -> None:
    """And may be stopped while it waits: it never begins."""
    calls = webui.facts()["calls"]
    with drawing(webui):
        assert train(webui, folder=str(pictures), name="waits", class_noun="dog").startswith("Training started.")
        assert webui.job()["state"] == "waiting"
        assert "is still running" in train(webui, folder=str(pictures), name="second", class_noun="dog")
        webui.post("/job/stop")
        assert webui.job()["state"] == "ending"
    webui.wait_for_idle()
    assert webui.job()["state"] == "stopped"
    [job] = (webui.data / "jobs").iterdir()
    assert json.loads((job / "job.json").read_text(encoding="utf-8"))["pid"] is None
    facts = webui.facts()
    assert facts["calls"][len(calls) :] == [], "the host keeps its model"
    assert facts["job"] == ""


@pytest.mark.parametrize(
    ("chosen", "written"),
    [
        (
            {"class_noun": "dog"},
            {
                "class_noun": "dog",
                "instance_prompt": "a photo of {token} {class}",
                "preview_prompts": "a photo of {token} {class}",
                "preview_every": 100,
            },
        ),
        (
            {"token": " ohwx ", "preview_every": 0, "learning_rate": 1e-4, "flip": False, "alpha": " "},
            {
                "token": "ohwx",
                "instance_prompt": "a photo of {token}",
                "preview_every": 0,
            },
        ),
        (
            {
                "class_noun": "cat",
                "preset": "person",
                "prior_count": 20,
                "steps": 7,
                "rank": None,
                "alpha": "1.5",
                "flip": True,
                "learning_rate": 0.002,
                "preview_every": 5,
                "preview_prompts": " a | b ",
                "base_lora": " x.safetensors\n\n ü.safetensors ",
            },
            {
                "class_noun": "cat",
                "preset": "person",
                "prior_count": 20,
                "steps": 7,
                "alpha": 1.5,
                "flip": True,
                "learning_rate": 0.002,
                "preview_every": 5,
                "preview_prompts": "a | b",
                "base_lora": ["x.safetensors", "ü.safetensors"],
                "instance_prompt": "a photo of {token} {class}",
                "class_prompt": "a photo of {class}",
            },
        ),
    ],
)
def test_what_was_changed_is_given(
    chosen: dict[str, Any], written: dict[str, Any], webui: WebUI, pictures: Path
) -> None:
    """And no more: a preset may fill in the rest."""
    with drawing(webui):
        assert train(webui, folder=str(pictures), name="dög", **chosen).startswith("Training started.")
        webui.post("/job/stop")
    settings = read_toml(webui.data / "jobs" / "dög" / "job.toml")
    assert (Path(settings.pop("tokenizer")) / "vocab.json").is_file()
    assert settings == written | {
        "name": "dög",
        "base": str(webui.folder / "models" / "Stable-diffusion" / "tiny.safetensors"),
        "images": str(pictures),
        "output_dir": str(webui.data),
    }


# The settings of an earlier run


def made_run(webui: WebUI, name: str, **settings: Any) -> str:
    """The record of a run that something trained; its id."""
    run = webui.data / "runs" / f"{name}-1234"
    run.mkdir(parents=True)
    record = {"fingerprint": "5e", "name": name, "settings": settings}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run.name


def refilled(webui: WebUI, run: str) -> dict[str, Any]:
    """What the fields hold once a run's settings were asked for: those that changed."""
    names = webui.outputs("settings_of", "input")
    updates = webui.call("settings_of", "input", settings_of=run)
    changed = {}
    for name, update in zip(names, updates):
        if not isinstance(update, dict):
            changed[name] = update
        elif "value" in update:
            changed[name] = update["value"]
    assert changed.pop("settings_of") == "", "so that the same run can be asked for again"
    return changed


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {
            "class_noun": "cat",
            "token": "ohwx",
            "preset": "person",
            "prior_count": 20,
            "steps": 7,
            "alpha": "1.5",
            "flip": True,
            "optimizer": "lion",
            "learning_rate": 0.002,
            "preview_every": 0,
            "preview_prompts": "a | b",
            "base_lora": "x.safetensors\nü.safetensors",
        },
    ],
)
def test_the_settings_of_a_run_are_trained_again(chosen: dict[str, Any], webui: WebUI, pictures: Path) -> None:
    """What was given for it is given again, whatever the fields held meanwhile."""
    with drawing(webui):
        assert train(webui, folder=str(pictures), name="dög", **chosen).startswith("Training started.")
        webui.post("/job/stop")
    run = made_run(webui, "dög")
    job = webui.data / "jobs" / "dög"
    (job / "job.json").write_text(json.dumps(json.loads((job / "job.json").read_text()) | {"run": run}))
    values = refilled(webui, run)
    assert text_of(values.pop("message")) == "These are the settings of 'dög'."
    assert values.pop("images") is None
    with drawing(webui):
        assert train(webui, **values).startswith("Training started.")
        webui.post("/job/stop")
    assert read_toml(webui.data / "jobs" / "dög-2" / "job.toml") == read_toml(job / "job.toml")


def test_the_settings_of_a_run_that_was_begun_elsewhere(webui: WebUI, pictures: Path) -> None:
    """All that its record holds; what the tab makes otherwise is said."""
    settings = {"preset": "person", "rank": 4, "alpha": 2.0, "flip": True, "loss": "mse", "targets": "of old"}
    settings |= {"instance_prompt": "my dog", "base": "/gone/base.safetensors", "images": str(pictures), "steps": 900}
    values = refilled(webui, made_run(webui, "cli", **settings))
    assert text_of(values["message"]) == (
        "These are the settings of 'cli'. Targets: 'of old' is no longer available. The base model "
        "/gone/base.safetensors is not in this web UI's list: choose another. Instance prompt was 'my dog'. Here it is "
        "'a photo of {token}', built from Word and Class."
    )
    assert "base" not in values
    wanted = {"name": "cli", "preset": "none", "rank": 4, "alpha": "2.0", "flip": True, "steps": 900}
    wanted |= {"folder": str(pictures), "targets": "attention-mlp", "class_noun": "", "preview_every": 100}
    assert values.items() >= wanted.items()


def test_settings_that_can_not_be_taken_over(webui: WebUI) -> None:
    """Nothing changes but the message."""
    several = made_run(webui, "several", subject=[{"token": "sks"}, {"token": "ohwx"}])
    for run, problem in (
        ("gone", "There is no run 'gone'."),
        ("../../x", "There is no run '../../x'."),
        (several, "'several' has several subjects, which this tab does not support."),
    ):
        values = refilled(webui, run)
        assert values.keys() == {"message"}
        assert text_of(values["message"]).startswith(problem)
