"""The learned merge beside plain torch, and by what must hold of it: sums, borrowed weights, seeds, stopping."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anima_checkpoints
import pytest
import torch
from adapter_maths import adapter_of
from cases import mostly_slow
from checkpoints import sdxl_checkpoint
from helpers import Recorder
from merge_worlds import (
    TEXT,
    both,
    checkpoint,
    deltas,
    demo_base,
    merged_model,
    random_adapter,
    same,
    weights_of,
)
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.adapters.names import modules_by_name, named_weights
from pack.trainer.core.errors import AdapterError, CancelledError, SettingsError, TrainerError
from pack.trainer.core.events import Phase, Step
from pack.trainer.core.seeding import generator
from pack.trainer.merging.merge import MergeResult, WeightedAdapter
from pack.trainer.merging.ziplora import _ZipLoraTrainer, learned_merge
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, denoise, starting_noise
from pack.trainer.settings.merge import BlockWeight, LearnedMergeSettings, parse_block_weights
from torch import Tensor
from torch.func import functional_call
from worlds import TOKENIZER, lent_tensors

pytestmark = pytest.mark.usefixtures("quick")

CPU = torch.device("cpu")
SOME = r"lora_unet_(down_blocks_1|mid|up_blocks_0).*attn[12]_to_[qkv]$"
QUICK: dict[str, Any] = {
    "subject_prompt": "a photo of sks dog | sks dog",
    "style_prompt": "pixel art, a house",
    "steps": 2,
    "pictures": 2,
    "sampling_steps": 2,
    "resolution": 64,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    return open_base(checkpoint(tmp_path_factory.mktemp("base"), "sd15"))


@pytest.fixture(scope="module")
def pair(base: BaseWeights) -> tuple[WeightedAdapter, WeightedAdapter]:
    """A subject with convolutions and a text encoder, a style of another rank and of other layers, at strengths."""
    subject = both(
        random_adapter(
            base, pattern=rf"{SOME}|mid_block_resnets_0_conv1|down_blocks_0_downsamplers", rank=2, alpha=1.0
        ),
        random_adapter(base, pattern=TEXT, seed=5),
    )
    style = both(
        random_adapter(base, pattern=r"mid.*(attn1_to_[qkv]|conv1|proj_in)$|time_emb_proj$", seed=2, rank=3, alpha=4.0),
        random_adapter(base, pattern=TEXT, seed=6, rank=2),
    )
    subject = replace(subject, metadata={"modelspec.trigger_phrase": "sks dog"})
    style = replace(style, metadata={"modelspec.trigger_phrase": "pixel art"})
    return WeightedAdapter(subject, "subject", 0.8, 0.7), WeightedAdapter(style, "style", 1.2, 0.4)


@pytest.fixture(scope="module")
def still(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> tuple[MergeResult, Recorder]:
    """A merge that learns next to nothing, for tests that only look."""
    listener = Recorder()
    return learned(base, pair, listener, learning_rate=1e-9, steps=1), listener


def learned(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter], listener: Any = None, **changes: Any
) -> MergeResult:
    settings = LearnedMergeSettings.checked({**QUICK, **changes})
    return learned_merge(base, *pair, settings, CPU, listener or Recorder())


def test_the_words_of_an_adapter_are_read_in_its_prompts(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]
) -> None:
    vectors = torch.ones(2, base.text_encoders[0].config["hidden_size"])
    embeddings = {"bundle_emb.sks.string_to_param.*": vectors}
    subject = replace(pair[0], adapter=replace(pair[0].adapter, embeddings=embeddings))
    trainer = _ZipLoraTrainer(base, [subject, pair[1]], LearnedMergeSettings.checked(QUICK), CPU, Recorder())
    trainer.weights = weights_of(base)
    models = [trainer._model_with_text_adapters(adapters) for adapters in ([subject], [pair[1]], [subject, pair[1]])]
    assert [[word.word for word in model.words] for model in models] == [["sks"], [], ["sks"]]


def plain_sum(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> dict[str, Tensor]:
    """Σ wᵢ Δᵢ of every module, in the weight's shape."""
    weights = weights_of(base)
    found: dict[str, Tensor] = {}
    for part in pair:
        for name, delta in deltas(part.adapter, weights).items():
            strength = part.text_strength if name.startswith("lora_te") else part.strength
            found[name] = found.get(name, 0) + strength * delta
    return found


