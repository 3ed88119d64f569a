"""Metrics of pictures: prompt following, subject fidelity, and drift of the prior.

All are computed from normalised features (`feature_extractors`), so that each picture is encoded once for all of them.
Only this module defines their names in tables and files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import PicturesError
from .feature_extractors import CLIP, DINO

CLIP_T = "CLIP-T"
CLIP_SCORE = "CLIPScore"
CLIP_I = "CLIP-I"
DINO_I = "DINO"
DIVERSITY = "diversity"
CLASS_DIVERSITY = "class diversity"
FIDELITY_METRICS = {CLIP: CLIP_I, DINO: DINO_I}
"""Feature extractor → the metric that compares pictures with the subject's by it."""
DRIFT_METRICS = {CLIP: "drift (CLIP)", DINO: "drift (DINO)"}
"""Feature extractor → the metric of the class pictures' drift by it."""


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
            "Provide one prompt, or one for each picture.",
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
        same: Whether a picture is the reference itself, which is excluded: (pictures, references), bool; None: none.

    Raises:
        PicturesError: A picture has no reference other than itself.
    """
    cosines = pictures @ references.T
    counted = torch.ones_like(cosines) if same is None else (~same).to(cosines)
    if not counted.any(dim=1).all():
        raise PicturesError(
            "A picture has no reference other than itself.",
            "Add more pictures of the subject, or leave that picture out.",
        )
    return (cosines * counted).sum(dim=1) / counted.sum(dim=1)


def leave_one_out_score(references: Tensor) -> float:
    """Mean subject score of real pictures, each compared with all others: an upper bound.

    Raises:
        PicturesError: There is only one picture.
    """
    return 1 - diversity(references)


def diversity(pictures: Tensor) -> float:
    """1 − mean cosine of all pairs of different pictures: 0 if all are the same.

    Raises:
        PicturesError: There is only one picture.
    """
    count = len(pictures)
    if count < 2:
        raise PicturesError("Diversity needs at least two pictures.", "Generate more pictures.")
    cosines = pictures @ pictures.T
    return 1 - float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def drift(before: Tensor, after: Tensor) -> float:
    """How far a prior has moved: 1 − mean cosine of pictures from the same noise without and with an adapter.

    Args:
        before: Features of pictures without it, (pictures, width).
        after: Features of pictures with it, in the same order.
    """
    return max(0.0, 1 - float((before * after).sum(dim=1).mean()))  # rounding is no drift
