"""Scores in a real ComfyUI over HTTP, with the demo's CLIP."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from comfy_graphs import node, seed_of_test
from comfy_host import ComfyServer, PromptFailed, find_comfyui
from feature_worlds import processor
from helpers import DEMO, ROOT, Recorder
from pack.trainer.data.images import load_pictures
from pack.trainer.evaluation.feature_extractors import open_feature_model
from pack.trainer.evaluation.metrics import clip_t, subject_score
from PIL import Image
from safetensors.torch import load_file, save_file
from workflows import as_prompt

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("files")]


@pytest.fixture(scope="module")
def files(comfy: ComfyServer) -> None:
    """The demo's subject and a picture as input, and its CLIP as a feature model."""
    shutil.copytree(DEMO / "subject", comfy.base_dir / "input" / "toy")
    shutil.copytree(DEMO / "scorer", comfy.base_dir / "models" / "feature_models" / "world")
    Image.open(DEMO / "style" / "00.png").convert("RGB").save(comfy.base_dir / "input" / "drawn.png")


def test_scores_are_the_engines(server: ComfyServer) -> None:
    prompt = {
        "image": node("LoadImage", image="drawn.png"),
        "subject": node("DreamBoothSubject", folder="toy", token="sks", class_noun="dog", caption="a {token} {class}"),
        "clip": node("DreamBoothClipScore", images=["image", 0], prompts="a tree", clip_model="world", download=False),
        "likeness": node(
            "DreamBoothSubjectScore",
            images=["image", 0],
            subject=["subject", 0],
            clip_model="world",
            dino_model="",
            download=False,
        ),
    }
    entry = server.wait(server.queue(prompt))
    model = open_feature_model(DEMO / "scorer", torch.device("cpu"))
    drawn = model.image_features([Image.open(DEMO / "style" / "00.png")])
    real = model.image_features([one.open() for one in load_pictures(DEMO / "subject", "", Recorder())])
    wanted = {
        "clip": f"CLIP-T: {float(clip_t(drawn, model.text_features(['a tree']))):.3f}",
        "likeness": f"CLIP-I: {float(subject_score(drawn, real)):.3f}",
    }
    for name, words in wanted.items():
        assert words in entry["outputs"][name]["text"][0]
        assert "by world" in entry["outputs"][name]["text"][0]


def test_a_model_that_is_not_there_is_named_and_not_fetched(server: ComfyServer) -> None:
    missing = node("DreamBoothClipScore", images=["image", 0], prompts="a", clip_model="nobody/here", download=False)
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue({"image": node("LoadImage", image="drawn.png"), "clip": missing}))
    assert "nobody/here" in failure.value.exception_message
    assert "preprocessor_config.json" in failure.value.exception_message