def coefficients(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter], result: Adapter
) -> dict[str, list[Tensor]]:
    """The factors of the inputs, from the result alone: of every input the two numbers that give its column.

    Raises an assertion if no factors give the result, so that it is Σ wᵢ Δᵢ diag(mᵢ) and nothing else.
    """
    weights = weights_of(base)
    inputs = [deltas(part.adapter, weights) for part in pair]
    found: dict[str, list[Tensor]] = {}
    for name, merged in deltas(result, weights).items():
        if name.startswith("lora_te"):
            continue
        present = [(part.strength, one[name]) for part, one in zip(pair, inputs, strict=True) if name in one]
        columns = [(weight * delta.double()).transpose(0, 1).flatten(1) for weight, delta in present]
        wanted = merged.double().transpose(0, 1).flatten(1)
        rows = []
        for place in range(len(wanted)):
            matrix = torch.stack([one[place] for one in columns], dim=1)
            rows.append(torch.linalg.lstsq(matrix, wanted[place][:, None]).solution[:, 0])
        solved = torch.stack(rows, dim=1)
        again = sum(one * row[:, None] for one, row in zip(columns, solved, strict=True))
        assert float((again - wanted).norm()) < 1e-5 * float(wanted.norm()), name
        found[name] = list(solved)
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# What the result is


def test_without_learning_it_is_the_sum(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter], still: tuple[MergeResult, Recorder]
) -> None:
    result, _ = still
    assert same(deltas(result.adapter, weights_of(base)), plain_sum(base, pair)) < 1e-5
    assert result.report.method == "learned"
    assert result.report.titles == ["subject", "style"]


def test_columns_are_scaled_and_text_encoders_summed(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]
) -> None:
    """Also of layers that one of them alone has; and the base is as it was."""
    before = digest(lent_tensors(base))
    result = learned(base, pair, learning_rate=0.05, steps=3)
    assert digest(lent_tensors(base)) == before
    found = coefficients(base, pair, result.adapter)
    expected = plain_sum(base, pair)
    assert set(result.adapter.layers) == set(expected)
    assert {layer.kind for layer in result.adapter.layers.values()} == {"LoRA"}
    moved = torch.cat([torch.cat(one) for one in found.values()])
    assert (moved - 1).abs().max() < 0.2
    assert float(((moved - 1).abs() > 0.02).double().mean()) > 0.8
    assert {len(one) for one in found.values()} == {1, 2}
    assert any("conv1" in name and len(one) == 2 for name, one in found.items())
    actual = deltas(result.adapter, weights_of(base))
    text = [name for name in expected if name.startswith("lora_te")]
    assert len(text) == 12
    assert same({name: actual[name] for name in text}, {name: expected[name] for name in text}) < 1e-6


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.skipif(not anima_checkpoints.can_be_made(), reason="needs diffusers 0.39")
def test_layers_that_read_prompts_are_summed_as_text_encoders_are(tmp_path: Path) -> None:
    """Anima's conditioner is a part of the transformer, but has done its work before anything is learned."""
    base = open_base(anima_checkpoints.anima_folder(tmp_path / "anima"))
    pattern = r"lora_unet_(llm_adapter_blocks_0_mlp_2|blocks_0_self_attn_q_proj)$"
    adapters = [random_adapter(base, pattern=pattern, seed=seed, rank=2) for seed in (1, 2)]
    pair = (WeightedAdapter(adapters[0], "subject", 0.8), WeightedAdapter(adapters[1], "style", 1.2))
    result = learned(base, pair, learning_rate=0.5, steps=2)
    found, expected = deltas(result.adapter, weights_of(base)), plain_sum(base, pair)
    assert len(found) == 2
    apart = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in found}
    assert apart.pop("lora_unet_llm_adapter_blocks_0_mlp_2") < 1e-5
    assert all(share > 1e-2 for share in apart.values())


