"""Adapter files of other programs add to a weight what those programs' own code adds.

`golden/foreign.safetensors` holds files that LyCORIS and kohya's scripts wrote, and what their own layers computed with
them (`make_foreign_golden.py`); PEFT is at hand and is asked itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import UNET_PREFIX, sdxl_state_dict
from helpers import ROOT
from layer_worlds import assert_close, leaves_out_the_scale, randomise
from lent_models import lent
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import Adapter, parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.layers import Layer, LokrLayer, fits, make_layer
from pack.trainer.adapters.module_paths import module_name, module_path
from pack.trainer.core.errors import AdapterError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import open_base
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@dataclass
class Case:
    """One module of a file, and what its program adds to the module's weight and bias."""

    adapter: Tensors = field(default_factory=dict)
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    delta: Tensor = field(default_factory=lambda: torch.empty(0))
    bias_delta: Tensor | None = None

    @property
    def name(self) -> str:
        """What the module should be called after reading: the names of LyCORIS alone and kohya's OFT are the UNet's."""
        [stem] = {name.partition(".")[0] for name in self.adapter}
        return stem.replace("lycoris_", "lora_unet_").replace("oft_unet_", "lora_unet_")


def golden_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, tensor in load_file(ROOT / "tests/golden/foreign.safetensors").items():
        title, part = name.split("/", 1)
        case = cases.setdefault(title, Case())
        if part.startswith("adapter/"):
            case.adapter[part.removeprefix("adapter/")] = tensor
        else:
            setattr(case, part, tensor.float())
    return cases


GOLDEN = golden_cases()
MATRICES = [title for title, case in GOLDEN.items() if case.weight.ndim > 1]
NORMS = [title for title, case in GOLDEN.items() if case.weight.ndim == 1]
TYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def read(tensors: Tensors, folder: Path) -> Adapter:
    save_file(tensors, folder / "theirs.safetensors")
    return read_adapter(folder / "theirs.safetensors")


def written_and_read(adapter: Adapter, folder: Path) -> Adapter:
    write_adapter(folder / "ours.safetensors", adapter, torch.float32)
    return read_adapter(folder / "ours.safetensors")


def only_layer(adapter: Adapter, name: str) -> Layer:
    assert list(adapter.layers) == [name]
    return adapter.layers[name]


# LyCORIS and kohya


def test_every_kind_has_its_case() -> None:
    found = {part.partition(".")[2] for case in GOLDEN.values() for part in case.adapter}
    lora = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"}
    loha = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
    lokr = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    assert found == lora | loha | lokr | {"alpha", "oft_blocks", "rescale", "diff", "diff_b", "w_norm", "b_norm"}
    prefixes = {
        part.partition("_mid_block")[0].partition("_text_model")[0] for c in GOLDEN.values() for part in c.adapter
    }
    assert prefixes == {"lora_unet", "lycoris", "oft_unet", "lora_te", "lora_te1", "lora_te2"}


@pytest.mark.parametrize("title", MATRICES)
def test_a_file_adds_what_its_program_adds(title: str, tmp_path: Path) -> None:
    case = GOLDEN[title]
    adapter = read(case.adapter, tmp_path)
    for one in (adapter, written_and_read(adapter, tmp_path)):
        layer = only_layer(one, case.name)
        assert fits(layer, case.weight.shape)
        assert_close(layer.delta(case.weight), case.delta)
        if case.bias_delta is not None:
            assert_close(one.vectors[f"{case.name}.diff_b"], case.bias_delta)


@pytest.mark.parametrize("title", MATRICES)
def test_the_factors_of_a_file_are_what_its_program_adds(title: str) -> None:
    case = GOLDEN[title]
    layer = only_layer(parse_adapter(case.adapter), case.name)
    factors = layer.factors()
    low_rank = layer.kind in ("LoRA", "LoHa", "LoKr")
    assert (factors is not None) == low_rank
    if factors:
        up, down = factors
        assert (up.ndim, down.ndim) in {(2, 2), (2, case.weight.ndim)}
        assert_close(up @ down.flatten(1), case.delta.flatten(1))


@pytest.mark.parametrize("title", NORMS)
def test_a_norm_changes_as_its_program_changes_it(title: str, tmp_path: Path) -> None:
    case = GOLDEN[title]
    adapter = read(case.adapter, tmp_path)
    for one in (adapter, written_and_read(adapter, tmp_path)):
        assert not one.layers
        assert_close(one.vectors[f"{case.name}.diff"], case.delta)
        assert_close(one.vectors[f"{case.name}.diff_b"], case.bias_delta)


