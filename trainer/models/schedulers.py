"""Diffusers' samplers, configured for a model's own noise schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..settings.train import SchedulerName

MIN_ALPHA = 4.9e-8  # remaining signal at a zero terminal SNR, so that no scheduler divides by zero


def discrete_scheduler(name: SchedulerName, alphas_cumprod: Tensor, prediction_type: str) -> Any:
    """A diffusers scheduler on a discrete noise schedule, configured as Stable Diffusion's pipelines are.

    Args:
        name: "ddim" (Song et al. 2021), "pndm" (Liu et al. 2022), "euler" (Karras et al. 2022, algorithm 2
            without churn) or "dpm++" (Lu et al. 2022, DPM-Solver++(2M)).
        alphas_cumprod: The schedule, (timesteps,).
        prediction_type: "epsilon" or "v_prediction".
    """
    import diffusers

    alphas = alphas_cumprod.double().cpu()
    zero_snr = bool(alphas[-1] < MIN_ALPHA)
    alphas = alphas.clamp(min=MIN_ALPHA)
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    common = {
        "num_train_timesteps": len(alphas_cumprod),
        "trained_betas": betas.numpy(),
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing" if zero_snr else "leading",  # the first step must see pure noise
        "steps_offset": 1,
    }
    if name == "ddim":
        return diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False)
    if name == "pndm":
        return diffusers.PNDMScheduler(**common, skip_prk_steps=True, set_alpha_to_one=False)
    if name == "euler":
        return diffusers.EulerDiscreteScheduler(**common)
    return diffusers.DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++")


def flow_dpm_solver(mu: float, steps: int, device: torch.device) -> Any:
    """DPM-Solver++(2M) of diffusers for rectified flow, with its timesteps set.

    Args:
        mu: μ of the noise levels' shift; see `flow.shifted`.
        steps: Denoising steps.
        device: Of its timesteps.
    """
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=math.exp(mu),
    )
    scheduler.set_timesteps(steps, device=device)
    return scheduler
