"""The memory of a training, planned on the meta device: counted by hand, and equal to what really lives on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from helpers import Recorder
from pack.trainer.__main__ import main
from pack.trainer.core.errors import plain, worded
from pack.trainer.data.batches import draw_batches
from pack.trainer.data.latent_cache import LatentCache, LatentDataset
from pack.trainer.models.blocks import blocks_of
from pack.trainer.models.objective import make_objective
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.memory import fit as fitting
from pack.trainer.training.memory.fit import MemoryBudget, plan_note
from pack.trainer.training.memory.meter import CudaEmulation, LiveBytes
from pack.trainer.training.memory.plan import (
    MemoryNeed,
    MemorySaving,
    Plan,
    Planner,
    PlanOption,
    make_plan,
    memory_savings,
    remedies,
    resident_bytes,
    state_bytes,
)
from torch import nn
from torch.nn import functional as F
from worlds import BOTH_TEXTS, COMMON, TEXT, TOKENIZER, World

pytestmark = pytest.mark.usefixtures("quick")
META = torch.device("meta")
FLOAT = 4
MANY = {"batch_size": 61, "resolution": 128}  # so many that the steps take most; they can be cut in one way only


@pytest.fixture(scope="module")
def planner(world: World) -> Planner:
    return Planner(world.base, settings_of(**MANY), "bf16", None, False)


def settings_of(**changes: Any) -> TrainSettings:
    return TrainSettings(**{**COMMON, **changes})


# What lives


def test_two_layers_counted_by_hand() -> None:
    """Batch 3, widths 8 → 16 → 4, float32: every tensor that is alive, in the order of the computation."""
    first, second = nn.Linear(8, 16, device="meta"), nn.Linear(16, 4, device="meta")
    x = torch.empty(3, 8, device="meta")
    weights = [*first.parameters(), *second.parameters()]
    with LiveBytes(exclude=weights) as live:
        hidden = first(x)
        assert live.current == live.peak == FLOAT * 3 * 16
        output = second(hidden)
        assert live.current == FLOAT * (3 * 16 + 3 * 4)
        loss = output.sum()
        assert live.current == FLOAT * (3 * 16 + 3 * 4 + 1)
        del hidden, output  # the second layer keeps what it was given
        assert live.current == FLOAT * (3 * 16 + 1)
        loss.backward()
        del loss
        gradients = FLOAT * (8 * 16 + 16 + 16 * 4 + 4)
        assert live.current == gradients
    assert live.peak >= gradients


def test_storages_are_rounded_up_and_views_counted_once() -> None:
    with LiveBytes(block_size=512) as live:
        one = torch.empty(3, device="meta")
        views = [one[:2], one.view(3, 1), one.detach()]
        assert live.current == 512
        other = torch.empty(129, device="meta")
        assert live.current == 512 + 1024
        del one, views, other
        assert live.current == 0
    assert live.peak == 512 + 1024


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_keeps_no_matrix(device: str) -> None:
    """Query, key and value are there; a fused kernel adds the output and a float32 number for each of its rows."""
    parts = [torch.zeros(1, 2, 64, 8, device=device, requires_grad=True) for _ in range(3)]
    with LiveBytes(device) as live, CudaEmulation(None):
        output = F.scaled_dot_product_attention(*parts)
        assert output.shape == (1, 2, 64, 8)
        assert live.peak == FLOAT * (2 * 64 * 8 + 2 * 64)
    CudaEmulation(None).backward(output.sum())
    assert all(one.grad is not None and one.grad.shape == one.shape for one in parts)


def test_autocast_is_that_of_cuda() -> None:
    """Products in bf16, norms in float32, whatever comes in; the rest as it comes."""
    layer = nn.Linear(8, 8, device="meta")
    norm = nn.LayerNorm(8, device="meta", dtype=torch.bfloat16)
    x = torch.empty(2, 8, device="meta")
    with CudaEmulation(torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert norm(layer(x)).dtype == torch.float32
        assert F.silu(layer(x)).dtype == torch.bfloat16
    with CudaEmulation(None):
        assert layer(x).dtype == torch.float32
    assert layer(x).dtype == torch.float32


WAYS: dict[str, tuple[dict[str, Any], str, MemorySaving]] = {
    "plain": ({}, "fp32", MemorySaving(False)),
    "bf16": ({"targets": "all"}, "bf16", MemorySaving(False)),
    "checkpointing": ({}, "bf16", MemorySaving(True)),
    "batch in parts": ({"batch_size": 4}, "bf16", MemorySaving(True, 2)),
    "text encoder": (TEXT, "bf16", MemorySaving(False)),
    "text encoder, checkpointing": (TEXT, "fp32", MemorySaving(True)),
    "a word": ({"token_vectors": 2}, "bf16", MemorySaving(False)),
    "DoRA": ({"adapter": "dora"}, "bf16", MemorySaving(True)),
    "LoHa": ({"adapter": "loha"}, "bf16", MemorySaving(False)),
    "T-LoRA": ({"rank_schedule": "timestep", "lora_init": "orthogonal"}, "bf16", MemorySaving(True)),
    "LoKr": ({"adapter": "lokr", "targets": "all"}, "bf16", MemorySaving(False)),
    "OFT": ({"adapter": "oft"}, "bf16", MemorySaving(False)),
    "BOFT": ({"adapter": "boft", "targets": "all"}, "bf16", MemorySaving(True)),
    "full": ({"adapter": "full"}, "bf16", MemorySaving(False)),
    "nf4": ({"base_quantization": "nf4"}, "bf16", MemorySaving(True)),
    "previews": ({"preview_every": 1}, "fp32", MemorySaving(False)),
}


@pytest.mark.parametrize("way", mostly_slow(WAYS, "plain", "batch in parts"))
def test_the_plan_equals_what_lives_in_a_real_step(way: str, world: World) -> None:
    changes, precision, lean = WAYS[way]
    settings = settings_of(**changes)
    planned, real = (
        Planner(world.base, settings, precision, None, True, device).need(lean)
        for device in (META, torch.device("cpu"))
    )
    on_the_cpu = 512 * 100 if way == "LoHa" else 0  # a number for each layer that PEFT makes on the CPU
    assert abs(planned.activations - real.activations) <= on_the_cpu
    assert replace(planned, activations=0) == replace(real, activations=0)
    assert min(planned.trained, planned.activations, planned.encoding) > 0


@pytest.mark.slow
def test_the_plan_equals_a_real_step_of_sdxl(xl: World) -> None:
    settings = settings_of(**BOTH_TEXTS)
    planned, real = (
        Planner(xl.base, settings, "bf16", None, False, device).need(MemorySaving(True))
        for device in (META, torch.device("cpu"))
    )
    assert planned == real


@pytest.mark.slow
def test_every_part_is_what_it_says(world: World) -> None:
    settings = settings_of(batch_size=4, targets="all", resolution=128)
    planner = Planner(world.base, settings, "bf16", None, False)
    plain, lean, parts = (
        planner.need(lean) for lean in (MemorySaving(False), MemorySaving(True), MemorySaving(True, 4))
    )
    assert plain.base == sum(2 * tensor.numel() for tensor in world.base.denoiser.tensors.values())
    recipe = world.recipe(Path("unused"), targets="all")
    model = recipe.base.family.build(recipe.base)
    from pack.trainer.training.adapter import TrainableAdapter

    numbers = sum(one.numel() for one in TrainableAdapter(model, recipe.settings).parameters())
    assert plain.trained == numbers * (4 + 4 + 8)
    assert plain.activations > lean.activations > parts.activations
    assert (plain.base, plain.trained) == (lean.base, lean.trained) == (parts.base, parts.trained)
    assert plain.previews == 0
    assert plain.peak == plain.base + plain.trained + plain.activations
    assert plain.total > plain.peak


@pytest.mark.slow
def test_a_word_keeps_the_text_encoder_on_the_device(world: World) -> None:
    """Frozen, in the base's precision; the vectors, with gradient and Adam's two moments, are what is trained more."""
    plain, words = (
        Planner(world.base, settings_of(**changes), "bf16", None, False).need(MemorySaving(False))
        for changes in ({}, {"token_vectors": 2})
    )
    [text_encoder] = world.base.text_encoders
    weights = sum(2 * tensor.numel() for tensor in text_encoder.tensors.values())
    assert words.base - plain.base == weights + 8 * text_encoder.config["max_position_embeddings"]
    assert words.trained - plain.trained == 4 * FLOAT * 2 * text_encoder.config["hidden_size"]
    assert words.activations > plain.activations


def test_activations_grow_with_the_batch_and_the_class_pictures(world: World) -> None:
    def activations(batch: int, priors: bool) -> int:
        settings = settings_of(batch_size=batch, resolution=128)
        return Planner(world.base, settings, "fp32", None, priors).need(MemorySaving(False)).activations

    one, two, four = (activations(batch, False) for batch in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    assert activations(2, True) == four


def test_quantised_weights_take_a_quarter(world: World) -> None:
    planner = Planner(world.base, settings_of(), "bf16", None, False)
    plain, packed = planner.need(MemorySaving(False)), planner.need(MemorySaving(False), quantization="nf4")
    model = world.base.family.build(world.base)
    linear = [module.weight.numel() for module in model.denoiser.modules() if isinstance(module, nn.Linear)]
    saved = plain.base - packed.base
    codes = 1100 * len(linear)  # the tables of the codes, for each layer
    assert 2 * sum(linear) - saved == pytest.approx(sum(linear) * 4.127 / 8 + codes, rel=0.02)
    assert packed.trained == plain.trained


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)
    if name == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters)
    import pytorch_optimizer

    made = {
        "lion": pytorch_optimizer.Lion,
        "prodigy": pytorch_optimizer.Prodigy,
        "adamw-schedule-free": pytorch_optimizer.ScheduleFreeAdamW,
    }
    return made[name](parameters)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "adamw-schedule-free", "prodigy", "adamw-8bit"])
def test_states_are_as_large_as_those_of_the_optimisers(name: str) -> None:
    shapes = [(64, 65), (16, 8, 3, 3), (32,)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = optimizer_of(name, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tables = {id(state.get(key)) for state in optimizer.state.values() for key in ("qmap1", "qmap2")}  # shared by all
    found = [
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim and id(value) not in tables
    ]
    assert sum(found) == sum(state_bytes(name, shape) for shape in shapes)


def test_paged_states_of_large_tensors_leave_the_device() -> None:
    assert state_bytes("adamw-8bit-paged", (1000, 1000)) == 0
    assert state_bytes("adamw-8bit-paged", (100, 100)) == state_bytes("adamw-8bit", (100, 100))


# What is chosen


def test_what_is_tried_comes_fastest_first() -> None:
    whole = [MemorySaving(0), MemorySaving(4), MemorySaving(2), MemorySaving(1)]
    assert memory_savings(settings_of()) == whole
    assert memory_savings(settings_of(gradient_checkpointing=True)) == [MemorySaving(1)]
    some = settings_of(gradient_checkpointing=True, gradient_checkpointing_interval=3)
    assert memory_savings(some) == [MemorySaving(3), MemorySaving(2), MemorySaving(1)]
    parts = [MemorySaving(1, 2), MemorySaving(1, 3), MemorySaving(1, 6)]
    assert memory_savings(settings_of(batch_size=6)) == whole + parts
    assert memory_savings(settings_of(batch_size=6, dropout=0.1)) == whole


def test_blocks_are_swapped_when_nothing_else_is_enough() -> None:
    found = memory_savings(settings_of(batch_size=2), blocks=10)
    assert found[-5:] == [MemorySaving(1, 2), *(MemorySaving(1, 2, count) for count in (3, 5, 8, 10))]
    wanted = settings_of(swap_blocks=5)
    assert memory_savings(wanted, blocks=10) == [MemorySaving(1, swap=5), MemorySaving(1, 1, 8), MemorySaving(1, 1, 10)]
    assert MemorySaving(1, 1, 8).applied(wanted).swap_blocks == 8
    assert MemorySaving(1, 1, 8).described(wanted) == "8 blocks swapped"
    assert wanted.checkpointing_interval == 1


def latents(count: int) -> LatentDataset:
    values = torch.randn((2, count, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    captions = [torch.tensor([number]) for number in range(count)]
    size, order, masks = torch.zeros(count, 6), list(range(count)), [None] * count
    return LatentDataset(list(values[0]), list(values[1].exp()), captions, size, order, masks)


@pytest.mark.parametrize("split", [2, 3, 6])
def test_a_batch_in_parts_has_the_same_samples(split: int) -> None:
    settings = settings_of(batch_size=6, gradient_accumulation=2, flip=False)
    cache = LatentCache(latents(5), None, None, {"ids": torch.zeros(5, 4)}, None)

    def samples(settings: TrainSettings) -> list[torch.Tensor]:
        found = [
            batch
            for micro in range(settings.gradient_accumulation)
            for batch in draw_batches(cache, settings, 3, micro, make_objective(), torch.device("cpu"))
        ]
        return [torch.cat([getattr(one, part) for one in found]) for part in ("latents", "noise", "timesteps")]

    whole, parts = samples(settings), samples(MemorySaving(True, split).applied(settings))
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


def test_swapped_blocks_take_three_places(xl: World) -> None:
    planner = Planner(xl.base, settings_of(), "bf16", None, False)
    blocks = blocks_of(planner._prepare("none").model.denoiser)
    sizes = [2 * sum(each.numel() for each in block.parameters() if not each.requires_grad) for block in blocks]
    plain, swapped = (planner.need(MemorySaving(1, swap=count)) for count in (0, len(blocks)))
    saved = plain.base - swapped.base
    assert saved == pytest.approx(sum(sizes) - 3 * max(sizes), rel=0.05)  # each tensor begins at a multiple of 256
    assert swapped.activations == plain.activations
    note = plan_note(Plan([PlanOption(MemorySaving(1, swap=7), ROOMY)], 16 * GB), settings_of())
    assert (
        "gradient checkpointing was turned on, and 7 blocks of the base model are swapped to system memory" in note.text
    )


def test_the_first_that_fits_is_chosen(planner: Planner) -> None:
    settings = settings_of(**MANY)
    ways = memory_savings(settings, planner.blocks)
    assert ways[:5] == [*(MemorySaving(interval) for interval in (0, 4, 2, 1)), MemorySaving(1, 61)]
    assert [way.swap for way in ways[5:]] == [math.ceil(planner.blocks * share / 4) for share in (1, 2, 3, 4)]
    ways = ways[:5]  # swapping the blocks of so small a model would save nothing
    totals = [planner.need(lean).total for lean in ways]
    assert totals == sorted(set(totals), reverse=True)
    for number, lean in enumerate(ways):
        plan = make_plan(planner, settings, totals[number])
        assert plan.fits
        assert plan.chosen.saving == lean
        assert len(plan.measured) <= 3  # those that don't fit, and what is chosen
    nothing = make_plan(planner, settings, 1000)
    assert not nothing.fits
    assert nothing.chosen.need.total == min(one.need.total for one in nothing.measured)


GB = 2**30
ROOMY, TIGHT = MemoryNeed(5 * GB, GB, 9 * GB), MemoryNeed(5 * GB, GB, GB // 2)


@pytest.mark.parametrize(
    ("measured", "memory", "changes", "expected", "warning"),
    [
        ([(MemorySaving(False), ROOMY)], 24, {}, "about 16.0 GB of the 24.0 GB that are free.", False),
        (
            [(MemorySaving(False), ROOMY), (MemorySaving(True), TIGHT)],
            8,
            {},
            "about 7.1 GB of the 8.0 GB that are free: gradient checkpointing was turned on.",
            False,
        ),
        (
            [(MemorySaving(True), ROOMY), (MemorySaving(True, 2), TIGHT)],
            8,
            {"batch_size": 2, "gradient_checkpointing": True},
            ": batches of 2 are computed in 2 micro-batches.",
            False,
        ),
        (
            [(MemorySaving(False), ROOMY), (MemorySaving(True), TIGHT)],
            6,
            {},
            "7.1 GB, even with gradient checkpointing, but only 6.0 GB are free. Lower resolution, set "
            "base_quantization = nf4 or set optimizer = adamw-8bit.",
            True,
        ),
    ],
    ids=["as set", "checkpointing", "in parts", "too large"],
)
def test_the_user_is_told(
    measured: list[tuple[MemorySaving, MemoryNeed]], memory: int, changes: dict[str, Any], expected: str, warning: bool
) -> None:
    plan = Plan([PlanOption(*one) for one in measured], memory * GB)
    note = plan_note(plan, settings_of(**changes))
    assert expected in worded(note.text, plain)
    assert note.warning == warning


def test_remedies_are_those_that_are_left() -> None:
    assert "nf4" in remedies(settings_of())
    assert "nf4" not in remedies(settings_of(base_quantization="nf4"))
    assert "nf4" not in remedies(settings_of(adapter="full"))
    for optimizer in ("adamw-8bit", "adamw-8bit-paged", "adafactor"):  # which need no more than eight bits
        assert "adamw-8bit" not in remedies(settings_of(optimizer=optimizer))
    of_prodigy = remedies(settings_of(optimizer="prodigy", learning_rate=1.0))
    assert "optimizer = adamw-8bit, with learning_rate = 0.0001" in worded(of_prodigy, plain)


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CUDA device that says how much is free; nothing is computed on it."""
    free = [0]
    monkeypatch.setattr(fitting, "free_memory", lambda device: free[0])
    return free


