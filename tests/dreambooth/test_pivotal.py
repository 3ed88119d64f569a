"""Pivotal tuning: vectors of the rare word that are learned beside the adapter, and the files that hold them.

That they are what a plain loop learns is shown in test_reference_families.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder
from pack.trainer.adapters.apply import apply_to_base, merge_into
from pack.trainer.adapters.embeddings import read_embedding, words_of
from pack.trainer.adapters.kohya import Adapter, read_adapter
from pack.trainer.core.errors import AdapterError, SettingsError
from pack.trainer.core.events import Preview
from pack.trainer.core.prompts import PromptWords
from pack.trainer.dreambooth import train
from pack.trainer.models.families.base import LearnedWord
from pack.trainer.models.sampling import GenerationConfig, build_on_device, generate
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from worlds import BOTH_TEXTS, COMMON, TEXT, World, assert_same_end, paths_in, runs_in

pytestmark = pytest.mark.usefixtures("quick")
WORD: dict[str, Any] = {"token_vectors": 2, "token_lr": 1e-2}


def vectors_at(run: Path, step: int) -> dict[str, Tensor]:
    adapter = read_adapter(run / f"step-{step:08d}" / "adapter.safetensors")
    return dict(adapter.embeddings)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# What is learned when

STATES: dict[str, dict[str, Any]] = {
    "until a half": {},
    "to the end": {"token_until": 1.0},
    "an average": {"ema_decay": 0.7},
    "schedule-free": {"optimizer": "adamw-schedule-free", "token_until": 1.0},
    "with the text encoder, which ends before": {
        **TEXT,
        "text_encoder_until": 0.25,
        "token_until": 0.75,
        "max_norm": 0.01,
    },
    "with the text encoder, which ends after": {**TEXT, "token_until": 0.25, "ema_decay": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_resuming_is_exact(name: str, family: str, tiny_world: World, xl: World, tmp_path: Path) -> None:
    """Stopped after every step, before, at and after the pivot."""
    world = tiny_world if family == "sd1" else xl
    changes = {**WORD, "checkpoint_every": 1, **STATES[name]}
    straight = world.train(tmp_path / "straight", first := Recorder(), **changes)
    for step in (1, 2, 3):
        world.stop_after(step, tmp_path / "often", **changes)
    last = world.train(tmp_path / "often", **changes)
    assert last.started_from == 3
    assert_same_end(last, straight)
    assert len(first.losses) == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_after_the_pivot_the_adapter_is_trained_alone(
    family: str, tiny_world: World, xl: World, tmp_path: Path
) -> None:
    world = tiny_world if family == "sd1" else xl
    result = world.train(tmp_path, listener := Recorder(), **WORD, checkpoint_every=1)
    one, two, three, four = (vectors_at(result.run, step) for step in (1, 2, 3, 4))
    parts = {"string_to_param.*"} if family == "sd1" else {"clip_l", "clip_g"}
    assert one.keys() == {f"bundle_emb.sks.{part}" for part in parts}
    assert not same(one, two)
    assert same(two, three)
    assert same(three, four)
    layers = [read_adapter(result.run / f"step-0000000{step}" / "adapter.safetensors").layers for step in (3, 4)]
    assert any(
        not torch.equal(layer.tensors()["lora_up.weight"], layers[1][name].tensors()["lora_up.weight"])
        for name, layer in layers[0].items()
    )
    assert [note for note in listener.notes if "are frozen" in note] == [
        "The rare word's vectors are frozen after step 2."
    ]


@pytest.mark.slow
def test_parts_end_one_after_the_other(xl: World, tmp_path: Path) -> None:
    changes = {**WORD, **BOTH_TEXTS, "text_encoder_2_lr": 0.0, "text_encoder_until": 0.25, "token_until": 0.5}
    result = xl.train(tmp_path, listener := Recorder(), **changes, checkpoint_every=1)
    assert [note for note in listener.notes if "are frozen" in note] == [
        "The text encoders are frozen after step 1.",
        "The rare word's vectors are frozen after step 2.",
    ]
    text = [
        {
            name: layer.tensors()["lora_up.weight"]
            for name, layer in read_adapter(result.run / f"step-0000000{step}" / "adapter.safetensors").layers.items()
            if name.startswith("lora_te1_")
        }
        for step in (1, 2, 4)
    ]
    assert text[0]
    assert same(text[0], text[1])
    assert same(text[0], text[2])


@pytest.mark.slow
def test_class_pictures_are_taught_as_ever(tiny_world: World, tmp_path: Path) -> None:
    """A caption without the word is conditioned on as without any vectors."""
    recipe = tiny_world.prepared(tmp_path, **WORD)
    plain = tiny_world.base.family.build(tiny_world.base)
    prompts = ["a photo of a dog", "a photo of sks dog"]
    with torch.no_grad():
        ours = recipe.session.model.encode_prompts(prompts)["text"]
        theirs = plain.encode_prompts(prompts)["text"]
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[1], theirs[1])
    recipe.clean_up()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {**TEXT, "dropout": 0.3}], ids=["alone", "with the text encoder"])
def test_gradient_checkpointing_changes_nothing(changes: dict[str, Any], tiny_world: World, tmp_path: Path) -> None:
    plain = tiny_world.train(tmp_path / "plain", first := Recorder(), **WORD, **changes)
    saving = tiny_world.train(tmp_path / "saving", second := Recorder(), **WORD, **changes, gradient_checkpointing=True)
    assert first.losses == second.losses
    assert_same_end(saving, plain)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "loha", "lokr", "oft", "boft"])
def test_with_adapters_of_every_kind(adapter: str, tiny_world: World, tmp_path: Path) -> None:
    result = tiny_world.train(tmp_path, **WORD, adapter=adapter, learning_rate=1e-3, checkpoint_every=1, steps=2)
    [before, after] = [vectors_at(result.run, step) for step in (1, 2)]
    assert before.keys() == {"bundle_emb.sks.string_to_param.*"}
    assert same(before, after)
    assert same(after, dict(read_adapter(result.path).embeddings))


# The files


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def learned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, Any, Recorder, Path]:
    world: World = request.getfixturevalue("tiny_world" if request.param == "sd1" else "xl")
    folder = tmp_path_factory.mktemp(f"learned-{request.param}")
    listener = Recorder()
    result = world.train(folder, listener, **WORD, preview_every=4, preview_steps=2, precision="fp32")
    return world, result, listener, folder


@pytest.mark.slow
def test_the_files(learned: tuple[World, Any, Recorder, Path]) -> None:
    world, result, listener, folder = learned
    path = folder / "loras" / "embeddings" / "dog-sks.safetensors"
    assert result.embeddings == {"sks": path}
    assert any(f"embedding:dog-sks in ComfyUI): {path}" in note for note in listener.notes)
    tensors = load_file(path)
    encoders = world.base.family.text_encoders
    assert tensors.keys() == ({"emb_params"} if len(encoders) == 1 else {"clip_l", "clip_g"})
    assert all(tensor.shape[0] == 2 and tensor.dtype == torch.float32 for tensor in tensors.values())
    [bundled] = words_of(read_adapter(result.path).embeddings, world.base.family)
    of_file = read_embedding(path, world.base.family)
    assert (bundled.word, of_file.word) == ("sks", "dog-sks")
    assert same(dict(bundled.vectors), dict(of_file.vectors))
    assert same(dict(bundled.vectors), dict(words_of(result.adapter.embeddings, world.base.family)[0].vectors))


@pytest.mark.slow
def test_what_is_generated_with_the_file_is_what_the_run_showed(learned: tuple[World, Any, Recorder, Path]) -> None:
    """The word stands for the vectors wherever the adapter is used; the embedding file's name does so, too."""
    world, result, listener, _ = learned
    [*_, shown] = [event for event in listener.events if isinstance(event, Preview)]
    config = GenerationConfig(width=64, height=64, steps=2)
    adapter = read_adapter(result.path)

    def drawn(prompt: str, adapter: Adapter, *words: LearnedWord) -> list[int]:
        model = build_on_device(world.base, torch.device("cpu"), "fp32")
        merge_into(model, adapter, 1.0)
        model.learn([*model.words, *words])
        [image] = generate(model, prompt, [0], config)
        return list(image.tobytes())

    [(path, prompt)] = shown.pictures
    pixels = drawn(prompt, adapter)
    assert max(abs(one - other) for one, other in zip(pixels, Image.open(path).tobytes(), strict=True)) <= 1
    alone = replace(adapter, embeddings={})
    assert drawn(prompt, alone) != pixels
    word = read_embedding(result.embeddings["sks"], world.base.family)
    assert drawn(prompt.replace("sks", word.word), alone, word) == pixels


