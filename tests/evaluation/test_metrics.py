"""Scores: features as transformers' own models give them, the papers' means, the command, and bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from feature_worlds import MEAN, SIZES, STD, picture, processor
from helpers import DEMO, Recorder
from pack.trainer.__main__ import main
from pack.trainer.cli.evaluate import run_score
from pack.trainer.core.errors import PicturesError, SettingsError, WeightsError
from pack.trainer.data.images import load_pictures
from pack.trainer.evaluation.feature_extractors import FeatureExtractors, FeatureModel, open_feature_model
from pack.trainer.evaluation.metrics import clip_score, clip_t, diversity, drift, leave_one_out_score, subject_score
from pack.trainer.evaluation.score_table import score_pictures
from pack.trainer.settings.evaluate import ScoreCommand
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CPU = torch.device("cpu")


def write(folder: Path, network: Any, preprocessing: dict[str, Any]) -> Path:
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models of every kind, as transformers writes them."""
    root = tmp_path_factory.mktemp("models ü")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    tower = transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=8, projection_dim=16)
    found = {
        "clip": DEMO / "scorer",
        "clip_vision_model": write(
            root / "clip vision", transformers.CLIPVisionModelWithProjection(tower), processor(32)
        ),
        "dinov2": write(
            root / "dinov2",
            transformers.Dinov2Model(transformers.Dinov2Config(**vision, image_size=28, patch_size=14)),
            processor(28),
        ),
    }
    vit = transformers.ViTConfig(**vision, image_size=32, patch_size=16)
    plain = {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3, "do_rescale": True}
    plain |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD}
    found["vit"] = write(root / "dino", transformers.ViTModel(vit, add_pooling_layer=False), plain)
    return found


def expected_pixels(image: Image.Image, side: int, crop: bool, mean: Any, std: Any) -> Tensor:
    """Bicubic, antialiased, cropped in the middle, normalised: written out once more, on Pillow alone."""
    image = image.convert("RGB")
    if crop:
        short = min(image.size)
        width, height = (max(side, int(side * one / short)) for one in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


def plain_feature(model: FeatureModel, kind: str, image: Image.Image) -> Tensor:
    """What transformers' network says of one picture, (width,), normalised."""
    mean, std = ((0.5,) * 3, (0.5,) * 3) if kind == "clip" else (MEAN, STD)
    pixels = expected_pixels(image, {"clip": 64, "dinov2": 28}.get(kind, 32), kind != "vit", mean, std)
    with torch.no_grad():
        if kind == "clip":
            pooled = model.network.visual_projection(model.network.vision_model(pixels).pooler_output)
        elif kind == "clip_vision_model":
            pooled = model.network(pixels).image_embeds
        else:
            pooled = model.network(pixels).last_hidden_state[:, 0]
    return F.normalize(pooled, dim=-1)[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["clip", "clip_vision_model", "dinov2", "vit"])
def test_features_are_those_of_the_model(kind: str, mode: str, folders: dict[str, Path]) -> None:
    model = open_feature_model(folders[kind], CPU)
    images = [picture(size, number, mode) for number, size in enumerate(SIZES)]
    found = model.image_features(images)
    for image, row in zip(images, found, strict=True):
        torch.testing.assert_close(row, plain_feature(model, kind, image), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(images)))