@pytest.mark.slow
def test_a_run_on_a_gpu_is_planned(world: World, planner: Planner, small_card: list[int]) -> None:
    settings = settings_of(**MANY)
    for lean in memory_savings(settings):
        small_card[0] = planner.need(lean).total
        listener = Recorder()
        chosen = MemoryBudget(settings, torch.device("cuda")).effective_settings(
            settings, world.base, None, False, "bf16", listener
        )
        assert chosen == lean.applied(settings)
        assert len(listener.notes) == 1
        assert (lean.checkpointing > 0) == ("turned on" in listener.notes[0])
        assert (lean.split > 1) == ("in 61 micro-batches" in listener.notes[0])
    small_card[0] = 1
    listener = Recorder()
    least = settings_of(gradient_checkpointing=True)
    chosen = MemoryBudget(least, torch.device("cuda")).effective_settings(
        least, world.base, None, False, "bf16", listener
    )
    assert chosen == least  # swapping the blocks of so small a model would save nothing
    assert len(listener.warnings) == 1


@pytest.mark.parametrize(("device", "fit"), [("cpu", "auto"), ("mps", "auto"), ("cuda", "off")])
def test_nothing_is_planned_unasked(device: str, fit: str, world: World) -> None:
    settings, listener = settings_of(fit=fit), Recorder()
    assert (
        MemoryBudget(settings, torch.device(device)).effective_settings(
            settings, world.base, None, False, "fp32", listener
        )
        == settings
    )
    assert listener.events == []