@pytest.mark.slow
def test_a_finished_run_writes_no_second_file(learned: tuple[World, Any, Recorder, Path]) -> None:
    world, result, _, folder = learned
    changes = {**WORD, "preview_every": 4, "preview_steps": 2, "precision": "fp32"}
    again = world.train(folder, **changes)
    assert again.embeddings == result.embeddings
    another = world.train(folder, **changes, seed=1)
    assert another.embeddings == {"sks": folder / "loras" / "embeddings" / f"{another.path.stem}-sks.safetensors"}
    assert another.embeddings != result.embeddings


@pytest.mark.slow
def test_several_subjects_have_a_word_each(tiny_world: World, tmp_path: Path) -> None:
    subject = [
        replace(tiny_world.subject[0], caption="a photo of sks dog"),
        replace(tiny_world.subject[1], caption="my toy"),
    ]
    words = [PromptWords("sks", "dog"), PromptWords("my  toy", "toy"), PromptWords("sks", "dog")]
    settings = TrainSettings(**{**COMMON, **WORD, "steps": 1})
    result = train(tiny_world.base, subject, [], settings, paths_in(tmp_path), "cpu", Recorder(), words=words)
    folder = tmp_path / "loras" / "embeddings"
    assert result.embeddings == {"sks": folder / "dog-sks.safetensors", "my toy": folder / "dog-my-toy.safetensors"}
    assert same(
        load_file(folder / "dog-sks.safetensors"),
        {"emb_params": result.adapter.embeddings["bundle_emb.sks.string_to_param.*"]},
    )