@pytest.mark.parametrize("title", GOLDEN)
def test_tensors_of_every_type_mean_their_numbers(title: str, tmp_path: Path) -> None:
    case = GOLDEN[title]
    for dtype in TYPES:
        short = {name: tensor.to(dtype) for name, tensor in case.adapter.items()}
        theirs, plain = read(short, tmp_path), parse_adapter({name: tensor.float() for name, tensor in short.items()})
        again = written_and_read(theirs, tmp_path)
        assert theirs.layers.keys() == plain.layers.keys() == again.layers.keys()
        for name, layer in plain.layers.items():
            delta = layer.delta(case.weight)
            for other in (theirs, again):
                assert other.layers[name].alpha == layer.alpha
                assert torch.equal(other.layers[name].delta(case.weight), delta)
            if dtype.itemsize == 2:
                assert (delta.flatten() - case.delta.flatten()).norm() < 0.03 * case.delta.norm()
        for name, vector in plain.vectors.items():
            assert torch.equal(theirs.vectors[name].float(), vector)
            assert torch.equal(again.vectors[name], vector)


SCALED = [title for title in MATRICES if any(name.endswith(".alpha") for name in GOLDEN[title].adapter)]


@pytest.mark.parametrize("title", SCALED)
def test_without_alpha_the_scale_is_one(title: str) -> None:
    """That is how kohya reads such a file; an OFT's alpha is a limit, and without one there is none."""
    case = GOLDEN[title]
    [alpha] = [float(tensor) for name, tensor in case.adapter.items() if name.endswith(".alpha")]
    for dtype in (torch.float32, *TYPES):
        bare = {name: tensor.to(dtype) for name, tensor in case.adapter.items() if not name.endswith(".alpha")}
        layer = only_layer(parse_adapter(bare), case.name)
        assert layer.alpha == (0.0 if "OFT" in layer.kind else layer.rank)
        assert torch.isfinite(layer.delta(case.weight)).all()
        if dtype == torch.float32 and not layer.needs_weight:
            whole = isinstance(layer, LokrLayer) and layer.is_whole
            assert_close(layer.delta(), case.delta if whole else case.delta * (layer.rank / alpha))


# SDXL's names


