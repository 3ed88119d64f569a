"""The recipe learns its subject, and a batch is as good as its samples one after the other; see also the plain loop in
test_reference_families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEMO, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.data.images import load_pictures
from pack.trainer.models.open import open_base
from worlds import PROMPT, World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


def test_accumulation_equals_a_larger_batch(world: World, tmp_path: Path) -> None:
    # with other seeds one gradient may be so near zero that Adam makes its rounding visible
    changes: dict[str, Any] = {"seed": 3, "steps": 3, "learning_rate": 3e-3}
    both = world.with_priors(tmp_path / "class")
    together = both.train(tmp_path, first := Recorder(), **changes, batch_size=2)
    apart = both.train(tmp_path, second := Recorder(), **changes, gradient_accumulation=2)
    assert together.run != apart.run
    assert first.losses == pytest.approx(second.losses, rel=1e-4)
    for name, layer in together.adapter.layers.items():
        for part, tensor in layer.tensors().items():
            other = apart.adapter.layers[name].tensors()[part]
            assert torch.linalg.vector_norm(tensor - other) < 1e-3 * torch.linalg.vector_norm(other), (name, part)


def test_training_learns_the_subject(world: World, tmp_path: Path) -> None:
    """The denoising error on the subject, over fixed noise that training never drew, falls clearly."""
    base, pictures = open_base(DEMO / "base"), load_pictures(DEMO / "subject", PROMPT, Recorder())
    changes = {"steps": 60, "learning_rate": 1e-3, "rank": 8, "precision": "fp32"}
    result = replace(world, base=base, subject=pictures).train(tmp_path, **changes)
    model = base.family.build(base)
    for network in (model.denoiser, model.vae, *model.text_encoders.values()):
        torch.nn.Module.float(network)
    generator = torch.Generator().manual_seed(123)
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(np.array(p.open())).permute(2, 0, 1) / 127.5 - 1 for p in pictures])
        latents, _ = base.family.latents.encode(model.vae, pixels)
        latents = latents.repeat(4, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.arange(len(latents)) * 800 // len(latents) + 150
        noisy = model.objective.add_noise(latents, noise, timesteps)
        target = model.objective.target(latents, noise, timesteps)
        text = model.encode_prompts([PROMPT])["text"].expand(len(latents), -1, -1)

        def error() -> float:
            return F.mse_loss(model.predict(noisy, timesteps, {"text": text}), target).item()

        before = error()
        merge_into(model, result.adapter, 1.0)
        after = error()
    assert after < 0.8 * before
