"""The recipe with every family and trained text encoders against a plain loop of diffusers, PEFT and torch.

T-LoRA and its orthogonal start are against the formulas that their authors publish.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapter_maths import rotated
from cases import mostly_slow
from checkpoints_folders import diffusers_folder
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from helpers import DEMO, Recorder
from pack.trainer.adapters.embeddings import words_of
from pack.trainer.adapters.module_paths import canonical_path
from pack.trainer.core.seeding import Draw, draw_sample
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from pack.trainer.training.runs.folder import RunPaths
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytestmark = pytest.mark.usefixtures("quick")

STEPS = 4  # every day; twice as many in the slow ones
SIDE = 64
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MLP = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
RESIDUAL = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
TARGETS = {"attention": ATTENTION, "attention-mlp": MLP, "all": [*MLP, *RESIDUAL]}
SELF_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
TEXT_TARGETS = {"attention": SELF_ATTENTION, "attention-mlp": [*SELF_ATTENTION, "fc1", "fc2"]}
TEXT_TARGETS["all"] = TEXT_TARGETS["attention-mlp"]
# Widths and heights; scaled to cover a square of 64, all sides are whole numbers, so that there is one way to round.
SIZES = [(96, 64), (128, 192), (160, 128), (256, 256)]
CAPTIONS = ["photo of sks dog", "picture of sks dog in the snow", "sks dog by night", "sks dog"]


@dataclass
class Case:
    """A model and what is trained on it."""

    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    prior: bool = False
    clip_skip: int = 0
    within: float = 1e-4  # of all losses


CASES = {
    "sd1, rank-stabilised convolutions": Case(
        "sd1", {"targets": "all", "rank": 4, "alpha": 2.0, "rank_stabilized": True}
    ),
    "sd1, prior, accumulation 2, tight clip": Case(
        "sd1",
        {
            "targets": "attention-mlp",
            "rank": 4,
            "alpha": 1.0,
            "prior_weight": 0.5,
            "gradient_accumulation": 2,
            "max_grad_norm": 0.01,
            "weight_decay": 0.5,
        },
        prior=True,
    ),
    "sd1, prior, batch 2, flip, no clip": Case(
        "sd1",
        {
            "targets": "attention",
            "rank": 4,
            "prior_weight": 2.0,
            "batch_size": 2,
            "flip": True,
            "max_grad_norm": 0.0,
        },
        prior=True,
    ),
    "sd1, OFT of convolutions and text encoder, limited": Case(
        "sd1",
        {"adapter": "oft", "targets": "all", "rank": 8, "text_encoder_lr": 1e-3, "max_norm": 0.05},
    ),
    "sd1, BOFT, prior": Case("sd1", {"adapter": "boft", "targets": "attention-mlp", "rank": 8}, prior=True),
    "sdxl, BOFT of convolutions": Case(
        "sdxl",
        {"adapter": "boft", "targets": "all", "exclude": "time_emb_proj", "rank": 8, "text_encoder_2_lr": 1e-3},
    ),
    "sd2": Case("sd2", {"targets": "attention-mlp", "rank": 2}),
    "sd2-v, prior, accumulation 2, flip": Case(
        "sd2-v",
        {"targets": "attention", "rank": 4, "alpha": 8.0, "gradient_accumulation": 2, "flip": True},
        prior=True,
    ),
    "sd2-v ztsnr, convolutions": Case("sd2-v-ztsnr", {"targets": "all", "rank": 4, "batch_size": 2}),
    "sdxl, prior, accumulation 2, flip": Case(
        "sdxl",
        {"targets": "attention-mlp", "rank": 4, "gradient_accumulation": 2, "prior_weight": 0.5, "flip": True},
        prior=True,
    ),
    # where every channel is normalised alone, what the timestep adds to it has no gradient but rounding
    "sdxl-v ztsnr, convolutions, clip skip 1": Case(
        "sdxl-v-ztsnr", {"targets": "all", "exclude": "time_emb_proj", "rank": 4}, clip_skip=1
    ),
    "sd1, text encoder, prior, until a half": Case(
        "sd1",
        {"targets": "attention", "rank": 4, "text_encoder_lr": 2e-3, "text_encoder_until": 0.5},
        prior=True,
    ),
    "sd1, text encoder, clip skip 2": Case(
        "sd1", {"targets": "attention-mlp", "rank": 4, "text_encoder_lr": 1e-3}, clip_skip=2
    ),
    "sd2-v, text encoder, until a half": Case(
        "sd2-v", {"targets": "attention-mlp", "rank": 4, "text_encoder_lr": 1e-3, "text_encoder_until": 0.5}
    ),
    "sdxl, both text encoders, prior, batch 2, tight clip": Case(
        "sdxl",
        {
            "targets": "attention-mlp",
            "rank": 4,
            "text_encoder_lr": 1e-3,
            "text_encoder_2_lr": 4e-4,
            "batch_size": 2,
            "max_grad_norm": 0.01,
            "weight_decay": 0.5,
        },
        prior=True,
    ),
    "sdxl, both text encoders, until a half, accumulation 2": Case(
        "sdxl",
        {
            "targets": "attention",
            "rank": 4,
            "alpha": 2.0,
            "text_encoder_lr": 4e-4,
            "text_encoder_2_lr": 1e-3,
            "text_encoder_until": 0.5,
            "gradient_accumulation": 2,
        },
    ),
    "sd1, T-LoRA, convolutions, prior, batch 2, text encoder": Case(
        "sd1",
        {
            "targets": "all",
            "rank": 4,
            "alpha": 2.0,
            "rank_schedule": "timestep",
            "min_rank": 1,
            "batch_size": 2,
            "text_encoder_lr": 1e-3,
        },
        prior=True,
        within=1e-5,
    ),
    "sd1, T-LoRA, orthogonal, prior, accumulation 2": Case(
        "sd1",
        {
            "targets": "attention-mlp",
            "rank": 4,
            "alpha": 2.0,
            "rank_schedule": "timestep",
            "min_rank": 1,
            "rank_power": 0.5,
            "lora_init": "orthogonal",
            "gradient_accumulation": 2,
        },
        prior=True,
        within=1e-5,
    ),
    "sdxl, orthogonal, convolutions, text encoders": Case(
        "sdxl",
        {
            "targets": "all",
            "exclude": "time_emb_proj",
            "rank": 4,
            "lora_init": "orthogonal",
            "text_encoder_lr": 1e-3,
            "text_encoder_2_lr": 1e-3,
        },
        within=1e-5,
    ),
    "sd1, a word of two vectors, prior, until a half": Case(
        "sd1",
        {"targets": "attention", "rank": 4, "token_vectors": 2, "token_lr": 3e-3, "token_start": "red dog"},
        prior=True,
    ),
    "sd1, a word of three vectors, trained text encoder, clip skip 2, tight clip": Case(
        "sd1",
        {
            "targets": "attention",
            "rank": 4,
            "token_vectors": 3,
            "token_lr": 2e-3,
            "token_until": 0.75,
            "text_encoder_lr": 1e-3,
            "text_encoder_until": 0.5,
            "max_grad_norm": 0.01,
        },
        clip_skip=2,
    ),
    "sd2, a word of one vector": Case(
        "sd2", {"targets": "attention", "rank": 4, "token_vectors": 1, "token_lr": 3e-3, "token_until": 1.0}
    ),
    "sdxl, a word of two vectors, prior, accumulation 2, weight decay": Case(
        "sdxl",
        {
            "targets": "attention",
            "rank": 4,
            "token_vectors": 2,
            "token_lr": 3e-3,
            "token_until": 1.0,
            "gradient_accumulation": 2,
            "weight_decay": 0.5,
        },
        prior=True,
    ),
    "sdxl, a word, the second text encoder trained longer": Case(
        "sdxl",
        {"targets": "attention", "rank": 4, "token_vectors": 1, "token_lr": 3e-3, "text_encoder_2_lr": 1e-3},
    ),
    "sd1, the base's predictions, with further prompts": Case(
        "sd1",
        {
            "targets": "attention",
            "rank": 4,
            "prior": "model",
            "prior_weight": 2.0,
            "prior_prompts": "a cat | a house",
            "prior_empty": 0.3,
            "batch_size": 2,
            "flip": True,
        },
    ),
    "sd2-v, the base's predictions every third step": Case(
        "sd2-v",
        {"targets": "attention-mlp", "rank": 4, "prior": "model", "prior_every": 3, "gradient_accumulation": 2},
    ),
    "sdxl, the base's predictions, both text encoders until a half": Case(
        "sdxl",
        {
            "targets": "attention",
            "rank": 4,
            "prior": "model",
            "text_encoder_lr": 4e-4,
            "text_encoder_2_lr": 1e-3,
            "text_encoder_until": 0.5,
        },
    ),
    "sd1, direct consistency, text encoder, prior": Case(
        "sd1", {"targets": "attention", "rank": 4, "dco_beta": 100.0, "text_encoder_lr": 1e-3}, prior=True
    ),
    "sd1, penalty on the weights, convolutions": Case(
        "sd1", {"targets": "all", "rank": 4, "alpha": 2.0, "weight_penalty": 0.1, "gradient_accumulation": 2}
    ),
    "sdxl, the second text encoder alone": Case(
        "sdxl", {"targets": "attention", "rank": 4, "text_encoder_2_lr": 1e-3, "flip": True}
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    folders = {
        f"{family}{mark}": diffusers_folder(root / f"{family}{mark}", family, velocity="v" in mark, ztsnr="z" in mark)
        for family in ("sd2", "sdxl")
        for mark in ("", "-v", "-v-ztsnr")
        if (family, mark) != ("sdxl", "-v")
    }
    return {**folders, "sd1": DEMO / "base"}


def pictures_in(folder: Path, sizes: Sequence[tuple[int, int]], captions: Sequence[str], seed: int) -> list[Picture]:
    """Pictures of coarse noise, so that cropping elsewhere would give other latents, each with a caption."""
    folder.mkdir()
    source = np.random.default_rng(seed)
    for number, (size, caption) in enumerate(zip(sizes, captions, strict=True)):
        noise = Image.fromarray(source.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BILINEAR).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return load_pictures(folder, "unused", Recorder(), AnnotationOptions(token="sks"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    return pictures_in(tmp_path_factory.mktemp("pictures") / "subject", SIZES, CAPTIONS, 0)


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    sizes = [(64, 64), (192, 128), (64, 64)]
    return pictures_in(tmp_path_factory.mktemp("pictures") / "class", sizes, ["photo of the dog"] * 3, 1)


class AuthorsLayer(nn.Module):
    """One module with a LoRA as the authors of T-LoRA write it: B · S · M · A - B₀ · S₀ · M · A₀, or B · M · A.

    The mask M is one for the whole batch, so the samples of a batch are computed one after the other.
    """

    def __init__(self, base: Any, parts: dict[str, Tensor], scale: float, orthogonal: bool) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b, self.s = (nn.Parameter(part.clone()) for part in parts.values())
        self.s.requires_grad_(orthogonal)
        self.start = [part.clone() for part in parts.values()] if orthogonal else None
        self.mask = torch.ones(len(self.a))

    def forward(self, x: Tensor) -> Tensor:
        change = self._product(x, self.a, self.b, self.s)
        if self.start is not None:
            change = change - self._product(x, *self.start)
        result: Tensor = self.base(x) + self.scale * change
        return result

    def _product(self, x: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        if isinstance(self.base, nn.Conv2d):
            hidden = F.conv2d(x, a, stride=self.base.stride, padding=self.base.padding)
            return F.conv2d(hidden * (s * self.mask).view(1, -1, 1, 1), b)
        return (x @ a.T * s * self.mask) @ b.T


def mask_by_timestep(timestep: int, settings: TrainSettings) -> Tensor:
    """As the authors' `get_mask_by_timestep` has it."""
    growth = ((1000 - timestep) / 1000) ** settings.rank_power
    active = int(growth * (settings.rank - settings.min_rank)) + settings.min_rank
    mask = torch.zeros(settings.rank)
    mask[:active] = 1.0
    return mask


