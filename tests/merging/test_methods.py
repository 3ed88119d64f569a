"""The methods of merging by identities: svd, subtraction, orthogonal, ties, dare, prune; and the order of inputs."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from adapter_maths import (
    DTYPES,
    NAME,
    NEEDING_WEIGHTS,
    WEIGHTS,
    Shape,
    adapter_of,
    added,
    error,
    kinds_for,
    merged,
    random_weight,
    single,
    tail,
    tensors_of,
    total,
)
from cases import mostly_slow
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.adapters.layers import FullLayer, LoraLayer
from pack.trainer.merging.deltas import Delta, Truncation, nearest_lora, truncate
from pack.trainer.merging.merge import MergeResult
from pack.trainer.merging.methods import METHODS, MergeOptions, column_scaled
from peft.utils import merge_utils
from torch import Tensor

CASES = [pytest.param(kind, weight, id=f"{kind}, {weight}") for weight in WEIGHTS for kind in kinds_for(weight)]
DENSE = ("ties", "dare", "dare-ties", "prune")


def sole(result: MergeResult, shape: Shape) -> Tensor:
    return added(result.adapter.layers[NAME], shape)


def changes_of(adapters: Sequence[Adapter], shape: Shape) -> list[Tensor]:
    base = random_weight(shape)
    return [added(adapter.layers[NAME], shape, base) for adapter in adapters]


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_spectrum(shape: Shape, values: Tensor) -> Adapter:
    """A full difference with these singular values."""
    rows, columns = shape[0], math.prod(shape[1:])
    matrix = orthonormal(rows, len(values), 1) * values.double() @ orthonormal(columns, len(values), 2).T
    return Adapter({NAME: FullLayer(matrix.float().reshape(shape))})


# svd


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_svd_without_a_limit_is_the_sum(kind: str, weight: str) -> None:
    shape = WEIGHTS[weight]
    types = DTYPES[: 3 if kind in NEEDING_WEIGHTS else 4]
    for dtype, limit in itertools.product(types, (0, 12)):
        pair = [single(kind, shape, 1, 2, dtype), single("LoRA", shape, 2, 3)]
        weights = {NAME: random_weight(shape)}
        result = merged((pair[0], 0.8), (pair[1], -1.3), weights=weights, method="svd", rank=limit)
        layer = result.adapter.layers[NAME]
        assert (layer.kind, layer.shape, layer.alpha) == ("LoRA", shape, layer.rank)
        assert error(added(layer, shape), total(changes_of(pair, shape), (0.8, -1.3))) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4, 7])
@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_svd_is_as_near_as_a_rank_allows(kind: str, weight: str, rank: int) -> None:
    """Eckart & Young: no matrix of that rank is nearer than the truncated decomposition."""
    shape = WEIGHTS[weight]
    pair = [single(kind, shape, 1, 3), single("LoHa", shape, 2, 2)]
    result = merged(*pair, weights={NAME: random_weight(shape)}, method="svd", rank=rank)
    whole = total(changes_of(pair, shape), (1, 1))
    assert result.adapter.layers[NAME].rank <= rank
    assert (whole - sole(result, shape)).norm() <= (1 + 1e-5) * tail(whole, rank) + 1e-6 * whole.norm()


LARGE = (800, 960)  # larger than what is decomposed whole
SPECTRA = {
    "geometric": (0.98 ** torch.arange(800), (8, 64)),
    "power": (1 / torch.arange(1, 801), (8, 64)),
    "slow power": (torch.arange(1, 801) ** -0.5, (8, 64)),
    "low rank": (torch.cat([torch.linspace(2, 1, 40), torch.zeros(10)]), (8, 64)),
    "low rank and noise": (torch.cat([torch.linspace(20, 10, 40), torch.linspace(1, 0.01, 760)]), (8, 40)),
}


@pytest.mark.parametrize("spectrum", mostly_slow(SPECTRA, "slow power", "low rank"))
def test_a_large_dense_change_is_cut_as_well_as_possible(spectrum: str) -> None:
    """What is left out is known from the singular values; the result is the same each time."""
    values, ranks = SPECTRA[spectrum]
    adapter = with_spectrum(LARGE, values)
    whole = added(adapter.layers[NAME], LARGE)
    for rank in ranks:
        layer, again = (merged(adapter, method="svd", rank=rank).adapter.layers[NAME] for _ in range(2))
        best = float(values[rank:].double().norm())
        assert (whole - added(layer, LARGE)).norm() <= (1 + 1e-5) * best + 2e-6 * whole.norm()
        for part, tensor in layer.tensors().items():
            assert torch.equal(again.tensors()[part], tensor)


def test_a_large_convolution_is_cut_as_well_as_possible() -> None:
    shape, rank = (800, 100, 3, 3), 32
    values = torch.arange(1, 801).double() ** -1.5
    adapter = with_spectrum(shape, values)
    result = merged(adapter, (single("LoRA", shape, 3, 4), 1e-4), method="svd", rank=rank)
    both = total(changes_of([adapter, single("LoRA", shape, 3, 4)], shape), (1, 1e-4))
    singular = np.linalg.svd(both.numpy(), compute_uv=False)
    layer = result.adapter.layers[NAME]
    assert layer.shape == shape
    best = float(np.linalg.norm(singular[rank:]))
    assert (both - added(layer, shape)).norm() <= (1 + 1e-5) * best + 2e-6 * both.norm()


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    merged(with_spectrum((900, 900), 0.9 ** torch.arange(50)), method="svd", rank=4)
    merged(single("LoRA", WEIGHTS["linear"]), method="dare")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kinds", [("LoRA", "LoRA"), ("LoHa", "full difference")], ids=" + ".join)
def test_svd_keeps_a_share_of_the_energy_and_no_rank_more(kinds: tuple[str, str], weight: str, energy: float) -> None:
    shape = WEIGHTS[weight]
    pair = [single(kind, shape, n, 4) for n, kind in enumerate(kinds)]
    result = merged(*pair, method="svd", energy=energy)
    whole = total(changes_of(pair, shape), (1, 1))
    rank = result.adapter.layers[NAME].rank
    kept = 1 - float((whole - sole(result, shape)).square().sum() / whole.square().sum())
    assert kept >= energy - 1e-6
    fewer = 1 - (tail(whole, rank - 1) / float(whole.norm())) ** 2
    assert fewer < energy
    [module] = result.report.modules
    assert module.lost == pytest.approx(1 - kept, abs=1e-5)


@pytest.mark.parametrize("energy", mostly_slow([0.5, 0.9, 0.99], 0.9))
def test_energy_of_a_large_dense_change(energy: float) -> None:
    """Where only the leading part of the decomposition is computed, and the limit of rank may come first."""
    values = 0.9 ** torch.arange(800)
    shares = values.square().cumsum(0) / values.square().sum()
    needed = int((shares < energy).sum()) + 1
    adapter = with_spectrum((800, 1000), values)
    for limit in (needed - 1, needed, needed + 1, 60):
        result = merged(adapter, method="svd", energy=energy, rank=limit)
        assert result.adapter.layers[NAME].rank == min(needed, limit)


@pytest.mark.parametrize(
    "shape", [(12, 15), (20, 30), (40, 25), (64, 64), (100, 30), (30, 100), (16, 24), (33, 57), (48, 32)], ids=str
)
def test_all_of_the_energy_is_all_of_the_rank(shape: Shape) -> None:
    """The smallest values have less of the energy than rounding, and are none."""
    values = torch.logspace(0, -4.5, 10)
    assert merged(with_spectrum(shape, values), method="svd", energy=1.0).adapter.layers[NAME].rank == 10


@pytest.mark.parametrize("ratio", [1.0, 1.5, 5.0, 1e4])
@pytest.mark.parametrize("shape", [(40, 30), (800, 900)])
def test_the_ratio_bounds_singular_values(shape: Shape, ratio: float) -> None:
    values = 0.7 ** torch.arange(20) * 3
    layer = merged(with_spectrum(shape, values), method="svd", ratio=ratio, rank=25).adapter.layers[NAME]
    assert layer.rank == int((values * ratio * (1 + 1e-5) >= values[0]).sum())


def test_every_limit_holds() -> None:
    values = 0.8 ** torch.arange(20)
    adapter = with_spectrum((40, 30), values)
    limits: dict[str, Any] = {"rank": 9, "energy": 0.95, "ratio": 20.0}
    alone = {name: merged(adapter, method="svd", **{name: v}).adapter.layers[NAME].rank for name, v in limits.items()}
    assert merged(adapter, method="svd", **limits).adapter.layers[NAME].rank == min(alone.values())


def test_the_rank_of_convolutions_acts_on_kernels_alone() -> None:
    shapes: dict[str, Shape] = {
        "lora_unet_mid_block_attentions_0_proj_in": (12, 20),
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut": (12, 20, 1, 1),
        "lora_unet_down_blocks_1_resnets_0_conv1": (12, 20, 3, 3),
        "lora_unet_down_blocks_1_resnets_1_conv2": (12, 18, 3, 3),
    }
    flat = list(shapes)[-1]
    a = adapter_of({name: tensors_of("LoRA", shape, 1, 6) for name, shape in shapes.items()})
    b = adapter_of({name: tensors_of("LoHa", shape, 2, 2) for name, shape in shapes.items() if name == flat})
    ranks = {
        (5, 2): (5, 5, 2, 2),
        (5, 0): (5, 5, 5, 5),
        (0, 2): (6, 6, 2, 2),
        (2, 5): (2, 2, 5, 5),
        (0, 0): (6, 6, 6, 10),
    }
    for (rank, conv_rank), expected in ranks.items():
        found = merged(a, b, method="svd", rank=rank, conv_rank=conv_rank).adapter.layers
        assert tuple(found[name].rank for name in shapes) == expected
    alone = merged(b, method="svd", rank=4, conv_rank=1).adapter.layers[flat]
    assert alone.rank == 1


def test_singular_values_are_shared_evenly() -> None:
    """So that neither factor leaves the range of fp16."""
    shape = WEIGHTS["linear"]
    plain = single("LoRA", shape, 1, 4).layers[NAME].tensors()
    for scale in (1e-6, 1.0, 1e6):
        adapter = Adapter({NAME: LoraLayer(scale * plain["lora_down.weight"], plain["lora_up.weight"], 4.0)})
        layer = merged(adapter, method="svd").adapter.layers[NAME]
        parts = layer.tensors()
        up, down = (parts[f"lora_{side}.weight"] for side in ("up", "down"))
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=0)
        assert error(added(layer, shape), added(adapter.layers[NAME], shape)) < 1e-5


@pytest.mark.parametrize("method", ["svd", "orthogonal", *DENSE])
@pytest.mark.parametrize("kind", ["LoRA", "full difference", "LoHa"])
def test_a_change_of_zeros_stays_one(kind: str, method: str) -> None:
    tensors = {part: torch.zeros_like(tensor) for part, tensor in tensors_of(kind, WEIGHTS["linear"]).items()}
    if "alpha" in tensors:
        tensors["alpha"] = torch.tensor(1.0)
    zero = adapter_of({NAME: tensors})
    other = single("LoRA", WEIGHTS["linear"])
    for inputs in ((zero,), (zero, zero)):
        layer = merged(*inputs, method=method).adapter.layers[NAME]
        assert added(layer, WEIGHTS["linear"]).abs().max() == 0
    if method not in ("dare", "prune", "ties", "dare-ties"):
        for pair in ((zero, other), (other, zero)):
            result = merged(*pair, method=method)
            assert error(sole(result, WEIGHTS["linear"]), added(other.layers[NAME], WEIGHTS["linear"])) < 1e-5


@pytest.mark.parametrize("shape", [(24, 32), (320, 768), (640, 1280), (64, 32, 3, 3)], ids=str)
@pytest.mark.parametrize("ranks", [(4, 4), (8, 16), (1, 6)])
def test_subtraction_leaves_the_other_adapter_and_its_rank(ranks: tuple[int, int], shape: Shape) -> None:
    """(A + B) − B is A, of A's rank: what is left of B is rounding, which counts for nothing."""
    a, b = (single("LoRA", shape, n, rank) for n, rank in enumerate(ranks))
    both = merged(a, b).adapter
    layer = merged(both, (b, -1.0), method="svd", energy=1.0).adapter.layers[NAME]
    assert error(added(layer, shape), added(a.layers[NAME], shape)) < 1e-5
    assert layer.rank == ranks[0]


