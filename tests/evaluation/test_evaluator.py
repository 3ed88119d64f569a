"""Marks are the papers' formulas on the judges' features, and a prompt loses its rare word, not its grammar."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import DEMO, Recorder
from pack.trainer.core.errors import CancelledError, PicturesError, SettingsError
from pack.trainer.core.prompts import split_prompts, without_token
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.evaluation.evaluator import (
    Evaluator,
    best_index,
    best_step,
    early_stop_step,
    fidelity_and_drift,
    overall_score,
)
from pack.trainer.evaluation.feature_extractors import FeatureExtractors, FeatureModel, open_feature_model

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["a photo of sks dog", "the sks dog on the grass"]
CLASS_PROMPTS = ["a photo of a dog", "the dog on the grass"]


@pytest.fixture(scope="module")
def clip() -> FeatureModel:
    return open_feature_model(DEMO / "scorer", torch.device("cpu"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> FeatureModel:
    """A tiny DINO of random weights."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    preprocessing = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return open_feature_model(folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def subject() -> list[Picture]:
    return load_pictures(DEMO / "subject", "", Recorder())


@pytest.fixture(scope="module")
def others() -> list[Picture]:
    """Sixteen pictures of the demo's world."""
    return load_pictures(DEMO / "style", "", Recorder())[:16]


def evaluation(extractors: FeatureExtractors, references: Sequence[Picture], **changes: Any) -> Evaluator:
    given = {"prompts": PROMPTS, "token": "sks", "listener": Recorder(), **changes}
    return Evaluator(extractors, references, **given)


def looked(model: FeatureModel, pictures: Sequence[Picture]) -> np.ndarray[Any, Any]:
    """Features of pictures, without the judges' memory."""
    return model.image_features([one.open() for one in pictures]).double().numpy()


def cosines(rows: Any, others: Any) -> list[float]:
    return [float(one @ other) for one in rows for other in others]


def unlikeness(rows: Any) -> float:
    return 1 - float(np.mean([one @ other for one, other in itertools.permutations(rows, 2)]))