def test_the_same_seed_gives_the_same(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    torch.manual_seed(1)
    first = learned(base, pair, steps=1).adapter.state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = learned(base, pair, steps=1).adapter.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    other = learned(base, pair, steps=1, seed=1).adapter.state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_it_goes_on_learning_from_the_same_start(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]
) -> None:
    """A longer run takes the steps of a shorter one first."""
    short, long = Recorder(), Recorder()
    learned(base, pair, short, steps=1)
    learned(base, pair, long, steps=3)
    assert long.losses[:1] == short.losses
    assert [event.step for event in long.events if isinstance(event, Step)] == [1, 2, 3]
    assert {event.name for event in long.events if isinstance(event, Phase)} == {"generating", "merging"}


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]
) -> None:
    plain = learned(base, pair, steps=1).adapter
    lean = learned(base, pair, steps=1, gradient_checkpointing=True).adapter
    weights = weights_of(base)
    assert same(deltas(lean, weights), deltas(plain, weights)) < 1e-4


def test_metadata_say_where_it_comes_from(still: tuple[MergeResult, Recorder]) -> None:
    found = still[0].adapter.metadata
    assert found["modelspec.merged_from"] == "subject, style"
    assert found["modelspec.trigger_phrase"] == "sks dog, pixel art"
    assert '"method": "learned"' in found["dreambooth.merge"]


# How it learns


