"""Makes `golden/foreign.safetensors` again: what the programs that write adapter files add to a weight themselves.

    python tools/make_foreign_golden.py --lycoris PATH --sd-scripts PATH

The paths are clones of https://github.com/KohakuBlueleaf/LyCORIS and https://github.com/kohya-ss/sd-scripts; their code
needs einops. It builds its networks around a UNet and text encoders of three layers, random numbers take the place of
training, and its own `save_weights` writes the file. What it adds to a weight is told by the layer's own `forward`: its
answer to the identity (a Linear) or to single pixels (a convolution), with the adapter less without. LyCORIS's
`get_diff_weight` is not asked, since it multiplies the scale of a LoHa or LoKr in twice.

Some things can't be asked so, and LyCORIS's own reader of files is asked: `full`, which takes the weights out of the
very layer whose `forward` it calls (with a bias, `get_diff_weight` is all that runs), and the norms that come with it.
Files without alphas are old ones, which kohya's scripts read but no longer write.

Left out is what LyCORIS computes otherwise than its own reader does from the file: a LoKr of whole factors with
`rs_lora`, and a DyLoRA in blocks of more than one rank, whose scales don't stand in the file.

For every case the file holds "<case>/adapter/<name in the file>", "<case>/weight" (numbers that half precision holds),
"<case>/delta", and for biases "<case>/bias_delta": numbers alone, nothing of the programs.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from make_golden import stub
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "foreign.safetensors"
ALPHA = 2.5

LINEAR, CONV1, CONV3 = "Linear", "conv 1x1", "conv 3x3"
PATHS = {
    LINEAR: "mid_block.attentions.0.to_q",
    CONV1: "mid_block.attentions.0.proj_in",
    CONV3: "mid_block.resnets.0.conv1",
}
NORMS = {"LayerNorm": "mid_block.attentions.0.norm", "GroupNorm": "mid_block.resnets.0.norm1"}
TEXT = "text_model.encoder.layers.0.mlp.fc1"
ALL, SOME = (LINEAR, CONV1, CONV3), (LINEAR, CONV3)
APPLY = (None, None, True, True)  # text encoder and UNet, which the networks know already; whether to apply to each

Cases = dict[str, Tensor]


# A network whose classes have the names that the programs look for


class Transformer2DModel(nn.Module):
    def __init__(self, out: int, inside: int, bias: bool) -> None:
        super().__init__()
        self.to_q = nn.Linear(inside, out, bias=bias)
        self.proj_in = nn.Conv2d(inside, out, 1, bias=bias)
        self.norm = nn.LayerNorm(out)


class ResnetBlock2D(nn.Module):
    def __init__(self, out: int, inside: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1, bias=bias)
        self.norm1 = nn.GroupNorm(2, out)


class CLIPMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16, bias=False)


class Tree(nn.Module):
    """Modules at dotted paths."""

    def __init__(self, **leaves: nn.Module) -> None:
        super().__init__()
        for path, leaf in leaves.items():
            *above, name = path.split("__")
            place: nn.Module = self
            for part in above:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(name, leaf)
        with torch.no_grad():
            for parameter in self.parameters():  # so that half the space is enough for them
                parameter.copy_(parameter.half())


def unet(size: tuple[int, int] = (12, 10), bias: bool = False) -> nn.Module:
    """The UNet of three layers; the inputs of the large convolution are four, to keep the file small."""
    torch.manual_seed(0)
    attention, residual = Transformer2DModel(*size, bias), ResnetBlock2D(size[0], 4, bias)
    return Tree(mid_block__attentions__0=attention, mid_block__resnets__0=residual)


def texts(count: int) -> list[nn.Module]:
    torch.manual_seed(1)
    return [Tree(text_model__encoder__layers__0__mlp=CLIPMLP()) for _ in range(count)]


# Asking a layer


@torch.no_grad()
def response(call: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """The weight that a layer without bias acts by: (out, in) or (out, in, k, k)."""
    if weight.ndim == 2:
        return call(torch.eye(weight.shape[1])).T
    inside, side = weight.shape[1], weight.shape[2]
    pixels = torch.zeros(inside, inside, side, side)
    pixels[range(inside), range(inside), side // 2, side // 2] = 1
    return call(pixels).permute(1, 0, 2, 3).flip(2, 3)


@torch.no_grad()
def norm_changes(call: Callable[[Tensor], Tensor], norm: nn.LayerNorm | nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """What is added to a norm's weight and bias, from its answers to two opposite inputs."""
    layer_norm = isinstance(norm, nn.LayerNorm)
    channels = norm.weight.shape[0]
    signs = torch.tensor([1.0, -1.0]).repeat(channels)
    inputs = signs[:channels].reshape(1, -1) if layer_norm else signs.reshape(1, channels, 1, 2)
    plain = F.layer_norm(inputs, (channels,)) if layer_norm else F.group_norm(inputs, norm.num_groups)
    there, back = call(inputs) - norm(inputs), call(-inputs) - norm(-inputs)
    weight, bias = (there - back) / (2 * plain), (there + back) / 2
    return (weight, bias) if layer_norm else (weight[..., 0], bias[..., 0])


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Random numbers for training."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "dora_scale" in name or "rescale" in name:
            parameter.mul_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.5 * noise)


