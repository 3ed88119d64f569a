"""Class pictures are made once, topped up, used again, and never mixed up."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from checkpoints import sd15_checkpoint
from helpers import TINY, Recorder
from pack.trainer.core.errors import CancelledError, OutOfMemoryError, StorageError, TrainerError
from pack.trainer.core.events import Phase
from pack.trainer.data.class_images import by_prompt, class_images_folders, generate_class_images
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.families.stable_diffusion import StableDiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import PriorSettings, SchedulerName, TrainSettings
from pack.trainer.training.runs.folder import RunPaths
from PIL import Image

CPU = torch.device("cpu")
FEW = PriorSettings(class_prompt="a photo of a dog", prior_count=2, prior_steps=2)


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> BaseWeights:
    return open_base(tiny_checkpoint)


@pytest.fixture(scope="module")
def made(base: BaseWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root where the pictures of `FEW` lie already; tests may add others."""
    root = tmp_path_factory.mktemp("class pictures")
    make(base, root)
    return root


def changed(settings: PriorSettings = FEW, **values: Any) -> PriorSettings:
    return PriorSettings.checked(settings.model_dump() | values)


def make(
    base: BaseWeights, root: Path, settings: PriorSettings = FEW, resolution: int = 64, listener: Recorder | None = None
) -> list[Picture]:
    return generate_class_images(base, settings, resolution, root, CPU, "fp32", listener or Recorder())


def drawn(root: Path) -> dict[Path, tuple[int, int, str]]:
    """Every picture file with what would change if it were written again: inode, time, content."""
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(root.glob("*/*.png"))
    }


def test_pictures_are_made_and_kept(base: BaseWeights, tmp_path: Path) -> None:
    listener = Recorder()
    pictures = make(base, tmp_path, changed(prior_count=3, prior_batch_size=2), listener=listener)
    files = drawn(tmp_path)
    assert [path.name for path in files] == ["00000.png", "00001.png", "00002.png"]
    assert [picture.digest for picture in pictures] == [content for _, _, content in files.values()]
    assert len({picture.digest for picture in pictures}) == 3
    assert {picture.caption for picture in pictures} == {"a photo of a dog"}
    assert {picture.open().size for picture in pictures} == {(64, 64)}
    assert listener.events == [Phase("class pictures", done, 3) for done in (0, 2, 3)]


def test_pictures_that_match_are_used_again(base: BaseWeights, made: Path) -> None:
    files, listener = drawn(made), Recorder()
    pictures = make(base, made, listener=listener)
    assert drawn(made) == files
    assert {picture.digest for picture in pictures} <= {content for _, _, content in files.values()}
    assert not [event for event in listener.events if isinstance(event, Phase)]


def test_fewer_are_the_first_of_those_there(base: BaseWeights, tmp_path: Path) -> None:
    three = make(base, tmp_path, changed(prior_count=3))
    files = drawn(tmp_path)
    one = make(base, tmp_path, changed(prior_count=1))
    assert [picture.digest for picture in one] == [three[0].digest]
    assert drawn(tmp_path) == files


def test_too_few_are_topped_up(base: BaseWeights, tmp_path: Path) -> None:
    make(base, tmp_path / "slowly", changed(prior_count=2, prior_batch_size=1))
    before = drawn(tmp_path / "slowly")
    slowly = make(base, tmp_path / "slowly", changed(prior_count=5, prior_batch_size=2))
    after = drawn(tmp_path / "slowly")
    assert {path: after[path] for path in before} == before
    at_once = make(base, tmp_path / "at once", changed(prior_count=5, prior_batch_size=5))
    for one, other in zip(slowly, at_once, strict=True):
        np.testing.assert_allclose(np.array(one.open()).astype(int), np.array(other.open()), atol=1)
    assert len({picture.digest for picture in slowly}) == 5


def test_a_gap_is_filled_with_the_same_picture(base: BaseWeights, tmp_path: Path) -> None:
    make(base, tmp_path, changed(prior_count=3, prior_batch_size=1))
    before = drawn(tmp_path)
    gap = list(before)[1]
    gap.unlink()
    make(base, tmp_path, changed(prior_count=3, prior_batch_size=1))
    after = drawn(tmp_path)
    assert after[gap][2] == before[gap][2]
    assert {path: state for path, state in after.items() if path != gap} == {
        path: state for path, state in before.items() if path != gap
    }