@pytest.fixture(scope="module")
def sdxl() -> tuple[BaseWeights, Tensors]:
    """The smallest SDXL, and its UNet under the original code's names."""
    tensors = sdxl_state_dict("tiny")
    unet = {name.removeprefix(UNET_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(UNET_PREFIX)}
    return open_base(lent(tensors)), unet


def named_weights(model: DiffusionModel) -> Tensors:
    """Every weight, by its network and the name that the network's library gives it."""
    networks = {"unet": model.denoiser, **model.text_encoders}
    return {f"{part}.{name}": weight for part, one in networks.items() for name, weight in one.named_parameters()}


def lora(shape: torch.Size, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((2, *shape[1:]), generator=generator)
    return down, torch.randn((shape[0], 2, *[1] * (len(shape) - 2)), generator=generator)


def changed(base: BaseWeights, tensors: Tensors, folder: Path) -> Tensors:
    """What merging the file adds to each weight that it changes."""
    model = base.family.build(base)
    before = named_weights(model)
    merge_into(model, read(tensors, folder), 1.0)
    return {name: weight - before[name] for name, weight in named_weights(model).items() if weight is not before[name]}


def test_sdxl_files_under_all_names_change_the_same_weights(sdxl: tuple[BaseWeights, Tensors], tmp_path: Path) -> None:
    """The original code's names (SGM's), as kohya and ComfyUI write them, and diffusers', as kohya's and diffusers'.

    Which module of diffusers is which of the original, its weight tells.
    """
    base, unet = sdxl
    expected, files = {}, {naming: {} for naming in ("SGM", "ComfyUI", "kohya of diffusers", "diffusers", "PEFT")}
    by_weight = {
        name: weight for name, weight in named_weights(base.family.build(base)).items() if weight.ndim in (2, 4)
    }
    for seed, (name, weight) in enumerate((n, w) for n, w in unet.items() if w.ndim in (2, 4)):
        [path] = [path for path, own in by_weight.items() if own.shape == weight.shape and torch.equal(own, weight)]
        down, up = lora(weight.shape, seed)
        expected[path] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * 0.75
        original, path = name.removesuffix(".weight"), path.removeprefix("unet.").removesuffix(".weight")
        stems = {
            "SGM": "lora_unet_" + original.replace(".", "_"),
            "ComfyUI": f"diffusion_model.{original}",
            "kohya of diffusers": "lora_unet_" + path.replace(".", "_"),
        }
        for naming, stem in stems.items():
            files[naming] |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            files[naming][f"{stem}.alpha"] = torch.tensor(1.5)
        for naming, start in (("diffusers", "unet."), ("PEFT", "base_model.model.")):
            files[naming] |= {f"{start}{path}.lora_A.weight": down * 0.75, f"{start}{path}.lora_B.weight": up}
    assert len(expected) > 100
    for tensors in files.values():
        found = changed(base, tensors, tmp_path)
        assert found.keys() == expected.keys()
        for path, delta in expected.items():
            torch.testing.assert_close(found[path], delta, rtol=0, atol=1e-5)


def test_sdxls_text_encoders_have_their_own_names(sdxl: tuple[BaseWeights, Tensors], tmp_path: Path) -> None:
    """Kohya counts them from one, diffusers calls the first by no number; each means its own encoder."""
    base, _ = sdxl
    model, expected = base.family.build(base), {}
    files: dict[str, Tensors] = {"kohya": {}, "diffusers": {}, "transformers 5": {}}
    for number, (component, encoder) in enumerate(model.text_encoders.items(), start=1):
        for seed, ending in enumerate(("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")):
            path = f"encoder.layers.1.{ending}"
            [(own, weight)] = [(n, w) for n, w in encoder.named_parameters() if n.endswith(f"{path}.weight")]
            down, up = lora(weight.shape, 10 * number + seed)
            expected[f"{component}.{own}"] = up @ down
            stem = f"lora_te{number}_text_model_" + path.replace(".", "_")
            files["kohya"] |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            for naming, level in (("diffusers", "text_model."), ("transformers 5", "")):
                stem = f"{component}.{level}{path}"
                files[naming] |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    for tensors in files.values():
        found = changed(base, tensors, tmp_path)
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-5)


def test_a_file_of_norms_alone_is_applied(sdxl: tuple[BaseWeights, Tensors], tmp_path: Path) -> None:
    base, unet = sdxl
    weight, bias = (torch.full_like(unet[f"out.0.{part}"], number) for part, number in (("weight", 0.25), ("bias", 2)))
    found = changed(base, {"lora_unet_out_0.w_norm": weight, "lora_unet_out_0.b_norm": bias}, tmp_path)
    assert found.keys() == {"unet.conv_norm_out.weight", "unet.conv_norm_out.bias"}
    torch.testing.assert_close(found["unet.conv_norm_out.weight"], weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["unet.conv_norm_out.bias"], bias, rtol=0, atol=1e-6)


# PEFT


class Block(nn.Module):
    """Modules that LoKr splits into (6, 8) and (5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(40, 48)
        self.conv_shortcut = nn.Conv2d(40, 48, 1)
        self.conv1 = nn.Conv2d(40, 48, 3)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid_block = Block()
        self.up_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return x


TARGETS: dict[str, Any] = {"target_modules": ["proj", "conv_shortcut", "conv1"]}
RANKS = {"conv1": 2, "up_blocks.0.proj": 3}
PATTERNS: dict[str, Any] = {
    "rank_pattern": RANKS,
    "alpha_pattern": {"conv_shortcut": 5, "up_blocks.0.proj": 7},
    **TARGETS,
}
UNSCALED: dict[str, Any] = {"rank_pattern": {"conv1": 3}, "alpha_pattern": {"conv1": 3}, **TARGETS}
PEFT_CONFIGS: dict[str, Any] = {
    "LoRA, patterns": LoraConfig(r=4, lora_alpha=6, **PATTERNS),
    "LoRA, patterns, rank-stabilised": LoraConfig(r=4, lora_alpha=6, use_rslora=True, **PATTERNS),
    "LoRA, gaussian": LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", **TARGETS),
    "DoRA, patterns": LoraConfig(r=4, lora_alpha=6, use_dora=True, **PATTERNS),
    "DoRA, patterns, rank-stabilised": LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True, **PATTERNS),
    "LoHa, Tucker, patterns": LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, **PATTERNS),
    "LoKr, patterns": LoKrConfig(r=2, alpha=2, **UNSCALED),
    "LoKr, both, Tucker, patterns": LoKrConfig(
        r=2, alpha=2, decompose_both=True, use_effective_conv2d=True, **UNSCALED
    ),
    "LoKr, factor": LoKrConfig(r=2, alpha=2, decompose_factor=4, **TARGETS),
    "LoKr, scaled patterns": LoKrConfig(r=2, alpha=5, decompose_both=True, **PATTERNS),
}


@pytest.mark.parametrize("config", PEFT_CONFIGS)
def test_folders_of_peft_add_what_peft_reads_from_them(config: str, tmp_path: Path) -> None:
    """PEFT's own reader is asked, on a fresh model."""
    torch.manual_seed(0)
    trained = get_peft_model(Blocks(), PEFT_CONFIGS[config])
    randomise(trained)
    if "scaled" in config and leaves_out_the_scale(trained):
        pytest.skip("this PEFT scales no LoKr")
    trained.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = Blocks()
    before = {path: tensor.clone() for path, tensor in fresh.state_dict().items()}
    after = PeftModel.from_pretrained(fresh, tmp_path).merge_and_unload().state_dict()
    adapter = read_adapter(tmp_path)
    assert adapter.kind == config.split(",")[0]
    assert len(adapter.layers) == 6
    for one in (adapter, written_and_read(adapter, tmp_path)):
        for name, layer in one.layers.items():
            key = f"{module_path(name).path}.weight"
            change = after[key] - before[key]
            assert_close(layer.delta(before[key]), change)
            factors = layer.factors()
            if factors:
                assert_close(factors[0] @ factors[1].flatten(1), change.flatten(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_folders_of_peft_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = get_peft_model(Blocks(), PEFT_CONFIGS["LoRA, patterns, rank-stabilised"])
    randomise(trained)
    trained.to(dtype).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    for path, module in trained.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layer = adapter.layers[module_name("unet", path)]
            assert {tensor.dtype for tensor in layer.tensors().values()} == {dtype}
            assert_close(layer.delta(), module.float().get_delta_weight("default").detach())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_of_weights_that_peft_changed_are_refused(init: str, tmp_path: Path) -> None:
    """Such a start takes something off the base; PEFT can save the same as a LoRA of the base as it was."""
    torch.manual_seed(0)
    model = Blocks()
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    trained = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], init_lora_weights=init))
    config = trained.peft_config["default"]
    config.init_lora_weights = True
    trained.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init
    randomise(trained)
    trained.save_pretrained(tmp_path / "plain")
    with pytest.raises(AdapterError, match=init) as refusal:
        read_adapter(tmp_path / "plain")
    assert "path_initial_model_for_weight_conversion" in refusal.value.remedy
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    after = trained.merge_and_unload().state_dict()
    for name, layer in read_adapter(tmp_path / "converted").layers.items():
        key = f"{module_path(name).path}.weight"
        assert_close(layer.delta(), after[key] - before[key])


@pytest.mark.parametrize("limit", [1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 4, 4, 4)], ids=["OFT", "BOFT"])
def test_a_small_rotation_is_not_lost_in_rounding(shape: tuple[int, ...], limit: float) -> None:
    """Limits as kohya recommends them; the last digits of the weight hold little of such a change."""
    generator = torch.Generator().manual_seed(0)
    blocks, weight = torch.randn(shape, generator=generator), torch.randn((16, 10), generator=generator)
    small = make_layer("m", {"oft_blocks": blocks}, limit).delta(weight)
    skew = (blocks - blocks.transpose(-1, -2)).double()
    skew *= limit * 16 / skew.norm()
    one = torch.eye(4, dtype=torch.float64)
    rotations = (one + skew) @ torch.linalg.inv(one - skew)
    expected = weight.double()
    if len(shape) == 3:
        expected = torch.block_diag(*rotations).T @ expected
    else:
        for level, rotation in enumerate(rotations):
            order = torch.arange(16).reshape(-1, 2, 2**level * 2).transpose(1, 2).flatten()
            moved = torch.block_diag(*rotation) @ expected[order]
            expected = moved[order.argsort()]
    assert_close(small, expected - weight.double(), 1e-6)
