"""Embeddings of learned words: how a model reads them, and the files that hold them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from pack.trainer.adapters.apply import with_bundled_words
from pack.trainer.adapters.embeddings import (
    bundled_embeddings,
    learn,
    learn_bundled,
    prompt_name,
    read_embedding,
    words_of,
    write_embedding,
)
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.core.errors import AdapterError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel, LearnedWord
from pack.trainer.models.families.sd1 import FAMILY as SD1
from pack.trainer.models.families.sdxl import FAMILY as SDXL
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds import World

WIDTH = 64  # of the tiny text encoders


def word(name: str = "sks", vectors: int = 2, value: float = 0.5, *encoders: str) -> LearnedWord:
    return LearnedWord(name, {name: torch.full((vectors, WIDTH), value) for name in encoders or ("text_encoder",)})


@pytest.fixture
def model(tiny_world: World) -> DiffusionModel:
    return tiny_world.base.family.build(tiny_world.base)


def tokens(model: DiffusionModel, prompt: str) -> list[int]:
    """Without the padding."""
    row = model.tokenize([prompt])["ids"][0].tolist()
    return row[: row.index(row[-1]) + 1]


# How a model reads them


def test_a_word_is_as_many_tokens_as_it_has_vectors(model: DiffusionModel) -> None:
    plain, without = tokens(model, "a photo of sks dog"), tokens(model, "a photo of dog")
    own = len(plain) - len(without)
    model.learn([word(vectors=3)])
    replaced = tokens(model, "a photo of sks dog")
    place = replaced.index(-1)
    assert replaced == [*plain[:place], -1, -2, -3, *plain[place + own :]]
    assert tokens(model, "SKS, sks") == [
        *tokens(model, "")[:1],
        -1,
        -2,
        -3,
        *tokens(model, ",")[1:-1],
        -1,
        -2,
        -3,
        plain[-1],
    ]
    assert tokens(model, "a photo of dog") == without
    model.learn([])
    assert tokens(model, "a photo of sks dog") == plain


def test_of_two_words_the_longer_one_counts(model: DiffusionModel) -> None:
    model.learn([word("sks", 1), word("sks dog", 2)])
    assert [token for token in tokens(model, "sks cat, sks dog") if token < 0] == [-1, -2, -3]


def test_a_long_word_is_cut_with_its_prompt(model: DiffusionModel) -> None:
    longest = model.text_encoders["text_encoder"].config.max_position_embeddings - 2
    model.learn([word(vectors=longest)])
    assert not model.overlong("sks")
    assert model.overlong("sks sks")
    row = model.tokenize(["sks sks"])["ids"][0].tolist()
    assert row == [row[0], *range(-1, -1 - longest, -1), row[-1]]
    assert (row[0], row[-1]) == (tokens(model, "")[0], tokens(model, "")[-1])


def test_the_vectors_are_read_in_the_word_s_place(model: DiffusionModel) -> None:
    """A word with the embedding of another one's token is that one; gradients reach it and nothing else."""
    with torch.no_grad():
        expected = model.encode_prompts(["a photo of red dog"])["text"]
    rows = model.token_embeddings("text_encoder", "red").clone().requires_grad_()
    model.learn([LearnedWord("sks", {"text_encoder": rows})])
    encoded = model.encode_prompts(["a photo of sks dog"])["text"]
    torch.testing.assert_close(encoded.detach(), expected, rtol=0, atol=1e-6)
    encoded[0, -1, :8].sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.text_encoders["text_encoder"].parameters())


def test_vectors_are_read_anew(model: DiffusionModel) -> None:
    one = word(value=0.1)
    model.learn([one])
    with torch.no_grad():
        before = model.encode_prompts(["sks"])["text"]
        one.vectors["text_encoder"].add_(0.1)
        assert not torch.equal(model.encode_prompts(["sks"])["text"], before)


def test_a_model_learns_beside_what_it_has_learned(model: DiffusionModel) -> None:
    learn(model, word("sks"))
    learn(model, word("ohwx", value=0.25))
    learn(model, word("SKS"))
    assert sorted(each.word for each in model.words) == ["SKS", "ohwx"]
    with pytest.raises(AdapterError, match="Two different embeddings have the name 'sks'"):
        learn(model, word("sks", value=0.75))
    wide = LearnedWord("wide", {"text_encoder": torch.zeros(1, WIDTH + 1)})
    with pytest.raises(
        AdapterError, match=f"'wide' have {WIDTH + 1} dimensions, but this model's text_encoder expects {WIDTH}"
    ):
        learn(model, wide)


