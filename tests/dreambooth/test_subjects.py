"""Several subjects in one run, and what becomes of captions: shares, orders, fingerprints, metadata, errors."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import mostly_slow
from comfy_graphs import node, seed_of_test
from comfy_host import CHECKPOINT, ComfyServer, PromptFailed
from helpers import DEMO, Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.__main__ import main
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import PicturesError, SettingsError
from pack.trainer.core.prompts import shuffled_tags
from pack.trainer.core.seeding import generator
from pack.trainer.data.batches import draw_batches
from pack.trainer.data.images import Picture
from pack.trainer.data.latent_cache import LatentCache
from pack.trainer.models.objective import make_objective
from pack.trainer.settings.train import TrainCommand, TrainSettings
from pack.trainer.training.runs.folder import run_fingerprint
from PIL import Image
from worlds import TOKENIZER, World, noisy_pictures, runs_in

pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")


def written(folder: Path, tables: str, checkpoint: Path, **changes: Any) -> Path:
    """A settings file of a small run with these tables."""
    values: dict[str, Any] = {"base": checkpoint.as_posix(), "tokenizer": TOKENIZER.as_posix(), "name": "both"}
    values |= {"steps": 2, "rank": 2, "targets": "attention", "resolution": 64, "precision": "fp32", "device": "cpu"}
    values |= {"prior_steps": 2, "output_dir": (folder / "output ü").as_posix()} | changes
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    path = folder / "two subjects.toml"
    path.write_text("\n".join(lines) + "\n" + tables, encoding="utf-8")
    return path


def table(**values: Any) -> str:
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join(["", "[[subject]]", *lines, ""])


@pytest.fixture
def dog_and_cat(tmp_path: Path) -> dict[str, Path]:
    places = {"dog": noisy_pictures(tmp_path / "dög", 3, 0), "cat": noisy_pictures(tmp_path / "cat", 2, 10)}
    return places | {"cats": noisy_pictures(tmp_path / "any cats", 3, 20)}


def only_run(folder: Path) -> Path:
    [run] = runs_in(folder)
    return run


@pytest.mark.slow
def test_two_subjects_through_the_command_line(
    dog_and_cat: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its pictures, prompts, repeats and class pictures: one makes them, the other brings its own."""
    dog = table(
        images=dog_and_cat["dog"].as_posix(),
        instance_prompt="a photo of {token} {class}",
        token="sks",
        class_noun="dog",
        class_prompt="a {class}",
        prior_count=2,
    )
    cat = table(
        **{
            "images": dog_and_cat["cat"].as_posix(),
            "instance-prompt": "a {token} {class}",
            "token": "rraj",
            "class_noun": "cat",
            "class-prompt": "a cat",
            "class_images": dog_and_cat["cats"].as_posix(),
            "repeats": 3,
        }
    )
    path = written(tmp_path, dog + cat, tiny_checkpoint, caption_dropout=0.5)
    assert main(["train", str(path)]) == 0
    output = tmp_path / "output ü"
    assert Path(capsys.readouterr().out.strip()) == output / "both.safetensors"
    cache = LatentCache.load(only_run(output) / "cache.safetensors")
    assert cache is not None
    assert cache.instance.order == [0, 1, 2, 3, 3, 3, 4, 4, 4]
    assert cache.prior is not None
    assert len(cache.prior) == 3 + 2
    rows = [int(own[0]) for own in cache.instance.captions]
    assert rows == [rows[0]] * 3 + [rows[3]] * 2
    assert len({rows[0], rows[3], cache.empty}) == 3
    class_rows = [int(own[0]) for own in cache.prior.captions]
    assert Counter(class_rows).most_common()[0][1] == 3
    assert len({*rows, *class_rows}) == 4
    [made] = (output / "class-pictures").iterdir()
    assert len(list(made.glob("*.png"))) == 2
    assert json.loads((made / "settings.json").read_text(encoding="utf-8"))["prompt"] == "a dog"

    metadata = read_adapter(output / "both.safetensors").metadata
    assert metadata["modelspec.trigger_phrase"] == "sks dog, rraj cat"
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {
        "a dog": {"n_repeats": 1, "img_count": 2},
        "a cat": {"n_repeats": 1, "img_count": 3},
    }
    [dataset] = json.loads(metadata["ss_datasets"])
    assert [(one["num_repeats"], one["img_count"]) for one in dataset["subsets"]] == [(1, 3), (3, 2)]
    assert dataset["num_train_images"] == int(metadata["ss_num_train_images"]) == 3 + 3 * 2  # kohya counts repeats
    assert metadata["ss_num_reg_images"] == "5"
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "both": {"n_repeats": 1, "img_count": 3},
        "3_both": {"n_repeats": 3, "img_count": 2},
    }
    assert metadata["ss_caption_dropout_rate"] == "0.5"

    assert main(["train", str(path)]) == 0  # finished already
    assert runs_in(output) == [only_run(output)]
    again = written(tmp_path, dog + cat.replace("repeats = 3", "repeats = 4"), tiny_checkpoint, caption_dropout=0.5)
    assert main(["train", str(again), "--steps", "1"]) == 0
    assert len(runs_in(output)) == 2


