"""Rank by timestep (T-LoRA; Soboleva et al. 2025, arXiv:2507.05964, section 4.1): fewer components at more noise."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SettingsError, suggest

_ROUNDING = 1e-9  # by which a whole number may come out too small


def active_ranks(timesteps: int, rank: int, min_rank: int, power: float) -> Tensor:
    """The number of a layer's active components at each timestep: ⌊((T - t) / T)^power · (rank - min_rank)⌋ + min_rank.

    Args:
        timesteps: T.
        rank: Of the layer.
        min_rank: Number of active components at the noisiest timestep, in [1, rank].
        power: Exponent, above 0.

    Returns:
        The rank at each timestep, (timesteps,), int64.
    """
    remaining = (timesteps - torch.arange(timesteps, dtype=torch.float64, device="cpu")) / timesteps
    more = (remaining.pow(power) * (rank - min_rank) + _ROUNDING).floor()
    return more.to(torch.int64) + min_rank


class RankSchedule:
    """Masks the components of a denoiser's adapter during training, by each sample's own timestep.

    In evaluation mode every component is active, as in the file.
    """

    def __init__(self, denoiser: nn.Module, timesteps: int, min_rank: int, power: float) -> None:
        """Read the timesteps of every training pass of a denoiser.

        Args:
            denoiser: A diffusers UNet, which reads timesteps, or a transformer, which reads noise levels in (0, 1].
            timesteps: Of its noise schedule.
            min_rank: Components that always act, at most all of a layer; 0: half of each layer's.
            power: Exponent of the schedule.
        """
        self._denoiser = weakref.ref(denoiser)  # which has this object's hooks, so that both would stay in memory
        self._timesteps = timesteps
        self._min_rank = min_rank
        self._power = power
        self._tables: dict[int, Tensor] = {}  # rank → (timesteps, rank), 1 where a component acts
        # rank → (batch, rank), of the newest training pass: the backward pass of checkpointed layers needs them again
        self._masks: dict[int, Tensor] = {}
        denoiser.register_forward_pre_hook(self._before_pass, with_kwargs=True)

    def limit(self, down: nn.Module) -> None:
        """Mask the outputs of a layer's first factor.

        Args:
            down: `nn.Linear` (in → rank), or `nn.Conv2d`.
        """
        weight: Any = down.weight
        rank = len(weight)
        if rank not in self._tables:
            min_rank = min(self._min_rank or max(1, rank // 2), rank)
            active = active_ranks(self._timesteps, rank, min_rank, self._power)
            mask = (torch.arange(rank, device="cpu") < active[:, None]).float()
            self._tables[rank] = mask.to(weight.device)
        down.register_forward_hook(self._masked)

    def _before_pass(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not denoiser.training:
            return
        timesteps: Tensor = (args[1] if len(args) > 1 else kwargs["timestep"]).reshape(-1)
        if timesteps.is_floating_point():
            timesteps = (timesteps * self._timesteps).long().clamp(max=self._timesteps - 1)
        self._masks = {rank: table[timesteps] for rank, table in self._tables.items()}

    def _masked(self, down: nn.Module, args: tuple[Any, ...], components: Tensor) -> Tensor | None:
        denoiser = self._denoiser()
        if denoiser is None or not denoiser.training:  # layers that were just injected have a mode of their own
            return None
        axis = 1 if isinstance(down, nn.Conv2d) else components.ndim - 1
        mask = self._masks[components.shape[axis]].to(components.dtype)
        if len(mask) > 1 and len(components) != len(mask):
            raise SettingsError(
                f"{suggest('rank_schedule', 'timestep')} does not support layers that process all samples of a batch "
                "as one sequence, such as the embedders of Z-Image or the text fusion of Krea 2.",
                f"Choose {suggest('targets')} without such layers, or set {suggest('batch_size', 1)}.",
            )
        shape = [1] * components.ndim
        shape[0], shape[axis] = mask.shape
        return components * mask.view(shape)