def test_prompts_are_read_as_clip_reads_them(folders: dict[str, Path]) -> None:
    model = open_feature_model(folders["clip"], CPU)
    prompts = ["a photo of a red dog", "a house at night " * 30]
    tokens = model.tokenizer(prompts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        pooled = model.network.text_projection(model.network.text_model(**tokens).pooler_output)
    torch.testing.assert_close(model.text_features(prompts), F.normalize(pooled, dim=-1), atol=1e-5, rtol=0)


def test_the_demo_scorer_knows_its_world(folders: dict[str, Path]) -> None:
    model = open_feature_model(folders["clip"], CPU)
    [seen] = load_pictures(DEMO / "subject", "", Recorder())[:1]
    right, wrong = model.text_features(["a dog on the grass", "a car in the water"])
    features = model.image_features([seen.open()])[0]
    assert float(features @ right) > float(features @ wrong) + 0.1


class ForTorchmetrics(transformers.CLIPModel):
    """Gives features as tensors, as every transformers before the fifth did: torchmetrics takes no others."""

    def get_image_features(self, *words: Any, **more: Any) -> Tensor:
        found = super().get_image_features(*words, **more)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, *words: Any, **more: Any) -> Tensor:
        found = super().get_text_features(*words, **more)
        return getattr(found, "pooler_output", found)


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_clip_score_is_that_of_torchmetrics() -> None:
    """Pictures of the subject, and noise of any size that is far from its prompt."""
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal")
    ours = open_feature_model(DEMO / "scorer", CPU)
    network = ForTorchmetrics.from_pretrained(DEMO / "scorer").float()
    theirs = network, transformers.CLIPProcessor(ours.processor, ours.tokenizer)
    images = [one.open() for one in load_pictures(DEMO / "subject", "", Recorder())]
    images += [picture(size, number) for number, size in enumerate(SIZES)]
    prompts = ["a dog on the grass", "a car in the water", "a dog"] * 3
    features, said = ours.image_features(images), ours.text_features(prompts)
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    with torch.no_grad():
        each = [float(multimodal.clip_score(*pair, lambda: theirs)) for pair in zip(tensors, prompts, strict=True)]
        together = float(multimodal.clip_score(tensors, prompts, lambda: theirs))
    assert min(each) == 0
    assert max(each) > 40
    assert clip_score(features, said).tolist() == pytest.approx(each, abs=1e-2)
    assert max(0.0, 100 * float(clip_t(features, said).mean())) == pytest.approx(together, abs=1e-2)


# Arithmetic


def rows(*values: tuple[float, ...]) -> Tensor:
    return F.normalize(torch.tensor(values, dtype=torch.float32), dim=1)


def test_clip_t_in_both_habits() -> None:
    pictures, prompts = rows((1, 0), (0, 1), (1, 1)), rows((1, 0), (0, -1), (1, 0))
    assert clip_t(pictures, prompts).tolist() == pytest.approx([1, -1, 0.5**0.5])
    assert clip_score(pictures, prompts).tolist() == pytest.approx([100, 0, 100 * 0.5**0.5])
    assert clip_t(pictures, prompts[:1]).tolist() == pytest.approx([1, 0, 0.5**0.5])
    with pytest.raises(PicturesError, match="2 prompts for 3 pictures"):
        clip_t(pictures, prompts[:2])


def test_pairwise_means_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, references = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (4, 5))
    expected = np.mean([[float(a @ b) for b in references] for a in pictures])
    assert float(subject_score(pictures, references).mean()) == pytest.approx(expected, abs=1e-6)
    left_out = np.mean([float(a @ b) for i, a in enumerate(references) for j, b in enumerate(references) if i != j])
    assert leave_one_out_score(references) == pytest.approx(left_out, abs=1e-6)
    assert diversity(references) == pytest.approx(1 - left_out, abs=1e-6)
    assert drift(references, references) == pytest.approx(0, abs=1e-6)
    assert drift(references, -references) == pytest.approx(2, abs=1e-6)


def test_a_reference_is_not_compared_with_itself() -> None:
    pictures = rows((1, 0), (0, 1))
    same = torch.eye(2, dtype=torch.bool)
    assert subject_score(pictures, pictures, same).tolist() == pytest.approx([0, 0])
    with pytest.raises(PicturesError, match="no reference other than itself"):
        subject_score(pictures[:1], pictures[:1], same[:1, :1])
    with pytest.raises(PicturesError, match="two pictures"):
        diversity(pictures[:1])


# Tables and the command


def test_a_table_of_all_measures(folders: dict[str, Path], tmp_path: Path) -> None:
    clip, dino = (open_feature_model(folders[kind], CPU) for kind in ("clip", "vit"))
    subject = load_pictures(DEMO / "subject", "", Recorder())
    listener = Recorder()
    table = score_pictures(subject[:2], ["a dog"], subject, FeatureExtractors(clip, dino), listener)
    assert list(table.rows[0]) == ["picture", "prompt", "CLIP-T", "CLIPScore", "CLIP-I", "DINO"]
    assert table.models == {"CLIP-T": "scorer", "CLIP-I": "scorer", "DINO": "dino"}
    assert "2 of the pictures are also references" in table.notes[0]
    features = clip.image_features([one.open() for one in subject])
    assert table.rows[0]["CLIP-I"] == pytest.approx(float((features[0] @ features[1:].T).mean()), abs=1e-5)
    assert json.loads(json.dumps(table.as_json(), allow_nan=False))["means"]["DINO"] == table.means["DINO"]
    assert [row["picture"] for row in csv.DictReader(table.as_csv().splitlines())] == ["0.png", "1.png"]
    assert "DINO by dino" in table.as_text()