@pytest.mark.parametrize("names", [("CLIP",), ("DINO",), ("CLIP", "DINO")], ids="+".join)
def test_marks_are_the_formulas(
    names: tuple[str, ...], clip: FeatureModel, dino: FeatureModel, subject: list[Picture], others: list[Picture]
) -> None:
    """Two pictures of each of two prompts, four of the class before, four after."""
    models = {name: model for name, model in (("CLIP", clip), ("DINO", dino)) if name in names}
    drawn, before, after = others[:4], others[4:8], others[8:12]
    expected: dict[str, float] = {}
    for name, model in models.items():
        rows, plain, moved, real = (looked(model, part) for part in (drawn, before, after, subject))
        expected["CLIP-I" if name == "CLIP" else "DINO"] = float(np.mean(cosines(rows, real)))
        expected[f"drift ({name})"] = 1 - float(np.mean([a @ b for a, b in zip(plain, moved, strict=True)]))
        # DINO comes last and has the say
        expected["diversity"] = float(np.mean([unlikeness(rows[:2]), unlikeness(rows[2:])]))
        expected["class diversity"] = float(np.mean([unlikeness(moved[:2]), unlikeness(moved[2:])]))
    if "CLIP" in names:
        said = clip.text_features(CLASS_PROMPTS).double().numpy()
        expected["CLIP-T"] = float(np.mean([one @ said[i // 2] for i, one in enumerate(looked(clip, drawn))]))
        clipped = [max(0.0, float(one @ said[i // 2])) for i, one in enumerate(looked(clip, drawn))]
        expected["CLIPScore"] = 100 * float(np.mean(clipped))
    marks = evaluation(FeatureExtractors(*(models.get(name) for name in ("CLIP", "DINO"))), subject).compute_metrics(
        drawn, before, after
    )
    assert marks == pytest.approx(expected, abs=1e-5)
    assert fidelity_and_drift(marks) == tuple(
        pytest.approx(expected[key], abs=1e-5)
        for key in (("DINO", "drift (DINO)") if "DINO" in names else ("CLIP-I", "drift (CLIP)"))
    )


def test_one_picture_of_each_prompt_has_no_diversity(
    clip: FeatureModel, subject: list[Picture], others: list[Picture]
) -> None:
    marks = evaluation(FeatureExtractors(clip), subject).compute_metrics(others[:2], others[2:4], others[4:6])
    assert set(marks) == {"CLIP-T", "CLIPScore", "CLIP-I", "drift (CLIP)"}


def test_marks_of_each_prompt_add_up(
    clip: FeatureModel, dino: FeatureModel, subject: list[Picture], others: list[Picture]
) -> None:
    """And without pictures of the class nothing is said of it."""
    judged = evaluation(FeatureExtractors(clip, dino), subject)
    marks, [one, other] = judged.compute_metrics(others[:6], [], []), judged.by_prompt(others[:6])
    assert set(marks) - set(one) == {"diversity"}
    assert {name: (one[name] + other[name]) / 2 for name in one} == pytest.approx(
        {name: marks[name] for name in one}, abs=1e-5
    )
    assert one["DINO"] == pytest.approx(np.mean(cosines(looked(dino, others[:3]), looked(dino, subject))), abs=1e-5)
    assert fidelity_and_drift(marks) == (marks["DINO"], 0.0)


def test_a_class_that_stays_does_not_drift(clip: FeatureModel, subject: list[Picture], others: list[Picture]) -> None:
    judged = evaluation(FeatureExtractors(clip), subject)
    same = judged.compute_metrics(others[:2], others[2:4], others[2:4])
    swapped = judged.compute_metrics(others[:2], others[2:4], others[3:1:-1])
    assert same["drift (CLIP)"] == pytest.approx(0, abs=1e-6)
    assert swapped["drift (CLIP)"] > 0.01


def test_the_subject_itself_scores_above_others(
    clip: FeatureModel, subject: list[Picture], others: list[Picture]
) -> None:
    """The top of the scale leaves each picture out of its own score; one alone has none."""
    judged = evaluation(FeatureExtractors(clip), subject)
    real = judged.reference_metrics()
    assert real == {"CLIP-I": pytest.approx(1 - unlikeness(looked(clip, subject)), abs=1e-5)}
    assert real["CLIP-I"] > judged.compute_metrics(others[:4], others[:4], others[:4])["CLIP-I"]
    assert evaluation(FeatureExtractors(clip), subject[:1]).reference_metrics() == {}


def test_each_measure_has_its_own_top(clip: FeatureModel, dino: FeatureModel, subject: list[Picture]) -> None:
    assert evaluation(FeatureExtractors(clip, dino), subject).reference_metrics() == {
        "CLIP-I": pytest.approx(1 - unlikeness(looked(clip, subject)), abs=1e-5),
        "DINO": pytest.approx(1 - unlikeness(looked(dino, subject)), abs=1e-5),
    }


def test_class_prompts_lose_the_rare_word(clip: FeatureModel, subject: list[Picture]) -> None:
    assert evaluation(FeatureExtractors(clip), subject).class_prompts == CLASS_PROMPTS


def test_marking_can_be_stopped(clip: FeatureModel, subject: list[Picture], others: list[Picture]) -> None:
    with pytest.raises(CancelledError):
        evaluation(FeatureExtractors(clip), subject, listener=Recorder(stop_after=1)).compute_metrics(
            others[:2], others[:2], others[:2]
        )


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"prompts": []}, SettingsError, "no prompt"),
        ({"references": []}, PicturesError, "no pictures of the subject"),
        ({"prompts": ["a photo of a dog"]}, SettingsError, "'a photo of a dog' does not contain the rare word 'sks'"),
        ({"prompts": ["sks dog", "a  photo\nof a dog "]}, SettingsError, "does not contain the rare word 'sks'"),
        ({"prompts": ["a photo of sksy dog"]}, SettingsError, "does not contain the rare word 'sks'"),
        ({"token": "ohwx"}, SettingsError, "does not contain the rare word 'ohwx'"),
        ({"token": " "}, SettingsError, "does not contain the rare word"),
    ],
    ids=str,
)
def test_what_can_not_be_measured_is_named(
    changes: dict[str, Any], error: type[Exception], problem: str, clip: FeatureModel, subject: list[Picture]
) -> None:
    values = dict(changes)
    with pytest.raises(error, match=problem) as caught:
        evaluation(FeatureExtractors(clip), values.pop("references", subject), **values)
    assert getattr(caught.value, "remedy", "")


@pytest.mark.parametrize(
    ("prompt", "token", "expected"),
    [
        # an article where there is none after a preposition, the noun's own where there was the token's
        ("a photo of sks dog", "sks", "a photo of a dog"),
        ("a photo of sks owl", "sks", "a photo of an owl"),
        ("a sks owl on grass", "sks", "an owl on grass"),
        ("an sks dog", "sks", "a dog"),
        ("a painting of sks dog and sks owl", "sks", "a painting of a dog and an owl"),
        # none where something else stands before the noun, or nothing
        ("sks dog", "sks", "dog"),
        ("the sks dog", "sks", "the dog"),
        ("my sks dog in your sks hat", "sks", "my dog in your hat"),
        ("a photo of a small sks dog", "sks", "a photo of a small dog"),
        ("two sks dogs", "sks", "two dogs"),
        ("photo of sks dog, sks dog on grass", "sks", "photo of a dog, dog on grass"),
        # no noun follows
        ("a photo of dog sks", "sks", "a photo of dog"),
        ("a photo of sks wearing a hat", "sks", "a photo of wearing a hat"),
        ("sks", "sks", ""),
        # punctuation
        ("a photo of sks dog.", "sks", "a photo of a dog."),
        ("a dog sks, in the snow", "sks", "a dog, in the snow"),
        ("dog, sks, snow", "sks", "dog, snow"),
        ("is this a dog sks?", "sks", "is this a dog?"),
        # more than one word, more than once
        ("a photo of xyz abc dog", "xyz abc", "a photo of a dog"),
        ("a photo of xyz abc, xyz", "xyz abc", "a photo of, xyz"),
        ("a sks sks dog", "sks", "a dog"),
        # not there: to the letter
        ("a photo of xyz dog", "xyz abc", "a photo of xyz dog"),
        ("a photo  of\na dog ", "sks", "a photo  of\na dog "),
        ("a photo of sksy dog", "sks", "a photo of sksy dog"),
        ("a photo  of sks dog", " ", "a photo  of sks dog"),
        ("", "sks", ""),
    ],
)
def test_a_prompt_without_its_rare_word(prompt: str, token: str, expected: str) -> None:
    assert without_token(prompt, token) == expected
    assert without_token(expected, token) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", ["a dog"]),
        (" a dog | a cat|a hat ", ["a dog", "a cat", "a hat"]),
        ("a dog\n\n a cat\r\na hat", ["a dog", "a cat", "a hat"]),
        ("|a dog| |\n", ["a dog"]),
        ("a dog, a cat", ["a dog, a cat"]),
        ("a dog|a dog", ["a dog", "a dog"]),
        (" \n| ", []),
        ("", []),
    ],
)
def test_prompts_are_separated_by_bars_and_lines(text: str, expected: list[str]) -> None:
    assert split_prompts(text) == expected


def history(*marks: tuple[float, float], judge: str = "CLIP") -> dict[int, dict[str, float]]:
    """Fidelity and drift of the steps 0, 10, 20 …"""
    fidelity = "CLIP-I" if judge == "CLIP" else "DINO"
    return {10 * at: {fidelity: one, f"drift ({judge})": other} for at, (one, other) in enumerate(marks)}


@pytest.mark.parametrize("judge", ["CLIP", "DINO"])
@pytest.mark.parametrize(
    ("marks", "best", "stalled_by_patience"),
    [
        ([], 0, {1: None}),
        ([(0.9, 0.0)], 0, {1: None}),  # the base itself is no best one
        ([(0.9, 0.0), (0.5, 0.1)], 10, {1: None}),
        ([(0.9, 0.0), (0.5, 0.1), (0.4, 0.2)], 10, {1: 10, 2: None}),
        ([(0.0, 0.0), (0.5, 0.1), (0.4, 0.2), (0.3, 0.3)], 10, {1: 10, 2: 10, 3: None}),
        ([(0.0, 0.0), (0.5, 0.1), (0.4, 0.2), (0.6, 0.3)], 30, {1: None, 2: None}),
        ([(0.0, 0.0), (0.5, 0.1), (0.6, 0.2), (0.4, 0.3)], 20, {1: 20, 2: None}),
        ([(0.0, 0.0), (0.5, 0.1), (0.4, 0.05), (0.4, 0.1)], 10, {1: None, 2: None}),  # the class came back
        ([(0.0, 0.0), (0.5, 0.1), (0.4, 0.05), (0.4, 0.11)], 10, {1: 10, 2: 10}),  # the last one says
        ([(0.0, 0.0), (0.5, 0.1), (0.5, 0.2)], 10, {1: 10}),  # as good is no better: the first, with less drift
    ],
)
def test_when_to_stop(
    marks: list[tuple[float, float]], best: int, stalled_by_patience: dict[int, int | None], judge: str
) -> None:
    told = history(*marks, judge=judge)
    assert best_step(told) == best
    assert {patience: early_stop_step(told, patience) for patience in stalled_by_patience} == stalled_by_patience


def test_dino_has_the_say_if_both_judged() -> None:
    """The paper's first choice: CLIP sees a rise where DINO sees none."""
    clip, dino = history((0, 0), (0.1, 0.1), (0.9, 0.1)), history((0, 0), (0.5, 0.1), (0.4, 0.2), judge="DINO")
    both = {step: clip[step] | dino[step] for step in clip}
    assert (early_stop_step(clip, 1), early_stop_step(dino, 1), early_stop_step(both, 1)) == (None, 10, 10)


def test_balance_weighs_fidelity_and_following() -> None:
    """It is the geometric mean, by DINO if it judged; nothing below zero counts, and without CLIP-T fidelity alone."""
    marks = {"DINO": 0.36, "CLIP-I": 0.9, "CLIP-T": 0.25}
    assert overall_score(marks) == pytest.approx((0.36**2 * 0.25) ** (1 / 3))
    assert overall_score({name: 4 * value for name, value in marks.items()}) == pytest.approx(4 * overall_score(marks))
    assert overall_score(marks | {"CLIP-T": -0.1}) == overall_score(marks | {"DINO": -0.1}) == 0
    assert overall_score({"DINO": 0.36}) == 0.36


@pytest.mark.parametrize(
    ("fidelity_following_drift", "best"),
    [
        ([(0.5, 0.2, 0.3)], 0),
        ([(0.5, 0.2, 0.1), (0.8, 0.2, 0.3)], 1),
        ([(0.8, 0.2, 0.3), (0.799, 0.2, 0.1)], 1),  # as good, with less drift
        ([(0.8, 0.2, 0.3), (0.7, 0.2, 0.1)], 0),
        ([(0.8, 0.1, 0.1), (0.7, 0.3, 0.3)], 1),
        ([(0.8, 0.2, 0.3), (0.8, 0.2, 0.3)], 0),
    ],
)
def test_which_of_several_to_keep(fidelity_following_drift: list[tuple[float, float, float]], best: int) -> None:
    names = ("CLIP-I", "CLIP-T", "drift (CLIP)")
    assert best_index([dict(zip(names, values, strict=True)) for values in fidelity_following_drift]) == best