class Reference:
    """The learned merge in plain torch: dense weights W + Σ wᵢ Δᵢ diag(mᵢ), the prompts' encodings of merged models."""

    def __init__(self, base: BaseWeights, pair: Sequence[WeightedAdapter], settings: LearnedMergeSettings) -> None:
        self.base, self.pair, self.settings = base, pair, settings
        self.weights = weights_of(base, "^lora_unet_")
        self.deltas = [
            {name: part.strength * one for name, one in deltas(part.adapter, weights_of(base)).items()} for part in pair
        ]
        self.columns = [
            {n: torch.ones(d.shape[1], requires_grad=True) for n, d in one.items() if n.startswith("lora_unet_")}
            for one in self.deltas
        ]
        self.model = base.family.build(base)
        places = {id(module): path for path, module in self.model.denoiser.named_modules()}
        by_name = modules_by_name(self.model)
        self.paths = {name: f"{places[id(by_name[name])]}.weight" for name in self.weights}
        self.prompts = [["a photo of sks dog", "sks dog"], ["pixel art, a house"]]
        self.merged: dict[tuple[int, ...], DiffusionModel] = {}
        self.latents = [self.drawn(index) for index in range(2)]

    def with_parts(self, indices: Sequence[int]) -> DiffusionModel:
        """A model with parts of the adapters in all of its weights, at the parts' strengths."""
        if tuple(indices) in self.merged:
            return self.merged[tuple(indices)]
        split: list[tuple[Adapter, float]] = []
        for index in indices:
            part = self.pair[index]
            for start, strength in (("lora_unet_", part.strength), ("lora_te", part.text_strength)):
                layers = {name: one for name, one in part.adapter.layers.items() if name.startswith(start)}
                split += [(Adapter(layers), strength)] if layers else []
        return self.merged.setdefault(tuple(indices), merged_model(self.base, *split))

    def said(self, indices: Sequence[int], prompts: Sequence[str]) -> dict[str, Tensor]:
        size = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(len(prompts), 6)
        with torch.no_grad():
            return {**self.with_parts(indices).encode_prompts(prompts), "size": size}

    def drawn(self, index: int) -> list[Tensor]:
        """What one adapter draws alone, on its prompts in turn."""
        model, settings = self.with_parts([index]), self.settings
        found = []
        for number in range(settings.pictures):
            prompt = self.prompts[index][number % len(self.prompts[index])]
            own, empty = self.said([index], [prompt]), self.said([index], [""])
            noise = starting_noise([settings.seed + number], (4, 8, 8))
            config = GenerationConfig(64, 64, "", "ddim", settings.sampling_steps, settings.guidance)
            found.append(denoise(model, noise, own, empty, config))
        return found

    def predicted(
        self, parts: Sequence[int], scaled: bool, noisy: Tensor, t: Tensor, said: dict[str, Tensor]
    ) -> Tensor:
        tensors = {}
        for name, weight in self.weights.items():
            for index in parts:
                if name in self.deltas[index]:
                    delta = self.deltas[index][name]
                    if scaled:
                        column = self.columns[index][name]
                        delta = delta * column.reshape(1, -1, *[1] * (delta.ndim - 2))
                    weight = weight + delta
            tensors[self.paths[name]] = weight
        added = self.model.family.added_conditions(said)
        hidden = [said[f"text{kind.number}"] for kind in self.model.family.text_encoders]
        arguments = (noisy, t, torch.cat(hidden, dim=-1))
        return functional_call(self.model.denoiser, tensors, arguments, {"added_cond_kwargs": added}).sample

    def loss(self, step: int) -> Tensor:
        settings, total = self.settings, torch.zeros(())
        for index in range(2):
            source = generator(settings.seed, "zip", index, step)
            row = int(torch.randint(settings.pictures, (), generator=source))
            split = round(settings.split * 1000)
            low, high = (0, 1000) if split == 0 else (split, 1000) if index == 0 else (0, split)
            t = torch.randint(low, high, (1,), generator=source)
            noise = torch.randn((1, 4, 8, 8), generator=source)
            alpha = self.model.objective.alphas_cumprod[t].reshape(1, 1, 1, 1)
            noisy = alpha.sqrt() * self.latents[index][row] + (1 - alpha).sqrt() * noise
            prompt = [self.prompts[index][row % len(self.prompts[index])]]
            with torch.no_grad():
                wanted = self.predicted([index], False, noisy, t, self.said([index], prompt))
            actual = self.predicted([0, 1], True, noisy, t, self.said([0, 1], prompt))
            total = total + (actual - wanted).square().mean()
        names = set(self.columns[0]) | set(self.columns[1])
        shared = set(self.columns[0]) & set(self.columns[1])
        overlap = sum((self.columns[0][n] * self.columns[1][n]).abs().mean() for n in shared) / len(names)
        return total + settings.overlap_weight * overlap


@pytest.mark.parametrize("split", mostly_slow([0.0, 0.6], 0.6))
def test_it_is_what_plain_torch_computes(
    split: float, base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]
) -> None:
    """The losses and, after AdamW's steps, the coefficients."""
    changes = {"learning_rate": 0.03, "overlap_weight": 0.5, "split": split, "seed": 3, "steps": 2, "pictures": 3}
    listener = Recorder()
    result = learned(base, pair, listener, **changes)
    reference = Reference(base, pair, LearnedMergeSettings.checked({**QUICK, **changes}))
    flat = [one for columns in reference.columns for one in columns.values()]
    optimizer = torch.optim.AdamW(flat, lr=0.03, weight_decay=0.0)
    clear = [torch.ones_like(one, dtype=torch.bool) for one in flat]
    for step in range(2):
        optimizer.zero_grad()
        loss = reference.loss(step)
        loss.backward()
        assert listener.losses[step] == pytest.approx(float(loss.detach()), rel=1e-4)
        for one, mask in zip(flat, clear, strict=True):
            assert one.grad is not None
            mask &= one.grad.abs() > 1e-8  # Adam's first steps are signs of gradients, which rounding turns at zero
        optimizer.step()
    found = coefficients(base, pair, result.adapter)
    compared = 0
    for index, columns in enumerate(reference.columns):
        for name, expected in columns.items():
            present = [n for n in range(2) if name in reference.columns[n]]
            actual = found[name][present.index(index)].float()
            mask = clear[[id(one) for one in flat].index(id(expected))]
            compared += int(mask.sum())
            torch.testing.assert_close(actual[mask], expected.detach()[mask], rtol=0, atol=2e-4)
    assert compared > 0.8 * sum(one.numel() for one in flat)


