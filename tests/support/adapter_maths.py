"""Adapters of every kind with random numbers, and what each adds to a weight by its equation, in double precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pack.trainer.adapters.kohya import Adapter, LoraLayer, parse_adapter
from pack.trainer.adapters.layers import Layer
from pack.trainer.merging.merge import MergeResult, WeightedAdapter, merge
from pack.trainer.settings.merge import MergeSettings
from torch import Tensor

Shape = tuple[int, ...]
NAME = "lora_unet_mid_block_attentions_0_proj_in"
CONV_NAME = "lora_unet_down_blocks_0_resnets_0_conv1"
SMALL = (3, 2)  # the small factor of a LoKr
WEIGHTS: dict[str, Shape] = {"linear": (12, 20), "conv 3×3": (12, 20, 3, 3), "conv 1×1": (12, 20, 1, 1)}
PLAIN = (
    "LoRA",
    "LoHa",
    "LoKr",
    "LoKr, both factorised",
    "LoKr, the small one factorised",
    "LoKr, whole",
    "full difference",
)
TUCKER = ("LoRA, Tucker", "LoHa, Tucker", "LoKr, Tucker")
NEEDING_WEIGHTS = ("DoRA", "DoRA, per input", "LoHa with DoRA", "LoKr with DoRA", "OFT", "BOFT")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
ALPHAS = {"OFT": 0.05, "BOFT": 0.0}


def kinds_for(weight: str) -> list[str]:
    """The kinds that a weight of that name in `WEIGHTS` can have."""
    return [*PLAIN, *(TUCKER if weight == "conv 3×3" else ()), *(NEEDING_WEIGHTS if weight != "conv 1×1" else ())]


def shapes_of(kind: str, weight: Shape, rank: int) -> dict[str, Shape]:
    """The shapes that files have, by part."""
    out, inside, *kernel = weight
    area, ones = math.prod(kernel), [1] * len(kernel)
    (a, c), b, d = SMALL, out // SMALL[0], inside // SMALL[1]
    match kind:
        case "LoRA":
            return {"lora_down.weight": (rank, inside, *kernel), "lora_up.weight": (out, rank, *ones)}
        case "LoRA, Tucker":
            outer = {"lora_down.weight": (rank, inside, *ones), "lora_up.weight": (out, rank, *ones)}
            return outer | {"lora_mid.weight": (rank, rank, *kernel)}
        case "LoHa":
            return {
                f"hada_w{n}_{half}": (out, rank) if half == "a" else (rank, inside * area)
                for n in (1, 2)
                for half in "ab"
            }
        case "LoHa, Tucker":
            halves = {f"hada_w{n}_{half}": (rank, out if half == "a" else inside) for n in (1, 2) for half in "ab"}
            return halves | {f"hada_t{n}": (rank, rank, *kernel) for n in (1, 2)}
        case "LoKr":
            return {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * area)}
        case "LoKr, both factorised":
            small = {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
            return small | {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * area)}
        case "LoKr, Tucker":
            outer = {"lokr_w1": (a, c), "lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d)}
            return outer | {"lokr_t2": (rank, rank, *kernel)}
        case "LoKr, the small one factorised":
            return {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c), "lokr_w2": (b, d, *kernel)}
        case "LoKr, whole":
            return {"lokr_w1": (a, c), "lokr_w2": (b, d, *kernel)}
        case "full difference":
            return {"diff": weight}
        case "DoRA, per input":
            return shapes_of("LoRA", weight, rank) | {"dora_scale": (1, inside, *ones)}
        case "DoRA" | "LoHa with DoRA" | "LoKr with DoRA":
            plain = "LoRA" if kind == "DoRA" else kind.split()[0]
            return shapes_of(plain, weight, rank) | {"dora_scale": (out, 1, *ones)}
        case "OFT":
            return {"oft_blocks": (out // 4, 4, 4), "rescale": (out, 1, *ones)}
        case "BOFT":
            return {"oft_blocks": (2, out // 2, 2, 2)}
    raise AssertionError(kind)


def tensors_of(
    kind: str, weight: Shape, seed: int = 0, rank: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """One module's tensors with alpha, as they stand in a file."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(kind, weight, rank)
    parts = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    for part in parts.keys() & {"dora_scale", "rescale"}:
        parts[part] = 0.5 + parts[part].abs()
    tensors = {part: tensor.to(dtype) for part, tensor in parts.items()}
    return tensors if kind == "full difference" else tensors | {"alpha": torch.tensor(ALPHAS.get(kind, 3.0))}


def adapter_of(modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str] | None = None) -> Adapter:
    """An adapter as a file of these modules is read."""
    return parse_adapter(
        {f"{name}.{part}": t for name, parts in modules.items() for part, t in parts.items()}, metadata
    )


def single(kind: str, weight: Shape, seed: int = 0, rank: int = 2, dtype: torch.dtype = torch.float32) -> Adapter:
    """An adapter with one module, `NAME`."""
    return adapter_of({NAME: tensors_of(kind, weight, seed, rank, dtype)})