@pytest.mark.parametrize("shape", [(24, 32), (320, 768), (800, 900)], ids=str)
@pytest.mark.parametrize("kind", ["LoRA", "full difference"])
def test_the_rank_of_what_has_one_is_found(kind: str, shape: Shape) -> None:
    """Whether it is hidden in factors that are larger than needed, or in a dense matrix."""
    small = single("LoRA", shape, 1, 3)
    inputs: list[Adapter | tuple[Adapter, float]] = [small, (small, 2.0), (small, -0.5)]
    if kind == "full difference":
        inputs = [Adapter({NAME: FullLayer(small.layers[NAME].delta())})]
    layer = merged(*inputs, method="svd").adapter.layers[NAME]
    assert layer.rank == 3


def test_nothing_is_left_of_an_adapter_minus_itself() -> None:
    a = single("LoRA", (64, 48), 1, 4)
    for method in ("sum", "svd", "orthogonal"):
        layer = merged(a, (a, -1.0), method=method).adapter.layers[NAME]
        if method != "orthogonal":
            assert added(layer, (64, 48)).norm() < 1e-5 * added(a.layers[NAME], (64, 48)).norm()


def test_the_nearest_lora_is_the_method_svd() -> None:
    change = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    one = nearest_lora(change, 5)
    other = merged(Adapter({NAME: FullLayer(change)}), method="svd", rank=5).adapter.layers[NAME]
    assert error(added(one, (30, 40)), added(other, (30, 40))) < 1e-6


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (7, 7)])
def test_factors_of_more_rank_than_the_weight(shape: Shape) -> None:
    a = single("LoRA", shape, 1, 20)
    layer = merged(a, method="svd").adapter.layers[NAME]
    assert layer.rank == min(shape)
    assert error(added(layer, shape), added(a.layers[NAME], shape)) < 1e-5


