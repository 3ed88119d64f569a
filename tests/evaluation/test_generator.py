"""A studio draws what `generate` draws, once: whatever lies there whole is not drawn again."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import sd15_checkpoint
from helpers import TINY, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import Adapter, LoraLayer
from pack.trainer.core.errors import AdapterError, CancelledError, OutOfMemoryError, StorageError
from pack.trainer.core.events import Phase
from pack.trainer.data.image_cache import ImageCache, generated_picture
from pack.trainer.data.images import Picture
from pack.trainer.evaluation.generator import Adapters, CachedGenerator, SampleConfig
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.families.stable_diffusion import StableDiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, build_on_device, generate
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from PIL import Image
from worlds import COMMON, TOKENIZER, perturb

pytestmark = pytest.mark.usefixtures("quick")

CPU = torch.device("cpu")
DOG, CAT = "a photo of a dog", "a photo of a cat"
SMALL = SampleConfig(count=2, seed=5, width=64, height=64, steps=2, guidance=3.0, batch_size=2)


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> BaseWeights:
    return open_base(tiny_checkpoint)


def learned(base: BaseWeights, **changes: Any) -> Adapter:
    """An adapter with random numbers, as training would leave it."""
    model = base.family.build(base)
    trained = TrainableAdapter(model, TrainSettings(**{**COMMON, **changes}), None)
    perturb(trained, 0.2)
    adapter = trained.saved({}).adapter
    assert adapter is not None
    return adapter


@pytest.fixture(scope="module")
def subject(base: BaseWeights) -> Adapter:
    return learned(base)


@pytest.fixture(scope="module")
def style(base: BaseWeights) -> Adapter:
    return learned(base, seed=1, text_encoder_lr=1e-2)


def studio(base: BaseWeights, root: Path, listener: Recorder | None = None, precision: str = "fp32") -> CachedGenerator:
    return CachedGenerator(base, root, CPU, precision, listener or Recorder())


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image, dtype=int)


def expected(base: BaseWeights, adapters: Adapters, prompt: str, how: SampleConfig) -> list[np.ndarray[Any, Any]]:
    """The same pictures, one at a time, by `generate` alone."""
    model = build_on_device(base, CPU, "fp32")
    for adapter, strength in adapters:
        merge_into(model, adapter, strength)
    size = {"width": how.width, "height": how.height}
    rest = {"scheduler": how.scheduler, "steps": how.steps, "guidance": how.guidance}
    config = GenerationConfig(**size, **rest)
    return [pixels(generate(model, prompt, [seed], config)[0]) for seed in how.seeds]


def assert_alike(pictures: Sequence[Picture], others: Sequence[np.ndarray[Any, Any]]) -> None:
    """Equal but for rounding."""
    for one, other in zip(pictures, others, strict=True):
        np.testing.assert_allclose(pixels(one.open()), other, atol=1)


def files(root: Path) -> dict[Path, tuple[int, int]]:
    """Every picture with what would change if it were written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(root.glob("*/*.png"))}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every forward pass of a UNet; they are only counted."""
    real, seen = StableDiffusionModel.predict, []

    def predict(self: StableDiffusionModel, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(noisy))
        return real(self, noisy, *rest)

    monkeypatch.setattr(StableDiffusionModel, "predict", predict)
    return seen


@pytest.mark.slow
def test_pictures_are_those_of_generate_prompt_by_prompt(
    base: BaseWeights, subject: Adapter, style: Adapter, tmp_path: Path
) -> None:
    """For the base, one adapter, two of them in either strength: every combination draws other pictures."""
    drawn: list[np.ndarray[Any, Any]] = []
    shared = studio(base, tmp_path)
    choices: list[Adapters] = [[], [(subject, 1.0)], [(subject, 0.5), (style, -1.0)], [(subject, -1.0), (style, 0.5)]]
    for adapters in choices:
        pictures = shared.generate(adapters, [DOG, CAT], SMALL, "pictures")
        assert [one.caption for one in pictures] == [DOG, DOG, CAT, CAT]
        assert [one.name for one in pictures] == ["00000.png", "00001.png"] * 2
        assert_alike(pictures[:2], expected(base, adapters, DOG, SMALL))
        assert_alike(pictures[2:], expected(base, adapters, CAT, SMALL))
        drawn += [pixels(one.open()) for one in pictures]
    for one, other in itertools.combinations(drawn, 2):
        assert np.abs(one - other).max() > 3


@pytest.mark.parametrize(
    "change", [{"scheduler": "euler"}, {"steps": 4, "guidance": 1.0}, {"width": 80, "height": 48, "seed": 2**64 - 1}]
)
def test_every_way_of_drawing_is_that_of_generate(change: dict[str, Any], base: BaseWeights, tmp_path: Path) -> None:
    how = replace(SMALL, **change)
    pictures = studio(base, tmp_path).generate([], [DOG], how, "pictures")
    assert {one.open().size for one in pictures} == {(how.width, how.height)}
    assert_alike(pictures, expected(base, [], DOG, how))


def test_the_batch_is_no_matter(base: BaseWeights, passes: list[int], tmp_path: Path) -> None:
    how = replace(SMALL, count=3, steps=1, guidance=1.0)
    together = studio(base, tmp_path / "together").generate([], [DOG], replace(how, batch_size=2), "pictures")
    assert passes == [2, 1]
    alone = studio(base, tmp_path / "alone").generate([], [DOG], replace(how, batch_size=1), "pictures")
    assert passes == [2, 1, 1, 1, 1]
    assert_alike(together, [pixels(one.open()) for one in alone])


def test_what_is_drawn_is_not_drawn_again(
    base: BaseWeights, subject: Adapter, passes: list[int], tmp_path: Path
) -> None:
    """By the same studio or another, and no model is built for it; of more pictures only those that lack are drawn."""
    how, first = replace(SMALL, steps=1, guidance=1.0), studio(base, tmp_path)
    pictures = first.generate([(subject, 1.0)], [DOG, CAT], how, "pictures")
    before, listener = files(tmp_path), Recorder()
    assert (len(before), passes) == (4, [2, 2])
    for again in (first, studio(base, tmp_path, listener)):
        found = again.generate([(subject, 1.0)], [DOG, CAT], replace(how, batch_size=1), "pictures")
        assert [one.digest for one in found] == [one.digest for one in pictures]
    assert passes == [2, 2]
    assert listener.events == [Phase("pictures", 4, 4)]
    more = studio(base, tmp_path, listener).generate([(subject, 1.0)], [DOG, CAT], replace(how, count=3), "pictures")
    assert passes == [2, 2, 1, 1]
    assert listener.events[1:] == [Phase("pictures", done, 6) for done in (4, 5, 6)]
    assert files(tmp_path).items() > before.items()
    assert_alike(more[:3], expected(base, [(subject, 1.0)], DOG, replace(how, count=3)))
    fewer = studio(base, tmp_path).generate([(subject, 1.0)], [CAT], replace(how, count=1), "pictures")
    assert [one.digest for one in fewer] == [pictures[2].digest]


def test_a_prompt_that_comes_twice_is_drawn_once(base: BaseWeights, passes: list[int], tmp_path: Path) -> None:
    pictures = studio(base, tmp_path).generate([], [DOG, DOG], replace(SMALL, steps=1, guidance=1.0), "pictures")
    assert passes == [2]
    assert [one.digest for one in pictures[:2]] == [one.digest for one in pictures[2:]]


def test_one_model_is_built_for_all_prompts(
    base: BaseWeights, subject: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another for other adapters; after `close` again."""
    real, built = type(base.family).build, []

    def build(self: Any, of: BaseWeights) -> Any:
        built.append(of)
        return real(self, of)

    monkeypatch.setattr(type(base.family), "build", build)
    how, ours = replace(SMALL, steps=1, count=1), studio(base, tmp_path)
    counts = []
    for adapters, prompts in ([], [DOG, CAT]), ([], ["a cat"]), ([(subject, 1.0)], [DOG]), ([(subject, 0.5)], [DOG]):
        ours.generate(adapters, prompts, how, "pictures")
        counts.append(len(built))
    ours.close()
    ours.generate([(subject, 0.5)], [CAT], how, "pictures")
    assert [*counts, len(built)] == [1, 1, 2, 3, 4]


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_format(path: Path) -> None:
    path.write_text("a picture")