def saved(network: Any) -> dict[str, Tensor]:
    """What the program's own writer writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        network.save_weights(str(path), torch.float32, {})
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def of_module(tensors: dict[str, Tensor], path: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of one module."""
    start = prefix + path.replace(".", "_") + "."
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
    assert found, f"{start} is not among {sorted(tensors)}"
    return found


def case(title: str, tensors: dict[str, Tensor], weight: Tensor, delta: Tensor) -> Cases:
    assert torch.equal(weight, weight.half().float())
    found = {f"{title}/adapter/{name}": tensor for name, tensor in tensors.items()}
    return {**found, f"{title}/weight": weight.half(), f"{title}/delta": delta}


def changes(network: Any, prefix: str, title: str, asked: dict[str, nn.Module], *to: object) -> Cases:
    """A case for every asked module.

    Args:
        network: The program's network, not applied yet.
        prefix: What the names of the UNet's modules begin with in the file.
        title: The beginning of the cases' names.
        asked: Ending of the case's name → module; a text encoder's ending is the prefix of its names.
        to: What the network's `apply_to` wants.
    """
    weights = {name: module.weight.detach().clone() for name, module in asked.items()}
    before = {name: response(module, weights[name]) for name, module in asked.items()}
    network.apply_to(*to)
    network.eval()
    randomise(network)
    tensors, found = saved(network), {}
    for name, module in asked.items():
        delta = response(module, weights[name]) - before[name]
        own = of_module(tensors, PATHS.get(name, TEXT), prefix if name in PATHS else name + "_")
        found |= case(f"{title}, {name}", own, weights[name], delta)
    return found


# LyCORIS


@dataclass(frozen=True)
class Variant:
    """Options of a program's network, and which modules are asked."""

    options: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = SOME
    rank: int = 3
    size: tuple[int, int] = (12, 10)


def algo(name: str, *modules: str, rank: int = 3, size: tuple[int, int] = (12, 10), **options: Any) -> Variant:
    return Variant({"algo": name, **options}, modules or SOME, rank, size)