# The order of inputs


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("method", ["sum", "svd", *DENSE])
def test_the_order_of_inputs_does_not_matter(method: str, weight: str) -> None:
    shape = WEIGHTS[weight]
    kinds = ("LoRA", "LoHa", "full difference")
    inputs = [(single(kind, shape, n, 3), s) for n, (kind, s) in enumerate(zip(kinds, (1.0, -0.4, 0.7), strict=True))]
    values: dict[str, Any] = {"rank": 5} if method == "svd" else {}
    first = sole(merged(*inputs, method=method, **values), shape)
    for order in itertools.permutations(inputs):
        assert error(sole(merged(*order, method=method, **values), shape), first) < 1e-5


# orthogonal


def inputs_of(change: Tensor, share: float = 1.0) -> Tensor:
    """The strongest inputs (in, n) that make up a share of the change's energy."""
    _, values, right = torch.linalg.svd(change, full_matrices=False)
    values = values[values > 1e-6 * values[0]]
    shares = values.square().cumsum(0) / values.square().sum()
    count = len(values) if share == 1 else int((shares < share).sum()) + 1
    return right[:count].T


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_the_first_adapter_acts_on_its_inputs_as_alone(kind: str, weight: str) -> None:
    """(ΔA + ΔB') V = ΔA V for the inputs V of A, and ΔB' is ΔB elsewhere."""
    shape = WEIGHTS[weight]
    pair = [single(kind, shape, 1, 2), single("LoRA", shape, 2, 3)]
    result = merged((pair[0], 1.5), (pair[1], -0.8), weights={NAME: random_weight(shape)}, method="orthogonal")
    a, b = changes_of(pair, shape)
    inputs = inputs_of(a)
    found = sole(result, shape)
    assert error(found @ inputs, 1.5 * a @ inputs) < 1e-5
    projected = -0.8 * (b - b @ inputs @ inputs.T)
    assert (found - (1.5 * a + projected)).norm() < 1e-5 * (1.5 * a).norm()