def lora_named(seed: int, *names: str) -> Adapter:
    """A LoRA whose modules, "m" if none is named, all add the same to weights of (4, 3); its alpha is its rank."""
    tensors = tensors_of("LoRA", (4, 3), seed, 1)
    layer = LoraLayer(tensors["lora_down.weight"], tensors["lora_up.weight"], 1.0)
    return Adapter(dict.fromkeys(names or ("m",), layer))


def random_weight(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))


def settings(method: str = "sum", **values: Any) -> MergeSettings:
    """Settings without a limit of rank, unless one is given."""
    limit = {} if method in ("sum", "orthogonal") or "rank" in values else {"rank": 0}
    return MergeSettings.checked({"method": method, **limit, **values})


def merged(
    *inputs: Adapter | tuple[Adapter, float], weights: Mapping[str, Tensor] | None = None, **values: Any
) -> MergeResult:
    """Adapters, with strengths for all of the model, merged by `settings(**values)`; titled A, B, C …"""
    pairs = [given if isinstance(given, tuple) else (given, 1.0) for given in inputs]
    weighted = [
        WeightedAdapter(adapter, title, strength, strength)
        for title, (adapter, strength) in zip("ABCDEFG", pairs, strict=False)
    ]
    return merge(weighted, settings(**values), weights)


def added(layer: Layer, shape: Shape, weight: Tensor | None = None) -> Tensor:
    """What a layer adds to a weight of that shape, (out, in·k·k), float64; from its tensors and its alpha alone."""
    parts = {name: tensor.double() for name, tensor in layer.tensors().items()}
    base = None if weight is None else weight.double()
    if "diff" in parts:
        return parts["diff"].reshape(shape).flatten(1)
    if "oft_blocks" in parts:
        assert base is not None
        return (rotated(parts, layer.alpha, base) - base).flatten(1)
    plain = _plain(parts, layer.alpha, shape)
    if "dora_scale" in parts:
        assert base is not None
        after, scale = base + plain.reshape(shape), parts["dora_scale"]
        axes = [axis for axis, length in enumerate(scale.shape) if length == 1]
        plain = scale * after / after.square().sum(dim=axes, keepdim=True).sqrt() - base
    return plain.reshape(shape).flatten(1)


def _plain(parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> Tensor:
    def tucker(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
        return torch.einsum("xykl,xo,yi->oikl", core, outer, inner)

    if "lora_up.weight" in parts:
        up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
        core = parts.get("lora_mid.weight")
        return alpha / len(down) * (up @ down if core is None else tucker(core, up.T, down))
    if "hada_w1_a" in parts:
        halves = []
        for n in (1, 2):
            outer, inner, core = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")
            halves.append(outer @ inner if core is None else tucker(core, outer, inner))
        return alpha / len(parts["hada_w1_b"]) * halves[0] * halves[1]
    small = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    rank: int | None = None if "lokr_w1" in parts else len(parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        large = parts["lokr_w2"]
    else:
        outer, inner, core = parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2")
        large, rank = outer @ inner if core is None else tucker(core, outer, inner), len(inner)
    blocks = large.reshape(shape[0] // len(small), shape[1] // small.shape[1], -1)
    return (1.0 if rank is None else alpha / rank) * torch.einsum("ac,bdk->abcdk", small, blocks).reshape(shape)


def rotated(parts: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Rows turned by Cayley transforms of skew-symmetric blocks; of BOFT by butterfly factors after one another."""
    blocks = parts["oft_blocks"]
    skew = blocks - blocks.mT
    limit = alpha * len(weight)
    if 0 < limit < skew.norm():
        skew = skew * limit / skew.norm()
    one = torch.eye(skew.shape[-1], dtype=torch.float64)
    rotations = (one + skew) @ torch.linalg.inv(one - skew)
    if blocks.ndim == 3:
        turned = torch.block_diag(*rotations.mT) @ weight.flatten(1)
    else:
        turned = weight.flatten(1)
        for level, rotation in enumerate(rotations):
            half = 2**level * (len(one) // 2)
            order = torch.arange(len(weight)).reshape(-1, 2, half).mT.flatten()
            block = torch.block_diag(*rotation)
            turned = turned.clone().index_copy(0, order, block @ turned[order])
    return (parts["rescale"].reshape(-1, 1) * turned if "rescale" in parts else turned).reshape(weight.shape)


def error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius' norm of the difference, as a share of what is expected."""
    return float((actual.double() - expected).norm() / expected.norm())


def tail(delta: Tensor, rank: int) -> float:
    """Norm of what the nearest delta of a rank leaves out (Eckart & Young)."""
    values = torch.linalg.svdvals(delta)
    return float(values[rank:].norm())


def total(deltas: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    return torch.stack([strength * delta for delta, strength in zip(deltas, strengths, strict=True)]).sum(dim=0)