TUCKER: dict[str, Any] = {"use_tucker": True}
DORA: dict[str, Any] = {"dora_wd": True}
INPUTS: dict[str, Any] = {"dora_wd": True, "wd_on_output": False}
HALVES: dict[str, Any] = {"factor": 2, "rank": 2}  # factors of (2, 2) and (6, 5), the larger of rank 2
LARGE: dict[str, Any] = {"rank": 2, "size": (30, 4)}
SMALL_FACTORED: dict[str, Any] = {"unbalanced_factorization": True, "decompose_both": True, "factor": 2, "rank": 3}
LYCORIS = {
    "LoRA": algo("lora", *ALL),
    "LoRA, Tucker": algo("locon", CONV3, **TUCKER, conv_dim=2, conv_alpha=1.5),
    "LoRA, scalar": algo("lora", LINEAR, use_scalar=True),
    "LoRA, rank-stabilised": algo("lora", LINEAR, rs_lora=True),
    "DyLoRA": algo("dylora", block_size=1),
    "DoRA": algo("lora", *ALL, **DORA),
    "DoRA, Tucker, scalar, rank-stabilised": algo("lora", CONV3, **DORA, **TUCKER, use_scalar=True, rs_lora=True),
    "DoRA of inputs": algo("lora", *ALL, **INPUTS),
    "LoHa": algo("loha", *ALL),
    "LoHa, Tucker": algo("loha", CONV3, **TUCKER),
    "LoHa, scalar": algo("loha", LINEAR, use_scalar=True),
    "LoHa, rank-stabilised": algo("loha", LINEAR, rs_lora=True),
    "LoHa with DoRA": algo("loha", **DORA),
    "LoHa with DoRA of inputs, Tucker": algo("loha", CONV3, **INPUTS, **TUCKER),
    "LoKr": algo("lokr", *ALL, **HALVES),
    "LoKr, Tucker": algo("lokr", CONV3, **HALVES, **TUCKER),
    "LoKr, scalar": algo("lokr", LINEAR, **HALVES, use_scalar=True),
    "LoKr, rank-stabilised": algo("lokr", LINEAR, **HALVES, rs_lora=True),
    "LoKr, both": algo("lokr", **LARGE, decompose_both=True),
    "LoKr, both, Tucker, scalar": algo("lokr", CONV3, **LARGE, decompose_both=True, **TUCKER, use_scalar=True),
    "LoKr, the small one": algo("lokr", LINEAR, **SMALL_FACTORED, size=(16, 4)),
    "LoKr, unbalanced": algo("lokr", LINEAR, unbalanced_factorization=True, **HALVES),
    "LoKr, whole by rank": algo("lokr", *ALL, rank=8),
    "LoKr, full matrix": algo("lokr", full_matrix=True, use_scalar=True),
    "LoKr with DoRA": algo("lokr", **HALVES, **DORA),
    "LoKr with DoRA of inputs, Tucker": algo("lokr", CONV3, **HALVES, **INPUTS, **TUCKER),
    "OFT": algo("diag-oft", *ALL),
    "OFT, limit": algo("diag-oft", LINEAR, constraint=0.1),
    "OFT, loose limit, rescale": algo("diag-oft", constraint=10, rescaled=True),
    "OFT, limit, rescale": algo("diag-oft", rank=4, constraint=0.1, rescaled=True),
    "BOFT of 2": algo("boft", *ALL, rank=6),
    "BOFT of 3, limit, rescale": algo("boft", rank=4, size=(16, 10), constraint=0.05, rescaled=True),
    "BOFT of 4, limit": algo("boft", LINEAR, rank=2, size=(16, 10), constraint=0.05),
}
ALONE = {
    "LoRA": algo("lora", LINEAR),
    "DoRA": algo("lora", CONV3, **DORA),
    "LoHa": algo("loha", LINEAR),
    "LoKr": algo("lokr", LINEAR, **HALVES),
    "BOFT": algo("boft", LINEAR, rank=6),
}


class LastRank:
    """`random`, whose whole numbers are the highest: a DyLoRA then computes with its full rank."""

    def __getattr__(self, name: str) -> Any:
        return getattr(random, name)

    def randint(self, low: int, high: int) -> int:
        return high


def lycoris(checkout: Path) -> Iterator[Cases]:
    sys.path.insert(0, str(checkout))
    from lycoris import kohya, wrapper
    from lycoris.modules import dylora

    dylora.random = LastRank()
    for title, variant in LYCORIS.items():
        model = unet(variant.size)
        network = kohya.create_network(1.0, variant.rank, ALPHA, None, texts(1)[0], model, **variant.options)
        asked = {name: model.get_submodule(PATHS[name]) for name in variant.modules}
        yield changes(network, "lora_unet_", f"LyCORIS {title}", asked, *APPLY)
    for title, variant in ALONE.items():
        model = unet(variant.size)
        network = wrapper.create_lycoris(model, 1.0, variant.rank, ALPHA, **variant.options)
        asked = {name: model.get_submodule(PATHS[name]) for name in variant.modules}
        yield changes(network, "lycoris_", f"LyCORIS alone {title}", asked)
    encoders = texts(2)
    network = kohya.create_network(1.0, 3, ALPHA, None, encoders, unet(), algo="loha")
    asked = {f"lora_te{n + 1}": encoder.get_submodule(TEXT) for n, encoder in enumerate(encoders)}
    yield changes(network, "", "LyCORIS LoHa", asked, *APPLY)
    for bias in (False, True):
        yield lycoris_full(kohya, bias)