@pytest.mark.parametrize("kind", ["LoRA", "LoKr, both factorised", "full difference"])
def test_the_first_adapter_is_untouched_whatever_comes_after(kind: str) -> None:
    shape = (16, 60)
    adapters = [single("LoRA", shape, n, 4) for n in range(2)]
    adapters.append(single("LoRA", shape, 7, 4) if kind.startswith("LoKr") else single(kind, shape, 7, 4))
    found = sole(merged(*adapters, method="orthogonal"), shape)
    a, b, c = changes_of(adapters, shape)
    first = inputs_of(a)
    rest = b - b @ first @ first.T
    both = torch.linalg.qr(torch.cat([first, inputs_of(rest)], dim=1))[0]
    assert error(found, a + rest + c - c @ both @ both.T) < 1e-5
    assert error(found @ first, a @ first) < 1e-5
    assert error(found @ both, (a + rest) @ both) < 1e-5


@pytest.mark.parametrize("shape", [(24, 64), (320, 768)], ids=str)
def test_what_an_adapter_repeats_takes_no_inputs_from_the_next(shape: Shape) -> None:
    """Of an adapter given twice nothing is left the second time: rounding must not be protected."""
    a, c = single("LoRA", shape, 1, 6), single("LoRA", shape, 2, 6)
    found = sole(merged(a, (a, 0.5), c, method="orthogonal"), shape)
    first, last = changes_of([a, c], shape)
    inputs = inputs_of(first)
    assert error(found, first + last - last @ inputs @ inputs.T) < 1e-5


