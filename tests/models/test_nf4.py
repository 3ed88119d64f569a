"""A base in four bits: what bitsandbytes computes, trained on for real, with every kind of adapter."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.core.errors import SettingsError
from pack.trainer.dreambooth import TrainResult
from pack.trainer.models import nf4
from pack.trainer.models.nf4 import Nf4Linear, load_bitsandbytes, quantize, require_quantizable
from torch import nn
from torch.nn import functional as F
from worlds import COMMON, KINDS, World, assert_same_end, lent_tensors, make_world, predicted

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")
NF4 = {"base_quantization": "nf4"}


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("nf4") / "subject")


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Recorder]:
    listener = Recorder()
    return world.train(tmp_path_factory.mktemp("straight"), listener, **NF4), listener


# The layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_with_the_dequantised_weight(dtype: torch.dtype, bias: bool) -> None:
    """Forward and backward equal those of a Linear layer that holds what bitsandbytes' own layer holds."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import LinearNF4

    plain = nn.Linear(96, 70, bias=bias)
    theirs = LinearNF4(96, 70, bias=bias)
    theirs.load_state_dict(plain.state_dict())
    theirs.to("cpu")  # here it quantises
    expected = dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    ours = Nf4Linear(plain, CPU, dtype)
    assert torch.equal(ours.weight, expected.to(dtype))
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    again = x.detach().clone().requires_grad_()
    output = ours(x)
    reference = F.linear(again, expected.to(dtype), None if plain.bias is None else plain.bias.to(dtype))
    assert torch.equal(output, reference)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    reference.backward(upstream)
    assert torch.equal(x.grad, again.grad)


def test_nf4_is_close() -> None:
    """Of normally distributed weights the four bits are 9 % off."""
    plain = nn.Linear(512, 256)
    nn.init.normal_(plain.weight)
    found = Nf4Linear(plain, CPU, torch.float32).weight
    weight = plain.weight.detach()
    off = torch.linalg.vector_norm(found.detach() - weight) / torch.linalg.vector_norm(weight)
    assert float(off) == pytest.approx(0.091, abs=0.004)


def test_it_takes_the_bytes_that_it_says() -> None:
    for shape in ((96, 70), (320, 1280), (64, 1)):
        layer = Nf4Linear(nn.Linear(*shape, bias=False), CPU, torch.float32)
        state = layer._state
        tables = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert layer.quantized_bytes == layer.packed.nbytes + sum(table.nbytes for table in tables)
        meta = Nf4Linear(nn.Linear(*shape, bias=False, device="meta"), torch.device("meta"), torch.float32)
        assert meta.quantized_bytes == layer.quantized_bytes
        assert meta.weight.shape == layer.weight.shape


def test_a_move_to_another_type_keeps_the_four_bits() -> None:
    layer = Nf4Linear(nn.Linear(64, 64), CPU, torch.float32)
    before = layer.weight
    network = nn.Sequential(layer).to(torch.bfloat16).to("cpu")
    assert torch.equal(network[0].weight, before)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


def test_all_linear_layers_and_nothing_else(world: World) -> None:
    model = world.base.family.build(world.base)
    plain = [path for path, module in model.denoiser.named_modules() if type(module) is nn.Linear]
    convolutions = {path: module for path, module in model.denoiser.named_modules() if isinstance(module, nn.Conv2d)}
    quantize(model.denoiser, CPU, torch.float32)
    assert [path for path, module in model.denoiser.named_modules() if isinstance(module, Nf4Linear)] == plain
    assert not any(type(module) is nn.Linear for module in model.denoiser.modules())
    now = dict(model.denoiser.named_modules())
    assert all(now[path] is module for path, module in convolutions.items())


# Training


@pytest.mark.slow
def test_it_learns(world: World, tmp_path: Path) -> None:
    listener = Recorder()
    world.train(tmp_path, listener, steps=40, learning_rate=3e-3, rank=8, targets="all", **NF4)
    first, last = listener.losses[:10], listener.losses[-10:]
    assert sum(last) < 0.9 * sum(first)


def test_the_lent_weights_stay_as_they_are(world: World, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in lent_tensors(world.base).items()}
    world.train(tmp_path, steps=2, targets="all", **NF4)
    now = lent_tensors(world.base)
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())


@pytest.mark.slow
def test_it_is_another_run_than_without(world: World, straight: tuple[TrainResult, Recorder], tmp_path: Path) -> None:
    listener = Recorder()
    plain = world.train(tmp_path, listener)
    assert plain.run.name != straight[0].run.name
    assert listener.losses[0] == pytest.approx(straight[1].losses[0], rel=0.2)
    assert listener.losses[0] != straight[1].losses[0]


