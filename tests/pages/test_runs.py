"""What pages of either host are told of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bare_nodes import adapter_of
from pack.pages import urls
from pack.pages.finite import finite
from pack.pages.runs import RunPages, checkpoint_name, take_checkpoint
from pack.trainer.adapters.kohya import write_adapter
from pack.trainer.core.errors import AdapterError, suggest
from pack.trainer.training.runs.index import RunIndex
from pack.trainer.training.runs.layout import RunLayout


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    folder = tmp_path / "runs" / "dog-1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"fingerprint": "f", "name": "rex", "settings": {"steps": 4}}))
    return RunLayout(folder)


def test_a_checkpoint_is_taken_under_a_free_name(run: RunLayout, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    with pytest.raises(AdapterError, match="no adapter for step 4") as none:
        take_checkpoint(run, 4, loras)
    assert none.value.remedy == "Choose one of: none."
    for step in (2, 4):
        write_adapter(run.path / "adapters" / f"step-{step:06d}.safetensors", adapter_of(float(step)), torch.float32)
    with pytest.raises(AdapterError) as some:
        take_checkpoint(run, 3, loras)
    assert some.value.remedy == "Choose one of: 2, 4."
    paths = [take_checkpoint(run, 4, loras) for _ in range(2)]
    assert [path.name for path in paths] == ["rex-000004.safetensors", "rex-000004-2.safetensors"]
    assert {path.parent for path in paths} == {loras}
    assert paths[0].read_bytes() == run.adapters()[4].read_bytes()
    (run.path / "run.json").write_text(json.dumps({"fingerprint": "f", "name": "../rex"}))
    assert checkpoint_name(run, 12) == "dog-1-000012.safetensors"


def test_a_run_is_shown_in_the_words_of_its_host(run: RunLayout) -> None:
    """What failed, and what the host is training, in the list and in the details alike; names of adapters as used."""
    write_adapter(run.path / "adapters" / "step-000002.safetensors", adapter_of(1.0), torch.float32)
    end = {"step": 2, "state": "failed", "problem": "Too much.", "remedy": f"Lower {suggest('rank', 4)}."}
    run.metrics_path.write_text(json.dumps(end))
    training: list[str] = []
    pages = RunPages(RunIndex(run.path.parent), lambda name, value: f"<{name}: {value}>", training.__contains__)
    for shown in (pages.summaries()[0], pages.details("dog-1")):
        assert (shown["state"], shown["problem"], shown["remedy"]) == ("failed", "Too much.", "Lower <rank: 4>.")
    [adapter] = pages.details("dog-1")["adapters"]
    assert adapter["name"] == "rex-000002.safetensors"
    assert adapter["url"] == "/dreambooth/runs/dog-1/files/adapters/step-000002.safetensors"
    training.append("dog-1")
    assert (pages.summaries()[0]["state"], pages.details("dog-1")["state"]) == ("running", "running")


def test_files_have_urls(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "my ü")
    base = "/dreambooth/runs/my%20%C3%BC/files"
    assert urls.file_url(run.path, run.path / "a b" / "c#.png") == f"{base}/a%20b/c%23.png"
    assert urls.summary_with_urls(run, {"id": "x", "preview": "p/0.png"}) == {"id": "x", "preview": f"{base}/p/0.png"}
    assert urls.summary_with_urls(run, {"id": "x", "preview": None}) == {"id": "x", "preview": None}
    details = {"preview": "p/0.png", "previews": {3: ["0.png", "1.png"]}, "subject": ["0.png"], "workflow": True}
    details |= {"adapters": [{"step": 3, "file": "adapters/a.safetensors"}]}
    shown = urls.details_with_urls(run, details)
    previews = run.preview_path(3).relative_to(run.path).as_posix()
    assert shown["preview"] == f"{base}/p/0.png"
    assert shown["previews"] == {3: [f"{base}/{previews}/0.png", f"{base}/{previews}/1.png"]}
    assert shown["subject"] == [f"{base}/{run.subject_path.name}/0.png"]
    assert shown["workflow"] == f"{base}/{run.workflow_path.name}"
    assert shown["adapters"] == [{"step": 3, "file": "adapters/a.safetensors", "url": f"{base}/adapters/a.safetensors"}]
    assert urls.details_with_urls(run, details | {"workflow": False})["workflow"] is None


def test_pages_get_no_numbers_that_json_lacks() -> None:
    nan, infinite = float("nan"), float("inf")
    content = {"a": nan, "b": [1.5, infinite, (-infinite, 2)], "c": {"d": nan, "e": "nan"}, "f": True}
    wanted = {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": None, "e": "nan"}, "f": True}
    assert finite(content) == wanted