def test_likeness_is_the_mean_over_all_pairs(folders: dict[str, Path]) -> None:
    """DreamBooth's protocol, picture by picture: the mean over all pairs of a generated and a real one."""
    models = {kind: open_feature_model(folders[kind], CPU) for kind in ("clip", "vit")}
    drawn, real = (load_pictures(DEMO / part, "", Recorder()) for part in ("style", "subject"))
    table = score_pictures(drawn[:3], [], real, FeatureExtractors(*models.values()), Recorder())
    for measure, (kind, model) in zip(("CLIP-I", "DINO"), models.items(), strict=True):
        rows, others = ([plain_feature(model, kind, one.open()) for one in part] for part in (drawn[:3], real))
        cosines = [float(one @ other) for one in rows for other in others]
        assert len(cosines) == 15
        assert table.means[measure] == pytest.approx(sum(cosines) / 15, abs=1e-4)


def test_every_picture_is_opened_once(folders: dict[str, Path]) -> None:
    model = open_feature_model(folders["vit"], CPU)
    opened: list[str] = []
    subject = load_pictures(DEMO / "subject", "", Recorder())
    counted = [
        type(one)(one.name, one.caption, one.digest, lambda one=one: opened.append(one.name) or one.open())
        for one in subject
    ]
    score_pictures(counted[:2], [], counted[2:], FeatureExtractors(None, model), Recorder())
    assert sorted(opened) == sorted(one.name for one in subject)


def test_the_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = tmp_path / "drawn ü"
    shutil.copytree(DEMO / "subject", drawn)
    (drawn / "0.txt").write_text("a dog on the grass")
    words = [
        "score",
        str(drawn),
        "--prompt",
        "a dog",
        "--subject",
        str(DEMO / "subject"),
        "--clip",
        str(DEMO / "scorer"),
    ]
    assert main([*words, "--output", str(tmp_path / "scores.csv")]) == 0
    assert "CLIP-I" in capsys.readouterr().out
    found = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [row["prompt"] for row in found] == ["a dog on the grass", *["a dog"] * 4]
    assert "CLIP-T" in found[0]


def test_without_a_prompt_of_every_picture_none_counts(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(DEMO / "subject", pictures)
    (pictures / "0.txt").write_text("a dog on the grass")
    given = {"pictures": pictures, "subject": DEMO / "subject", "clip": str(DEMO / "scorer")}
    told = tmp_path / "scores.json"
    table = run_score(ScoreCommand.checked({**given, "output": told, "device": "cpu"}), Recorder())
    assert table.metrics == ["CLIP-I"]
    assert json.loads(told.read_text(encoding="utf-8")) == table.as_json()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ("clip", "dino")),
        ({"dino": "x"}, ("subject",)),
        ({"clip": "x"}, ("prompt",)),
        ({"clip": "x", "prompt": "a", "output": "a.txt"}, (".csv",)),
    ],
)
def test_settings_that_measure_nothing(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        ScoreCommand.checked({"pictures": "p", **values})
    for word in words:
        assert word in str(caught.value)


def test_bad_input_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    clip = open_feature_model(folders["clip"], CPU)
    vision = open_feature_model(folders["clip_vision_model"], CPU)
    subject = load_pictures(DEMO / "subject", "", Recorder())
    with pytest.raises(PicturesError, match="no pictures"):
        score_pictures([], ["a"], [], FeatureExtractors(clip, None), Recorder())
    with pytest.raises(PicturesError, match="7 prompts for 5 pictures"):
        score_pictures(subject, ["a"] * 7, [], FeatureExtractors(clip, None), Recorder())
    with pytest.raises(PicturesError, match="nothing to measure"):
        score_pictures(subject, [], [], FeatureExtractors(clip, None), Recorder())
    with pytest.raises(WeightsError, match="has no text encoder") as caught:
        score_pictures(subject, ["a"], [], FeatureExtractors(vision, None), Recorder())
    assert "whole CLIP" in caught.value.remedy
    with pytest.raises(WeightsError, match="can't be opened") as caught:
        open_feature_model("nobody/nothing", CPU)
    assert "preprocessor_config.json" in caught.value.remedy
    broken = FeatureModel(
        clip.name, clip.kind, clip.network, lambda *_, **__: {"pixel_values": torch.full((5, 3, 64, 64), torch.nan)}
    )
    with pytest.raises(PicturesError, match="NaN or infinite"):
        score_pictures(subject, [], subject, FeatureExtractors(broken, None), Recorder())