def test_a_plan_that_fails_stops_no_run(world: World, small_card: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        torch.empty(2, device="meta").item()

    monkeypatch.setattr(fitting, "make_plan", fails)
    settings, listener = settings_of(), Recorder()
    assert (
        MemoryBudget(settings, torch.device("cuda")).effective_settings(
            settings, world.base, None, False, "bf16", listener
        )
        == settings
    )
    assert "could not be estimated" in listener.warnings[0]


MISTAKES = (TypeError, AttributeError, KeyError, ValueError, AssertionError, ZeroDivisionError)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_planner_is_not_hidden(
    mistake: type[Exception], world: World, small_card: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise mistake("a mistake")

    monkeypatch.setattr(fitting, "make_plan", fails)
    budget, listener = MemoryBudget(settings_of(), torch.device("cuda")), Recorder()
    with pytest.raises(mistake):
        budget.effective_settings(settings_of(), world.base, None, False, "bf16", listener)
    assert listener.events == []


def test_weights_that_lie_there_need_no_more_room(world: World) -> None:
    size = sum(tensor.nbytes for tensor in world.base.denoiser.tensors.values())
    cpu = torch.device("cpu")
    assert resident_bytes(world.base, settings_of(), "fp32", cpu) == size
    assert resident_bytes(world.base, settings_of(), "bf16", cpu) == 0
    assert resident_bytes(world.base, settings_of(base_quantization="nf4"), "fp32", cpu) == 0
    assert resident_bytes(world.base, settings_of(), "fp32", torch.device("cuda")) == 0


# The command


def planned(capsys: pytest.CaptureFixture[str], checkpoint: Path, *words: str) -> str:
    status = main(["plan", "--base", str(checkpoint), "--tokenizer", str(TOKENIZER), "--resolution", "256", *words])
    out, error = capsys.readouterr()
    assert status == 0, error
    return out


@pytest.mark.slow
def test_the_command_shows_every_way_and_what_is_picked(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(capsys, tiny_checkpoint, "--memory", "8", "--rank", "4", "--batch-size", "2")
    for line in ("as set", "gradient checkpointing", "batches of 2 in 2 micro-batches", "adamw-8bit", "nf4"):
        assert line in text
    assert text.splitlines()[-1] == "Chosen for 7.5 GB: as set."
    tight = planned(capsys, tiny_checkpoint, "--memory", "0.7", "--gradient-checkpointing")
    assert tight.splitlines()[-1].startswith("None of these fits in 0.2 GB. Lower --resolution")


def test_the_command_needs_a_number_without_a_gpu(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["plan", "--base", str(tiny_checkpoint), "--tokenizer", str(TOKENIZER)]) == 1
    assert "--memory 8" in capsys.readouterr().err


def test_a_mistake_in_the_settings_is_told(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", str(tiny_checkpoint), "--tokenizer", str(TOKENIZER), "--memory", "8", "--rank", "999"]
    assert main(["plan", *words]) == 1
    assert "Rank 999" in capsys.readouterr().err


def test_planning_writes_nothing_to_the_base(world: World) -> None:
    before = {name: tensor.clone() for name, tensor in world.base.denoiser.tensors.items()}
    Planner(replace(world.base), settings_of(targets="all"), "bf16", None, True).need(
        MemorySaving(True), quantization="nf4"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in world.base.denoiser.tensors.items())
