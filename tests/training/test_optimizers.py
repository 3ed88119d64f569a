"""Every optimiser does what its authors say, and is found or missed early."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import mostly_slow
from diffusers.optimization import get_scheduler
from helpers import Recorder
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.core.errors import SettingsError
from pack.trainer.settings.optimizer import OPTIMIZERS, OptimizerName
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from pack.trainer.training.optimizers import (
    learning_rate_factor,
    make_optimizer,
    require_optimizer,
    restore_optimizer,
    set_learning_rates,
)
from torch import Tensor, nn
from worlds import BOTH_TEXTS, COMMON, KINDS, TEXT, World

pytestmark = pytest.mark.usefixtures("quick")

NAMES = get_args(OptimizerName)
# What each one needs beside its name, in runs of a few steps.
WITH: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in NAMES},
    "adamw-8bit": {"optimizer": "adamw-8bit", "optimizer_options": "min_8bit_size=1"},  # the tiny adapter, too
    "adamw-8bit-paged": {"optimizer": "adamw-8bit-paged", "optimizer_options": "min_8bit_size=1"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
}


def settings_of(name: str, **values: Any) -> TrainSettings:
    return TrainSettings(**{"learning_rate": 1.0 if name == "prodigy" else 1e-3, **values, "optimizer": name})


def built(name: str, *parameters: nn.Parameter, **values: Any) -> torch.optim.Optimizer:
    return make_optimizer({"unet": list(parameters)}, settings_of(name, **values))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach().clone()


def after(name: str, steps: int, shape: tuple[int, ...] = (64, 128), **values: Any) -> Tensor:
    """A parameter after steps along gradients that always are the same ones."""
    parameter = nn.Parameter(random(*shape, seed=0))
    optimizer = built(name, parameter, **values)
    for step in range(steps):
        stepped(optimizer, parameter, random(*shape, seed=step + 1) + 0.5)
    return parameter.detach()


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_where_the_metadata_say(name: str) -> None:
    found = OPTIMIZERS[name]
    made = type(built(name, nn.Parameter(torch.zeros(2, 2))))
    assert made is getattr(import_module(found.module), found.name)
    assert (made.__module__, made.__name__) == (found.module, found.name)


def test_adamw_is_torchs() -> None:
    parameter = nn.Parameter(random(64, 128, seed=0))
    reference = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.01)
    for step in range(5):
        expected = stepped(reference, parameter, random(64, 128, seed=step + 1) + 0.5)
    assert torch.equal(after("adamw", 5), expected)


def test_adamw_in_8_bits_is_near_adamw() -> None:
    """Within a tenth of the way that was gone; and it really keeps 8 bits."""
    start, exact, ours = random(64, 128, seed=0), after("adamw", 20), after("adamw-8bit", 20)
    assert not torch.equal(ours, exact)
    assert torch.linalg.vector_norm(ours - exact) < 0.1 * torch.linalg.vector_norm(exact - start)
    parameter = nn.Parameter(random(64, 128, seed=0))
    optimizer = built("adamw-8bit", parameter)
    stepped(optimizer, parameter, random(64, 128, seed=1))
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


def test_small_tensors_are_not_kept_in_8_bits() -> None:
    exact, ours = (after(name, 5, (8, 8)) for name in ("adamw", "adamw-8bit"))
    assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_paging_changes_no_number() -> None:
    assert torch.equal(after("adamw-8bit-paged", 5), after("adamw-8bit", 5))


def test_lion_moves_every_number_by_its_rate() -> None:
    """Chen et al. 2023, algorithm 2, with β of 0.9 and 0.99."""
    parameter = nn.Parameter(torch.zeros(7, 5))
    optimizer = built("lion", parameter, learning_rate=2.0**-10, weight_decay=0.0)
    first, second = random(7, 5, seed=1), random(7, 5, seed=2)
    moved = stepped(optimizer, parameter, first)
    assert torch.equal(moved, -(2.0**-10) * first.sign())
    again = stepped(optimizer, parameter, second) - moved
    direction = (0.9 * (0.01 * first.double()) + 0.1 * second.double()).sign().float()
    assert torch.equal(again, -(2.0**-10) * direction)


def test_lions_weight_decay_is_decoupled() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = built("lion", parameter, learning_rate=0.125, weight_decay=0.5)
    assert torch.equal(stepped(optimizer, parameter, torch.ones(3)), torch.full((3,), 1 - 0.0625 - 0.125))


@pytest.mark.parametrize("shape", [(6, 4), (6,), (3, 2, 5, 5)], ids=str)
def test_adafactor_by_its_paper(shape: tuple[int, ...]) -> None:
    """Shazeer & Stern 2018, algorithms 4 and 5, without momentum and with a rate from outside."""
    parameter = nn.Parameter(random(*shape, seed=0))
    optimizer = built("adafactor", parameter, weight_decay=0.0)
    weight = parameter.detach().double().clone()
    row = column = whole = torch.zeros((), dtype=torch.float64)
    for step in range(1, 6):
        gradient = random(*shape, seed=step)
        stepped(optimizer, parameter, gradient)
        squared, beta = gradient.double() ** 2 + 1e-30, 1 - step**-0.8
        if len(shape) > 1:
            row = beta * row + (1 - beta) * squared.mean(-1)
            column = beta * column + (1 - beta) * squared.mean(-2)
            moment = row.unsqueeze(-1) * column.unsqueeze(-2) / row.mean(-1)[..., None, None]
        else:
            moment = whole = beta * whole + (1 - beta) * squared
        update = gradient.double() / moment.sqrt()
        update /= max(1.0, float(update.pow(2).mean().sqrt()))
        weight -= 1e-3 * update
    assert torch.allclose(parameter.detach().double(), weight, rtol=0, atol=1e-6)


def test_adafactor_keeps_rows_and_columns_alone() -> None:
    parameter = nn.Parameter(random(64, 128, seed=0))
    optimizer = built("adafactor", parameter)
    stepped(optimizer, parameter, random(64, 128, seed=1))
    kept = [value.numel() for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    assert sum(kept) <= 64 + 128 + 1


def test_prodigy_finds_a_rate() -> None:
    """On a quadratic whose minimum is far: the estimate of the distance only grows, and the minimum is reached."""
    target = 5 * random(10, seed=0)
    parameter = nn.Parameter(torch.zeros(10))
    optimizer = built("prodigy", parameter, weight_decay=0.0)
    estimates = []
    for _ in range(300):
        stepped(optimizer, parameter, parameter.detach() - target)
        estimates.append(optimizer.param_groups[0]["d"])
    assert estimates == sorted(estimates)
    assert estimates[0] <= 1e-5
    distance = float(torch.linalg.vector_norm(target))
    assert 1e-3 * distance < estimates[-1] <= distance  # never more than there is, by the paper's theorem
    assert torch.linalg.vector_norm(parameter.detach() - target) < 0.05 * distance


def test_prodigy_has_one_estimate_for_all_groups() -> None:
    unet, text = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))
    settings = settings_of("prodigy", text_encoder_lr=1.0)
    optimizer = make_optimizer({"unet": [unet], "text_encoder": [text]}, settings)
    for _ in range(20):
        unet.grad, text.grad = unet.detach() - 1, text.detach() - 100
        optimizer.step()
    first, second = (group["d"] for group in optimizer.param_groups)
    assert first == second > 1e-5
    one = nn.Parameter(torch.zeros(7))
    alone = built("prodigy", one)
    for _ in range(20):
        stepped(alone, one, one.detach() - torch.tensor([1.0] * 4 + [100.0] * 3))
    assert torch.allclose(torch.cat([unet, text]), one, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_group_has_its_own_peak_and_follows_the_schedule(name: str) -> None:
    rates = {"learning_rate": 1.0, "text_encoder_lr": 1.0} if name == "prodigy" else {"text_encoder_lr": 2e-5}
    groups = {part: [nn.Parameter(torch.zeros(2, 2))] for part in ("text_encoder", "unet")}
    settings = settings_of(name, **rates)
    optimizer = make_optimizer(groups, settings)
    set_learning_rates(optimizer, 0.25)
    expected = [settings.text_encoder_lr, settings.learning_rate]
    assert [group["peak"] for group in optimizer.param_groups] == expected
    assert [group["lr"] for group in optimizer.param_groups] == [0.25 * rate for rate in expected]


@pytest.mark.parametrize("name", mostly_slow(NAMES, "prodigy"))
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_a_run_learns_and_names_its_optimiser(name: str, world: World, tmp_path: Path) -> None:
    adapter = world.train(tmp_path, **WITH[name], steps=2).adapter
    found = OPTIMIZERS[name]
    assert adapter.metadata["ss_optimizer"].startswith(f"{found.module}.{found.name}(weight_decay=0.01")
    assert all(layer_is_learned(layer) for layer in adapter.layers.values())


def layer_is_learned(layer: Any) -> bool:
    return bool(layer.tensors()["lora_up.weight"].abs().max() > 0)


@pytest.mark.parametrize("schedule", get_args(TrainSettings.model_fields["lr_schedule"].annotation))
def test_rates_are_those_of_diffusers_schedules(schedule: str) -> None:
    """As a plain loop has them that steps the schedule after each update."""
    warmup = 0 if schedule == "constant" else 3
    settings = TrainSettings(learning_rate=1e-3, steps=10, lr_schedule=schedule, lr_warmup_steps=warmup)
    optimizer = make_optimizer({"unet": [nn.Parameter(torch.zeros(2))]}, settings)
    factor = learning_rate_factor(optimizer, settings)
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=1e-3)
    reference = get_scheduler(schedule, plain, num_warmup_steps=warmup, num_training_steps=10, num_cycles=3, power=2.0)
    found = []
    for step in range(10):
        set_learning_rates(optimizer, factor(step))
        found.append(optimizer.param_groups[0]["lr"])
        assert found[-1] == pytest.approx(reference.get_last_lr()[0])
        plain.step()
        reference.step()
    assert found[:warmup] == pytest.approx([step * 1e-3 / 3 for step in range(warmup)])
    assert (len(set(found[warmup:])) == 1) == schedule.startswith("constant")


ZERO = {"lora": "lora_up", "dora": "lora_up", "loha": "hada_w2_b", "lokr": "lokr_w1"}


@pytest.mark.parametrize("kind", KINDS)
def test_lora_plus_speeds_up_what_starts_at_zero(kind: str, world: World) -> None:
    settings = TrainSettings(**{**COMMON, **KINDS[kind], **TEXT})
    trainable = TrainableAdapter(world.base.family.build(world.base), settings)
    zero = {id(parameter) for parameter in trainable.parameters() if not parameter.any()}
    fast = [id(parameter) for parameter in trainable.starting_at_zero()]
    assert len(fast) == (0 if kind == "Ortho-LoRA" else len(trainable.layers))
    assert set(fast) == zero


@pytest.mark.parametrize("kind", mostly_slow(["LoRA", "LoCon", "DoRA", "LoHa", "LoKr", "LoKr of 4"], "LoRA"))
def test_lora_plus_is_the_ratio_of_the_first_updates(kind: str, world: World, tmp_path: Path) -> None:
    """A power of two, so that it holds to the bit; in the first step the other parts do not depend on it."""
    changes = {**KINDS[kind], **TEXT, "steps": 1}
    plain = world.train(tmp_path / "plain", **changes).adapter
    plus = world.train(tmp_path / "plus", **changes, lora_plus_ratio=16.0).adapter
    fast = ZERO[changes.get("adapter", "lora")]
    seen = 0
    for name, layer in plus.layers.items():
        for part, tensor in layer.tensors().items():
            before = plain.layers[name].tensors()[part]
            ratio = 16 if part.startswith(fast) and part != "lokr_w1_b" else 1
            assert torch.equal(tensor, ratio * before), (name, part)
            seen += ratio > 1 and bool(before.abs().max() > 0)
    assert seen == len(plus.layers)
    assert json.loads(plus.metadata["ss_network_args"])["loraplus_lr_ratio"] == "16.0"


def test_lora_plus_splits_the_groups_of_sdxl_too() -> None:
    parts = ("unet", "text_encoder", "text_encoder_2")
    groups = {part: [nn.Parameter(torch.zeros(1)) for _ in range(2)] for part in parts}
    settings = TrainSettings(learning_rate=1e-3, **BOTH_TEXTS, lora_plus_ratio=16.0)
    optimizer = make_optimizer(groups, settings, [members[1] for members in groups.values()])
    assert [group["peak"] for group in optimizer.param_groups] == [1e-3, 16e-3, 1e-2, 16e-2, 1e-2, 16e-2]


@pytest.mark.parametrize("name", [name for name in NAMES if OPTIMIZERS[name].requirement])
def test_a_missing_package_is_named_before_any_work(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = OPTIMIZERS[name].requirement.split(">=")[0]
    for module in [OPTIMIZERS[name].module, package, *sys.modules]:
        if module.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, module, None)
    listener = Recorder()
    with pytest.raises(SettingsError) as caught:
        world.train(tmp_path, listener, **WITH[name])
    assert package in caught.value.problem
    assert f'pip install -U "{OPTIMIZERS[name].requirement}"' in caught.value.remedy
    assert listener.events == []
    assert not (tmp_path / "runs").exists()


def test_an_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.3.0")
    with pytest.raises(SettingsError) as caught:
        require_optimizer(settings_of("adamw-schedule-free"))
    assert "3.4.2" in caught.value.problem
    assert "pip install" in caught.value.remedy


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_does_not_exist_is_told_with_those_that_do(name: str, world: World, tmp_path: Path) -> None:
    for given in ("bettas", "lr", "params", "kwargs"):
        with pytest.raises(SettingsError) as caught:
            world.train(tmp_path, **{**WITH[name], "optimizer_options": f"{given}=1"})
        assert f"'{given}'" in caught.value.problem
        known = caught.value.remedy.split(":")[1].split(".")[0].replace(" ", "").split(",")
        assert ("beta1" if name == "adafactor" else "betas") in known
        assert not {"lr", "params", "weight_decay", "kwargs", "relative_step"} & set(known)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", "betas=3"),
        ("adamw", "betas=(1.5,0.9)"),
        ("adamw-8bit", "betas=(1.5,0.9)"),
        ("adamw-8bit", "amsgrad=True"),
        ("adafactor", "clip_threshold=(1,2)"),
        ("lion", "betas=(0.9,)"),
        ("prodigy", "d_coef=(1,2)"),
        ("prodigy", "eps=-1.0"),
        ("adamw-schedule-free", "betas=None"),
    ],
)
def test_a_value_that_can_not_be_is_refused_before_any_work(
    name: str, options: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as caught:
        world.train(tmp_path, **{**WITH[name], "optimizer_options": options})
    assert name in caught.value.problem
    assert options in caught.value.problem
    assert not (tmp_path / "runs").exists()


def test_options_reach_the_optimiser() -> None:
    for text in ("betas=(0.5,0.75) eps=1e-3", "  betas=(0.5, 0.75)   eps = 1e-3".replace(" = ", "=")):
        [group] = built("adamw", nn.Parameter(torch.zeros(1)), optimizer_options=text).param_groups
        assert (group["betas"], group["eps"]) == ((0.5, 0.75), 1e-3)
    title = settings_of("adamw-8bit", optimizer_options="betas=(0.5, 0.75)").optimizer_title(0.02)
    assert title == "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.02,betas=(0.5, 0.75))"


@pytest.mark.parametrize(
    "text",
    ["betas", "betas=", "=3", "betas=abc", "eps=__import__('os')", "eps=1 eps=2", "eps='1'", "a={1}", "a=1j", "a b=1"],
)
def test_options_that_can_not_be_read_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="optimizer_options") as caught:
        TrainSettings.checked({"optimizer_options": text})
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optimizer": "prodigy"}, ("prodigy", "learning_rate = 1")),
        ({"optimizer": "prodigy", "learning_rate": 0.09}, ("0.09", "learning_rate = 1")),
        ({"optimizer": "prodigy", "learning_rate": 1.0, **TEXT}, ("text_encoder_lr = 1", "or text_encoder_lr = 0")),
        (
            {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_2_lr": 0.5},
            ("text_encoder_2_lr = 1", "one learning rate"),
        ),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "lora_plus_ratio": 16.0}, ("lora_plus_ratio = 0",)),
        *(
            ({"optimizer": "adamw-schedule-free", "lr_schedule": schedule}, (f"'{schedule}'", "constant_with_warmup"))
            for schedule in ("linear", "cosine", "cosine_with_restarts", "polynomial")
        ),
        ({"optimizer": "adamw-schedule-free", "ema_decay": 0.9}, ("ema_decay = 0",)),
        ({"optimizer": "adamw-schedule-free", "max_norm": 1.0}, ("max_norm = 0",)),
        ({"adapter": "full", "lora_plus_ratio": 16.0}, ("'full'", "set lora_plus_ratio = 0")),
        ({"ema_decay": 1.0}, ("ema_decay",)),
        ({"lora_plus_ratio": -1.0}, ("lora_plus_ratio",)),
        ({"optimizer": "adamw8bit"}, ("optimizer", "'adamw-8bit'")),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(values: dict[str, Any], told: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        TrainSettings.checked(values)
    for words in told:
        assert words in caught.value.problem


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 1.0, "lr_schedule": "cosine"},
        {"optimizer": "adamw-schedule-free", "lr_schedule": "constant_with_warmup", "lr_warmup_steps": 5},
        {"optimizer": "adafactor", "lora_plus_ratio": 16.0, "ema_decay": 0.999, "max_norm": 1.0},
        # What a card of 16 GB without bf16 takes.
        {
            "optimizer": "adamw-8bit",
            "precision": "fp16",
            "gradient_checkpointing": True,
            "gradient_accumulation": 4,
            "ema_decay": 0.999,
        },
    ],
    ids=str,
)
def test_settings_that_go_together(values: dict[str, Any]) -> None:
    assert TrainSettings.checked(values)


def test_the_recipe_of_a_small_card_runs(world: World, tmp_path: Path) -> None:
    """In bf16 here, since fp16 needs CUDA."""
    listener = Recorder()
    result = world.train(
        tmp_path,
        listener,
        optimizer="adamw-8bit",
        precision="bf16",
        gradient_checkpointing=True,
        gradient_accumulation=4,
        steps=2,
    )
    assert len(listener.losses) == 2
    assert any(layer_is_learned(layer) for layer in read_adapter(result.path).layers.values())


def test_a_state_of_the_fused_kernel_goes_on_without_it_elsewhere() -> None:
    """A GPU's run that is resumed on the CPU: the step is that of a run that was never fused."""
    ends = []
    for fused in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 8))
        began = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
        parameter.grad = torch.linspace(1, 2, 8)
        began.step()
        resumed = torch.optim.AdamW([parameter], lr=0.1)
        restore_optimizer(resumed, began.state_dict())
        assert not resumed.param_groups[0]["fused"]
        resumed.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)  # the two kernels round differently