# Going on


@pytest.mark.slow
def test_going_on_from_an_adapter_goes_on_with_its_vectors(
    learned: tuple[World, Any, Recorder, Path], tmp_path: Path
) -> None:
    world, result, _, _ = learned
    start = StartingPoint(read_adapter(result.path))
    further = world.train(tmp_path, starting_point=start, **{**WORD, "token_lr": 1e-9}, steps=1)
    for key, tensor in further.adapter.embeddings.items():
        torch.testing.assert_close(tensor, result.adapter.embeddings[key], rtol=0, atol=1e-6)
    with pytest.raises(AdapterError, match="has 2 vectors, but token_vectors is 3"):
        world.train(tmp_path, starting_point=start, **{**WORD, "token_vectors": 3}, steps=1)


@pytest.mark.slow
def test_a_second_stage_reads_what_the_first_has_learned(tiny_world: World, tmp_path: Path) -> None:
    first = tiny_world.train(tmp_path / "first", **WORD)
    stacked = [(first.adapter, 0.5)]
    upper = replace(tiny_world, base=apply_to_base(tiny_world.base, stacked))
    without = apply_to_base(tiny_world.base, [(replace(first.adapter, embeddings={}), 0.5)])
    assert upper.base.fingerprint != without.fingerprint
    point = StartingPoint(stacked=stacked)
    second = upper.train(tmp_path / "second", listener := Recorder(), starting_point=point, combine=True, steps=2)
    plain = replace(tiny_world, base=without).train(tmp_path / "plain", other := Recorder(), steps=2)
    assert listener.losses != other.losses
    assert same(dict(second.adapter.embeddings), dict(first.adapter.embeddings))
    assert not plain.adapter.embeddings
    with pytest.raises(SettingsError, match="already has an embedding for 'sks'"):
        upper.train(tmp_path / "third", starting_point=point, **WORD)


# Mistakes are found before anything is made


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"token": ""}, "token is empty"),
        ({"token": "s.k.s"}, "contains a dot"),
        ({"token": "ohwx"}, "learns the word 'ohwx', but no caption contains it; one is 'a photo of sks dog'"),
    ],
)
def test_a_word_that_can_not_be_learned(
    changes: dict[str, Any], problem: str, tiny_world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=problem):
        tiny_world.train(tmp_path, **WORD, **changes)
    assert not runs_in(tmp_path)