@pytest.mark.slow
def test_the_penalty_pulls_shared_inputs_down(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    """Of layers that both have; the inputs of others are not shared."""
    free, bound = (
        coefficients(base, pair, learned(base, pair, steps=6, learning_rate=0.02, overlap_weight=weight).adapter)
        for weight in (0.0, 100.0)
    )
    for name, columns in bound.items():
        product = torch.stack(columns).prod(dim=0)
        if len(columns) == 2:
            assert product.max() < 0.85, name
            assert product.mean() < torch.stack(free[name]).prod(dim=0).mean() - 0.1


@pytest.mark.slow
def test_the_loss_falls_on_a_trained_model() -> None:
    base = demo_base()
    pattern = r"lora_unet_.*attn[12]_to_(q|k|v|out_0)$"
    pair = tuple(
        WeightedAdapter(random_adapter(base, pattern=pattern, seed=seed), title) for seed, title in enumerate("ab", 1)
    )
    listener = Recorder()
    changes = {"steps": 30, "learning_rate": 0.05, "pictures": 1, "overlap_weight": 0.0}
    learned_merge(base, *pair, LearnedMergeSettings.checked({**QUICK, **changes}), CPU, listener)
    losses = torch.tensor(listener.losses)
    assert len(losses) == 30
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()


# Other models and precisions


@pytest.mark.slow
def test_sdxl(tmp_path: Path) -> None:
    base = open_base(sdxl_checkpoint(tmp_path / "xl.safetensors", size="tiny"), TOKENIZER)
    before = digest(lent_tensors(base))
    subject = both(
        random_adapter(base, pattern=r"lora_unet_middle.*attn2_to_[qk]$|label_emb_0_0$"),
        random_adapter(base, pattern=r"lora_te1.*self_attn_q_proj$", seed=3),
    )
    style = both(
        random_adapter(base, pattern=r"lora_unet_middle.*attn2_to_[kv]$", seed=2),
        random_adapter(base, pattern=r"lora_te2.*self_attn_q_proj$", seed=4),
    )
    pair = (WeightedAdapter(subject, "a", 1.0, 0.5), WeightedAdapter(style, "b", 0.9, 0.8))
    listener = Recorder()
    result = learned(base, pair, listener, learning_rate=0.05)
    assert all(loss > 0 for loss in listener.losses)
    assert digest(lent_tensors(base)) == before
    found = coefficients(base, pair, result.adapter)
    assert sum(len(one) == 2 for one in found.values()) == 2
    expected, actual = plain_sum(base, pair), deltas(result.adapter, weights_of(base))
    text = [name for name in expected if name.startswith("lora_te")]
    assert len(text) == 6
    assert same({name: actual[name] for name in text}, {name: expected[name] for name in text}) < 1e-6


@pytest.mark.slow
def test_sdxl_by_plain_torch(tmp_path: Path) -> None:
    """Pooled text and sizes are told to the UNet."""
    base = open_base(sdxl_checkpoint(tmp_path / "xl.safetensors", size="tiny"), TOKENIZER)
    subject = both(
        random_adapter(base, pattern=r"lora_unet_middle.*attn2_to_[qk]$"),
        random_adapter(base, pattern=r"lora_te2.*self_attn_v_proj$", seed=3),
    )
    pair = (
        WeightedAdapter(subject, "a"),
        WeightedAdapter(random_adapter(base, pattern=r"lora_unet_middle.*attn2_to_k$", seed=2), "b"),
    )
    listener = Recorder()
    learned(base, pair, listener, steps=1)
    reference = Reference(base, pair, LearnedMergeSettings.checked({**QUICK, "steps": 1}))
    assert listener.losses[0] == pytest.approx(float(reference.loss(0).detach()), rel=1e-4)


@pytest.mark.slow
def test_bf16(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    before = digest(lent_tensors(base))
    listener, exact = Recorder(), Recorder()
    result = learned(base, pair, listener, precision="bf16", learning_rate=0.02, steps=1)
    learned(base, pair, exact, learning_rate=0.02, steps=1)
    assert listener.losses == pytest.approx(exact.losses, rel=0.1)
    assert digest(lent_tensors(base)) == before
    found = coefficients(base, pair, result.adapter)
    assert max(float((one - 1).abs().max()) for columns in found.values() for one in columns) < 0.05


@pytest.mark.parametrize("kind", mostly_slow(["DoRA", "LoKr", "LoHa", "OFT", "full difference"], "DoRA"))
def test_any_kind_of_adapter(kind: str, base: BaseWeights) -> None:
    """Of the first and, beside it, in the text encoder; kinds that no factors tell become full differences."""
    subject = both(random_adapter(base, kind, r"mid.*attn1_to_[qk]$"), random_adapter(base, kind, TEXT, seed=3))
    pair = (
        WeightedAdapter(subject, "a", 0.5, 0.5),
        WeightedAdapter(random_adapter(base, pattern=r"mid.*attn1_to_[kv]$", seed=2), "b"),
    )
    still = learned(base, pair, learning_rate=1e-9, steps=1)
    coefficients(base, pair, still.adapter)
    assert same(deltas(still.adapter, weights_of(base)), plain_sum(base, pair)) < 1e-5


# Parts and strengths


def test_block_weights_hold_in_the_unet_and_beside_text_encoders(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]
) -> None:
    blocks: list[BlockWeight] = parse_block_weights("mid_block=0.5")
    with_blocks = (replace(pair[0], blocks=blocks), pair[1])
    actual = deltas(learned(base, with_blocks, learning_rate=1e-9, steps=1).adapter, weights_of(base))
    name = "lora_unet_mid_block_resnets_0_conv1"
    first, second = (deltas(part.adapter, weights_of(base))[name] for part in pair)
    expected = 0.8 * 0.5 * first + 1.2 * second
    assert float((actual[name] - expected).norm() / expected.norm()) < 1e-5


def test_biases_of_a_text_encoder_are_heard_while_learning(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter], still: tuple[MergeResult, Recorder]
) -> None:
    """They are part of the result, so what is matched must hold them, too."""
    name = "lora_te_text_model_final_layer_norm.diff_b"
    width = base.text_encoders[0].tensors["text_model.final_layer_norm.bias"].shape[0]
    loud = replace(pair[0], adapter=replace(pair[0].adapter, vectors={name: torch.full((width,), 3.0)}))
    listener = Recorder()
    result = learned(base, (loud, pair[1]), listener, steps=1)
    assert torch.allclose(result.adapter.vectors[name], torch.full((width,), 3.0 * 0.7))
    assert listener.losses != still[1].losses


