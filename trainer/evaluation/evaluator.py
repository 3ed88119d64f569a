"""How good an adapter is: pictures of the subject and of its class, drawn with it and measured.

Fidelity, prompt following and prior drift (Ruiz et al. 2023, section 4), on pictures from the same noise for every
adapter, so that differences are the adapters' own.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import PicturesError, SettingsError
from ..core.events import Listener
from ..core.prompts import without_token
from ..data.images import Picture
from .feature_extractors import CLIP, DINO, FeatureExtractors
from .generator import Adapters, CachedGenerator, Drawing
from .metrics import clip_score, clip_t, diversity, drift, own_score, subject_score

FIDELITY = {CLIP: "CLIP-I", DINO: "DINO"}  # judge → what it measures against the subject's pictures
DRIFT = {CLIP: "drift (CLIP)", DINO: "drift (DINO)"}
FOLLOWING, CLIP_SCORE, DIVERSITY, CLASS_DIVERSITY = "CLIP-T", "CLIPScore", "diversity", "class diversity"
_AS_GOOD = 0.01  # differences of a hundredth are the noise of a few pictures


@dataclass(frozen=True)
class Evaluated:
    """One adapter, or the base alone.

    Attributes:
        marks: Measure → value.
        by_prompt: The measures of single pictures again, as means for each prompt.
        pictures: Of the subject, prompt by prompt.
        class_pictures: Of the class, likewise; empty if they were not drawn.
    """

    marks: Mapping[str, float]
    by_prompt: Sequence[Mapping[str, float]]
    pictures: Sequence[Picture]
    class_pictures: Sequence[Picture]


class Evaluation:
    """Prompts and a way to draw them, the subject's pictures, and the judges."""

    def __init__(
        self,
        judges: FeatureExtractors,
        references: Sequence[Picture],
        prompts: Sequence[str],
        token: str,
        listener: Listener,
    ) -> None:
        """Take what all adapters are measured by.

        Args:
            judges: The models.
            references: Real pictures of the subject.
            prompts: Of the subject, with its rare word.
            token: The rare word. CLIP-T and the class pictures leave it out, since CLIP does not know it.
            listener: Told of the progress; may stop the work.

        Raises:
            SettingsError: There is no prompt, or one holds the same words without the rare word.
            PicturesError: There is no picture of the subject.
        """
        if not prompts:
            raise SettingsError("There is no prompt to draw.", "Give one or more, separated by '|'.")
        if not references:
            raise PicturesError("There are no pictures of the subject to compare with.", "Give its folder.")
        self.judges, self.references, self.listener = judges, list(references), listener
        self.prompts, self.class_prompts = list(prompts), [without_token(prompt, token) for prompt in prompts]
        same = [prompt for prompt, plain in zip(self.prompts, self.class_prompts, strict=True) if prompt == plain]
        if same:
            raise SettingsError(
                f"The prompt '{same[0]}' does not hold the rare word '{token}', so it draws no subject.",
                "Write the rare word into every prompt, or set token to the one that the adapter was taught.",
            )

    def draw_and_mark(
        self, studio: CachedGenerator, adapters: Adapters, drawing: Drawing, title: str, *, prior: bool = True
    ) -> Evaluated:
        """Draw the subject and its class with adapters, and measure; the base's class pictures are drawn, too.

        Args:
            studio: Where to draw.
            adapters: Applied to the base; none: the base alone.
            drawing: How to draw.
            title: What the progress is called.
            prior: Whether the class is drawn, with and without the adapters, to measure the drift.
        """
        plain = self.class_prompts
        before = studio.draw([], plain, drawing, "class pictures of the base") if prior else []
        pictures = studio.draw(adapters, self.prompts, drawing, title)
        after = studio.draw(adapters, plain, drawing, f"{title}, class") if prior else []
        marks = self.mark(pictures, before, after)
        return Evaluated(marks, self.by_prompt(pictures), pictures, after)

    def mark(
        self, pictures: Sequence[Picture], before: Sequence[Picture], after: Sequence[Picture]
    ) -> dict[str, float]:
        """Measure pictures.

        Args:
            pictures: Of the subject, prompt by prompt, the same number of each.
            before: Of the class, drawn without the adapter; may be empty.
            after: Of the class, drawn with it from the same noise; in the same order.

        Returns:
            Measure → mean over the pictures; diversities are means over the prompts.
        """
        each = len(pictures) // len(self.prompts)
        self.judges.look([*pictures, *before, *after, *self.references], self.listener)  # all at once is fastest
        marks = {name: float(values.mean()) for name, values in self._columns(pictures).items()}
        first = DINO if DINO in self.judges.models else CLIP
        if before:
            plain, plain_after = (self.judges.look(drawn, self.listener) for drawn in (before, after))
            marks |= {DRIFT[name]: drift(plain[name], plain_after[name]) for name in plain}
        if each > 1:
            for title, drawn in ((DIVERSITY, pictures), (CLASS_DIVERSITY, after)):
                if drawn:
                    rows = self.judges.look(drawn, self.listener)[first]
                    marks[title] = statistics.mean(diversity(part) for part in torch.split(rows, each))
        return marks

    def by_prompt(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Measures of single pictures as means over those of each prompt, in the order of the prompts."""
        each, columns = len(pictures) // len(self.prompts), self._columns(pictures)
        return [
            {name: float(values[start : start + each].mean()) for name, values in columns.items()}
            for start in range(0, len(pictures), each)
        ]

    def _columns(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Measure → one value for each picture of the subject."""
        each = len(pictures) // len(self.prompts)
        seen, real = (self.judges.look(some, self.listener) for some in (pictures, self.references))
        columns: dict[str, Tensor] = {}
        if self.judges.reads_text:
            said = self.judges.read([plain for plain in self.class_prompts for _ in range(each)])
            columns = {FOLLOWING: clip_t(seen[CLIP], said), CLIP_SCORE: clip_score(seen[CLIP], said)}
        return columns | {FIDELITY[name]: subject_score(seen[name], real[name]) for name in seen}

    def real(self) -> dict[str, float]:
        """The subject's pictures among themselves, each left out of its own score: the top of the scale."""
        if len(self.references) < 2:
            return {}
        seen = self.judges.look(self.references, self.listener)
        return {FIDELITY[name]: own_score(features) for name, features in seen.items()}


def fidelity_and_drift(marks: Mapping[str, float]) -> tuple[float, float]:
    """The paper's first choice: by DINO if it judged, else by CLIP. Without class pictures no drift is known: 0."""
    judge = DINO if FIDELITY[DINO] in marks else CLIP
    return marks[FIDELITY[judge]], marks.get(DRIFT[judge], 0.0)


def balance(marks: Mapping[str, float]) -> float:
    """Geometric mean of fidelity and prompt following, fidelity counting twice: it is what the training is for.

    What gains one by losing the other gains nothing, and unlike a sum it does not depend on the measures' scales.
    Without CLIP-T it is the fidelity.
    """
    fidelity = max(0.0, fidelity_and_drift(marks)[0])
    return (fidelity**2 * max(0.0, marks[FOLLOWING])) ** (1 / 3) if FOLLOWING in marks else fidelity


def best_of(marks: Sequence[Mapping[str, float]]) -> int:
    """Which of several to keep: of those whose `balance` is as good as the best, the one that drifts least.

    Args:
        marks: One at least, as `Evaluation.mark` gives them.

    Returns:
        Its place in `marks`.
    """
    found = [balance(one) for one in marks]
    good = [place for place, value in enumerate(found) if value >= (1 - _AS_GOOD) * max(found)]
    return min(good, key=lambda place: fidelity_and_drift(marks[place])[1])


def peak(history: Mapping[int, Mapping[str, float]]) -> int:
    """Step of the highest fidelity after the first step; 0 if there is none."""
    return max((step for step in history if step), key=lambda step: fidelity_and_drift(history[step])[0], default=0)


def stalled(history: Mapping[int, Mapping[str, float]], patience: int) -> int | None:
    """Step to go back to, if since then fidelity has not risen while the prior drifted on; else None.

    Args:
        history: Step → marks.
        patience: How many previews must have come since.
    """
    best = peak(history)
    since = sorted(step for step in history if step > best)
    if len(since) < patience or not best:
        return None
    return best if fidelity_and_drift(history[since[-1]])[1] > fidelity_and_drift(history[best])[1] else None