def test_class_pictures_of_every_subject(dog_and_cat: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The run's number holds for tables without their own; of a class in common each gets pictures of its own."""
    tables = [
        {"images": dog_and_cat["dog"], "instance_prompt": "sks", "class_prompt": "a dog"},
        {"images": dog_and_cat["cat"], "instance_prompt": "rraj", "class_prompt": "a dog", "prior_count": 3},
        {"images": dog_and_cat["cats"], "instance_prompt": "xyz", "class_prompt": "a cat", "prior_count": 0},
        {"images": dog_and_cat["cats"], "instance_prompt": "uvw"},
    ]
    values: dict[str, Any] = {"base": tiny_checkpoint, "steps": 1, "rank": 2, "resolution": 64, "prior_count": 1}
    values |= {"prior_steps": 1, "device": "cpu", "output_dir": tmp_path / "output", "subject": tables}
    command = TrainCommand.checked(values)
    assert [one.prior_count for one in command.subjects] == [1, 3, 0, 0]
    run_train(command, Recorder())
    folders = list((tmp_path / "output" / "class-pictures").iterdir())
    assert [len(list(folder.glob("*.png"))) for folder in folders] == [1 + 3]
    cache = LatentCache.load(only_run(tmp_path / "output") / "cache.safetensors")
    assert cache is not None
    assert cache.prior is not None
    assert len(cache.prior) == 1 + 3
    assert len({mean.numpy().tobytes() for mean in cache.prior.mean}) == 1 + 3


def test_one_table_is_as_no_table(dog_and_cat: dict[str, Path], tmp_path: Path) -> None:
    words = {"instance_prompt": "a {token} {class}", "class_prompt": "a {class}", "token": "rraj", "class_noun": "cat"}
    subject = {"images": dog_and_cat["cat"], "repeats": 2, "masks": "alpha", "captions": "prompt", **words}
    plain = TrainCommand.checked({"base": tmp_path, "prior_count": 5, **subject})
    tables = TrainCommand.checked({"base": tmp_path, "prior_count": 5, "subject": [subject]})
    assert plain.subjects == tables.subjects
    [one] = plain.subjects
    assert (one.instance_prompt, one.class_prompt, one.prior_count) == ("a rraj cat", "a cat", 5)


ERRORS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"images": "x", "subject": [{"images": "y"}]}, ("images", "[[subject]]", "both given")),
    ({}, ("images is required",)),
    ({"subject": []}, ("images is required",)),
    ({"subject": [{"images": "x"}, {"images": "y", "class_promt": "z"}]}, ("subject.2.class_promt",)),
    ({"subject": [{"images": "x", "steps": 7}]}, ("subject.1.steps",)),
    ({"subject": [{"images": "x"}, {"instance_prompt": "z"}]}, ("subject.2.images is required",)),
    ({"subject": [{"images": "x", "repeats": 0}]}, ("subject.1.repeats", "must be at least 1")),
    ({"subject": [{"images": "x", "instance_prompt": " | "}]}, ("subject.1.instance_prompt", "is blank")),
    ({"subject": {"images": "x"}}, ("subject", "[[subject]]")),
    ({"subject": [{"images": "x"}], "prior_count": 4}, ("prior_count", "class_prompt", "[[subject]]")),
    ({"subject": [{"images": "x", "prior_count": 4}]}, ("subject.1", "prior_count", "class_prompt")),
    ({"subject": [{"images": "x", "class_prompt": "a"}, {"images": "y", "prior_count": 4}]}, ("subject.2",)),
    ({"subject": [{"images": "x"}], "instance_prompt": "y"}, ("instance_prompt", "into the tables")),
    ({"subject": [{"images": "x"}], "class_prompt": "y", "repeats": 2}, ("class_prompt, repeats", "into the tables")),
    (
        {"subject": [{"images": "x", "instance_prompt": "a|b", "class_prompt": "b", "prior_count": 1}]},
        ("class_prompt equals instance_prompt",),
    ),
]


