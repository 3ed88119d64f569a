"""What docs/learning.md says is what the committed results say, and the subjects are what they were."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import ROOT
from pack.trainer.settings.train import TrainCommand

RESULTS = ROOT / "benchmarks" / "results" / "learning"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("learning_tables")


def test_the_page_holds_the_tables_of_the_results(tables: ModuleType) -> None:
    text = tables.as_page(tables.load_results(RESULTS), RESULTS)
    page = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    assert f"{tables.BEGIN}\n\n{text}\n{tables.END}" in page, (
        "python benchmarks/learning.py table --page docs/learning.md"
    )


def test_every_result_stands_where_its_facts_say() -> None:
    for path in RESULTS.glob("*/*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if path.parts[-2] != "search":
            assert path.relative_to(RESULTS).as_posix() == f"{result['way']}/{result['subject']}-{result['seed']}.json"


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("learning_ways")


def test_every_way_has_settings_that_the_trainer_takes(ways: ModuleType) -> None:
    trials = ({**ways.PRIOR_MODEL, **changes} for changes in ways.single_changes().values())
    for changes in (*ways.WAYS.values(), *trials):
        values = ways.filled({**ways.RECIPE, **changes}, "dog")
        settings = TrainCommand.checked({**values, "base": "base", "images": "images"})
        assert settings.without_effect() == {}
        assert settings.instance_prompt == "a photo of sks dog"


def test_the_best_changes_are_joined(ways: ModuleType) -> None:
    titles = ["rank 4", "rank 32", "targets attention", "learning_rate 0.0004"]
    assert ways.joint_changes(titles) == {
        "rank 4, targets attention": {"rank": 4, "targets": "attention"},
        "rank 4, targets attention, learning_rate 0.0004": {"rank": 4, "targets": "attention", "learning_rate": 4e-4},
    }
    assert ways.joint_changes(["rank 4", "rank 32"]) == {}


@pytest.mark.slow
def test_kohya_gets_the_same_latents(ways: ModuleType, tmp_path: Path) -> None:
    """Its scripts multiply by 0.18215, whatever the base says."""
    base = ROOT / "demo" / "base"
    ways.write_with_usual_scale(base, tmp_path / "base")
    ours, theirs = (AutoencoderKL.from_pretrained(folder, subfolder="vae") for folder in (base, tmp_path / "base"))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, given = (vae.float().encode(pixels).latent_dist for vae in (ours, theirs))
        latents = expected.mean * ours.config.scaling_factor
        torch.testing.assert_close(given.mean * 0.18215, latents)
        torch.testing.assert_close(given.std * 0.18215, expected.std * ours.config.scaling_factor)
        decoded = [
            vae.decode(latents / scale).sample for vae, scale in ((ours, ours.config.scaling_factor), (theirs, 0.18215))
        ]
    torch.testing.assert_close(*decoded, atol=1e-4, rtol=1e-4)


def test_seeds_are_averaged_over_subjects_first(tables: ModuleType) -> None:
    mean, spread = tables.mean_and_spread([(0, 1.0), (0, 3.0), (1, 4.0), (1, 4.0)])
    assert mean == 3
    assert spread == pytest.approx(2**0.5)
    assert tables.mean_and_spread([(0, 1.0), (0, 3.0)]) == (2, 0)


def test_a_seed_that_lacks_subjects_does_not_count(tables: ModuleType) -> None:
    assert tables.mean_and_spread([(0, 1.0), (0, 3.0), (1, 9.0)]) == (2, 0)


def test_what_is_missing_is_listed(tables: ModuleType) -> None:
    results = [{"way": "none", "subject": "dog", "seed": 1}]
    missing = tables.missing_jobs(results, ["none"])
    assert len(missing) == 4 * 3 - 1
    assert "none, dog, seed 1" not in missing
    assert "none, dog, seed 0" in missing


def test_the_world_draws_what_it_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own subject to the pixel (its pictures are drawn with Pillow alone), and four others, each in a coat
    of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    world = importlib.import_module("world")
    subjects = importlib.import_module("subjects").SUBJECTS
    drawn = {
        name: hashlib.sha256(subject.picture("at night", random.Random(3)).tobytes()).hexdigest()
        for name, subject in subjects.items()
    }
    assert set(drawn) == {"dog", "cat", "robot", "mug"}
    again = subjects["dog"].picture("at night", random.Random(3))
    assert hashlib.sha256(again.tobytes()).hexdigest() == drawn["dog"]
    demo_dog = world.subject_picture("at night", random.Random(3))
    assert demo_dog.tobytes() != again.tobytes()  # the same dog in the same place, in another coat
    assert [picture.size for picture in subjects["mug"].training_pictures()] == [(64, 64)] * 5
