"""T-LoRA: how many components act at each timestep; and the start that is orthogonal."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter, write_adapter
from pack.trainer.adapters.layers import LoraLayer
from pack.trainer.adapters.orthogonal import DOWN, SINGULAR_VALUES, UP, plain_factors
from pack.trainer.core.errors import AdapterError, SettingsError
from pack.trainer.models.blocks import enable_gradient_checkpointing
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint, TrainableAdapter
from pack.trainer.training.rank_schedule import RankSchedule, active_ranks
from pack.trainer.training.runs.checkpoint import Saved
from pack.trainer.training.trainable import evaluating
from torch import Tensor, nn
from worlds import COMMON, KINDS, TEXT, World, assert_same_end, distances, perturb, predicted

pytestmark = pytest.mark.usefixtures("quick")

TIMESTEPS = 1000
ORTHOGONAL: dict[str, Any] = {"lora_init": "orthogonal"}
BY_TIMESTEP: dict[str, Any] = {"rank_schedule": "timestep", "min_rank": 1}
BOTH = {**ORTHOGONAL, **BY_TIMESTEP}


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> BaseWeights:
    return open_base(tiny_checkpoint)


def injected(base: BaseWeights, **values: Any) -> tuple[DiffusionModel, TrainableAdapter]:
    model = base.family.build(base)
    return model, TrainableAdapter(model, TrainSettings(**{**COMMON, **values}))


def noisy_prediction(model: DiffusionModel, timesteps: list[int], *, rows: list[int] | None = None) -> Tensor:
    """What a model says of as many noisy samples as there are timesteps; `rows` takes some of them."""
    noise = torch.randn((len(timesteps), 4, 8, 8), generator=torch.Generator().manual_seed(5))
    said = {"text": torch.randn((len(timesteps), 32, 64), generator=torch.Generator().manual_seed(6))}
    chosen = torch.tensor(rows if rows is not None else range(len(timesteps)))
    return model.predict(
        noise[chosen], torch.tensor(timesteps)[chosen], {name: part[chosen] for name, part in said.items()}
    )


# How many components act


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("rank", "min_rank"), [(64, 32), (16, 1), (4, 4), (1, 1), (7, 3)])
def test_the_ranks_are_the_authors(rank: int, min_rank: int, power: float) -> None:
    """As their code has it, `int(((T - t) / T) ** alpha * (max_rank - min_rank)) + min_rank`, but for its rounding."""
    ranks = active_ranks(TIMESTEPS, rank, min_rank, power)
    exact = (np.arange(TIMESTEPS, 0, -1) / TIMESTEPS) ** power * (rank - min_rank)
    unclear = np.abs(exact - exact.round()) < 1e-6  # a whole number, of which theirs may come out one too small
    authors = np.array([int(value) for value in exact]) + min_rank
    assert (ranks.numpy() == authors)[~unclear].all()
    assert (ranks.numpy() == exact.round() + min_rank)[unclear].all()
    assert int(ranks[0]) == rank
    assert min_rank <= int(ranks[-1]) <= min_rank + (power < 1)
    assert (ranks.diff() <= 0).all()


def test_whole_numbers_are_not_rounded_down() -> None:
    """0.29 · 100 is 28.999999999999996 in float64."""
    assert int(active_ranks(100, 101, 1, 1.0)[71]) == 30


@pytest.mark.parametrize("kind", ["T-LoRA", "Ortho-LoRA"])
def test_each_sample_has_the_components_of_its_own_timestep(kind: str, base: BaseWeights) -> None:
    """A pass of mixed timesteps equals, row by row, the model whose other components are not there at all."""
    values = {**KINDS[kind], **BY_TIMESTEP, "conv_rank": 0}
    model, adapter = injected(base, **values)
    perturb(adapter)
    timesteps = [300, 999]
    model.denoiser.train()
    with torch.no_grad():
        together = noisy_prediction(model, timesteps)
        model.denoiser.eval()
        for row, timestep in enumerate(timesteps):
            cut_model, cut = injected(base, **{**values, "rank_schedule": "constant"})
            active = int(active_ranks(TIMESTEPS, 4, 1, 1.0)[timestep])
            for name, layer in cut.layers.items():
                for suffix, parameter in layer.parameters.items():
                    parameter.copy_(adapter.layers[name].parameters[suffix])
                    if suffix == UP:
                        parameter[:, active:] = 0
                for suffix, initial in layer.initial.items():
                    if suffix == UP:
                        initial[:, active:] = 0
            alone = noisy_prediction(cut_model, timesteps, rows=[row])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert [int(active_ranks(TIMESTEPS, 4, 1, 1.0)[timestep]) for timestep in timesteps] == [3, 1]


def test_noise_levels_of_flow_matching_are_timesteps_of_their_own() -> None:
    """A transformer reads σ in (0, 1], of which a thousandth is a timestep; pure noise counts as the noisiest one."""
    down = nn.Linear(2, 4, bias=False)
    nn.init.ones_(down.weight)

    class Transformer(nn.Module):
        def forward(self, hidden: Tensor, timestep: Tensor) -> Tensor:
            components: Tensor = down(hidden)
            return components

    denoiser = Transformer().train()
    RankSchedule(denoiser, TIMESTEPS, 1, 1.0).limit(down)
    sigmas = torch.tensor([0.0004, 0.3, 0.7, 1.0])
    components = denoiser(hidden=torch.ones(4, 3, 2), timestep=sigmas)
    assert (components != 0).sum(-1).tolist() == [[rank] * 3 for rank in (4, 3, 1, 1)]


def test_a_layer_that_reads_all_samples_in_one_row_is_refused() -> None:
    """As the embedders of Z-Image do: which rows are whose does not show there. Of one sample all are."""
    down = nn.Linear(2, 4, bias=False)

    class Transformer(nn.Module):
        def forward(self, hidden: Tensor, timestep: Tensor) -> Tensor:
            components: Tensor = down(hidden.flatten(0, 1))
            return components

    denoiser = Transformer().train()
    RankSchedule(denoiser, TIMESTEPS, 1, 1.0).limit(down)
    with pytest.raises(SettingsError, match="rank_schedule") as caught:
        denoiser(hidden=torch.ones(2, 3, 2), timestep=torch.tensor([0.3, 0.7]))
    assert "batch_size" in caught.value.remedy
    denoiser(hidden=torch.ones(1, 3, 2), timestep=torch.tensor([0.3]))


def test_outside_of_training_every_component_acts(base: BaseWeights) -> None:
    model, adapter = injected(base, **KINDS["T-LoRA"])
    perturb(adapter)
    plain_model, plain = injected(base, **{**KINDS["T-LoRA"], "rank_schedule": "constant"})
    plain.load(adapter.adapter())
    with torch.no_grad():
        assert torch.equal(noisy_prediction(model, [999]), noisy_prediction(plain_model, [999]))
        model.denoiser.train()
        masked = noisy_prediction(model, [999])
        assert not torch.allclose(masked, noisy_prediction(plain_model, [999]), atol=1e-3)
        with evaluating(model):
            assert torch.equal(noisy_prediction(model, [999]), noisy_prediction(plain_model, [999]))
        assert torch.equal(noisy_prediction(model, [999]), masked)


@pytest.mark.parametrize("values", [BY_TIMESTEP, BOTH], ids=["T-LoRA", "orthogonal"])
def test_checkpointed_layers_are_masked_alike_in_the_backward_pass(values: dict[str, Any], base: BaseWeights) -> None:
    """Also after an evaluation between the two passes, and idle components get no gradient."""
    gradients = []
    for checkpointing in (False, True):
        model, adapter = injected(base, **{**values, "targets": "all", "rank": 4})
        perturb(adapter)
        model.denoiser.train()
        if checkpointing:
            enable_gradient_checkpointing(model.denoiser)
        loss = noisy_prediction(model, [999, 700]).square().mean()
        with evaluating(model), torch.no_grad():
            noisy_prediction(model, [0])
        loss.backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
        for layer in adapter.layers.values():
            down, up = (layer.parameters[suffix].grad for suffix in (DOWN, UP))
            assert down is not None
            assert up is not None
            assert not down[1:].any()
            assert not up[:, 1:].any()
            assert down[0].any()
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_text_encoders_know_no_timestep(base: BaseWeights) -> None:
    model, adapter = injected(base, **BY_TIMESTEP, **TEXT)
    perturb(adapter)
    model.text_encoders["text_encoder"].train()
    model.denoiser.train()
    noisy_prediction(model, [999])
    ids = model.tokenize(["a photo of sks dog"])["ids"]
    states = model.encode_tokens("text_encoder", ids)["text"]
    merged = base.family.build(base)
    merge_into(merged, adapter.adapter(), 1.0)
    torch.testing.assert_close(states, merged.encode_tokens("text_encoder", ids)["text"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("min_rank", [0, 1, 3])
def test_a_layer_of_another_rank_has_its_own_schedule(min_rank: int, base: BaseWeights) -> None:
    """0 is half of each rank; a layer of no more than min_rank is always whole."""
    model, adapter = injected(base, **{**BY_TIMESTEP, "rank": 4, "block_ranks": "mid_block=2", "min_rank": min_rank})
    perturb(adapter)
    model.denoiser.train()
    noisy_prediction(model, [999]).square().mean().backward()
    for layer in adapter.layers.values():
        gradient = layer.parameters[DOWN].grad
        assert gradient is not None
        expected = min(min_rank or layer.target.rank // 2, layer.target.rank)
        assert int(gradient.any(dim=1).sum()) == expected


def test_more_than_every_rank_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="min_rank") as caught:
        world.train(tmp_path, listener := Recorder(), rank=4, rank_schedule="timestep", min_rank=5)
    assert "4" in caught.value.problem
    assert "rank_schedule" in caught.value.remedy
    assert listener.losses == []
    assert not (tmp_path / "runs").exists()


# Runs


def test_a_mask_of_the_whole_rank_changes_no_bit(base: BaseWeights) -> None:
    passes = []
    for schedule in ("constant", "timestep"):
        model, adapter = injected(base, rank=4, rank_schedule=schedule, min_rank=4)
        perturb(adapter)
        model.denoiser.train()
        prediction = noisy_prediction(model, [999, 0])
        prediction.square().mean().backward()
        passes.append([prediction, *(parameter.grad for parameter in adapter.parameters())])
    assert all(torch.equal(plain, masked) for plain, masked in zip(*passes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA", "LoCon"])
def test_the_whole_rank_at_every_timestep_is_plain_lora(kind: str, world: World, tmp_path: Path) -> None:
    changes = {**KINDS[kind], "rank": 4, "steps": 3, "batch_size": 2}
    plain = world.train(tmp_path / "plain", told := Recorder(), **changes)
    whole = world.train(tmp_path / "whole", again := Recorder(), **changes, rank_schedule="timestep", min_rank=4)
    assert told.losses == again.losses
    assert plain.run.name != whole.run.name  # another run by its settings
    assert_same_end(whole, plain)


@pytest.mark.slow
def test_fewer_components_learn_something_else(world: World, tmp_path: Path) -> None:
    changes = {"rank": 4, "steps": 2}
    files = [
        world.train(tmp_path / str(number), **changes, **values).adapter.state_dict()
        for number, values in enumerate(({}, BY_TIMESTEP, {**BY_TIMESTEP, "rank_power": 4.0}))
    ]
    for first, second in ((0, 1), (1, 2)):
        assert any(not torch.equal(tensor, files[second][name]) for name, tensor in files[first].items())


EVERYTHING: dict[str, Any] = {
    **BOTH,
    **TEXT,
    "targets": "all",
    "rank": 4,
    "gradient_accumulation": 2,
    "dropout": 0.2,
    "ema_decay": 0.7,
    "text_encoder_until": 0.5,
}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_stop_leaves_no_trace(step: int, world: World, tmp_path: Path) -> None:
    """An orthogonal LoRA goes on from its three factors and its start, which its file alone does not tell."""
    straight = world.train(tmp_path / "straight", told := Recorder(), **EVERYTHING)
    world.stop_after(step, tmp_path / "stopped", **EVERYTHING)
    resumed = world.train(tmp_path / "stopped", last := Recorder(), **EVERYTHING)
    assert resumed.started_from == step
    assert last.losses == told.losses[step:]
    assert_same_end(resumed, straight)


@pytest.mark.slow
def test_checkpointing_and_parts_of_a_batch_change_nothing(world: World, tmp_path: Path) -> None:
    classes = world.with_priors(tmp_path / "class")
    changes: dict[str, Any] = {**BOTH, "targets": "all", "rank": 4, "steps": 3, "seed": 3, "learning_rate": 3e-3}
    together = classes.train(tmp_path / "together", told := Recorder(), **changes, batch_size=2)
    lean = classes.train(tmp_path / "lean", again := Recorder(), **changes, batch_size=2, gradient_checkpointing=True)
    assert told.losses == again.losses
    assert_same_end(lean, together)
    classes.train(tmp_path / "apart", apart := Recorder(), **changes, gradient_accumulation=2)
    assert apart.losses == pytest.approx(told.losses, rel=1e-4)


@pytest.mark.slow
def test_the_file_says_what_it_holds(world: World, tmp_path: Path) -> None:
    changes: dict[str, Any] = {**BOTH, "targets": "all", "rank": 4, "conv_rank": 3, "conv_alpha": 1.0, "alpha": 2.0}
    metadata = world.train(tmp_path, **changes, steps=1).adapter.metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "4.0")
    arguments = json.loads(metadata["ss_network_args"])
    assert (arguments["conv_dim"], arguments["conv_alpha"]) == ("6", "2.0")
    assert {name: arguments[name] for name in ("rank_schedule", "min_rank", "rank_power", "lora_init")} == {
        "rank_schedule": "timestep",
        "min_rank": "1",
        "rank_power": "1.0",
        "lora_init": "orthogonal",
    }


@pytest.mark.slow
def test_it_goes_on_from_its_file_and_adds_up(world: World, tmp_path: Path) -> None:
    """The file of an orthogonal LoRA is one of twice the rank, on which a plain run goes on; and so it is combined."""
    first = world.train(tmp_path / "first", **BOTH, rank=4, steps=2).adapter
    stage = StartingPoint(first, [(first, 0.5)])
    later = world.train(
        tmp_path / "later", **BOTH, rank=4, steps=1, combine=True, learning_rate=1e-12, starting_point=stage
    )
    merged, twice = (world.base.family.build(world.base) for _ in range(2))
    merge_into(merged, later.adapter, 1.0)
    merge_into(twice, first, 1.5)
    assert max(distances(predicted(merged), predicted(twice)).values()) < 1e-5


# The orthogonal start


def test_the_orthogonal_start_changes_nothing(base: BaseWeights) -> None:
    """To the bit on one device, since both terms are computed alike; and its file holds zeros."""
    plain = predicted(base.family.build(base))
    model, adapter = injected(base, **ORTHOGONAL, **TEXT, targets="all", rank=4)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in predicted(model).items())
    for layer in adapter.adapter().layers.values():
        assert not layer.delta().any()


def test_the_components_start_orthonormal(base: BaseWeights) -> None:
    """With the last singular values of a normal matrix of deviation 1 / rank, the largest first."""
    _, adapter = injected(base, **ORTHOGONAL, targets="all", rank=4)
    for name, layer in adapter.layers.items():
        down, up = (layer.parameters[suffix].detach().flatten(1) for suffix in (DOWN, UP))
        values = layer.parameters[SINGULAR_VALUES].detach()
        for gram in (down @ down.T, up.T @ up):
            torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=1e-5)
        normal = torch.randn((up.shape[0], down.shape[1]), generator=torch.Generator().manual_seed(1)) / 4
        expected = torch.linalg.svdvals(normal)[-4:]
        size = float(normal.norm())
        assert (values - expected).abs().max() < 0.05 * size, name
        assert (values.diff() <= 0).all()
        assert values.min() > 0
    downs = [float(layer.parameters[DOWN].detach().sum()) for layer in adapter.layers.values()]
    assert len(set(downs)) == len(downs)


def test_the_orthogonal_start_depends_on_seed_and_module_alone(base: BaseWeights) -> None:
    def starts(**values: Any) -> dict[str, dict[str, Tensor]]:
        _, adapter = injected(base, **ORTHOGONAL, rank=4, **values)
        return {
            name: {key: part.detach() for key, part in one.parameters.items()} for name, one in adapter.layers.items()
        }

    first, few, other = starts(targets="attention-mlp"), starts(exclude="attn2"), starts(seed=1)
    assert all(torch.equal(part, first[name][key]) for name, one in few.items() for key, part in one.items())
    assert not any(torch.equal(one[DOWN], other[name][DOWN]) for name, one in first.items() if name in other)


def test_the_file_of_an_orthogonal_lora_is_what_was_trained_even_in_half_precision(
    base: BaseWeights, tmp_path: Path
) -> None:
    """Its factors are differences from the start, so that little is lost of a small change."""
    _, adapter = injected(base, **ORTHOGONAL, targets="all", rank=4, alpha=3.0)
    perturb(adapter, 1e-4)
    path = write_adapter(tmp_path / "dog.safetensors", adapter.adapter(), torch.float16)
    for name, layer in read_adapter(path).layers.items():
        assert isinstance(layer, LoraLayer)
        one = adapter.layers[name]
        products = [
            (parts[UP].flatten(1) * parts[SINGULAR_VALUES]).double() @ parts[DOWN].flatten(1).double()
            for parts in (one.parameters, one.initial)
        ]
        expected = (one.scale * (products[0] - products[1])).float().detach()
        delta = layer.delta().flatten(1)
        assert float((delta - expected).norm()) < 2e-3 * float(expected.norm()), name


def test_the_first_components_of_the_file_are_the_first_of_the_training() -> None:
    source = torch.Generator().manual_seed(0)
    trained, initial = (
        {
            DOWN: torch.randn((3, 5), generator=source),
            UP: torch.randn((7, 3), generator=source),
            SINGULAR_VALUES: torch.rand(3, generator=source),
        }
        for _ in range(2)
    )
    factors = plain_factors(trained, initial)
    for count in range(4):
        part, start = (
            (each[UP] * each[SINGULAR_VALUES])[:, :count] @ each[DOWN][:count] for each in (trained, initial)
        )
        both = factors[UP][:, : 2 * count] @ factors[DOWN][: 2 * count]
        torch.testing.assert_close(both, part - start, rtol=0, atol=1e-5)


def test_the_adapter_can_be_taken_off(base: BaseWeights) -> None:
    """As PEFT does it, for what the base alone predicts."""
    plain = predicted(base.family.build(base))
    model, adapter = injected(base, **BOTH, targets="all", rank=4)
    perturb(adapter)
    modules: list[Any] = [module for module in model.denoiser.modules() if hasattr(module, "base_layer")]
    for module in modules:
        module._disable_adapters = True
    assert torch.equal(predicted(model)["prediction"], plain["prediction"])


def test_a_checkpoint_without_its_factors_is_another_runs(base: BaseWeights) -> None:
    _, adapter = injected(base, **ORTHOGONAL)
    with pytest.raises(AdapterError, match="different modules"):
        adapter.restore(Saved(adapter=adapter.adapter()))


def test_networks_leave_memory_with_their_hooks(base: BaseWeights) -> None:
    """No cycle of references holds a network that nobody needs."""
    gc.collect()
    gc.disable()
    try:
        layer: nn.Module = nn.Linear(4, 4, bias=False)
        denoiser = nn.Sequential(layer)
        RankSchedule(denoiser, TIMESTEPS, 1, 1.0).limit(layer)
        left = weakref.ref(denoiser)
        del denoiser, layer
        assert left() is None
    finally:
        gc.enable()
