"""Trains the three models of the demo's Stable Diffusion: autoencoder, CLIP and denoiser.

Every function is seeded by a generator of its own; torch's global random state is left as it was.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from palette import SIZE
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer
from words import MAX_TOKENS, tokenize

LOG = logging.getLogger("demo")

SEED = 0
MIN_STEPS = 4
LOG_EVERY_STEPS = 100
KEEP_EVERY_STEPS = 200
WIDTH = 128
"""Width of CLIP's hidden states, of its projections and of the denoiser's cross-attention."""

KL_WEIGHT = 2e-7
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
HELD_OUT = 512


@dataclass(frozen=True)
class Phase:
    """How long and how fast a model is trained.

    Attributes:
        name: For the log.
        steps: Number of optimiser steps.
        batch_size: Pictures in a step.
        learning_rate: Its peak; it rises and falls as in OneCycleLR.
        warmup_share: Share of the steps after which the peak is reached, in (0, 1).
        beta2: AdamW's second decay rate.
        weight_decay: AdamW's weight decay.
        ema_decay: The model becomes an exponential average of its weights, with at most this decay per
            step; None keeps the last weights.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    warmup_share: float
    beta2: float = 0.99
    weight_decay: float = 0.01
    ema_decay: float | None = None

    def scaled(self, effort: float) -> "Phase":
        """Returns the same phase with `effort` times its steps, but at least `MIN_STEPS`."""
        return replace(self, steps=max(MIN_STEPS, round(effort * self.steps)))


VAE_FIRST = Phase("vae", steps=4200, batch_size=16, learning_rate=1.5e-3, warmup_share=0.06)
VAE_SECOND = Phase("vae, gentler", steps=2800, batch_size=16, learning_rate=1e-3, warmup_share=0.1, ema_decay=0.998)
CLIP = Phase("clip", steps=2200, batch_size=128, learning_rate=1e-3, warmup_share=0.1, beta2=0.98, weight_decay=0.05)
UNET = Phase("unet", steps=9000, batch_size=32, learning_rate=1e-3, warmup_share=0.05, ema_decay=0.999)