def test_what_is_new_in_an_adapter_is_protected_and_no_rounding() -> None:
    """The second is the first and a little more: two inputs of its own."""
    shape = (24, 64)
    a, new, c = single("LoRA", shape, 1, 6), single("LoRA", shape, 2, 2), single("LoRA", shape, 3, 6)
    second = merged(a, (new, 1e-3)).adapter
    found = sole(merged(a, second, c, method="orthogonal"), shape)
    first, more, last = changes_of([a, new, c], shape)
    inputs = inputs_of(first)
    own = 1e-3 * (more - more @ inputs @ inputs.T)
    both = torch.linalg.qr(torch.cat([inputs, inputs_of(own)], dim=1))[0]
    assert error(found, first + own + last - last @ both @ both.T) < 1e-5


def test_unused_rank_protects_nothing() -> None:
    """An adapter whose factors are larger than what they add."""
    shape = (24, 64)
    a, b = single("LoRA", shape, 1, 3), single("LoRA", shape, 2, 3)
    thrice = merged(a, (a, 0.5), (a, -0.25)).adapter
    first, last = changes_of([thrice, b], shape)
    inputs = inputs_of(first)
    assert inputs.shape[1] == 3
    found = sole(merged(thrice, b, method="orthogonal"), shape)
    assert error(found, first + last - last @ inputs @ inputs.T) < 1e-5