@pytest.mark.slow
def test_resumed_is_straight(world: World, straight: tuple[TrainResult, Recorder], tmp_path: Path) -> None:
    world.stop_after(2, tmp_path, **NF4)
    resumed = world.train(tmp_path, **NF4)
    assert resumed.started_from == 2
    assert_same_end(resumed, straight[0])


@pytest.mark.slow
def test_checkpointing_changes_nothing(world: World, straight: tuple[TrainResult, Recorder], tmp_path: Path) -> None:
    assert_same_end(world.train(tmp_path, gradient_checkpointing=True, **NF4), straight[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(kind: str, world: World, tmp_path: Path) -> None:
    listener = Recorder()
    result = world.train(tmp_path, listener, **{**NF4, **KINDS[kind], "steps": 2})
    assert all(torch.isfinite(torch.tensor(listener.losses)))
    assert all(part.any() for layer in result.adapter.layers.values() for part in layer.tensors().values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
def test_it_trains_in_half_precision(precision: str, world: World, tmp_path: Path) -> None:
    listener = Recorder()
    result = world.train(tmp_path, listener, precision=precision, targets="all", **NF4)
    assert len(listener.losses) == 4
    layers = result.adapter.layers.values()
    assert all(torch.isfinite(part).all() for layer in layers for part in layer.tensors().values())


def test_doras_magnitudes_are_those_of_the_four_bits(world: World) -> None:
    from pack.trainer.settings.train import TrainSettings
    from pack.trainer.training.trainable import make_trainable

    settings = TrainSettings(**{**COMMON, **NF4, "adapter": "dora"})
    model = world.base.family.build(world.base)
    trainee: Any = make_trainable(model, settings, CPU, torch.float32, None)
    layer = next(iter(trainee.layers.values()))
    modules = dict(model.denoiser.named_modules())
    base = modules[layer.target.path].base_layer
    assert isinstance(base, Nf4Linear)
    lengths = torch.linalg.vector_norm(base.weight, dim=1)
    torch.testing.assert_close(layer.parameters["dora_scale"].detach().flatten(), lengths)


def test_the_file_is_an_ordinary_lora(world: World, straight: tuple[TrainResult, Recorder]) -> None:
    adapter = read_adapter(straight[0].path)
    assert adapter.kind == "LoRA"
    model = world.base.family.build(world.base)
    before = predicted(model)["prediction"]
    merge_into(model, adapter, 1.0)
    assert not torch.equal(predicted(model)["prediction"], before)


# What can't be


def test_all_weights_cant_be_trained_in_four_bits() -> None:
    from pack.trainer.settings.train import TrainSettings

    with pytest.raises(SettingsError, match="base_quantization"):
        TrainSettings.checked({"adapter": "full", **NF4})


def test_a_missing_package_is_told_before_any_work(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError) as caught:
        world.train(tmp_path, **NF4)
    assert "pip install bitsandbytes" in caught.value.remedy
    assert not (tmp_path / "runs").exists()


def test_a_device_that_cant_is_told() -> None:
    require_quantizable("nf4", CPU)
    require_quantizable("none", torch.device("mps"))
    with pytest.raises(SettingsError) as caught:
        require_quantizable("nf4", torch.device("xla"))
    assert "base_quantization" in caught.value.remedy


@pytest.mark.slow
def test_importing_it_asks_for_no_kernel_and_says_nothing(tmp_path: Path) -> None:
    """A package `kernels` lies there, as on some computers, and would download; it is not asked, and is there after."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k):\n    print('asked')\n", encoding="utf-8")
    code = (
        "import logging, sys\n"
        "logging.basicConfig(level=logging.INFO)\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import kernels\n"
        "from trainer.models.nf4 import load_bitsandbytes\n"
        "load_bitsandbytes()\n"
        "assert 'bitsandbytes' in sys.modules and sys.modules['kernels'] is kernels\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "logging.getLogger('bitsandbytes').warning('heard')\n"
        "import diffusers.models\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "asked" not in done.stdout
    assert "gemm_4bit" not in done.stderr
    assert "heard" in done.stderr


def test_functions_are_compiled_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    network = torch.nn.Linear(1, 1)
    with nf4._compiling_when_called():

        @torch.compile
        def bare(number: int) -> int:
            return 2 * number

        @torch.compile(dynamic=True)
        def dynamic(number: int, *, factor: int) -> int:
            return factor * number

        assert not compiled
        assert torch.compile(network) is network
    assert torch.compile is compile_now
    assert [bare(2), bare(3), dynamic(2, factor=5), bare.__name__] == [4, 6, 10, "bare"]
    assert [options for _, options in compiled] == [{}, {}, {"dynamic": True}], "once each"


def test_loading_leaves_the_logger_as_it_was() -> None:
    level = logging.getLogger("bitsandbytes").level
    load_bitsandbytes()
    assert logging.getLogger("bitsandbytes").level == level