@pytest.mark.parametrize(("values", "words"), ERRORS, ids=lambda value: str(value))
def test_tables_that_can_not_be_are_named(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({"base": "model.safetensors", **values})
    for part in words:
        assert part in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize(
    "values",
    [
        {"subject": [{"images": "x", "class_images": "y"}], "prior_count": 4},
        {"subject": [{"images": "x", "class_prompt": "a dog"}, {"images": "y"}], "prior_count": 4},
        {"subject": [{"images": "x"}], "token": "sks"},
        {"images": "x", "class_images": "y", "prior_count": 4},
    ],
    ids=str,
)
def test_tables_that_can_be(values: dict[str, Any]) -> None:
    assert TrainCommand.checked({"base": "model.safetensors", **values}).subjects


def test_an_unknown_key_is_told_on_the_command_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, table(images="a") + table(images="b", folder="c"), tiny_checkpoint)
    assert main(["train", str(path)]) == 1
    assert "subject.2.folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation_pictures": 3, "class_prompt": "a dog", "prior_count": 2}, "validation_pictures is 3"),
        ({"class_images": "cats"}, "have no captions"),
    ],
    ids=str,
)
def test_errors_come_before_long_work(
    changes: dict[str, Any], words: str, dog_and_cat: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    places = {"class_images": dog_and_cat["cats"]} if "class_images" in changes else {}
    values = {"base": tiny_checkpoint, "images": dog_and_cat["dog"], "output_dir": tmp_path / "output", "device": "cpu"}
    values |= {"steps": 1, "resolution": 64, "rank": 2, "prior_steps": 1}
    with pytest.raises(PicturesError) as caught:
        run_train(TrainCommand.checked({**values, **changes, **places}), Recorder())
    assert words in caught.value.problem
    assert not (tmp_path / "output").exists()


def test_class_images_with_captions_of_their_own_need_no_prompt(
    dog_and_cat: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for number in range(3):
        (dog_and_cat["cats"] / f"{number}.txt").write_text("a {class} in {token}", encoding="utf-8")
    values: dict[str, Any] = {"base": tiny_checkpoint, "images": dog_and_cat["cat"], "steps": 1, "resolution": 64}
    values |= {"class_images": dog_and_cat["cats"], "class_noun": "cat", "token": "rraj", "device": "cpu"}
    result = run_train(TrainCommand.checked(values | {"output_dir": tmp_path / "output"}), Recorder())
    assert json.loads(result.adapter.metadata["ss_reg_dataset_dirs"]) == {
        "a cat in rraj": {"n_repeats": 1, "img_count": 3}
    }


def changed(number: int, **values: Any) -> Callable[[list[Picture]], list[Picture]]:
    def change(pictures: list[Picture]) -> list[Picture]:
        return [replace(one, **values) if place == number else one for place, one in enumerate(pictures)]

    return change


def test_what_of_the_pictures_makes_another_run(world: World) -> None:
    mask = partial(Image.new, "L", (64, 64), 128)
    changes: dict[str, Callable[[list[Picture]], list[Picture]]] = {
        "nothing": lambda pictures: pictures,
        "repeats": changed(0, repeats=2),
        "repeats of another": changed(1, repeats=2),
        "more repeats": changed(0, repeats=3),
        "a mask": changed(0, mask=mask, mask_digest="1"),
        "another mask": changed(0, mask=mask, mask_digest="2"),
        "a mask of another": changed(1, mask=mask, mask_digest="1"),
        "a further caption": changed(0, more_captions=("x",)),
        "two further captions": changed(0, more_captions=("x", "y")),
        "in another order": changed(0, more_captions=("y", "x")),
        "one caption of both": changed(0, caption=f"{world.subject[0].caption} x"),
        "another order of pictures": lambda pictures: pictures[::-1],
    }
    prints = {}
    for name, change in changes.items():
        subject = change(list(world.subject))
        for kind, sets in (("subject", (subject, ())), ("class", (world.subject, subject))):
            prints[name, kind] = run_fingerprint(world.base, *sets, TrainSettings(), "fp32")
    assert len(set(prints.values())) == len(prints)
    renamed = changed(0, name="another.png", open=lambda: None)(list(world.subject))
    assert run_fingerprint(world.base, renamed, (), TrainSettings(), "fp32") == prints["nothing", "subject"]


def cache_of(world: World, folder: Path, **changes: Any) -> tuple[LatentCache, TrainSettings]:
    recipe = world.prepared(folder, **changes)
    return recipe.session.cache, recipe.settings


def samples(cache: LatentCache, settings: TrainSettings, steps: int) -> Iterator[tuple[float, int]]:
    """Weight and caption of each sample, in the order of the steps."""
    for step, micro in itertools.product(range(steps), range(settings.gradient_accumulation)):
        for batch in draw_batches(cache, settings, step, micro, make_objective(), CPU):
            yield from zip(batch.weights.tolist(), batch.captions.tolist(), strict=True)


def test_the_share_of_samples_follows_the_repeats(world: World, tmp_path: Path) -> None:
    first, second, third = world.subject
    subject = [
        replace(first, caption="one", repeats=5),
        replace(second, caption="two", repeats=1),
        replace(third, caption="three", repeats=2),
    ]
    cache, settings = cache_of(replace(world, subject=subject), tmp_path, batch_size=3, gradient_accumulation=2)
    rows = {int(own[0]): one.repeats for own, one in zip(cache.instance.captions, subject, strict=True)}
    drawn = [caption for _, caption in samples(cache, settings, 8)]
    assert len(drawn) == 48
    for epoch in range(6):
        assert Counter(drawn[8 * epoch : 8 * epoch + 8]) == rows
    assert len({tuple(drawn[8 * epoch : 8 * epoch + 8]) for epoch in range(6)}) > 1


def test_several_prompts_are_used_alike(world: World, tmp_path: Path) -> None:
    subject = [replace(one, more_captions=("the sks", "sks, seen from above")) for one in world.subject]
    cache, settings = cache_of(replace(world, subject=subject), tmp_path, batch_size=10)
    shares = Counter(caption for _, caption in samples(cache, settings, 90))
    assert set(shares) == set(cache.instance.captions[0].tolist())
    assert len(shares) == 3
    assert all(abs(count - 300) < 60 for count in shares.values())  # over four standard deviations


@pytest.mark.parametrize("share", mostly_slow([0.1, 0.5, 1.0], 0.1))
def test_captions_are_left_out_for_a_share_of_the_subjects_samples(share: float, world: World, tmp_path: Path) -> None:
    cache, settings = cache_of(
        world.with_priors(tmp_path / "class"), tmp_path, batch_size=10, caption_dropout=share, prior_weight=0.5
    )
    assert cache.empty is not None
    drawn = list(samples(cache, settings, 100))
    subject = [caption for weight, caption in drawn if weight == pytest.approx(0.1)]
    classes = [caption for weight, caption in drawn if weight == pytest.approx(0.05)]
    assert (len(subject), len(classes)) == (1000, 1000)
    assert cache.empty not in classes
    deviation = math.sqrt(1000 * share * (1 - share))
    assert abs(subject.count(cache.empty) - 1000 * share) <= 4 * deviation


def test_leaving_captions_out_changes_nothing_else(world: World, tmp_path: Path) -> None:
    plain, settings = cache_of(world, tmp_path / "plain", batch_size=3)
    dropped, dropping = cache_of(world, tmp_path / "dropped", batch_size=3, caption_dropout=0.5)
    assert plain.empty is None
    for step in range(5):
        [one], [other] = (
            draw_batches(*both, step, 0, make_objective(), CPU) for both in ((plain, settings), (dropped, dropping))
        )
        for part in ("latents", "noise", "added_noise", "timesteps", "sizes", "weights"):
            assert torch.equal(getattr(one, part), getattr(other, part))


def test_the_empty_caption_is_encoded_as_the_empty_prompt(world: World, tmp_path: Path) -> None:
    recipe = world.prepared(tmp_path, caption_dropout=0.5)
    model = world.base.family.build(world.base)
    with torch.no_grad():
        wanted = model.encode_prompts([""])
    told = recipe.session.text.rows(torch.tensor([recipe.session.cache.empty]))
    assert wanted
    for name, rows in wanted.items():
        torch.testing.assert_close(told[name], rows)


tags = st.lists(st.text("abc d", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=6)


@given(parts=tags, keep=st.integers(0, 7), seed=st.integers(0, 1000))
def test_the_first_tags_stay_and_the_rest_changes_places(parts: list[str], keep: int, seed: int) -> None:
    found = shuffled_tags(",".join(parts) + ", ,", keep, generator(seed)).split(", ")
    plain = [part.strip() for part in parts]
    assert found[:keep] == plain[:keep]
    assert sorted(found) == sorted(plain)
    assert shuffled_tags(", ".join(parts), keep, generator(seed)).split(", ") == found


def test_every_order_of_few_tags_comes_up() -> None:
    orders = {shuffled_tags("sks, a, b, c", 1, generator(seed)) for seed in range(200)}
    assert orders == {", ".join(("sks", *order)) for order in itertools.permutations("abc")}


def test_shuffled_captions_are_orders_of_the_captions(world: World, tmp_path: Path) -> None:
    """As their tokens say; class pictures keep theirs."""
    captions = ["sks, red, dog, sits", "sks, a, b"]
    subject = [replace(one, caption=captions[min(1, number)]) for number, one in enumerate(world.subject)]
    priors = [replace(one, caption="x, y, z") for one in world.with_priors(tmp_path / "class").priors]
    cache, settings = cache_of(
        replace(world, subject=subject, priors=priors),
        tmp_path,
        batch_size=8,
        shuffle_tags=True,
        keep_tags=1,
        prior_weight=0.5,
    )
    model = world.base.family.build(world.base)
    [name] = [name for name in cache.text if name.startswith("ids")]

    def tokens(texts: list[str]) -> list[tuple[int, ...]]:
        return [tuple(row) for row in model.tokenize(texts)[name].tolist()]

    orders = [
        {", ".join((first, *order)) for order in itertools.permutations(rest)}
        for first, *rest in (caption.split(", ") for caption in captions)
    ]
    rows = [tuple(row) for row in cache.text[name].tolist()]
    for number, own in enumerate(cache.instance.captions):
        possible = dict(zip(tokens(sorted(orders[min(1, number)])), sorted(orders[min(1, number)]), strict=True))
        drawn = {possible[rows[row]] for row in own.tolist()}
        assert len(own) == 16
        assert len(drawn) > 1
    assert cache.prior is not None
    assert {rows[int(own)] for own in cache.prior.captions} == set(tokens(["x, y, z"]))
    used = {caption for weight, caption in samples(cache, settings, 60) if weight == pytest.approx(1 / 8)}
    assert used <= {row for own in cache.instance.captions for row in own.tolist()}
    assert len(used) > 5
    again, _ = cache_of(replace(world, subject=subject), tmp_path / "again", shuffle_tags=True, keep_tags=1)
    assert all(
        [tuple(again.text[name][row].tolist()) for row in theirs] == [rows[row] for row in ours]
        for ours, theirs in zip(
            (own.tolist() for own in cache.instance.captions),
            (own.tolist() for own in again.instance.captions),
            strict=True,
        )
    )


def test_long_captions_are_told_once(world: World, tmp_path: Path) -> None:
    """Not in every order."""
    long = ", ".join(f"tag {number}" for number in range(60))
    subject = [replace(one, caption=long) for one in world.subject]
    replace(world, subject=subject).prepared(tmp_path, listener := Recorder(), shuffle_tags=True)
    assert len([text for text in listener.warnings if "too long for the text encoder" in text]) == 1


@pytest.fixture(scope="module")
def pictured(comfy: ComfyServer) -> None:
    """A folder, and pictures with transparency."""
    folder = comfy.base_dir / "input" / "dög"
    folder.mkdir()
    for path in (DEMO / "subject").glob("*.png"):
        Image.open(path).convert("RGB").resize((96, 80)).save(folder / f"{path.stem}.png")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[:, :32, 3] = 0
        Image.fromarray(pixels).save(comfy.base_dir / "input" / f"cat{number}.png")


def chained(**changes: Any) -> dict[str, dict[str, Any]]:
    """Two chained subjects, the second of connected pictures with masks → class pictures → training."""
    loaded: dict[str, Any] = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2]}
    train = {"name": "both", "steps": 2, "learning_rate": 1e-3, "rank": 4, "targets": "attention", "resolution": 64}
    train |= {"adapter": "lora", "text_encoder_lr": 0.0, "base_lora_strength": 1.0, "preview_every": 0}
    train |= {"seed": seed_of_test()}
    priors = {"prompt": "", "count": 1, "resolution": 64, "scheduler": "ddim", "steps": 1, "guidance": 1.0, "seed": 0}
    cat = {"folder": "none", "token": "rraj", "class_noun": "cat", "caption": "a {token} {class}", "repeats": 2}
    cat |= {"images": ["cats", 0], "captions": "{token} sits\n{token} stands", "mask": ["inverted", 0]}
    return {
        "base": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "cat 0": node("LoadImage", image="cat0.png"),
        "cat 1": node("LoadImage", image="cat1.png"),
        "cats": node("ImageBatch", image1=["cat 0", 0], image2=["cat 1", 0]),
        "masks": node("MaskToImage", mask=["cat 0", 1]),
        "both masks": node("ImageBatch", image1=["masks", 0], image2=["masks", 0]),
        "as mask": node("ImageToMask", image=["both masks", 0], channel="red"),
        "inverted": node("InvertMask", mask=["as mask", 0]),
        "dog": node("DreamBoothSubject", folder="dög", token="sks", class_noun="dog", caption="a {token} {class}"),
        "cat": node("DreamBoothSubject", subject=["dog", 0], **cat | changes),
        "priors": node("DreamBoothClassPriors", subject=["cat", 0], batch_size=1, precision="fp32", **loaded, **priors),
        "train": node("DreamBoothTrainLora", subject=["cat", 0], priors=["priors", 0], **loaded, **train),
    }


@pytest.mark.comfy
@pytest.mark.usefixtures("pictured")
def test_comfyui_trains_chained_subjects(server: ComfyServer) -> None:
    server.wait(server.queue(chained(folder=no_folder(server))))
    metadata = read_adapter(server.base_dir / "models" / "loras" / "both.safetensors").metadata
    dogs = len(list((server.base_dir / "input" / "dög").glob("*.png")))
    config = json.loads(metadata["dreambooth.config"])
    assert config["captions"] == ["a sks dog"] * dogs + ["rraj sits", "rraj stands"]
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {
        "a dog": {"n_repeats": 1, "img_count": 1},
        "a cat": {"n_repeats": 1, "img_count": 1},
    }
    [cache_file] = (server.base_dir / "output" / "dreambooth" / "runs").glob("both-*/cache.safetensors")
    cache = LatentCache.load(cache_file)
    assert cache is not None
    assert cache.instance.order == [*range(dogs), dogs, dogs, dogs + 1, dogs + 1]
    assert [mask is None for mask in cache.instance.masks] == [True] * dogs + [False, False]
    for mask in cache.instance.masks[dogs:]:
        assert mask is not None
        assert mask[..., :4].eq(0).all()  # transparent
        assert mask[..., 4:].eq(1).all()
    assert cache.prior is not None
    assert len(cache.prior) == 2


def no_folder(server: ComfyServer) -> str:
    """The choice that stands for connected pictures: the first of the list."""
    return server.object_info()["DreamBoothSubject"]["input"]["required"]["folder"][1]["options"][0]


@pytest.mark.comfy
@pytest.mark.usefixtures("pictured")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"captions": "one\ntwo\nthree"}, ("2 connected images", "3 captions")),
        ({"mask": ["cat 0", 1]}, ("2 connected images", "1 masks")),
        ({"folder": "dög"}, ("come from a folder",)),
    ],
    ids=str,
)
def test_comfyui_tells_what_does_not_fit(changes: dict[str, Any], words: tuple[str, ...], server: ComfyServer) -> None:
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue(chained(**{"folder": no_folder(server), **changes})))
    for part in words:
        assert part in failure.value.exception_message