def tiny_clip(models: Path, comfyui: Path) -> None:
    """A random CLIP with CLIP's vocabulary: as a folder, as one file, and as a file of each tower."""
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    tower |= {"hidden_act": "gelu", "projection_dim": 32}
    config = transformers.CLIPConfig(
        vision_config=tower | {"image_size": 32, "patch_size": 8}, text_config=tower, projection_dim=32
    )
    folder = models / "feature_models" / "tiny"
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor(32)))
    shutil.copytree(comfyui / "comfy" / "sd1_tokenizer", folder, dirs_exist_ok=True)
    for name in ("clip_vision", "text_encoders"):
        (models / name).mkdir(exist_ok=True)
    shutil.copy(folder / "model.safetensors", models / "clip_vision" / "whole.safetensors")
    tensors = load_file(folder / "model.safetensors")
    for place, start in (("clip_vision/eyes", "vis"), ("text_encoders/words", "text")):
        tower_alone = {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
        save_file(tower_alone, models / f"{place}.safetensors")


def test_a_clip_in_files_scores_as_its_folder(server: ComfyServer) -> None:
    comfyui = find_comfyui()
    assert comfyui is not None
    tiny_clip(server.base_dir / "models", comfyui)
    sources = {"tiny": "tiny", "whole": "whole.safetensors", "eyes + words": "eyes.safetensors + words.safetensors"}
    prompt = {"image": node("LoadImage", image="drawn.png")}
    for number, source in enumerate(sources.values()):
        values = {"images": ["image", 0], "prompts": "a tree", "clip_model": source, "download": False}
        prompt[f"clip {number}"] = node("DreamBoothClipScore", **values)
    outputs = server.wait(server.queue(prompt))["outputs"]
    texts = [outputs[f"clip {number}"]["text"][0] for number in range(3)]
    for name, text in zip(sources, texts, strict=True):
        assert f"by {name}" in text
    assert len({re.search(r"CLIP-T: (\S+)", text)[1] for text in texts}) == 1  # type: ignore[index]


def test_the_example_graph_trains_picks_and_scores(server: ComfyServer) -> None:
    """Only sizes are lowered, and the demo's CLIP judges."""
    workflow = json.loads((ROOT / "example_workflows" / "train_score_pick.json").read_text(encoding="utf-8"))
    prompt = as_prompt(workflow, server.object_info())
    small = {"resolution": 64, "width": 64, "height": 64, "size": "64", "count": 2, "rank": 4, "batch_size": 1}
    small |= {"clip_model": "world", "steps": 2, "checkpoint_every": 1, "precision": "fp32", "preview_every": 0}
    small |= {"seed": seed_of_test()}
    for entry in prompt.values():
        inputs = entry["inputs"]
        inputs.update({name: value for name, value in small.items() if name in inputs})
        if entry["class_type"] == "DreamBoothPickBest":
            inputs |= {"steps": "2", "count": 1, "prompts": "{subject} in the snow"}
    history = server.wait(server.queue(prompt))
    shown = {prompt[key]["class_type"]: output for key, output in history["outputs"].items()}
    table = shown["DreamBoothPickBest"]["text"][0]
    assert [line.split(" | ")[0].strip("| *") for line in table.splitlines()[2:5]] == [
        "base",
        "my-dog, step 1",
        "my-dog, step 2",
    ]
    assert "Best: my-dog, step" in table
    assert "CLIP: world" in table
    scores = server.base_dir / "output" / "dreambooth" / "scores"
    [run] = [path for path in scores.iterdir() if path.is_dir()]
    assert {path.name for path in run.iterdir()} == {"best.png", "sheet.png", "table.csv", "table.json", "table.md"}
    rows = list(csv.DictReader((scores / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["setting"] for row in rows] == ["base", "best checkpoint"]
    assert all(float(row["CLIP-T"]) and float(row["CLIP-I"]) for row in rows)
    for name in ("DreamBoothPickBest", "DreamBoothScoreTable"):
        picture = Image.open(io.BytesIO(server.view(shown[name]["images"][0])))
        assert np.asarray(picture).std() > 0
    again = server.wait(server.queue(prompt))
    assert again["outputs"].keys() <= history["outputs"].keys()  # nothing has changed, so nothing is drawn anew


@pytest.mark.parametrize(
    ("class_type", "changes", "words"),
    [
        ("DreamBoothScoreTable", {"prompts": ""}, ("no prompt",)),
        ("DreamBoothScoreTable", {"prompts": "a\nb"}, ("1 pictures for 2 prompts", "same number")),
        ("DreamBoothScoreTable", {"name": "../x"}, ("name",)),
        ("DreamBoothScoreTable", {"clip_model": ""}, ("no model", "Choose a CLIP")),
        ("DreamBoothClipScore", {"prompts": "a\nb"}, ("2 prompts for 1 pictures",)),
    ],
)
def test_bad_input_is_named(
    class_type: str, changes: dict[str, Any], words: tuple[str, ...], server: ComfyServer
) -> None:
    given: dict[str, Any] = {"clip_model": "world", "download": False, "prompts": "a tree"}
    if class_type == "DreamBoothScoreTable":
        given |= {"settings.images_0": ["image", 0], "titles": "one", "dino_model": "", "name": "bad"}
    else:
        given |= {"images": ["image", 0]}
    with pytest.raises(PromptFailed) as failure:
        server.wait(
            server.queue({"image": node("LoadImage", image="drawn.png"), "n": node(class_type, **given | changes)})
        )
    for word in words:
        assert word in failure.value.exception_message
