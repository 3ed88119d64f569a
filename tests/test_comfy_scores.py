"""Scores in a real ComfyUI over HTTP, with the demo's CLIP."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from comfy_host import ComfyServer, PromptFailed, find_comfyui
from helpers import DEMO, ROOT, Recorder
from pack.trainer.feature_models import open_feature_model
from pack.trainer.pictures import load_pictures
from pack.trainer.scores import clip_t, subject_score
from PIL import Image
from test_nodes import node

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI with the demo's subject as input and its CLIP as a feature model."""
    base_dir = tmp_path_factory.mktemp("comfy scores ü")
    shutil.copytree(DEMO / "subject", base_dir / "input" / "dog")
    shutil.copytree(DEMO / "scorer", base_dir / "models" / "feature_models" / "world")
    Image.open(DEMO / "style" / "00.png").convert("RGB").save(base_dir / "input" / "drawn.png")
    with ComfyServer(base_dir, pack=ROOT, pack_name="dreambooth-lora") as running:
        yield running


def test_scores_are_the_engines(server: ComfyServer) -> None:
    prompt = {
        "image": node("LoadImage", image="drawn.png"),
        "subject": node("DreamBoothSubject", folder="dog", token="sks", class_noun="dog", caption="a {token} {class}"),
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