@pytest.mark.parametrize("size", [1e-6, 1e7])
def test_what_is_protected_does_not_depend_on_how_large_changes_are(size: float) -> None:
    adapters = [single("LoRA", (24, 64), n, 6) for n in range(3)]
    scaled = [merged((adapter, size)).adapter for adapter in adapters]
    plain, found = (sole(merged(*inputs, method="orthogonal"), (24, 64)) for inputs in (adapters, scaled))
    assert error(found, size * plain) < 1e-5


@pytest.mark.parametrize("protected", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["LoRA", "full difference"])
def test_a_share_of_the_energy_is_protected(kind: str, protected: float) -> None:
    shape = (20, 30)
    pair = [single(kind, shape, 1, 6), single("LoRA", shape, 2, 6)]
    found = sole(merged(*pair, method="orthogonal", protected=protected), shape)
    a, b = changes_of(pair, shape)
    inputs = inputs_of(a, protected)
    assert 0 < inputs.shape[1] < len(torch.linalg.svdvals(a))
    assert error(found, a + b - b @ inputs @ inputs.T) < 1e-5
    assert error(found @ inputs, a @ inputs) < 1e-5


def test_adapters_of_different_inputs_are_summed() -> None:
    basis = orthonormal(40, 8, 1).float()
    generator = torch.Generator().manual_seed(2)
    a, b = (
        Adapter({NAME: LoraLayer(half.T.contiguous(), torch.randn(12, 4, generator=generator), 4.0)})
        for half in (basis[:, :4], basis[:, 4:])
    )
    found = sole(merged(a, b, method="orthogonal"), (12, 40))
    assert error(found, total(changes_of([a, b], (12, 40)), (1, 1))) < 1e-5


def test_nothing_is_left_of_what_has_only_the_inputs_of_the_first() -> None:
    """A square change of full rank uses every input."""
    shape = (12, 12)
    pair = [single("full difference", shape, 1), single("LoRA", shape, 2)]
    found = sole(merged(*pair, method="orthogonal"), shape)
    assert error(found, added(pair[0].layers[NAME], shape)) < 1e-5


# PEFT


def matrices(adapters: Sequence[Adapter], shape: Shape) -> list[Tensor]:
    return [added(adapter.layers[NAME], shape).float() for adapter in adapters]


@pytest.mark.parametrize("density", [0.1, 0.35, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.9, -0.4, 2.0)])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_and_pruning_are_those_of_peft(weight: str, strengths: tuple[float, ...], density: float) -> None:
    shape = WEIGHTS[weight]
    adapters = [single(kind, shape, n, 3) for n, kind in enumerate(("LoRA", "LoHa", "full difference"))]
    inputs = list(zip(adapters, strengths, strict=True))
    for method, function in {"ties": merge_utils.ties, "prune": merge_utils.magnitude_prune}.items():
        expected = function(matrices(adapters, shape), torch.tensor(strengths), density)
        found = sole(merged(*inputs, method=method, density=density), shape)
        assert error(found, expected.double()) < 1e-5


@pytest.mark.parametrize("method", DENSE)
def test_a_rank_after_a_dense_method_is_the_nearest(method: str) -> None:
    shape = WEIGHTS["linear"]
    pair = [single("LoRA", shape, n, 3) for n in (1, 2)]
    whole = sole(merged(*pair, method=method), shape)
    cut = merged(*pair, method=method, rank=3)
    assert cut.adapter.layers[NAME].rank == 3
    assert (whole - sole(cut, shape)).norm() == pytest.approx(tail(whole, 3), rel=1e-4)


