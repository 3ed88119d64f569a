"""Scores of pictures: how well they follow a prompt, how much they show the subject, how far a prior has drifted.

All take normalised features (`feature_models`), so that a picture's are computed once for all scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import PicturesError


def clip_t(pictures: Tensor, prompts: Tensor) -> Tensor:
    """CLIP-T (Ruiz et al. 2023): cosine of each picture and its prompt.

    Args:
        pictures: (pictures, width).
        prompts: (pictures, width), or (1, width) for one prompt of all.

    Returns:
        (pictures,), in [-1, 1].

    Raises:
        PicturesError: There are more or fewer prompts than pictures.
    """
    if len(prompts) not in (1, len(pictures)):
        raise PicturesError(
            f"There are {len(prompts)} prompts for {len(pictures)} pictures.",
            "Give one prompt, or one for each picture.",
        )
    return (pictures * prompts).sum(dim=1)


def clip_score(pictures: Tensor, prompts: Tensor) -> Tensor:
    """CLIPScore (Hessel et al. 2021) as torchmetrics scales it: 100 · max(cosine, 0), (pictures,)."""
    return 100 * clip_t(pictures, prompts).clamp(min=0)


def subject_score(pictures: Tensor, references: Tensor, same: Tensor | None = None) -> Tensor:
    """CLIP-I or DINO (Ruiz et al. 2023): each picture's mean cosine to all reference pictures, (pictures,).

    Args:
        pictures: (pictures, width).
        references: Features of real pictures of the subject, (references, width), by the same model.
        same: (pictures, references), where a picture is the reference itself and is left out; None for nowhere.

    Raises:
        PicturesError: A picture has no other reference than itself.
    """
    cosines = pictures @ references.T
    counted = torch.ones_like(cosines) if same is None else (~same).to(cosines)
    if not counted.any(dim=1).all():
        raise PicturesError(
            "A picture has no reference but itself.", "Give further pictures of the subject, or leave that picture out."
        )
    return (cosines * counted).sum(dim=1) / counted.sum(dim=1)


def own_score(references: Tensor) -> float:
    """The score of real pictures among themselves, each left out of its own references: the top of the scale.

    Raises:
        PicturesError: There is one picture alone.
    """
    return 1 - diversity(references)


def diversity(pictures: Tensor) -> float:
    """1 − mean cosine of all pairs of different pictures: 0 if all are the same.

    Raises:
        PicturesError: There is one picture alone.
    """
    count = len(pictures)
    if count < 2:
        raise PicturesError("Diversity needs two pictures at least.", "Make more pictures.")
    cosines = pictures @ pictures.T
    return 1 - float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def drift(before: Tensor, after: Tensor) -> float:
    """How far a prior has moved: 1 − mean cosine of pictures from the same noise without and with an adapter.

    Args:
        before: Without it, (pictures, width).
        after: With it, in the same order.
    """
    return max(0.0, 1 - float((before * after).sum(dim=1).mean()))  # the same pictures drift by no rounding
