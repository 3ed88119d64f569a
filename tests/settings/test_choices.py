"""Every choice does something of its own: no two choices of a setting give the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from adapter_maths import single
from checkpoints import sdxl_checkpoint
from helpers import Recorder
from pack.trainer.__main__ import COMMANDS
from pack.trainer.adapters.diffusers_format import diffusers_state_dict
from pack.trainer.adapters.peft_layers import PEFT_METHODS
from pack.trainer.adapters.targets import choose_targets
from pack.trainer.core.devices import DTYPES
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.images import load_pictures
from pack.trainer.merging.merge import WeightedAdapter, merge
from pack.trainer.models.families import FAMILIES
from pack.trainer.models.flow import ConstantMu, FlowObjective
from pack.trainer.models.nf4 import quantize
from pack.trainer.models.objective import make_objective
from pack.trainer.models.open import open_base
from pack.trainer.settings.merge import MergeSettings
from pack.trainer.settings.objective import ObjectiveSettings
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.optimizers import learning_rate_factor, make_optimizer
from pack.trainer.training.presets import load_preset
from PIL import Image
from torch import Tensor, nn
from worlds import TOKENIZER

pytestmark = pytest.mark.usefixtures("quick")

CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(field.annotation)
    for command in COMMANDS
    for name, field in command.settings.model_fields.items()
    if get_origin(field.annotation) is Literal
}


def numbers(tensor: Tensor) -> Hashable:
    return tuple(round(value, 7) for value in tensor.flatten().tolist())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rates(schedule: str, **values: Any) -> list[float]:
    """The factor of the learning rate in each of 60 steps."""
    warmup = {} if schedule == "constant" else {"lr_warmup_steps": 6}
    settings = TrainSettings.checked({"lr_schedule": schedule, "steps": 60, **warmup, **values})
    optimizer = make_optimizer({"unet": [nn.Parameter(torch.zeros(1))]}, settings)
    factor = learning_rate_factor(optimizer, settings)
    return [factor(step) for step in range(60)]


def sampled(scheduler: Any) -> Hashable:
    """Latents after six steps along predictions that depend on the timestep and the latents."""
    made = make_objective().make_scheduler(scheduler, 6, (1, 2, 2), torch.device("cpu"))
    latents = random(1, 1, 2, 2) * made.init_noise_sigma
    for timestep in made.timesteps:
        prediction = torch.sin(made.scale_model_input(latents, timestep) + float(timestep) / 300)
        latents = made.step(prediction, timestep, latents, return_dict=False)[0]
    return numbers(latents)


def loss_with(**values: Any) -> Hashable:
    objective = make_objective().with_settings(ObjectiveSettings.checked(values))
    predicted, latents, noise = (random(3, 1, 2, 2, seed=seed) for seed in range(3))
    return numbers(objective.loss(predicted, latents, noise, torch.tensor([50, 500, 950])))


def updated(optimizer: str) -> Hashable:
    """A parameter after three steps."""
    options = "min_8bit_size=1" if "8bit" in optimizer else ""
    rate = 1.0 if optimizer == "prodigy" else 1e-2
    settings = TrainSettings.checked({"optimizer": optimizer, "optimizer_options": options, "learning_rate": rate})
    parameter = nn.Parameter(random(64, 64))
    made = make_optimizer({"unet": [parameter]}, settings)
    for step in range(3):
        parameter.grad = random(64, 64, seed=step + 1) + 0.5
        made.step()
    return type(made).__name__, numbers(parameter.detach()[:2, :2])


def targeted(checkpoint: Path, targets: str) -> Hashable:
    if not checkpoint.exists():
        sdxl_checkpoint(checkpoint, size="tiny")
    base = open_base(checkpoint, TOKENIZER)
    include = "^conv_in$" if targets == "none" else ""
    settings = TrainSettings.checked({"targets": targets, "include": include, "rank": 2})
    return tuple(target.name for target in choose_targets(base.family.build(base), settings))


def merged(method: str) -> Hashable:
    options: dict[str, Any] = {} if method in ("sum", "orthogonal") else {"rank": 2}
    pair = [WeightedAdapter(single("LoRA", (12, 20), seed), f"adapter {seed}", 1.0) for seed in (1, 2)]
    result = merge(pair, MergeSettings.checked({"method": method, **options}))
    tensors = result.adapter.state_dict()
    up, down = (next(tensor for name, tensor in tensors.items() if part in name) for part in ("lora_up", "lora_down"))
    return numbers((up @ down)[:3, :3])


def captioned(folder: Path, captions: Any) -> Hashable:
    options = AnnotationOptions(captions=captions)
    return tuple(picture.caption for picture in load_pictures(folder, "a photo of sks dog", Recorder(), options))


def masked(folder: Path, masks: Any) -> Hashable:
    options = AnnotationOptions(masks=masks)
    return tuple(bool(picture.mask) for picture in load_pictures(folder, "a photo of sks dog", Recorder(), options))


def stored(quantization: str) -> Hashable:
    network = nn.Sequential(nn.Linear(64, 64))
    if quantization == "nf4":
        quantize(network, torch.device("cpu"), torch.float32)
    return type(network[0]).__name__, str(next(network.parameters()).dtype)


def preset(subject: str, family: Any) -> Hashable:
    if subject == "none":
        return ()
    loaded = load_preset(subject, family)
    return tuple(sorted({**loaded.settings, **loaded.priors}.items()))


@pytest.fixture(scope="module")
def gives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[str], Hashable]]:
    """Setting → what one of its choices gives."""
    xl = tmp_path_factory.mktemp("xl") / "tiny-xl.safetensors"
    folder = tmp_path_factory.mktemp("pictures") / "dogs"
    folder.mkdir()
    for name, mode in (("a", "RGB"), ("b", "RGBA"), ("c", "RGB")):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (64, 64, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels, mode).save(folder / f"rex {name}.png")
    (folder / "rex a.txt").write_text("sks dog on the lawn")
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(folder / "rex c-masklabel.png")
    return {
        "lr_schedule": lambda choice: tuple(rates(choice)),
        "scheduler": sampled,
        "prior_scheduler": sampled,
        "loss": lambda choice: loss_with(loss=choice),
        "loss_weighting": lambda choice: loss_with(loss_weighting=choice),
        "timestep_sampling": noise_level,
        "prediction_type": lambda choice: "" if choice == "auto" else sampled_target(choice),
        "optimizer": updated,
        "adapter": lambda choice: "all weights" if choice == "full" else repr(PEFT_METHODS[choice]),
        "targets": lambda choice: targeted(xl, choice),
        "base_quantization": stored,
        "method": merged,
        "format": lambda choice: tuple(names_as(choice)),
        "captions": lambda choice: captioned(folder, choice),
        "masks": lambda choice: masked(folder, choice),
        "save_precision": lambda choice: str(DTYPES[choice]),
        "precision": lambda choice: str(DTYPES.get(choice)),
        **{f"preset of {family.name}": lambda choice, family=family: preset(choice, family) for family in FAMILIES},
    }


def sampled_target(prediction_type: str) -> Hashable:
    objective = make_objective(prediction_type)
    latents, noise = random(1, 1, 2, 2), random(1, 1, 2, 2, seed=1)
    return numbers(objective.target(latents, noise, torch.tensor([500])))


def noise_level(sampling: str) -> Hashable:
    objective = FlowObjective(ConstantMu(0.0), ConstantMu(0.0))
    return objective.timestep_at(0.9, ObjectiveSettings.checked({"timestep_sampling": sampling}), (4, 8, 8))


def names_as(layout: str) -> list[str]:
    adapter = single("LoRA", (12, 20))
    return sorted(diffusers_state_dict(adapter, torch.float32) if layout == "diffusers" else adapter.state_dict())


SHOWN_BY_RUNS = {  # choices that only a whole run shows → the test of their difference
    "rank_schedule": "tests/training/test_rank_schedule.py",
    "lora_init": "tests/training/test_rank_schedule.py",
    "fit": "tests/training/test_memory_plan.py",
    "compile": "tests/models/test_compiled_blocks.py",
    "base_preview": "tests/training/test_previews.py",
    "prior": "tests/dreambooth/test_preservation.py",
    "resume": "tests/cli/test_command_line.py",
    "log_with": "tests/training/test_trackers.py",
}
ALIKE = {  # choices with the same values, on purpose
    ("preset of sdxl", "object", "animal"),  # diffusers' authors found the same values for a dog, a toy and a logo
}


def test_every_choice_is_looked_at(gives: dict[str, Callable[[str], Hashable]]) -> None:
    assert {name.split()[0] for name in gives} | set(SHOWN_BY_RUNS) == set(CHOICES)
    for name, file in SHOWN_BY_RUNS.items():
        assert name in (Path(__file__).parents[2] / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *sorted(set(CHOICES) - {"preset", "targets"} - SHOWN_BY_RUNS.keys()),
        pytest.param("targets", marks=pytest.mark.slow),  # builds a tiny SDXL
        *(f"preset of {family.name}" for family in FAMILIES),
    ],
)
def test_no_two_choices_give_the_same(name: str, gives: dict[str, Callable[[str], Hashable]]) -> None:
    results = {choice: gives[name](choice) for choice in CHOICES[name.split()[0]]}
    for one, other in itertools.combinations(results, 2):
        assert (results[one] == results[other]) == ((name, one, other) in ALIKE), f"{one} and {other}"


def test_restarts_restart() -> None:
    """Each of the cycles begins at the peak and falls; after the warm-up they are of equal length."""
    for cycles in (2, 3, 6):
        factors = rates("cosine_with_restarts", lr_cycles=cycles)[6:]
        assert [step for step, factor in enumerate(factors) if factor == 1.0] == list(range(0, 54, 54 // cycles))
        rises = [step for step in range(1, 54) if factors[step] > factors[step - 1]]
        assert rises == list(range(54 // cycles, 54, 54 // cycles))
    assert rates("cosine_with_restarts") == rates("cosine_with_restarts", lr_cycles=3)


def test_a_polynomial_has_its_power() -> None:
    for power in (0.5, 2.0, 3.0):
        factors = rates("polynomial", lr_power=power)[6:]
        assert factors == pytest.approx([(1 - step / 54) ** power for step in range(54)], abs=2e-3)  # it ends at 1e-7
    assert rates("polynomial") == rates("polynomial", lr_power=2.0)


def test_a_polynomial_of_a_tiny_rate_has_its_power() -> None:
    factors = rates("polynomial", learning_rate=1e-8)[6:]
    assert factors == pytest.approx([(1 - step / 54) ** 2 for step in range(54)], abs=2e-3)


def test_one_cycle_and_power_one_are_what_version_0_4_had() -> None:
    """Its runs had these curves and no setting for them; so they are found again, and go on exactly."""
    assert rates("cosine_with_restarts", lr_cycles=1) == pytest.approx(rates("cosine"))
    assert rates("polynomial", lr_power=1.0) == pytest.approx(rates("linear"), abs=2e-3)
    for name, schedule, value in (("lr_cycles", "cosine_with_restarts", 1), ("lr_power", "polynomial", 1.0)):
        of_old = TrainSettings.checked({"lr_schedule": schedule, name: value}).result_settings()
        assert not {"lr_cycles", "lr_power"} & of_old.keys()
        assert name in TrainSettings.checked({"lr_schedule": schedule}).result_settings()


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_fingerprints_of_other_schedules_know_nothing_of_them(schedule: str) -> None:
    settings = TrainSettings.checked({"lr_schedule": schedule, "lr_cycles": 7, "lr_power": 3.0})
    assert not {"lr_cycles", "lr_power"} & settings.result_settings().keys()
    assert not {"lr_cycles", "lr_power"} & settings.result_settings(as_given=True).keys()


@pytest.mark.parametrize(("steps", "warmup", "most"), [(800, 0, 400), (10, 2, 4), (3, 0, 1), (1, 0, 1)])
def test_cycles_need_two_steps_each(steps: int, warmup: int, most: int) -> None:
    """With as many cycles as steps, each step would be at the peak."""
    values = {"lr_schedule": "cosine_with_restarts", "steps": steps, "lr_warmup_steps": warmup}
    assert TrainSettings.checked({**values, "lr_cycles": most}).lr_cycles == most
    with pytest.raises(Exception, match=rf"set lr_cycles = {most} or less"):
        TrainSettings.checked({**values, "lr_cycles": most + 1})
