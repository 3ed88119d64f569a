"""A judge of the demo's pictures: a small network that is trained on drawings, and says which thing, coat and place.

The world's programs draw as many pictures as are wanted with known answers, so the judge is trained from a seed within
minutes. Half of its pictures went through the base's autoencoder, because everything that it judges comes from there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from palette import COLORS, jitter
from PIL import Image
from places import PLACES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from subjects import SUBJECTS, checks, hoops, spots
from things import THINGS, Pattern
from torch import Tensor, nn
from world import HATS, SUBJECT_COAT, WEARS_HAT, compose, dots, stripes

PLAIN = "plain"
OTHER = "other"
THING_NAMES = tuple(THINGS)
COAT_NAMES = (PLAIN, OTHER, *SUBJECTS)
PLACE_NAMES = tuple(PLACES)
HEADS = {"thing": THING_NAMES, "coat": COAT_NAMES, "place": PLACE_NAMES}
_PATTERNS = (stripes, dots, spots, hoops, checks)
_BATCH = 64
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class JudgeEffort:
    """How thoroughly the judge is trained.

    Attributes:
        drawings: Pictures to learn from; half of them go through the autoencoder.
        tested: Further pictures that it is tested on.
        epochs: How often it sees each.
    """

    drawings: int = 8000
    tested: int = 800
    epochs: int = 12


class JudgeNetwork(nn.Module):
    """Four convolutions and a linear layer for each question: (batch, 3, 64, 64) in [-1, 1] → logits of each head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], len(answers)) for name, answers in HEADS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits of each head, (batch, answers)."""
        features = self.trunk(pixels)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as (images, 3, height, width) in [-1, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])


def random_drawing(rng: random.Random) -> tuple[Image.Image, tuple[int, int, int]]:
    """A picture of any thing in any coat and place, and the indices of these in `HEADS`.

    The subjects' classes and coats come more often than others. Any thing may wear any coat, so that both must be seen.
    """
    thing = rng.choice(tuple(SUBJECTS) if rng.random() < 0.6 else THING_NAMES)
    place = rng.choice(PLACE_NAMES)
    coat = rng.choices(COAT_NAMES, (0.3, 0.3, *[0.1] * len(SUBJECTS)))[0]
    color = jitter(COLORS[rng.choice(list(COLORS))], rng)
    hat = rng.choice(HATS) if thing in WEARS_HAT and rng.random() < 0.15 else None
    pattern: Pattern | None = None
    if coat in SUBJECTS:
        pattern = SUBJECTS[coat].coat
        color = (0, 0, 0)
    elif coat == OTHER:
        pattern = _other_pattern(rng)
    picture = compose(thing, color, place, rng, pattern, hat)
    return picture, (THING_NAMES.index(thing), COAT_NAMES.index(coat), PLACE_NAMES.index(place))


def _other_pattern(rng: random.Random) -> Pattern:
    """A pattern in colours of chance, or the coat of the demo's own subject."""
    if rng.random() < 0.1:
        return SUBJECT_COAT
    first, second = ((rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)) for _ in range(2))
    return rng.choice(_PATTERNS)(first, second)


@torch.no_grad()
def through_autoencoder(vae: Any, pixels: Tensor) -> Tensor:
    """What is left of pictures after encoding and decoding, (images, 3, height, width) in [-1, 1]."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(_BATCH)]
    return torch.cat(parts)


class Judge:
    """A trained judge.

    Attributes:
        accuracy: What it got right of drawings that it had not seen; see `Judge.test`.
    """

    def __init__(self, network: JudgeNetwork, accuracy: dict[str, float]) -> None:
        self._network = network.eval()
        self.accuracy = accuracy

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Probability of every answer of each head, (images, answers)."""
        return {name: logits.softmax(dim=1) for name, logits in self._network(as_pixels(images)).items()}

    def shows(self, images: Sequence[Image.Image], thing: str, coat: str) -> Tensor:
        """Probability that a picture shows a thing in a coat, (images,)."""
        by_head = self.probabilities(images)
        return by_head["thing"][:, THING_NAMES.index(thing)] * by_head["coat"][:, COAT_NAMES.index(coat)]

    def is_in(self, images: Sequence[Image.Image], places: Sequence[str]) -> Tensor:
        """Probability that each picture shows the place that belongs to it, (images,)."""
        index = torch.tensor([[PLACE_NAMES.index(place)] for place in places])
        return self.probabilities(images)["place"].gather(1, index)[:, 0]


def load_or_train(file: Path, vae: Any, effort: JudgeEffort) -> Judge:
    """The judge that is kept in a file, or a new one, which is kept there."""
    network = JudgeNetwork()
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        accuracy = _train(network, vae, effort)
        save_file(network.state_dict(), file, {name: repr(value) for name, value in accuracy.items()})
    network.load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    return Judge(network, {name: float(value) for name, value in metadata.items()})


def _drawings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 64, 64) and their answers (count, heads)."""
    rng = random.Random(seed)
    drawn = [random_drawing(rng) for _ in range(count)]
    return as_pixels([picture for picture, _ in drawn]), torch.tensor([answers for _, answers in drawn])


def _train(network: JudgeNetwork, vae: Any, effort: JudgeEffort) -> dict[str, float]:
    torch.manual_seed(0)
    pixels, answers = _drawings(effort.drawings, seed=1)
    half = len(pixels) // 2
    pixels[:half] = through_autoencoder(vae, pixels[:half])
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    steps = effort.epochs * -(-len(pixels) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    network.train()
    for _ in range(effort.epochs):
        for rows in torch.randperm(len(pixels)).split(_BATCH):
            logits = network(_softened(pixels[rows]))
            losses = [
                nn.functional.cross_entropy(logits[name], answers[rows, column]) for column, name in enumerate(HEADS)
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    network.eval()
    return _test(network, vae, effort.tested)


def _softened(pixels: Tensor) -> Tensor:
    """Half of the pictures mirrored, and a little noise on all."""
    mirrored = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    return mirrored + 0.05 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)


@torch.no_grad()
def _test(network: JudgeNetwork, vae: Any, count: int) -> dict[str, float]:
    """Shares of right answers about drawings that were not trained on, as drawn and through the autoencoder.

    Returns:
        "thing", "coat" and "place"; "subject": of pictures of a subject, how many are recognised; "plain": of plain
        things of a subject's class, how many are taken for plain; "taken for a subject": of all others, how many are
        taken for any subject. With " decoded" the same through the autoencoder.
    """
    drawn, answers = _drawings(count, seed=2)
    things, coats, _ = answers.T
    own_coat = torch.tensor([COAT_NAMES.index(name) if name in SUBJECTS else -1 for name in THING_NAMES])
    shares: dict[str, float] = {}
    for suffix, pixels in (("", drawn), (" decoded", through_autoencoder(vae, drawn))):
        given = {name: logits.argmax(dim=1) for name, logits in network(pixels).items()}
        for column, name in enumerate(HEADS):
            shares[name + suffix] = _share(given[name] == answers[:, column])
        is_subject = coats == own_coat[things]
        is_plain = (coats == 0) & (own_coat[things] > 0)
        taken = given["coat"] == own_coat[given["thing"]]
        right = (given["thing"] == things) & (given["coat"] == coats)
        shares["subject" + suffix] = _share(right[is_subject])
        shares["plain" + suffix] = _share(right[is_plain])
        shares["taken for a subject" + suffix] = _share(taken[~is_subject])
    return shares


def _share(right: Tensor) -> float:
    return float(right.float().mean()) if len(right) else 0.0