@pytest.mark.parametrize(
    "change",
    [
        {"class_prompt": "a photo of a cat"},
        {"prior_scheduler": "euler"},
        {"prior_steps": 3},
        {"prior_guidance": 3.0},
        {"prior_guidance_start": 0.5},
        {"prior_guidance_end": 0.5},
        {"prior_seed": 100},
        {"resolution": 72},
        {"base": "another"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_makes_others_elsewhere(
    base: BaseWeights, made: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    files, folders = drawn(made), set(made.iterdir())
    values = dict(change)
    resolution = values.pop("resolution", 64)
    if values.pop("base", None):
        base = open_base(_other_checkpoint(tmp_path))
    pictures = make(base, made, changed(**values), resolution)
    assert drawn(made).items() > files.items()
    [folder] = set(made.iterdir()) - folders
    assert {path.name for path in folder.iterdir()} == {"00000.png", "00001.png", "settings.json"}
    assert not {picture.digest for picture in pictures} & {content for _, _, content in files.values()}


def _other_checkpoint(folder: Path) -> Path:
    """The tiny model with other weights, under the very name of the first."""
    path = sd15_checkpoint(folder / "other" / "tiny.safetensors", size=TINY, seed=1)
    (path.parent / "tokenizer").symlink_to(Path(__file__).parents[2] / "demo" / "base" / "tokenizer")
    return path


@pytest.mark.parametrize(
    "change",
    [{"prior_batch_size": 1}, {"prior_count": 1}, {"prior_guidance_end": 0.8}],  # its default
    ids=lambda change: next(iter(change)),
)
def test_what_changes_no_picture_changes_no_folder(base: BaseWeights, made: Path, change: dict[str, Any]) -> None:
    files = drawn(made)
    make(base, made, changed(**change))
    assert drawn(made) == files


def test_an_interval_changes_nothing_without_guidance(base: BaseWeights, tmp_path: Path) -> None:
    make(base, tmp_path, changed(prior_guidance=1.0))
    files = drawn(tmp_path)
    make(base, tmp_path, changed(prior_guidance=1.0, prior_guidance_start=0.5))
    assert drawn(tmp_path) == files


EARLIER: dict[str, Any] = {  # the defaults of version 0.4
    "prior_scheduler": "ddim",
    "prior_steps": 30,
    "prior_guidance": 7.5,
    "prior_guidance_start": 0.0,
    "prior_guidance_end": 1.0,
}


def test_the_defaults_take_at_most_half_of_the_passes(
    base: BaseWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def predict(self: StableDiffusionModel, latents: torch.Tensor, *_: Any) -> torch.Tensor:
        passes.append(len(latents))
        return 0.1 * latents

    monkeypatch.setattr(StableDiffusionModel, "predict", predict)
    asked = {"class_prompt": "a dog", "prior_count": 1}
    make(base, tmp_path, PriorSettings.checked(asked))
    of_defaults = sum(passes)
    passes.clear()
    make(base, tmp_path, PriorSettings.checked({**asked, **EARLIER}))
    assert (of_defaults, sum(passes)) == (24, 60)


@pytest.mark.parametrize("given", [{}, {"prior_steps": 2}, {"prior_scheduler": "pndm", "prior_steps": 3}], ids=str)
def test_what_an_earlier_version_generated_for_the_same_input_is_used(
    given: dict[str, Any], base: BaseWeights, tmp_path: Path
) -> None:
    """So that a run that was begun with those goes on; their folder is the one of that version."""
    asked = {"class_prompt": "a dog", "prior_count": 2, **given}
    earlier = make(base, tmp_path, PriorSettings.checked({**asked, **EARLIER, **given}))
    files = drawn(tmp_path)
    [folder] = tmp_path.iterdir()
    assert "guidance_interval" not in json.loads((folder / "settings.json").read_text())
    settings, listener = PriorSettings.checked(asked), Recorder()
    assert class_images_folders(tmp_path, base, settings, 64, "fp32") == [folder]
    pictures = make(base, tmp_path, settings, listener=listener)
    assert [picture.digest for picture in pictures] == [picture.digest for picture in earlier]
    assert drawn(tmp_path) == files
    [note] = listener.notes
    assert str(folder) in note
    assert "earlier version" in note


@pytest.mark.parametrize(
    "change",
    [{"prior_count": 3}, {"prior_scheduler": "dpm++"}, {"prior_guidance_start": 0.2}, {"prior_seed": 5}],
    ids=lambda change: next(iter(change)),
)
def test_what_an_earlier_version_did_not_generate_is_generated_anew(
    change: dict[str, Any], base: BaseWeights, tmp_path: Path
) -> None:
    """More than there are, or otherwise: also where the given value is the default of today."""
    asked = {"class_prompt": "a dog", "prior_count": 2, "prior_steps": 2}
    earlier = make(base, tmp_path, PriorSettings.checked({**EARLIER, **asked}))
    settings, listener = PriorSettings.checked({**asked, **change}), Recorder()
    pictures = make(base, tmp_path, settings, listener=listener)
    assert len(pictures) == settings.prior_count
    assert not {picture.digest for picture in pictures} & {picture.digest for picture in earlier}
    assert make(base, tmp_path, settings, listener=listener)[0].digest == pictures[0].digest
    assert not any("earlier version" in note for note in listener.notes)


def test_seeds_count_up(base: BaseWeights, tmp_path: Path) -> None:
    """Picture i of seed s is picture i - 1 of seed s + 1, also across the largest seed."""
    for seed in (0, 2**64 - 1):
        first = make(base, tmp_path, changed(prior_seed=seed, prior_batch_size=1))
        second = make(base, tmp_path, changed(prior_seed=(seed + 1) % 2**64, prior_batch_size=1))
        assert first[1].digest == second[0].digest
        assert first[0].digest != second[1].digest


def test_every_scheduler_draws_its_own_pictures(base: BaseWeights, tmp_path: Path) -> None:
    pictures, digests = {}, set()
    for name in get_args(SchedulerName):
        [picture] = make(base, tmp_path, changed(prior_scheduler=name, prior_steps=4, prior_count=1))
        pictures[name] = np.array(picture.open()).astype(int)
        digests.add(picture.digest)
    assert set(pictures) == {"ddim", "pndm", "euler", "dpm++"}
    assert len(digests) == 4
    for one, other in itertools.combinations(pictures, 2):
        difference = np.abs(pictures[one] - pictures[other]).max()
        if {one, other} == {"ddim", "euler"}:  # both take Euler steps on one equation (Song et al. 2021, section 4.3)
            assert difference <= 3
        else:
            assert difference > 3, f"{one} draws as {other}"


def test_cancel_keeps_what_is_finished(base: BaseWeights, tmp_path: Path) -> None:
    class StopAfterTwo(Recorder):
        def should_stop(self) -> bool:
            return any(isinstance(event, Phase) and event.done >= 2 for event in self.events)

    settings = changed(prior_count=6, prior_batch_size=2)
    with pytest.raises(CancelledError):
        make(base, tmp_path, settings, listener=StopAfterTwo())
    before = drawn(tmp_path)
    assert [path.name for path in before] == ["00000.png", "00001.png"]
    listener = Recorder()
    assert len(make(base, tmp_path, settings, listener=listener)) == 6
    assert listener.events[0] == Phase("class pictures", 2, 6)
    after = drawn(tmp_path)
    assert {path: after[path] for path in before} == before


def test_cancel_within_a_picture(base: BaseWeights, tmp_path: Path) -> None:
    listener = Recorder(stop_after=5)
    with pytest.raises(CancelledError):
        make(base, tmp_path, changed(prior_steps=100), listener=listener)
    assert listener.steps_seen == 5
    assert not drawn(tmp_path)


def test_leftovers_of_a_killed_process_are_no_pictures(base: BaseWeights, tmp_path: Path) -> None:
    make(base, tmp_path)
    [folder] = {path.parent for path in drawn(tmp_path)}
    half = folder / ".tmp-0123abcd-00002.png"
    half.write_bytes(b"half a pict")
    os.utime(half, (0, 0))
    pictures = make(base, tmp_path, changed(prior_count=3))
    assert [picture.name for picture in pictures] == ["00000.png", "00001.png", "00002.png"]
    assert pictures[2].open().size == (64, 64)
    assert not list(folder.glob(".tmp-*"))


def test_a_damaged_picture_is_made_again_or_named(base: BaseWeights, tmp_path: Path, picture_folder: Any) -> None:
    """Never an error without a remedy from deep inside the training."""
    make(base, tmp_path / "priors")
    damaged = list(drawn(tmp_path / "priors"))[1]
    whole = damaged.read_bytes()
    before = np.asarray(Image.open(damaged).convert("RGB"), dtype=int)
    damaged.write_bytes(whole[: len(whole) // 2])
    settings = TrainSettings(steps=1, rank=1, resolution=64)
    subject = load_pictures(picture_folder(), "a photo of sks dog", Recorder())
    told: TrainerError | None = None
    try:
        priors = make(base, tmp_path / "priors")
        train(base, subject, priors, settings, RunPaths(tmp_path / "loras", tmp_path / "runs"), "cpu", Recorder())
    except TrainerError as error:
        told = error
    if told is None:
        # drawn alone now, not in a batch: the same picture up to rounding
        assert np.abs(np.asarray(Image.open(damaged).convert("RGB"), dtype=int) - before).max() <= 1
    else:
        assert damaged.name in told.problem
        assert told.remedy


def test_out_of_memory_says_what_to_lower(base: BaseWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = StableDiffusionModel.predict, itertools.count()

    def predict(self: StableDiffusionModel, *arguments: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, *arguments)

    monkeypatch.setattr(StableDiffusionModel, "predict", predict)
    with pytest.raises(OutOfMemoryError) as caught:
        make(base, tmp_path, changed(prior_count=2, prior_batch_size=1))
    assert "memory" in caught.value.problem
    assert "prior_batch_size" in caught.value.remedy
    assert [path.name for path in drawn(tmp_path)] == ["00000.png"]


def test_the_base_is_untouched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = open_base(tiny_checkpoint)
    before = {name: tensor.clone() for name, tensor in base.denoiser.tensors.items()}
    make(base, tmp_path)
    assert all(torch.equal(base.denoiser.tensors[name], tensor) for name, tensor in before.items())


def test_pictures_open_from_disk(base: BaseWeights, tmp_path: Path) -> None:
    [first, _] = make(base, tmp_path)
    [path, _] = drawn(tmp_path)
    with Image.open(path) as image:
        assert first.open().tobytes() == image.convert("RGB").tobytes()


def test_of_several_prompts_each_has_its_share(base: BaseWeights, made: Path) -> None:
    pictures = make(base, made, changed(class_prompt="a photo of a dog | a dog", prior_count=3))
    assert [picture.caption for picture in pictures] == ["a photo of a dog", "a photo of a dog", "a dog"]
    assert [picture.digest for picture in pictures[:2]] == [picture.digest for picture in make(base, made)]
    assert len({picture.digest for picture in pictures}) == 3


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([("a dog", 2)], {"a dog": 2}),
        ([("a dog", 2), ("a dog", 3)], {"a dog": 5}),
        ([("a dog", 2), ("a cat", 1), ("a dog", 1)], {"a dog": 3, "a cat": 1}),
        ([("a dog | a puppy", 3), ("a dog", 2)], {"a dog": 4, "a puppy": 1}),
        ([("a dog | a puppy | a hound", 2)], {"a dog": 1, "a puppy": 1}),
        ([("", 0), ("a dog", 0)], {}),
    ],
)
def test_subjects_of_one_class_ask_for_pictures_of_their_own(
    asked: list[tuple[str, int]], expected: dict[str, int]
) -> None:
    settings = [FEW.model_copy(update={"class_prompt": prompt, "prior_count": count}) for prompt, count in asked]
    assert {one.class_prompt: one.prior_count for one in by_prompt(settings)} == expected


@pytest.mark.parametrize("content", [None, b"x"], ids=["gone", "changed"])
def test_a_class_picture_that_changes_after_it_was_found_is_an_error(
    content: bytes | None, base: BaseWeights, tmp_path: Path
) -> None:
    first, second = make(base, tmp_path)
    path = next(iter(drawn(tmp_path)))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        first.open()
    assert str(path) in caught.value.problem
    assert "Start again" in caught.value.remedy
    assert second.open().size == (64, 64)
    assert make(base, tmp_path)[0].open().size == (64, 64)  # the remedy works