@contextmanager
def seeded_weights() -> Iterator[None]:
    """Seeds the initial weights of models built inside, which torch draws from its global state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _half_precision(device: torch.device) -> torch.autocast:
    """Computes in bfloat16, but on a CPU without it, which would be thirty times slower."""
    has_it = device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


def _to_pixels(pictures: Tensor, device: torch.device) -> Tensor:
    """Turns uint8 (batch, height, width, 3) into float32 (batch, 3, height, width) in [-1, 1]."""
    return pictures.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Interruptible:
    """What a training needs in order to go on where it was interrupted, with the same numbers.

    Attributes:
        state: File of its state, which is written every `KEEP_EVERY_STEPS` steps and read where it exists.
        generator: Source of the random numbers of `loss_at`.
        origin: What the training depends on; the state of another one is not read.
    """

    state: Path
    generator: torch.Generator
    origin: str

    def load(self, *parts: Any) -> int:
        """Puts everything back as it was, and returns the number of the next step; 0 without such a state."""
        kept = torch.load(self.state, weights_only=True) if self.state.exists() else {}
        if kept.get("origin") != self.origin:
            return 0
        for part, state in zip(parts, kept["parts"], strict=True):
            part.load_state_dict(state)
        self.generator.set_state(kept["generator"])
        return int(kept["step"])

    def save(self, step: int, *parts: Any) -> None:
        """Writes everything down; `step` is the number of the next step."""
        part_file = self.state.with_name(f"part-{self.state.name}")
        states = [part.state_dict() for part in parts]
        kept = {"origin": self.origin, "step": step, "parts": states, "generator": self.generator.get_state()}
        torch.save(kept, part_file)
        part_file.replace(self.state)


def train(
    model: nn.Module, phase: Phase, loss_at: Callable[[int], Tensor], interruptible: Interruptible | None = None
) -> None:
    """Minimises a loss.

    Args:
        model: Changed in place; left in evaluation mode and in torch's ordinary memory format.
        phase: How long and how fast; its weights must be averaged if the training is interruptible.
        loss_at: Given the number of the step, from 0, draws a batch and returns its loss, a scalar.
        interruptible: How to go on after an interruption; None: from the beginning.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, phase.beta2), weight_decay=phase.weight_decay
    )
    # OneCycleLR divides by the number of rising steps less one.
    warmup_share = max(phase.warmup_share, 2 / phase.steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.learning_rate, phase.steps, pct_start=warmup_share)
    average = None
    if phase.ema_decay is not None:
        average = EMAModel(model.parameters(), decay=phase.ema_decay, foreach=True)
    parts = (model, optimizer, schedule, average)
    first_step = interruptible.load(*parts) if interruptible else 0
    model.train()
    for step in range(first_step, phase.steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.step(model.parameters())
        if step % LOG_EVERY_STEPS == 0 or step == phase.steps - 1:
            LOG.info("%s: step %d of %d, loss %.4f", phase.name, step, phase.steps, loss.item())
        if interruptible and (step + 1) % KEEP_EVERY_STEPS == 0:
            interruptible.save(step + 1, *parts)
    if average is not None:
        average.copy_to(model.parameters())
    # Older versions of diffusers can't save weights in the channels-last format.
    model.to(memory_format=torch.contiguous_format).eval()


def train_vae(pictures: Tensor, patterned: Tensor, effort: float, device: torch.device) -> AutoencoderKL:
    """Trains the autoencoder in two phases, the second gentler and with an average of the weights.

    Args:
        pictures: Pictures of the world, uint8 (n, SIZE, SIZE, 3).
        patterned: Patterned and pixelated things, uint8 (n, SIZE, SIZE, 3).
        effort: Scales the number of steps.
        device: Where to train.

    Returns:
        The autoencoder, with the `scaling_factor` that gives its latents a standard deviation of 1.
    """
    with seeded_weights():
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=16,
            sample_size=SIZE,
        )
    vae.to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(SEED)

    def train_on(phase: Phase, data: Tensor, edge_weight: float, squared_weight: float) -> None:
        def loss_at(_step: int) -> Tensor:
            chosen = torch.randint(len(data), (phase.batch_size,), generator=generator)
            pixels = _to_pixels(data[chosen], device).contiguous(memory_format=torch.channels_last)
            return _reconstruction_loss(vae, pixels, generator, edge_weight, squared_weight)

        train(vae, phase.scaled(effort), loss_at)

    train_on(
        VAE_FIRST, torch.cat([pictures, patterned[: len(patterned) * 2 // 3]]), edge_weight=0.5, squared_weight=0.0
    )
    train_on(VAE_SECOND, torch.cat([pictures[: len(pictures) // 2], patterned]), edge_weight=0.3, squared_weight=1.0)
    scaling_factor = round(1 / encode_pictures(vae, pictures[:1024], device).std().item(), 5)
    vae.register_to_config(scaling_factor=scaling_factor)
    LOG.info("vae: scaling factor %.5f", scaling_factor)
    return vae


def _reconstruction_loss(
    vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator, edge_weight: float, squared_weight: float
) -> Tensor:
    """Absolute and squared error, the error of differences between neighbours, and a small KL divergence.

    Args:
        vae: Encodes and decodes.
        pixels: A batch in [-1, 1], (batch, 3, height, width).
        generator: Of the samples from the posterior.
        edge_weight: Weight of the differences between neighbouring pixels, which keeps edges sharp.
        squared_weight: Weight of the squared error.
    """
    with _half_precision(pixels.device):
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
    error = decoded.float() - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = posterior.kl().float().mean()
    return error.abs().mean() + squared_weight * error.square().mean() + edge_weight * edges + KL_WEIGHT * divergence


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, device: torch.device) -> Tensor:
    """Encodes uint8 pictures (n, SIZE, SIZE, 3) into the means of their latents, not scaled."""
    return torch.cat([vae.encode(_to_pixels(batch, device)).latent_dist.mean for batch in pictures.split(64)])


def train_clip(
    pictures: Tensor, captions: Sequence[str], tokenizer: CLIPTokenizer, effort: float, device: torch.device
) -> CLIPModel:
    """Trains a CLIP model on pictures and their captions.

    Its pictures are `pixel_values` in [-1, 1], (batch, 3, SIZE, SIZE). The last `HELD_OUT` pictures, or
    a quarter of them where there are few, are kept for the loss that is logged at the end.

    Args:
        pictures: Pictures of the world, uint8 (n, SIZE, SIZE, 3).
        captions: Their captions.
        tokenizer: The world's tokenizer.
        effort: Scales the number of steps.
        device: Where to train.
    """
    with seeded_weights():
        clip = CLIPModel(_clip_config(tokenizer)).to(device)
    tokens = tokenize(tokenizer, captions)
    number_by_caption = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    caption_numbers = torch.tensor([number_by_caption[caption] for caption in captions])
    training_count = len(pictures) - min(HELD_OUT, len(pictures) // 4)
    generator = torch.Generator().manual_seed(SEED)

    def loss_of(chosen: Tensor, noise_scale: float) -> Tensor:
        pixels = _to_pixels(pictures[chosen], device)
        noise = torch.randn(pixels.shape, generator=generator).to(device)
        with _half_precision(device):
            output = clip(input_ids=tokens[chosen].to(device), pixel_values=(pixels + noise_scale * noise).clamp(-1, 1))
        return _contrastive_loss(output.logits_per_image.float(), caption_numbers[chosen].to(device))

    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(training_count, (CLIP.batch_size,), generator=generator)
        return loss_of(chosen, noise_scale=0.05 if step % 2 else 0.0)

    train(clip, CLIP.scaled(effort), loss_at)
    with torch.no_grad():
        held_out = torch.arange(training_count, len(pictures))[: CLIP.batch_size]
        LOG.info("clip: loss on held-out pictures %.4f", loss_of(held_out, noise_scale=0.0).item())
    return clip


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    vision = {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
    return CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=WIDTH)


def _contrastive_loss(logits_per_image: Tensor, caption_numbers: Tensor) -> Tensor:
    """CLIP's symmetric loss, in which every pair with the same caption is a positive, since captions repeat.

    Args:
        logits_per_image: Scaled similarities, (batch, batch), a picture per row.
        caption_numbers: The same number for the same caption, (batch,).
    """
    same = (caption_numbers[:, None] == caption_numbers[None, :]).float()
    target = same / same.sum(dim=1, keepdim=True)
    per_image = -(target * logits_per_image.log_softmax(dim=1)).sum(dim=1).mean()
    per_text = -(target * logits_per_image.t().log_softmax(dim=1)).sum(dim=1).mean()
    return (per_image + per_text) / 2


def make_scheduler() -> DDPMScheduler:
    """Makes the noise schedule of Stable Diffusion 1.x: epsilon prediction, scaled-linear, 1000 steps."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_captions(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Encodes every different caption once.

    Returns:
        Embeddings of the empty caption and of all different captions, (1 + different, MAX_TOKENS, WIDTH),
        and for each caption the row of its embedding, (len(captions),).
    """
    different = sorted(set(captions))
    tokens = tokenize(tokenizer, ["", *different]).to(device)
    embeddings = torch.cat([text_encoder(batch).last_hidden_state for batch in tokens.split(256)])
    row_by_caption = {caption: row for row, caption in enumerate(different, start=1)}
    return embeddings, torch.tensor([row_by_caption[caption] for caption in captions])


def train_unet(
    latents: Tensor, embeddings: Tensor, rows: Tensor, effort: float, device: torch.device
) -> UNet2DConditionModel:
    """Trains the denoiser to predict noise, with min-SNR weights and an average of its weights.

    A tenth of the captions is dropped for classifier-free guidance. Min-SNR: https://arxiv.org/abs/2303.09556

    Args:
        latents: Scaled latents, (n, 4, height, width), on `device`.
        embeddings: Embeddings of captions, the empty one first, on `device`.
        rows: The row of each latent's caption in `embeddings`, (n,).
        effort: Scales the number of steps.
        device: Where to train.
    """
    with seeded_weights():
        unet = UNet2DConditionModel(
            sample_size=latents.shape[-1],
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=32,
        )
    unet.to(device, memory_format=torch.channels_last)
    scheduler = make_scheduler()
    generator = torch.Generator().manual_seed(SEED)
    batch = (UNET.batch_size,)

    def loss_at(_step: int) -> Tensor:
        chosen = torch.randint(len(latents), batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        condition = embeddings[torch.where(dropped, 0, rows[chosen]).to(device)]
        clean = latents[chosen.to(device)]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, batch, generator=generator).to(device)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with _half_precision(device):
            predicted = unet(noisy, timesteps, condition).sample
        snr = compute_snr(scheduler, timesteps)
        weights = snr.clamp(max=MIN_SNR_GAMMA) / snr
        return (weights * (predicted.float() - noise).square().mean(dim=(1, 2, 3))).mean()

    train(unet, UNET.scaled(effort), loss_at)
    return unet