def test_pruning_keeps_the_largest_numbers() -> None:
    shape = WEIGHTS["linear"]
    adapter = single("full difference", shape, 1)
    found = sole(merged(adapter, method="prune", density=0.25), shape)
    change = added(adapter.layers[NAME], shape)
    largest = change.abs() >= change.abs().flatten().kthvalue(change.numel() * 3 // 4 + 1)[0]
    assert int(largest.sum()) == change.numel() // 4
    assert error(found, change * largest) < 1e-5


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_dare_keeps_a_share_and_scales_it(density: float) -> None:
    """Every number is dropped, or divided by the density."""
    shape = (60, 80)
    adapter = single("full difference", shape, 1)
    found = sole(merged(adapter, method="dare", density=density, seed=3), shape)
    ratio = found / added(adapter.layers[NAME], shape)
    kept = ratio.abs() > 1e-2
    scaled = added(adapter.layers[NAME], shape) * kept / density
    assert (found - scaled).norm() < 1e-5 * scaled.norm()
    share = float(kept.double().mean())
    assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / kept.numel())


@pytest.mark.parametrize("density", mostly_slow([0.3, 0.7], 0.3))
def test_the_mean_of_dare_over_seeds_is_the_sum(density: float) -> None:
    shape = WEIGHTS["linear"]
    pair = [single("LoRA", shape, n, 3) for n in (1, 2)]
    changes = [Delta(shape, matrix) for matrix in matrices(pair, shape)]
    draws = [
        METHODS["dare"](
            list(zip(changes, (0.8, -0.5), strict=True)), MergeOptions(density, protected=1.0, seed=seed, name=NAME)
        ).dense()
        for seed in range(600)
    ]
    mean = torch.stack(draws).double().mean(dim=0)
    a, b = changes_of(pair, shape)
    deviation = ((0.8 * a).square() + (0.5 * b).square()).sqrt() * math.sqrt((1 - density) / density / len(draws))
    score = (mean - (0.8 * a - 0.5 * b)) / deviation
    assert score.abs().max() < 5
    assert 0.8 < float(score.square().mean()) < 1.2


def test_what_dare_drops_is_fixed() -> None:
    """A change here would make a merge that is done again another one."""
    change = Adapter({NAME: FullLayer(torch.ones(3, 8))})
    found = sole(merged(change, method="dare", density=0.5, seed=7), (3, 8))
    assert found.round().tolist() == [[2, 0, 0, 2, 0, 2, 0, 2], [2, 2, 0, 2, 0, 2, 2, 0], [0, 2, 2, 2, 0, 0, 2, 2]]