@pytest.mark.parametrize("damage", [shortened, emptied, other_format, Path.unlink])
def test_a_damaged_picture_is_drawn_anew(damage: Callable[[Path], None], base: BaseWeights, tmp_path: Path) -> None:
    how = replace(SMALL, batch_size=1)
    pictures = studio(base, tmp_path).generate([], [DOG], how, "pictures")
    before = files(tmp_path)
    [whole, damaged] = before
    damage(damaged)
    again = studio(base, tmp_path).generate([], [DOG], how, "pictures")
    assert [one.digest for one in again] == [one.digest for one in pictures]
    assert again[1].open().tobytes() == pictures[1].open().tobytes()
    assert files(tmp_path)[whole] == before[whole]


@pytest.fixture(scope="module")
def kept(base: BaseWeights, subject: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root where one picture lies; tests may add others elsewhere in it."""
    root = tmp_path_factory.mktemp("kept")
    studio(base, root).generate([(subject, 1.0)], [DOG], replace(SMALL, count=1), "pictures")
    return root


@pytest.mark.parametrize(
    "change",
    [
        {"strength": 0.5},
        {"adapters": "none"},
        {"adapters": "another"},
        {"adapters": "twice"},
        {"prompt": CAT},
        {"precision": "bf16"},
        {"base": "another"},
        {"scheduler": "euler"},
        {"steps": 3},
        {"guidance": 1.0},
        {"seed": 6},
        {"width": 72},
        {"height": 72},
    ],
    ids=str,
)
def test_any_change_draws_others_elsewhere(
    change: dict[str, Any], base: BaseWeights, subject: Adapter, style: Adapter, kept: Path, tmp_path: Path
) -> None:
    before, folders = files(kept), set(kept.iterdir())
    values = dict(change)
    one = (subject, values.pop("strength", 1.0))
    adapters = {"none": [], "another": [(style, 1.0)], "twice": [one, one], "one": [one]}[values.pop("adapters", "one")]
    prompt, precision = values.pop("prompt", DOG), values.pop("precision", "fp32")
    if values.pop("base", None):
        base = open_base(sd15_checkpoint(tmp_path / "tiny.safetensors", size=TINY, seed=1), TOKENIZER)
    how = replace(SMALL, count=1, **values)
    [picture] = studio(base, kept, precision=precision).generate(adapters, [prompt], how, "pictures")
    [folder] = set(kept.iterdir()) - folders
    assert files(kept).items() > before.items()
    assert {path.name for path in folder.iterdir()} == {"00000.png", "settings.json"}
    assert all(path.read_bytes() != (folder / "00000.png").read_bytes() for path in before)
    assert picture.open().size == (how.width, how.height)


def test_what_an_adapter_says_of_itself_makes_no_other_pictures(
    base: BaseWeights, subject: Adapter, kept: Path
) -> None:
    before = files(kept)
    renamed = replace(subject, metadata={"ss_output_name": "cat"})
    studio(base, kept).generate([(renamed, 1.0)], [DOG], replace(SMALL, count=1, batch_size=7), "pictures")
    assert files(kept) == before


def test_a_stop_keeps_what_is_drawn(base: BaseWeights, passes: list[int], tmp_path: Path) -> None:
    """Asked before every batch and every denoising step: the third batch stops at its second step."""
    how = replace(SMALL, count=4)
    with pytest.raises(CancelledError):
        studio(base, tmp_path, Recorder(stop_after=9)).generate([], [DOG, CAT], how, "pictures")
    before = files(tmp_path)
    assert [path.name for path in before] == [f"{number:05d}.png" for number in range(4)]
    assert len(passes) == 5
    listener = Recorder()
    pictures = studio(base, tmp_path, listener).generate([], [DOG, CAT], how, "pictures")
    assert listener.events[0] == Phase("pictures", 4, 8)
    assert files(tmp_path).items() > before.items()
    assert_alike(pictures, [*expected(base, [], DOG, how), *expected(base, [], CAT, how)])


def test_the_base_is_untouched(base: BaseWeights, style: Adapter, tmp_path: Path) -> None:
    parts = (base.denoiser, *base.text_encoders)
    before = [{name: tensor.clone() for name, tensor in part.tensors.items()} for part in parts]
    studio(base, tmp_path).generate([(style, 1.0)], [DOG], replace(SMALL, count=1), "pictures")
    for part, tensors in zip(parts, before, strict=True):
        assert all(torch.equal(part.tensors[name], tensor) for name, tensor in tensors.items())


def test_what_can_not_be_drawn_is_named(
    base: BaseWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: Adapter
) -> None:
    how = replace(SMALL, count=1)
    foreign = Adapter({"lora_unet_nowhere": LoraLayer(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    with pytest.raises(AdapterError, match="1 modules do not exist in this model"):
        studio(base, tmp_path).generate([(foreign, 1.0)], [DOG], how, "pictures")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        studio(base, tmp_path / "file").generate([], [DOG], how, "pictures")

    def predict(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StableDiffusionModel, "predict", predict)
    with pytest.raises(OutOfMemoryError) as caught:
        studio(base, tmp_path).generate([(subject, 1.0)], [DOG], how, "pictures")
    assert "picture_batch_size" in caught.value.remedy
    assert not files(tmp_path)


def test_a_gallery_keeps_pictures_under_any_path(tmp_path: Path) -> None:
    root = tmp_path / "Bilder für Ünal 写真" / "a b"
    gallery = ImageCache(root, {"prompt": "a photo of ünal's dog 犬", "steps": 2})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    assert not gallery.has("0 ü.png")
    gallery.prepare(1, 64 * 48)
    gallery.save("0 ü.png", image)
    kept, drawn = gallery.load("0 ü.png", "a dog"), generated_picture("0 ü.png", "a dog", image)
    assert kept.open().tobytes() == drawn.open().tobytes() == image.tobytes()
    assert (kept.name, kept.caption, kept.digest) == (drawn.name, drawn.caption, drawn.digest)
    assert ImageCache(root, {"steps": 2, "prompt": "a photo of ünal's dog 犬"}).has("0 ü.png")
    assert not ImageCache(root, {"prompt": "a photo of ünal's dog 犬", "steps": 3}).has("0 ü.png")
    with pytest.raises(StorageError):
        gallery.load("1.png", "a dog")


def test_leftovers_of_a_killed_process_leave(tmp_path: Path) -> None:
    gallery = ImageCache(tmp_path, {})
    gallery.prepare(1, 1)
    half = gallery.folder / ".tmp-0123abcd-0.png"
    half.write_bytes(b"half a pict")
    os.utime(half, (0, 0))
    gallery.prepare(1, 1)
    assert [path.name for path in gallery.folder.iterdir()] == ["settings.json"]