def test_what_can_not_be_read_of_a_bundle_is_told(model: DiffusionModel, caplog: pytest.LogCaptureFixture) -> None:
    bundle = bundled_embeddings([word("sks")], SD1)
    bundle |= {"bundle_emb.xl.clip_g": torch.ones(1, 8), "bundle_emb.xl.clip_l": torch.ones(1, 8)}
    bundle |= {"bundle_emb.wide.string_to_param.*": torch.ones(1, WIDTH + 1)}
    with caplog.at_level(logging.WARNING):
        learn_bundled(model, bundle)
    assert [each.word for each in model.words] == ["sks"]
    assert "The embedding 'xl' has the parts clip_g, clip_l" in caplog.text
    assert "The vectors of the embedding 'wide' have" in caplog.text


def test_a_base_with_a_word_is_another_base(tiny_world: World) -> None:
    base: BaseWeights = tiny_world.base
    bundle = bundled_embeddings([word("sks")], SD1)
    taught = with_bundled_words(base, [Adapter({}), Adapter({}, embeddings=bundle)])
    assert [each.word for each in taught.words] == ["sks"]
    assert [each.word for each in base.family.build(taught).words] == ["sks"]
    assert taught.fingerprint != base.fingerprint
    assert with_bundled_words(base, [Adapter({})]) is base


# Files


def same(one: LearnedWord, other: LearnedWord) -> bool:
    return one.vectors.keys() == other.vectors.keys() and all(
        torch.equal(tensor, other.vectors[encoder]) for encoder, tensor in one.vectors.items()
    )


@pytest.mark.parametrize(
    ("family", "encoders", "bundled", "alone"),
    [
        (SD1, ("text_encoder",), {"string_to_param.*"}, {"emb_params"}),
        (SDXL, ("text_encoder", "text_encoder_2"), {"clip_l", "clip_g"}, {"clip_l", "clip_g"}),
        (SDXL, ("text_encoder_2",), {"clip_g"}, {"clip_g"}),
    ],
)
def test_a_word_comes_back_from_both_files(
    family: object, encoders: tuple[str, ...], bundled: set[str], alone: set[str], tmp_path: Path
) -> None:
    one = word("my toy", 3, 0.25, *encoders)
    bundle = bundled_embeddings([one], family)
    assert bundle.keys() == {f"bundle_emb.my toy.{part}" for part in bundled}
    [back] = words_of(bundle, family)
    assert back.word == "my toy"
    assert same(back, one)
    path = write_embedding(tmp_path / "dog.safetensors", one, family, {"a": "b"})
    again = write_embedding(tmp_path / "dog.safetensors", one, family, {})
    assert (path.name, again.name) == ("dog.safetensors", "dog-2.safetensors")
    assert load_file(path).keys() == alone
    read = read_embedding(path, family)
    assert read.word == "dog"
    assert same(read, one)


@pytest.mark.parametrize("key", ["emb_params", "string_to_param.*", "<sks>", "clip_l"])
def test_files_of_one_text_encoder_are_read_whatever_their_key(key: str, tmp_path: Path) -> None:
    for tensor in (torch.ones(1, 8), torch.ones(8)):
        save_file({key: tensor}, tmp_path / "dog.safetensors")
        assert read_embedding(tmp_path / "dog.safetensors", SD1).vectors["text_encoder"].shape == (1, 8)


@pytest.mark.parametrize(
    ("family", "tensors", "problem"),
    [
        (SD1, {"clip_l": torch.ones(1, 8), "clip_g": torch.ones(1, 8)}, "has the parts clip_g, clip_l"),
        (SDXL, {"emb_params": torch.ones(1, 8)}, "has the parts emb_params"),
        (SD1, {"emb_params": torch.ones(1, 2, 8)}, r"is damaged: emb_params has shape \(1, 2, 8\)"),
        (SD1, {"emb_params": torch.ones(1, 8, dtype=torch.int64)}, "type int64"),
        (SD1, {"emb_params": torch.ones(0, 8)}, "is damaged"),
        (SD1, {"bundle_emb.sks.clip_l": torch.ones(1, 8)}, "is an adapter with bundled embeddings"),
    ],
)
def test_what_is_no_embedding_is_refused(
    family: object, tensors: dict[str, Tensor], problem: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "dog.safetensors")
    with pytest.raises(AdapterError, match=problem) as refusal:
        read_embedding(tmp_path / "dog.safetensors", family)
    assert "dog" in str(refusal.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dog.safetensors").write_bytes(b"no")
    for name in ("dog", "cat"):
        with pytest.raises(AdapterError, match="can't be read"):
            read_embedding(tmp_path / f"{name}.safetensors", SD1)


def test_the_name_that_prompts_call() -> None:
    assert [prompt_name(text) for text in ("sks", "my toy", "<s1>", "犬_1", "!!")] == [
        "sks",
        "my-toy",
        "s1",
        "犬_1",
        "word",
    ]
