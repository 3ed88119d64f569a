"""What keeps the class as it is in a run, where the user left that open."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.images import Picture
from ..settings.train import TrainSettings


def chosen_prior(settings: TrainSettings, pictures: Sequence[Picture], *, has_class_pictures: bool) -> str:
    """What the setting `prior` stands for in a run; "auto" is the first of these that the pictures allow.

    Class pictures that were given are wanted. Without any, the base model is the teacher if it is known what each
    picture shows without the rare word; but not where all weights are trained, beside which it would take memory.

    Args:
        settings: Of the run.
        pictures: The subject's.
        has_class_pictures: Whether there are some of the class.
    """
    if settings.prior != "auto":
        return settings.prior
    if has_class_pictures:
        return "class-pictures"
    is_known = all(picture.class_captions for picture in pictures)
    return "model" if is_known and settings.adapter != "full" else "none"