@torch.no_grad()
def lycoris_full(kohya: ModuleType, bias: bool) -> Cases:
    """Full differences and norms, as LyCORIS reads its own file."""
    trained, options = unet(bias=bias), {"algo": "full", "train_norm": True}
    network = kohya.create_network(1.0, 4, 1, None, texts(1)[0], trained, **options)
    network.apply_to(*APPLY)
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    tensors = saved(network)
    model, found = unet(bias=bias), {}
    reader, _ = kohya.create_network_from_weights(1.0, None, None, texts(1)[0], model, weights_sd=dict(tensors))
    layers = {layer.lora_name: layer for layer in reader.unet_loras}
    for name, path in {**PATHS, **NORMS}.items():
        module, layer = model.get_submodule(path), layers["lora_unet_" + path.replace(".", "_")]
        own, title = of_module(tensors, path, "lora_unet_"), f"LyCORIS full{' with bias' if bias else ''}, {name}"
        if name in NORMS:
            delta, bias_delta = norm_changes(layer.forward, module)
            found |= case(title, own, module.weight, delta.flatten())
        elif bias:
            delta, bias_delta = layer.get_diff_weight()
            found |= case(title, own, module.weight, delta)
        else:
            found |= case(title, own, module.weight, response(layer.forward, module.weight) - module.weight)
            continue
        found[f"{title}/bias_delta"] = bias_delta.flatten().clone()
    return {name: tensor for name, tensor in found.items() if bias or "Norm" not in name}


# kohya

CONVOLUTIONS: dict[str, Any] = {"conv_dim": 2, "conv_alpha": 1.5}
OFT_MODULES: dict[str, Any] = {"enable_all_linear": True, "enable_conv": True}


def sd_scripts(checkout: Path) -> Iterator[Cases]:
    sys.path.insert(0, str(checkout))
    import library

    library.__path__ = [str(checkout / "library")]
    stub("library.utils", setup_logging=lambda: None)
    stub("library.train_util", precalculate_safetensors_hashes=lambda tensors, metadata: ("", ""))
    from networks import dylora, lora, lora_fa, oft

    dylora.random = LastRank()
    for title, module, options in (("LoRA", lora, CONVOLUTIONS), ("LoRA-FA", lora_fa, {}), ("DyLoRA", dylora, {})):
        model, encoders = unet(), texts(1)
        network = module.create_network(1.0, 3, ALPHA, None, encoders[0], model, **options)
        asked = {name: model.get_submodule(PATHS[name]) for name in (ALL if options else (LINEAR,))}
        asked["lora_te"] = encoders[0].get_submodule(TEXT)
        yield changes(network, "lora_unet_", f"kohya {title}", asked, *APPLY)
    encoders = texts(2)
    network = lora.create_network(1.0, 3, None, None, encoders, unet())
    asked = {f"lora_te{n + 1}": encoder.get_submodule(TEXT) for n, encoder in enumerate(encoders)}
    yield changes(network, "", "kohya LoRA", asked, *APPLY)
    yield kohya_without_alpha(lora)
    for title, limit in (("OFT", 0.1), ("OFT, loose limit", 10.0)):
        model = unet()
        network = oft.create_network(1.0, 4, limit, None, texts(1)[0], model, **OFT_MODULES)
        asked = {name: model.get_submodule(PATHS[name]) for name in ALL}
        yield changes(network, "oft_unet_", f"kohya {title}", asked, *APPLY)


def kohya_without_alpha(lora: ModuleType) -> Cases:
    """A file that lacks its alphas, as kohya reads it."""
    written = lora.create_network(1.0, 3, ALPHA, None, texts(1)[0], unet())
    written.apply_to(*APPLY)
    randomise(written)
    tensors = {name: tensor for name, tensor in saved(written).items() if not name.endswith("alpha")}
    model = unet()
    module = model.get_submodule(PATHS[LINEAR])
    before, weight = response(module, module.weight), module.weight.detach().clone()
    network, _ = lora.create_network_from_weights(1.0, None, None, texts(1)[0], model, weights_sd=tensors)
    network.apply_to(*APPLY)
    network.load_state_dict(tensors, strict=False)
    own = of_module(tensors, PATHS[LINEAR], "lora_unet_")
    return case("kohya LoRA without alpha, Linear", own, weight, response(module, weight) - before)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lycoris", type=Path, required=True)
    parser.add_argument("--sd-scripts", type=Path, required=True)
    paths = parser.parse_args()
    logging.disable(logging.WARNING)
    tensors: Cases = {}
    for found in (*lycoris(paths.lycoris.expanduser().resolve()), *sd_scripts(paths.sd_scripts.expanduser().resolve())):
        assert tensors.keys().isdisjoint(found)
        tensors |= found
    save_file({name: tensors[name].detach().contiguous().clone() for name in sorted(tensors)}, GOLDEN)
    cases = sum(name.endswith("/delta") for name in tensors)
    sys.stderr.write(f"{GOLDEN.name}: {cases} cases, {GOLDEN.stat().st_size // 1000} kB\n")


if __name__ == "__main__":
    main()
