"""LoRA with orthogonal initialisation (Ortho-LoRA of Soboleva et al. 2025, arXiv:2507.05964, section 4.2).

    Δ = up · S · down - up₀ · S₀ · down₀

The columns of up₀ and the rows of down₀ are orthonormal, S is diagonal; up, S and down start as copies and are trained,
so that Δ starts at zero and yet every component has its own direction.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.seeding import generator

DOWN = "lora_down.weight"
UP = "lora_up.weight"
SINGULAR_VALUES = "singular_values"  # the diagonal of S; no file of an adapter has it


class OrthogonalProduct(nn.Module):
    """Δ applied to a module's inputs, by the layers in which PEFT has the factors."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        """Take the trained layers and copy them.

        Args:
            down: `nn.Linear` (in → rank), or `nn.Conv2d` with the adapted module's kernel.
            up: `nn.Linear` (rank → out), or `nn.Conv2d` with a kernel of 1×1.
        """
        super().__init__()
        weight: Any = down.weight
        self.down = down
        self.up = up
        self.singular_values = nn.Parameter(torch.ones(len(weight), dtype=torch.float32, device=weight.device))
        self.initial_down = copy.deepcopy(down).requires_grad_(False)
        self.initial_up = copy.deepcopy(up).requires_grad_(False)
        self.initial_singular_values = nn.Parameter(self.singular_values.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Any:
        """That of `down`; PEFT converts the inputs to its type."""
        return self.down.weight

    def trained(self) -> dict[str, Any]:
        """The parameters that are trained, by suffix."""
        return {DOWN: self.down.weight, UP: self.up.weight, SINGULAR_VALUES: self.singular_values}

    def initial(self) -> dict[str, Any]:
        """Their copies at the start, float32."""
        return {
            DOWN: self.initial_down.weight,
            UP: self.initial_up.weight,
            SINGULAR_VALUES: self.initial_singular_values,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Inputs of the adapted module → what is added to its outputs; exactly zero at first."""
        trained: Tensor = self.up(_scaled(self.down(x), self.singular_values, x))
        initial: Tensor = self.initial_up(_scaled(self.initial_down(x), self.initial_singular_values, x))
        return trained - initial


def _scaled(components: Tensor, singular_values: Tensor, x: Tensor) -> Tensor:
    """Components (…, rank) of a linear layer or (batch, rank, height, width) of a convolution, times their values."""
    is_convolution = x.ndim == 4
    return components * (singular_values.view(-1, 1, 1) if is_convolution else singular_values)


def plain_factors(trained: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same Δ as the two factors of a LoRA of twice the rank, exactly.

    Component i becomes two, (up_i S_i - up₀_i S₀_i) · down_i and up₀_i S₀_i · (down_i - down₀_i), next to
    each other: so half precision rounds differences, not the large terms that cancel, and the first components stay
    the first.

    Args:
        trained: up, S and down by suffix.
        initial: Their values at the start.
    """
    scaled, scaled_initial = (
        each[UP] * each[SINGULAR_VALUES].view(1, -1, *[1] * (each[UP].ndim - 2)) for each in (trained, initial)
    )
    up = torch.stack([scaled - scaled_initial, scaled_initial], dim=2).flatten(1, 2)
    down = torch.stack([trained[DOWN], trained[DOWN] - initial[DOWN]], dim=1).flatten(0, 1)
    return {DOWN: down, UP: up}


def orthogonal_start(suffix: str, shape: torch.Size, module: nn.Module, source: torch.Generator) -> Tensor:
    """The initial value of a parameter, float32 on the CPU.

    The authors decompose a matrix of normal numbers with a standard deviation of 1 / rank, as large as the module's
    weight, and take the last singular vectors and values. The vectors of such a matrix are random orthonormal ones,
    whatever its values, so they are sampled directly; and its values hardly differ from one matrix to another, so
    modules of one shape share them.

    Args:
        suffix: Which of the parameters.
        shape: The parameter's.
        module: The module that gets the adapter.
        source: Of the random numbers, on the CPU.
    """
    if suffix == SINGULAR_VALUES:
        weight: Any = module.weight
        return _last_singular_values(len(weight), weight[0].numel(), shape[0]).clone()
    rank = shape[0] if suffix == DOWN else shape[1]
    vectors = _orthonormal_columns(shape.numel() // rank, rank, source)
    return (vectors.T if suffix == DOWN else vectors).reshape(shape).contiguous()


def _orthonormal_columns(rows: int, columns: int, source: torch.Generator) -> Tensor:
    """Uniformly distributed among all matrices with orthonormal columns (Mezzadri 2007, arXiv:math-ph/0609050)."""
    vectors, triangle = torch.linalg.qr(torch.randn((rows, columns), generator=source))
    signed: Tensor = vectors * triangle.diagonal().sign()
    return signed


@functools.lru_cache(maxsize=256)
def _last_singular_values(rows: int, columns: int, rank: int) -> Tensor:
    """The smallest singular values of a matrix of normal numbers with a deviation of 1 / rank, the largest first."""
    normal = torch.randn((rows, columns), generator=generator("singular values", rows, columns, rank), device="cpu")
    values: Tensor = torch.linalg.svdvals(normal)[-rank:] / rank
    return values