# Stopping, and what is refused


@pytest.mark.parametrize("after", mostly_slow([1, 3, 7, 8], 7))
def test_it_can_be_stopped(after: int, base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    """While drawing and while learning; the base is as it was, and so is accelerate's state."""
    before = digest(lent_tensors(base))
    with pytest.raises(CancelledError):
        learned(base, pair, Recorder(stop_after=after), steps=50)
    assert digest(lent_tensors(base)) == before


@pytest.mark.slow
def test_a_stop_while_learning_tells_the_step(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    asked = Recorder()
    learned(base, pair, asked, steps=1)
    drawing = asked.steps_seen - 1 - len(range(0, len(plain_sum(base, pair)), 16))
    with pytest.raises(CancelledError) as raised:
        learned(base, pair, Recorder(stop_after=drawing + 3), steps=50)
    assert (raised.value.step, raised.value.steps) == (3, 50)


def refused(error: TrainerError, *words: str) -> None:
    assert all(word in error.problem for word in words), error.problem
    assert error.remedy.strip()


def test_adapters_that_do_not_fit_are_named(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    """Before anything is drawn."""
    subject, style = pair
    name = "lora_unet_down_blocks_3_attentions_0_proj_in"
    nowhere = adapter_of({name: {"lora_down.weight": torch.ones(1, 4), "lora_up.weight": torch.ones(4, 1)}})
    listener = Recorder()
    with pytest.raises(AdapterError) as unknown:
        learned(base, (subject, WeightedAdapter(both(style.adapter, nowhere), "lost")), listener)
    refused(unknown.value, "lost", name)
    place = next(iter(subject.adapter.layers))
    other = adapter_of({place: {"lora_down.weight": torch.ones(1, 7), "lora_up.weight": torch.ones(5, 1)}})
    with pytest.raises(AdapterError) as misfit:
        learned(base, (WeightedAdapter(other, "odd"), WeightedAdapter(other, "odd too")), listener)
    refused(misfit.value, "odd", place)
    assert listener.events == []


def test_other_families_are_named(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter], tmp_path: Path
) -> None:
    xl = open_base(sdxl_checkpoint(tmp_path / "xl.safetensors", size="tiny"), TOKENIZER)
    adapter = random_adapter(xl, pattern=r"middle.*attn2_to_k$")
    with pytest.raises(AdapterError) as raised:
        learned(base, (WeightedAdapter(adapter, "a"), WeightedAdapter(adapter, "b")))
    refused(raised.value, "a", "base model")


def test_adapters_without_a_common_layer_are_refused(base: BaseWeights) -> None:
    text = random_adapter(base, pattern=TEXT)
    for left, right in (("attn1_to_q$", "attn1_to_k$"), ("attn1_to_q$", "mid.*attn2_to_k$")):
        pair = (
            WeightedAdapter(both(random_adapter(base, pattern=left), text), "a"),
            WeightedAdapter(random_adapter(base, pattern=right), "b"),
        )
        with pytest.raises(AdapterError) as raised:
            learned(base, pair)
        refused(raised.value, "in common")
    only_text = (WeightedAdapter(text, "a"), WeightedAdapter(text, "b"))
    with pytest.raises(AdapterError) as raised:
        learned(base, only_text)
    refused(raised.value, "no UNet layers in common")


def test_fp16_on_the_cpu_is_refused(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    with pytest.raises(SettingsError, match="fp16"):
        learned(base, pair, precision="fp16")


def test_numbers_that_explode_are_told(base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter]) -> None:
    loud = replace(pair[0], strength=1e30)
    with pytest.raises(TrainerError) as raised:
        learned(base, (loud, replace(pair[1], strength=-1e30)))
    assert "precision" in raised.value.remedy or "learning_rate" in raised.value.remedy


def test_names_of_the_weights_are_those_of_the_results(
    base: BaseWeights, pair: tuple[WeightedAdapter, WeightedAdapter], still: tuple[MergeResult, Recorder]
) -> None:
    result = still[0].adapter
    known = named_weights(base.family.build(base))
    assert set(result.layers) <= set(known)
    assert all(layer.shape == tuple(known[name].shape) for name, layer in result.layers.items())
    assert {name for name in result.layers if name.startswith("lora_unet_")} == {
        name for part in pair for name in part.adapter.layers if name.startswith("lora_unet_")
    }