@pytest.mark.parametrize("method", DENSE)
def test_all_numbers_are_kept_without_a_word_at_a_density_of_one(method: str) -> None:
    adapter = single("LoRA", WEIGHTS["linear"], 1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sole(merged(adapter, method=method, density=1.0), WEIGHTS["linear"])
    assert error(found, changes_of([adapter], WEIGHTS["linear"])[0]) < 1e-5


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_the_seed_decides_what_is_dropped(method: str) -> None:
    shape = WEIGHTS["linear"]
    names = [NAME, NAME.replace("proj_in", "proj_out")]
    tensors = tensors_of("LoRA", shape, 1, 3)
    adapter = adapter_of(dict.fromkeys(names, tensors))

    def found(seed: int) -> list[Tensor]:
        layers = merged(adapter, method=method, seed=seed).adapter.layers
        return [added(layers[name], shape) for name in names]

    first, again, other = found(1), found(1), found(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(*first), "two modules with the same numbers drop different ones"


def test_what_is_dropped_of_one_adapter_does_not_depend_on_the_others() -> None:
    """So that DARE of a sum is the sum of each one's, and DARE-TIES PEFT's election among them."""
    shape = WEIGHTS["linear"]
    adapters = [single("LoRA", shape, n, 3) for n in range(3)]
    strengths = (0.7, -1.2, 0.4)
    values: dict[str, Any] = {"density": 0.4, "seed": 11}
    alone = [sole(merged(one, method="dare", **values), shape) for one in adapters]
    inputs = list(zip(adapters, strengths, strict=True))
    assert error(sole(merged(*inputs, method="dare", **values), shape), total(alone, strengths)) < 1e-5

    exact = [torch.where(one.abs() > 1e-4, one, 0.0) for one in alone]
    dense = torch.stack(exact)
    signs = merge_utils.calculate_majority_sign_mask(dense)
    elected = merge_utils.disjoint_merge(dense * torch.tensor(strengths).double()[:, None, None], signs)
    assert error(sole(merged(*inputs, method="dare-ties", **values), shape), elected) < 1e-4


def test_different_adapters_drop_different_numbers() -> None:
    shape = (40, 50)
    pair = [single("full difference", shape, n) for n in (1, 2)]
    kept = [sole(merged(one, method="dare"), shape).abs() > 1e-3 for one in pair]
    both = float((kept[0] & kept[1]).double().mean())
    assert abs(both - 0.25) < 0.05


# Single functions


def test_coefficients_of_inputs_scale_columns() -> None:
    """Of factors and of dense changes; a convolution's by its input channels."""
    for shape in ((6, 5), (6, 5, 3, 3)):
        generator = torch.Generator().manual_seed(1)
        columns = [torch.randn(5, generator=generator) for _ in range(2)]
        pair = [single(kind, shape, n) for n, kind in enumerate(("LoRA", "full difference"))]
        dense = [added(one.layers[NAME], shape).float() for one in pair]
        up, down = (pair[0].layers[NAME].tensors()[f"lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        for changes in (
            [Delta(shape, 1.5 * up, down), Delta(shape, dense[1])],
            [Delta(shape, 1.5 * up, down), Delta(shape, 1.5 * up, down)],
        ):
            found = column_scaled(list(zip(changes, (0.5, -2.0), strict=True)), columns).dense().double()
            expected = torch.zeros(6, math.prod(shape[1:])).double()
            for change, column, strength in zip(changes, columns, (0.5, -2.0), strict=True):
                matrix = change.dense().double().reshape(6, 5, -1)
                expected += strength * (matrix * column.double()[:, None]).flatten(1)
            assert error(found, expected) < 1e-6


def test_the_rank_and_the_size_of_a_delta() -> None:
    factored, dense = Delta((2, 3), torch.ones(2, 5), torch.ones(5, 3)), Delta((2, 3), torch.ones(2, 3))
    assert (factored.rank, factored.size) == (5, 25)
    assert (dense.rank, dense.size) == (2, 6)


@pytest.mark.parametrize("pair", list(itertools.product(["factored", "dense"], repeat=2)), ids=" and ".join)
def test_inner_products_need_no_product_of_factors(pair: tuple[str, str]) -> None:
    def change(form: str, seed: int) -> Delta:
        generator = torch.Generator().manual_seed(seed)
        up, down = torch.randn(9, 3, generator=generator), torch.randn(3, 14, generator=generator)
        return Delta((9, 14), up, down) if form == "factored" else Delta((9, 14), up @ down)

    one, other = change(pair[0], 1), change(pair[1], 2)
    expected = float((one.dense().double() * other.dense().double()).sum())
    assert one.inner(other) == pytest.approx(expected, rel=1e-5)
    assert other.inner(one) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("down", [None, torch.zeros(5, 14)], ids=["dense", "factored"])
def test_a_cut_of_zeros_has_one_rank(down: Tensor | None) -> None:
    found = truncate(Delta((9, 14), torch.zeros(9, 14 if down is None else 5), down), Truncation(4))
    assert found.down is not None
    assert (found.shape, found.up.shape, found.down.shape) == ((9, 14), (9, 1), (1, 14))
    assert not found.dense().any()


def test_a_cut_of_rank_one_of_one_number() -> None:
    found = truncate(Delta((1, 1), torch.tensor([[-3.0]])), Truncation(1))
    assert float(found.dense()) == pytest.approx(-3.0)
    assert found.down is not None