class PlainRotation(nn.Module):
    """A weight whose rows are turned by matrices; see `adapter_maths.rotated`."""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.blocks = nn.Parameter(torch.zeros_like(blocks))

    def forward(self, weight: Tensor) -> Tensor:
        return rotated({"oft_blocks": self.blocks.double()}, 0.0, weight.double()).float()

    @torch.no_grad()
    def limit(self, norm: float) -> None:
        skew = self.blocks - self.blocks.mT
        self.blocks.mul_(norm / max(norm, float(skew.norm())))


class PlainTrainer:
    """The networks as diffusers loads them, with LoRA by PEFT or rotated weights; steps as in diffusers' examples."""

    def __init__(self, folder: Path, settings: TrainSettings, clip_skip: int, pictures: Sequence[Picture]) -> None:
        self.pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True).to(torch.float32)
        self.settings, self.clip_skip = settings, clip_skip
        self.is_xl = hasattr(self.pipe, "text_encoder_2")
        self.noise_scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.networks: dict[str, nn.Module] = {"unet": self.pipe.unet, "text_encoder": self.pipe.text_encoder}
        if self.is_xl:
            self.networks["text_encoder_2"] = self.pipe.text_encoder_2
        for network in (self.pipe.vae, *self.networks.values()):
            network.requires_grad_(False)
        with torch.no_grad():
            self.posteriors = {
                (picture.digest, flip): self._posterior(picture, flip) for picture in pictures for flip in (False, True)
            }
        self.base = copy.deepcopy(self.pipe)
        self.latent_shape = next(iter(self.posteriors.values()))[0].shape[1:]
        self.rates = {"unet": settings.learning_rate, **settings.text_encoder_rates}
        self.learned: dict[str, nn.Parameter] = {}
        self.lora: dict[str, Any] = {}
        self.rotations: dict[str, PlainRotation] = {}

    def add_words(self) -> None:
        """New tokens at the end of the vocabulary, of which the word consists; as textual inversion adds them."""
        settings = self.settings
        names = [f"<s{number}>" for number in range(settings.token_vectors)]
        for component, network in self.networks.items():
            if component == "unet" or not names:
                continue
            tokenizer = getattr(self.pipe, component.replace("text_encoder", "tokenizer"))
            ids = tokenizer(settings.token_start or "sks", add_special_tokens=False).input_ids
            assert tokenizer.add_tokens(names) == len(names)
            text_model: Any = getattr(network, "text_model", network)
            text_model.eos_token_id = tokenizer.eos_token_id  # else the last of the vocabulary is taken for the end
            embedding = text_model.embeddings.token_embedding
            old = embedding.weight.detach().clone()
            rows = nn.Parameter(old[[ids[number % len(ids)] for number in range(len(names))]].clone())
            embedding.forward = lambda ids, old=old, rows=rows: F.embedding(ids, torch.cat([old, rows]))
            self.learned[component] = rows

    def caption(self, picture: Picture) -> str:
        """What a text encoder reads in place of the picture's caption."""
        new = "".join(f"<s{number}>" for number in range(self.settings.token_vectors))
        return picture.caption.replace("sks", new) if new else picture.caption

    def _posterior(self, picture: Picture, flip: bool) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.array(centre(picture.open()))).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = self.pipe.vae.encode(pixels.flip(-1) if flip else pixels).latent_dist
        factor = self.pipe.vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor

    def add_lora(self, start: TrainableAdapter) -> None:
        """LoRA on the modules that kohya and diffusers train, from the recipe's start."""
        settings, wanted = self.settings, {}
        for component in self.rates:
            targets = (TARGETS if component == "unet" else TEXT_TARGETS)[settings.targets]
            config = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha or settings.rank,
                target_modules=[name for name in targets if name != settings.exclude],
                use_rslora=settings.rank_stabilized,
            )
            network = inject_adapter_in_model(config, self.networks[component])
            wanted |= {
                (component, canonical_path(component, path)): module
                for path, module in network.named_modules()
                if hasattr(module, "lora_A")
            }
        layers = start.adapter().layers
        self.lora = {name: wanted.pop((one.target.component, one.target.path)) for name, one in start.layers.items()}
        assert not wanted
        if settings.rank_schedule != "constant" or settings.lora_init != "default":
            self._as_authors(start)
            return
        with torch.no_grad():
            for name, module in self.lora.items():
                module.lora_A["default"].weight.copy_(layers[name].down)
                module.lora_B["default"].weight.copy_(layers[name].up)

    def _as_authors(self, start: TrainableAdapter) -> None:
        """Put the authors' layers where PEFT has put its own."""
        places = {
            id(module): (component, path)
            for component, network in self.networks.items()
            for path, module in network.named_modules()
        }
        for name, module in self.lora.items():
            component, path = places[id(module)]
            parts = {suffix: part.detach() for suffix, part in start.layers[name].parameters.items()}
            parts.setdefault("singular_values", torch.ones(self.settings.rank))
            scale = (self.settings.alpha or self.settings.rank) / self.settings.rank
            orthogonal = self.settings.lora_init == "orthogonal"
            parent, _, own_name = path.rpartition(".")
            self.lora[name] = AuthorsLayer(module.base_layer, parts, scale, orthogonal)
            setattr(self.networks[component].get_submodule(parent), own_name, self.lora[name])

    def add_rotations(self, start: TrainableAdapter) -> None:
        """Turned weights of the same modules."""
        layers = start.adapter().layers
        names = {(one.target.component, one.target.path): name for name, one in start.layers.items()}
        for component in self.rates:
            targets = set((TARGETS if component == "unet" else TEXT_TARGETS)[self.settings.targets])
            targets.discard(self.settings.exclude)
            for path, module in list(self.networks[component].named_modules()):
                if any(f".{path}".endswith(f".{target}") for target in targets):
                    name = names.pop((component, canonical_path(component, path)))
                    self.rotations[name] = PlainRotation(layers[name].tensors()["oft_blocks"])
                    parametrize.register_parametrization(module, "weight", self.rotations[name])
        assert not names

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, each network's own rate."""
        return [
            {"params": [p for p in self.networks[component].parameters() if p.requires_grad], "lr": rate}
            for component, rate in self.rates.items()
        ] + [{"params": list(self.learned.values()), "lr": self.settings.token_lr}] * bool(self.learned)

    def conditions(
        self, pipe: Any, pictures: Sequence[Picture], captions: list[str]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Text, and for SDXL pooled text and time ids, as `train_dreambooth_lora_sdxl.py` makes them."""
        options: dict[str, Any] = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "device": "cpu"}
        if not self.is_xl:
            if self.clip_skip:
                return self._skipped(captions), None
            return pipe.encode_prompt(captions, **options)[0], None
        if self.clip_skip:  # diffusers counts the layers to leave out beyond the one that it always leaves out
            options["clip_skip"] = self.clip_skip - 2
        text, _, pooled, _ = pipe.encode_prompt(captions, **options)
        sizes = torch.tensor([time_ids(picture.open().size) for picture in pictures])
        return text, {"text_embeds": pooled, "time_ids": sizes}

    def _skipped(self, captions: list[str]) -> Tensor:
        """An earlier layer with the final layer norm; diffusers' pipeline can't with every version of transformers."""
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        ids = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        states = encoder(ids.input_ids, output_hidden_states=True).hidden_states
        skipped: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(states[-self.clip_skip])
        return skipped

    def predicted(self, pipe: Any, noisy: Tensor, timesteps: Tensor, *prompts: Any) -> Tensor:
        text, added = self.conditions(pipe, *prompts)
        if pipe is self.pipe and self.settings.rank_schedule == "timestep":
            rows = range(len(noisy))
            return torch.cat([self._masked_prediction(noisy[[row]], int(timesteps[row]), text[[row]]) for row in rows])
        prediction: Tensor = pipe.unet(noisy, timesteps, text, added_cond_kwargs=added).sample
        return prediction

    def samples(self, draws: Sequence[Draw], pictures: Sequence[Picture]) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, and what the denoiser should predict."""
        rows = []
        for drawn in draws:
            mean, std = self.posteriors[pictures[drawn.item].digest, drawn.flip]
            rows.append(mean + std * drawn.posterior_noise)
        latents = torch.cat(rows)
        noise = torch.stack([drawn.noise for drawn in draws])
        timesteps = torch.tensor([drawn.timestep for drawn in draws])
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            return noisy, timesteps, self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noisy, timesteps, noise

    def loss(self, draws: Sequence[Draw], pictures: Sequence[Picture]) -> Tensor:
        """The mean squared error of one set's samples."""
        noisy, timesteps, target = self.samples(draws, pictures)
        chosen = [pictures[drawn.item] for drawn in draws]
        return F.mse_loss(self.predicted(self.pipe, noisy, timesteps, chosen, self.captions(chosen)), target)

    def consistency_loss(self, draws: Sequence[Draw], pictures: Sequence[Picture]) -> Tensor:
        """Direct consistency optimisation as the authors' code has it, of one sample; scaled, and moved, as ours is."""
        [drawn] = draws
        noisy, timesteps, target = self.samples(draws, pictures)
        chosen = [pictures[drawn.item]]
        loss_model = F.mse_loss(self.predicted(self.pipe, noisy, timesteps, chosen, self.captions(chosen)), target)
        with torch.no_grad():
            loss_refer = F.mse_loss(self.predicted(self.base, noisy, timesteps, chosen, self.captions(chosen)), target)
        beta = self.settings.dco_beta
        loss = -1 * torch.nn.functional.logsigmoid(-1 * beta * (loss_model - loss_refer))
        return (loss - np.log(2)) * 2 / beta + loss_refer

    def preservation_loss(self, step: int, micro: int, pictures: Sequence[Picture]) -> Tensor:
        """Where eight steps of DDIM by the base lead from noise, with prompts of the class, it is the teacher."""
        settings = self.settings
        number, position = divmod(step // settings.prior_every + micro * 8 // settings.gradient_accumulation, 8)
        draws = draws_of(self, "preserved", number, micro, len(pictures))
        chosen = [pictures[drawn.item] for drawn in draws]
        prompts = []
        for drawn in draws:
            words = [pictures[drawn.item].caption.replace("of sks", "of a").replace("sks ", ""), "a cat", "a house"]
            known = words if settings.prior_prompts else words[:1]
            prompts.append("" if drawn.drop < settings.prior_empty else known[int(drawn.caption * len(known))])
        noisy = torch.stack([drawn.noise for drawn in draws])
        steps = [
            torch.tensor([int(125 * (7 - place + drawn.timestep_fraction)) for drawn in draws]) for place in range(8)
        ]
        alphas = self.noise_scheduler.alphas_cumprod
        with torch.no_grad():
            for place in range(position):
                prediction = self.predicted(self.base, noisy, steps[place], chosen, prompts)
                alpha, following = (alphas[steps[at]].view(-1, 1, 1, 1) for at in (place, place + 1))
                if self.noise_scheduler.config.prediction_type == "v_prediction":
                    latents = alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
                    noise = alpha.sqrt() * prediction + (1 - alpha).sqrt() * noisy
                else:
                    latents = (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
                    noise = prediction
                noisy = following.sqrt() * latents + (1 - following).sqrt() * noise
            target = self.predicted(self.base, noisy, steps[position], chosen, prompts)
        return F.mse_loss(self.predicted(self.pipe, noisy, steps[position], chosen, prompts), target)

    def _masked_prediction(self, noisy: Tensor, timestep: int, text: Tensor) -> Tensor:
        for module in self.pipe.unet.modules():
            if isinstance(module, AuthorsLayer):
                module.mask = mask_by_timestep(timestep, self.settings)
        predicted: Tensor = self.pipe.unet(noisy, torch.tensor([timestep]), text).sample
        return predicted

    def captions(self, pictures: Sequence[Picture]) -> list[str]:
        return [self.caption(picture) for picture in pictures]

    def squared_change(self) -> Tensor:
        """Of all weights, by the products that LoRA stands for."""
        squares = []
        for module in self.lora.values():
            down, up = module.lora_A["default"].weight.flatten(1), module.lora_B["default"].weight.flatten(1)
            squares.append((up @ down * module.scaling["default"]).square().sum())
        return torch.stack(squares).sum()


def centre(image: Image.Image) -> Image.Image:
    """The largest square in the middle, scaled."""
    short = min(image.size)
    left, top = ((side - short) / 2 for side in image.size)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))


def time_ids(size: tuple[int, int]) -> list[float]:
    """Original size, top left of the crop, target size; every pair height first."""
    width, height = size
    resized = (int(SIDE * height / min(size)), int(SIDE * width / min(size)))
    top_left = [max(0, round((side - SIDE) / 2.0)) for side in resized]
    return [float(number) for number in (height, width, *top_left, SIDE, SIDE)]


def draws_of(trainer: PlainTrainer, kind: str, step: int, micro: int, count: int) -> list[Draw]:
    settings = trainer.settings
    slots = settings.batch_size * settings.gradient_accumulation
    first = micro * settings.batch_size
    flip = settings.flip and kind != "class"
    return [
        draw_sample(settings.seed, kind, step, slot, slots, [trainer.latent_shape] * count, 1000, flip)
        for slot in range(first, first + settings.batch_size)
    ]


def plain_losses(
    trainer: PlainTrainer, subject: Sequence[Picture], priors: Sequence[Picture]
) -> tuple[list[float], list[float]]:
    """The losses of all steps, and the rates of the denoiser."""
    settings = trainer.settings
    groups = trainer.groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    of_words = groups[-1:] if trainer.learned else []
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    schedule = get_scheduler(
        settings.lr_schedule,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.steps,
    )
    losses, rates = [], []
    for step in range(settings.steps):
        if settings.text_encoder_rates and step == settings.steps * settings.text_encoder_until:
            for group in groups[1 : 1 + len(settings.text_encoder_rates)]:
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
        if step == settings.steps * settings.token_until:
            for group in of_words:
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
        values = []
        for micro in range(settings.gradient_accumulation):
            drawn = draws_of(trainer, "instance", step, micro, len(subject))
            loss = (trainer.consistency_loss if settings.dco_beta else trainer.loss)(drawn, subject)
            if settings.prior == "model" and step % settings.prior_every == 0:
                weight = 2 * settings.prior_weight * settings.prior_every
                loss = loss + weight * trainer.preservation_loss(step, micro, subject)
            if settings.weight_penalty:
                loss = loss + settings.weight_penalty * trainer.squared_change()
            if priors:
                drawn = draws_of(trainer, "class", step, micro, len(priors))
                loss = loss + settings.prior_weight * trainer.loss(drawn, priors)
            (loss / settings.gradient_accumulation).backward()
            values.append(loss.item())
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        for rotation in trainer.rotations.values():
            if settings.max_norm:
                rotation.limit(settings.max_norm)
        schedule.step()
        optimizer.zero_grad()
        losses.append(sum(values) / len(values))
    return losses, rates


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        CASES,
        "sd1, prior, accumulation 2, tight clip",
        "sd2-v, prior, accumulation 2, flip",
        "sdxl, both text encoders, prior, batch 2, tight clip",
        "sd1, the base's predictions, with further prompts",
        "sd1, penalty on the weights, convolutions",
    ),
)
def test_recipe_equals_the_plain_loop(
    name: str,
    folders: dict[str, Path],
    subject: list[Picture],
    priors: list[Picture],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    case = CASES[name]
    settings = TrainSettings(
        steps=2 * STEPS if request.node.get_closest_marker("slow") else STEPS,
        resolution=SIDE,
        learning_rate=3e-3,
        precision="fp32",
        save_precision="fp32",
        seed=7,
        lr_schedule="cosine",
        lr_warmup_steps=2,
        **{"prior": "auto" if case.prior else "none", **case.settings},
    )
    base = open_base(folders[case.base], clip_skip=case.clip_skip)
    class_pictures = priors if case.prior else []
    listener = Recorder()
    result = train(
        base, subject, class_pictures, settings, RunPaths(tmp_path / "loras", tmp_path / "runs"), "cpu", listener
    )

    trainer = PlainTrainer(folders[case.base], settings, case.clip_skip, [*subject, *class_pictures])
    trainer.add_words()
    start = TrainableAdapter(base.family.build(base), settings)
    if settings.adapter == "lora":
        trainer.add_lora(start)
    else:
        trainer.add_rotations(start)
    trained = sum(len(group["params"]) for group in trainer.groups())
    assert trained == len(start.parameters()) + len(trainer.learned)
    losses, rates = plain_losses(trainer, subject, class_pictures)
    # sums in another order: 1e-6 in the first steps, up to 2e-5 after eight, since Adam divides by small gradients
    assert listener.losses == pytest.approx(losses, rel=0, abs=case.within)
    assert listener.losses[:2] == pytest.approx(losses[:2], rel=0, abs=1e-5)
    assert [event.learning_rate for event in listener.events if hasattr(event, "learning_rate")] == pytest.approx(rates)
    assert rates[0] == 0
    for layer, module in trainer.lora.items():
        ours = result.adapter.layers[layer]
        if isinstance(module, AuthorsLayer):
            start = module.start or (module.a * 0, module.b, module.s)
            change = [(b.flatten(1) * s) @ a.flatten(1) for a, b, s in ((module.a, module.b, module.s), start)]
            expected = (module.scale * (change[0] - change[1])).detach()
            assert (ours.delta().flatten(1) - expected).norm() <= 1e-3 * expected.norm()
            continue
        for learned, plain in ((ours.down, module.lora_A), (ours.up, module.lora_B)):
            weight = plain["default"].weight.detach()
            assert (learned - weight).norm() <= 1e-3 * weight.norm()
    for layer, rotation in trainer.rotations.items():
        learned, weight = result.adapter.layers[layer].tensors()["oft_blocks"], rotation.blocks.detach()
        assert (learned - weight).norm() <= 1e-3 * weight.norm()
    words = words_of(result.adapter.embeddings, base.family)
    assert [word.word for word in words] == ["sks"] * bool(trainer.learned)
    for word in words:
        assert word.vectors.keys() == trainer.learned.keys()
        for component, vectors in word.vectors.items():
            plain = trainer.learned[component].detach()
            torch.testing.assert_close(vectors, plain, rtol=0, atol=1e-5)
            first = base.family.build(base).token_embeddings(component, settings.token_start or "sks")
            assert (vectors - first[torch.arange(len(vectors)) % len(first)]).abs().max() > 3e-3
    last = "up" if settings.adapter == "lora" else "blocks"
    moved = {layer.rsplit("_text_model")[0] for layer, one in result.adapter.layers.items() if getattr(one, last).any()}
    assert len([name for name in moved if name.startswith("lora_te")]) == len(settings.text_encoder_rates)
