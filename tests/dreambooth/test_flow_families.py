"""The recipe with flow-matching models: against plain loops of diffusers and PEFT, and whole runs with all around them.

The loops follow diffusers' examples/dreambooth: train_dreambooth_lora_flux2_klein.py, train_dreambooth_lora_z_image.py,
train_dreambooth_lora_krea2.py; for Anima there is none, and the loop follows kohya's anima_train_network.py.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", minversion="0.37")
pytest.importorskip("transformers", minversion="4.51")

import anima_checkpoints
import diffusers
from anima_checkpoints import anima_folder
from cases import mostly_slow
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, ZImagePipeline
from diffusers.optimization import get_scheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from flux2_checkpoints import flux2_folder
from helpers import Recorder
from krea2_checkpoints import OUTSIDE, SYSTEM, can_be_made, krea2_folder
from pack.trainer.adapters.apply import apply_to_base, merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.adapters.layers import LoraLayer
from pack.trainer.adapters.names import adapter_names
from pack.trainer.core.events import Validation
from pack.trainer.core.seeding import Draw, draw_sample
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.models.families.base import DiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.training.adapter import TrainableAdapter
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn
from worlds import (
    KINDS,
    PROMPT,
    SHAPES,
    World,
    assert_same_end,
    newest_step,
    noisy_pictures,
    pictures_of,
    runs_in,
    steps_in,
)
from zimage_checkpoints import CHAT_TEMPLATE, zimage_folder

pytestmark = pytest.mark.usefixtures("quick")

STEPS = 8
CLASS_PROMPT = "a photo of a dog"


@pytest.fixture(scope="module", params=["flux2", "zimage", "krea2", "anima"])
def plain(request: pytest.FixtureRequest) -> type[PlainTrainer]:
    """The plain loop of a family."""
    if request.param == "krea2" and not can_be_made():
        pytest.skip("needs diffusers 0.39 and transformers 4.57")
    if request.param == "anima" and not anima_checkpoints.can_be_made():
        pytest.skip("needs diffusers 0.39")
    plains = {"flux2": PlainKlein, "zimage": PlainZImage, "krea2": PlainKrea2, "anima": PlainAnima}
    return plains[request.param]


@pytest.fixture(scope="module")
def folder(plain: type[PlainTrainer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain.make_folder(tmp_path_factory.mktemp("flow") / "base")


@pytest.fixture(scope="module")
def world(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    pictures = noisy_pictures(tmp_path_factory.mktemp("pictures") / "subject", 3, 0)
    return World(open_base(folder), load_pictures(pictures, PROMPT, Recorder(), AnnotationOptions(token="sks")))


def with_class_captions(pictures: Sequence[Picture]) -> list[Picture]:
    return [replace(picture, class_captions=(CLASS_PROMPT,)) for picture in pictures]


# Against diffusers and PEFT


@dataclass
class Case:
    """What is trained, and what keeps the class."""

    settings: dict[str, Any] = field(default_factory=dict)
    class_pictures: bool = False


CASES = {
    "attention": Case({"rank": 4, "alpha": 2.0}),
    "attention and MLP, class pictures, accumulation 2, flip": Case(
        {"targets": "attention-mlp", "rank": 4, "gradient_accumulation": 2, "prior_weight": 0.5, "flip": True},
        class_pictures=True,
    ),
    "all, batch 2, rank-stabilised, tight clip, weight decay": Case(
        {
            "targets": "all",
            "rank": 4,
            "alpha": 3.0,
            "rank_stabilized": True,
            "batch_size": 2,
            "max_grad_norm": 0.01,
            "weight_decay": 0.5,
        }
    ),
    "the base's predictions": Case({"rank": 4, "prior": "model", "prior_empty": 0.3}),
    "the base's predictions every third step, accumulation 2, some timesteps": Case(
        {
            "rank": 4,
            "prior": "model",
            "prior_every": 3,
            "gradient_accumulation": 2,
            "min_timestep": 100,
            "max_timestep": 700,
            "timestep_bias": 0.5,
        }
    ),
}
CASES["T-LoRA, all, batch 2, the base's predictions"] = Case(
    {
        "targets": "all",
        "rank": 4,
        "rank_schedule": "timestep",
        "min_rank": 1,
        "rank_power": 0.5,
        "batch_size": 2,
        "prior": "model",
    }
)


class PlainTrainer:
    """The networks as diffusers loads them, with LoRA by PEFT; steps as in diffusers' example.

    Attributes:
        make_folder: Writes a small model of the family.
        pipeline: The family's pipeline.
        targets: Of each preset, the modules.
        latents: Shape of the latents of a picture of 64² pixels.
    """

    make_folder: ClassVar[Callable[[Path], Path]]
    pipeline: ClassVar[Any]
    targets: ClassVar[Mapping[str, str]]
    latents: ClassVar[tuple[int, int, int]]

    def __init__(self, folder: Path, settings: Any, pictures: Sequence[Picture]) -> None:
        self.settings = settings
        self.pipe: Any = self.loaded(folder)
        for network in (self.pipe.vae, self.pipe.text_encoder, self.pipe.transformer):
            network.requires_grad_(False)
        self.prepare()
        self.base = copy.deepcopy(self.pipe.transformer)
        with torch.no_grad():
            self.posteriors = {
                (picture.digest, flip): self.posterior(picture, flip) for picture in pictures for flip in (False, True)
            }
        self.lora: dict[str, Any] = {}
        self.text: dict[str, Any] = {}

    def loaded(self, folder: Path) -> Any:
        pipe = self.pipeline.from_pretrained(folder, local_files_only=True)
        pipe.tokenizer.chat_template = CHAT_TEMPLATE
        return pipe

    def prepare(self) -> None:
        """Change the network where a LoRA would else have another form."""

    def encoded(self, picture: Picture, flip: bool) -> Any:
        return self.pipe.vae.encode(self.pixels(picture, flip)).latent_dist

    def pixels(self, picture: Picture, flip: bool) -> Tensor:
        pixels = torch.from_numpy(np.array(picture.open().convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
        return pixels.flip(-1) if flip else pixels

    def posterior(self, picture: Picture, flip: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents."""
        raise NotImplementedError

    def shifted(self, sigma: Tensor) -> Tensor:
        """The shift of diffusers' scheduler for 64² pixels."""
        raise NotImplementedError

    def predicted(self, transformer: Any, noisy: Tensor, sigmas: Tensor, captions: list[str]) -> Tensor:
        raise NotImplementedError

    def path_in_diffusers(self, path: str) -> str:
        return path

    def add_lora(self, start: TrainableAdapter) -> None:
        """LoRA on the modules of the target, from the recipe's start."""
        settings = self.settings
        chosen = [
            path
            for path, module in self.pipe.transformer.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(self.targets[settings.targets], path)
        ]
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha or settings.rank,
            target_modules=chosen,
            use_rslora=settings.rank_stabilized,
        )
        inject_adapter_in_model(config, self.pipe.transformer)
        modules = {path: module for path, module in self.pipe.transformer.named_modules() if hasattr(module, "lora_A")}
        layers = start.adapter().layers
        for name, one in start.layers.items():
            module: Any = modules.pop(self.path_in_diffusers(one.target.path))
            layer = layers[name]
            assert isinstance(layer, LoraLayer)
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(layer.down)
                module.lora_B["default"].weight.copy_(layer.up)  # nothing but zeros
            if settings.rank_schedule == "timestep":
                module.lora_A["default"].register_forward_hook(self._masked)
            self.lora[name] = module
        assert not modules

    def _masked(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """As the authors of T-LoRA mask by timestep, each sample of a batch by its own."""
        mask = torch.zeros(len(output), self.settings.rank)
        for row, sigma in enumerate(self.sigmas.tolist()):
            growth = ((1000 - int(1000 * sigma)) / 1000) ** self.settings.rank_power
            active = int(growth * (self.settings.rank - self.settings.min_rank)) + self.settings.min_rank
            mask[row, :active] = 1.0
        return output * mask.view(len(mask), *[1] * (output.ndim - 2), -1)

    def sigma(self, quantile: float, settings: Any) -> float:
        """The example's logit-normal distribution, shifted."""
        normal = torch.tensor(NormalDist().inv_cdf(quantile), dtype=torch.float64)
        sigma = self.shifted(torch.sigmoid(normal))
        least, most = (getattr(settings, name, usual) for name, usual in (("min_timestep", 0), ("max_timestep", 1000)))
        return float(least + sigma * (most - least)) / 1000

    def loss(self, draws: Sequence[Draw], pictures: Sequence[Picture]) -> Tensor:
        """The mean squared error of one set's samples."""
        rows, quantiles = [], []
        for drawn in draws:
            mean, std = self.posteriors[pictures[drawn.item].digest, drawn.flip]
            rows.append(mean + std * drawn.posterior_noise)
            quantile = (drawn.timestep + drawn.timestep_fraction) / 1000
            quantiles.append(quantile ** (2.0**-self.settings.timestep_bias))
        latents = torch.cat(rows)
        noise = torch.stack([drawn.noise for drawn in draws])
        sigmas = torch.tensor([self.sigma(quantile, self.settings) for quantile in quantiles])
        share = sigmas.view(-1, 1, 1, 1)
        noisy = (1.0 - share) * latents + share * noise
        captions = [pictures[drawn.item].caption for drawn in draws]
        return F.mse_loss(self.predicted(self.pipe.transformer, noisy, sigmas, captions), noise - latents)

    def preservation_loss(self, step: int, micro: int, count: int) -> Tensor:
        """Where eight of Euler's steps by the base lead from noise, with prompts of the class, it is the teacher."""
        settings = self.settings
        number, position = divmod(step // settings.prior_every + micro * 8 // settings.gradient_accumulation, 8)
        draws = self.draws("preserved", number, micro, count)
        prompts = ["" if drawn.drop < settings.prior_empty else CLASS_PROMPT for drawn in draws]
        noisy = torch.stack([drawn.noise for drawn in draws])
        sigmas = [
            torch.tensor([self.sigma((7 - place + drawn.timestep_fraction) / 8, None) for drawn in draws])
            for place in range(8)
        ]
        with torch.no_grad():
            for place in range(position):
                prediction = self.predicted(self.base, noisy, sigmas[place], prompts)
                noisy = noisy + (sigmas[place + 1] - sigmas[place]).view(-1, 1, 1, 1) * prediction
            target = self.predicted(self.base, noisy, sigmas[position], prompts)
        return F.mse_loss(self.predicted(self.pipe.transformer, noisy, sigmas[position], prompts), target)

    def draws(self, kind: str, step: int, micro: int, count: int) -> list[Draw]:
        settings = self.settings
        slots = settings.batch_size * settings.gradient_accumulation
        first = micro * settings.batch_size
        flip = settings.flip and kind != "class"
        return [
            draw_sample(settings.seed, kind, step, slot, slots, [self.latents] * count, 1000, flip)
            for slot in range(first, first + settings.batch_size)
        ]

    def train(self, subject: Sequence[Picture], priors: Sequence[Picture]) -> list[float]:
        """The losses of all steps."""
        settings = self.settings
        parameters = [parameter for parameter in self.pipe.transformer.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = get_scheduler(
            settings.lr_schedule,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.steps,
        )
        losses = []
        for step in range(settings.steps):
            total = 0.0
            for micro in range(settings.gradient_accumulation):
                loss = self.loss(self.draws("instance", step, micro, len(subject)), subject)
                if priors:
                    drawn = self.draws("class", step, micro, len(priors))
                    loss = loss + settings.prior_weight * self.loss(drawn, priors)
                if settings.prior == "model" and step % settings.prior_every == 0:
                    weight = 2 * settings.prior_weight * settings.prior_every
                    loss = loss + weight * self.preservation_loss(step, micro, len(subject))
                (loss / settings.gradient_accumulation).backward()
                total += loss.item() / settings.gradient_accumulation
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(total)
        return losses


class PlainKlein(PlainTrainer):
    """FLUX.2 klein.

    Query, key and value projections are joined by diffusers' own `fuse_projections`, so that a LoRA has one inner
    factor for the three of them.
    """

    make_folder = staticmethod(flux2_folder)
    pipeline = Flux2KleinPipeline
    in_blocks = r".*\.attn\.(to_qkv|to_added_qkv|to_out\.0|to_add_out|to_qkv_mlp_proj|to_out)"
    targets: ClassVar[Mapping[str, str]] = {
        "attention": in_blocks,
        "attention-mlp": rf"{in_blocks}|.*\.ff(_context)?\.linear_(in|out)",
        "all": ".*",
    }
    latents = (128, 4, 4)

    def prepare(self) -> None:
        for block in self.pipe.transformer.transformer_blocks:
            block.attn.fuse_projections()
            for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                delattr(block.attn, part)  # else they would get a LoRA that does nothing

    def posterior(self, picture: Picture, flip: bool) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        posterior = self.encoded(picture, flip)
        centre = vae.bn.running_mean.view(1, -1, 1, 1)
        scale = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        mean, std = (self.pipe._patchify_latents(part) for part in (posterior.mean, posterior.std))
        return (mean - centre) / scale, std / scale

    def shifted(self, sigma: Tensor) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        moved: Tensor = scheduler.time_shift(calculate_shift(16), 1.0, sigma)
        return moved

    def predicted(self, transformer: Any, noisy: Tensor, sigmas: Tensor, captions: list[str]) -> Tensor:
        with torch.no_grad():
            for caption in {*captions} - self.text.keys():
                self.text[caption] = self.pipe.encode_prompt(caption, device=torch.device("cpu"))
        text, text_ids = (torch.cat([self.text[caption][part] for caption in captions]) for part in (0, 1))
        places = self.pipe._prepare_latent_ids(noisy)
        self.sigmas = sigmas
        prediction = transformer(
            hidden_states=self.pipe._pack_latents(noisy),
            timestep=sigmas,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=places,
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipe._unpack_latents_with_ids(prediction, places)
        return unpacked

    def path_in_diffusers(self, path: str) -> str:
        return path.replace("norm_out.projection", "norm_out.linear")


class PlainZImage(PlainTrainer):
    """Z-Image, with the static shift that musubi-tuner advises."""

    make_folder = staticmethod(zimage_folder)
    pipeline = ZImagePipeline
    targets: ClassVar[Mapping[str, str]] = {
        "attention": r"layers\..*\.(to_q|to_k|to_v|to_out\.0)",
        "attention-mlp": r"layers\..*\.(to_q|to_k|to_v|to_out\.0|w1|w2|w3)",
        "all": r"(?!all_x_embedder|cap_embedder).*",
    }
    latents = (16, 8, 8)

    def posterior(self, picture: Picture, flip: bool) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        posterior = self.encoded(picture, flip)
        return (posterior.mean - config.shift_factor) * config.scaling_factor, posterior.std * config.scaling_factor

    def shifted(self, sigma: Tensor) -> Tensor:
        moved: Tensor = FlowMatchEulerDiscreteScheduler().time_shift(math.log(2), 1.0, sigma)
        return moved

    def predicted(self, transformer: Any, noisy: Tensor, sigmas: Tensor, captions: list[str]) -> Tensor:
        with torch.no_grad():
            for caption in {*captions} - self.text.keys():
                [self.text[caption]], _ = self.pipe.encode_prompt([caption], do_classifier_free_guidance=False)
        self.sigmas = sigmas
        inputs = list(noisy.unsqueeze(2).unbind(dim=0))
        prompts = [self.text[caption] for caption in captions]
        outputs = transformer(inputs, (1000 - 1000 * sigmas) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(outputs, dim=0).squeeze(2)


class OfWan(PlainTrainer):
    """A family with Wan's autoencoder, whose pictures are videos of one frame."""

    latents = (16, 8, 8)

    def pixels(self, picture: Picture, flip: bool) -> Tensor:
        return super().pixels(picture, flip).unsqueeze(2)

    def posterior(self, picture: Picture, flip: bool) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        posterior = self.encoded(picture, flip)
        centre = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
        factor = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
        return ((posterior.mean - centre) * factor)[:, :, 0], (posterior.std * factor)[:, :, 0]


class PlainKrea2(OfWan):
    """Krea 2, whose noise levels are shifted in training as in sampling, which musubi-tuner calls krea2_shift."""

    make_folder = staticmethod(krea2_folder)
    pipeline = getattr(diffusers, "Krea2Pipeline", None)  # newer than the others
    in_blocks = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0)"
    targets: ClassVar[Mapping[str, str]] = {
        "attention": in_blocks,
        "attention-mlp": rf"{in_blocks}|transformer_blocks\.\d+\.ff\..*",
        "all": r"(?!text_fusion\.projector).*",
    }

    def prepare(self) -> None:
        """Count the tokens of the template by those of the small tokenizer."""
        count = lambda text: len(self.pipe.tokenizer(text).input_ids)  # noqa: E731
        self.pipe.prompt_template_encode_start_idx = count(SYSTEM)
        self.pipe.prompt_template_encode_num_suffix_tokens = count(self.pipe.prompt_template_encode_suffix)

    def shifted(self, sigma: Tensor) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        moved: Tensor = scheduler.time_shift(calculate_shift(16, 256, 6400, 0.5, 1.15), 1.0, sigma)
        return moved

    def predicted(self, transformer: Any, noisy: Tensor, sigmas: Tensor, captions: list[str]) -> Tensor:
        cpu = torch.device("cpu")
        with torch.no_grad():
            for caption in {*captions} - self.text.keys():
                self.text[caption] = self.pipe.encode_prompt([caption], device=cpu, max_sequence_length=80)
        text, mask = (torch.cat([self.text[caption][part] for caption in captions]) for part in (0, 1))
        self.sigmas = sigmas
        packed = self.pipe._pack_latents(noisy, len(noisy), 16, 8, 8)
        output = transformer(
            hidden_states=packed,
            encoder_hidden_states=text,
            timestep=sigmas,
            position_ids=self.pipe.prepare_position_ids(text.shape[1], 4, 4, cpu),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipe._unpack_latents(output, 64, 64)[:, :, 0]
        return unpacked

    def path_in_diffusers(self, path: str) -> str:
        first, dot, rest = path.partition(".")
        return f"{OUTSIDE[first]}{dot}{rest}"


class PlainAnima(OfWan):
    """Anima, whose noise levels are not shifted in training."""

    make_folder = staticmethod(anima_folder)
    pipeline = getattr(diffusers, "AnimaModularPipeline", None)  # newer than the others
    in_blocks = r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    targets: ClassVar[Mapping[str, str]] = {
        "attention": in_blocks,
        "attention-mlp": rf"{in_blocks}|transformer_blocks\.\d+\.ff\..*",
        "all": ".*",
    }

    def loaded(self, folder: Path) -> Any:
        pipe = self.pipeline.from_pretrained(str(folder))
        pipe.load_components()
        pipe.text_conditioner.requires_grad_(False)
        return pipe

    def shifted(self, sigma: Tensor) -> Tensor:
        return sigma

    def encoded_text(self, caption: str) -> Tensor:
        """As diffusers' AnimaTextEncoderStep, but of nothing ComfyUI's encoding: that of the token for padding."""
        pipe = self.pipe
        ids = torch.tensor([pipe.tokenizer(caption).input_ids or [pipe.tokenizer.pad_token_id]])
        source = pipe.text_encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        text: Tensor = pipe.text_conditioner(source, torch.tensor([pipe.t5_tokenizer(caption).input_ids]))
        return text

    def predicted(self, transformer: Any, noisy: Tensor, sigmas: Tensor, captions: list[str]) -> Tensor:
        with torch.no_grad():
            for caption in {*captions} - self.text.keys():
                self.text[caption] = self.encoded_text(caption)
        self.sigmas = sigmas
        with pytest.MonkeyPatch.context() as patch:
            # torchvision, which makes the mask as large as the latents, need not be installed: it is so already
            resize = SimpleNamespace(resize=lambda mask, size, interpolation: mask)
            modes = SimpleNamespace(NEAREST=None)
            module = "diffusers.models.transformers.transformer_cosmos.transforms"
            patch.setattr(module, SimpleNamespace(functional=resize, InterpolationMode=modes), raising=False)
            output: Tensor = transformer(
                hidden_states=noisy.unsqueeze(2),
                timestep=sigmas,
                encoder_hidden_states=torch.cat([self.text[caption] for caption in captions]),
                padding_mask=noisy.new_zeros(1, 1, *noisy.shape[-2:]),
                return_dict=False,
            )[0]
        return output.squeeze(2)

    def path_in_diffusers(self, path: str) -> str:
        first, dot, rest = path.partition(".")
        return f"{anima_checkpoints.OUTSIDE[first]}{dot}{rest}"


@pytest.mark.parametrize("name", mostly_slow(CASES, "the base's predictions"))
def test_recipe_equals_the_plain_loop(
    name: str, plain: type[PlainTrainer], folder: Path, world: World, tmp_path: Path
) -> None:
    case = CASES[name]
    where = replace(world, subject=with_class_captions(world.subject))
    if case.class_pictures:
        where = where.with_priors(tmp_path / "class")
    changes: dict[str, Any] = {
        "steps": STEPS,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "seed": 7,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 2,
        "prior": "class-pictures" if case.class_pictures else "none",
        **case.settings,
    }
    if plain is PlainKrea2 and "rank_schedule" in changes:
        changes["targets"] = "attention-mlp"  # the fusion of text has rows of its own for each token
    recipe = where.recipe(tmp_path, listener := Recorder(), **changes)
    result = recipe.run()

    trainer = plain(folder, recipe.settings, [*where.subject, *where.priors])
    trainer.add_lora(TrainableAdapter(where.base.family.build(where.base), recipe.settings))
    assert len(trainer.lora) == len(result.adapter.layers) > 0
    losses = trainer.train(where.subject, where.priors)
    # sums in another order, and Adam divides by small gradients
    assert listener.losses == pytest.approx(losses, rel=0, abs=1e-5)
    apart: list[float] = []
    for name, module in trainer.lora.items():
        learned = result.adapter.layers[name]
        assert isinstance(learned, LoraLayer)
        down, up = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))
        if name == "lora_unet_final_layer_adaLN_modulation_1":
            up = torch.cat(up.chunk(2)[::-1])  # diffusers has scale before shift
        for ours, theirs in ((learned.down, down), (learned.up, up)):
            apart.append(float((ours - theirs).norm() / theirs.norm()))
        assert up.any()
    if plain is PlainZImage and recipe.settings.rank_schedule == "timestep":
        # where a gradient is nothing but rounding, Adam steps as far, in the direction of its sign
        assert statistics.median(apart) <= 1e-3
        assert sum(share > 1e-3 for share in apart) <= 0.1 * len(apart)
        assert max(apart) <= 0.05
    else:
        assert max(apart) <= 1e-3


# Whole runs


def loaded(world: World, path: Path) -> DiffusionModel:
    """The base model with an adapter file applied."""
    base = apply_to_base(world.base, [(read_adapter(path), 1.0)])
    return base.family.build(base)


@torch.no_grad()
def predicted(model: DiffusionModel) -> Tensor:
    noisy = torch.randn((1, *model.family.latents.shape(model.vae, 64, 64)), generator=torch.Generator().manual_seed(0))
    return model.predict(noisy, torch.tensor([400.0]), model.encode_prompts([PROMPT]))


def step_losses(listener: Recorder) -> list[float]:
    return [event.loss for event in listener.events if hasattr(event, "learning_rate")]


def base_prediction(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    return replace(world, subject=with_class_captions(world.subject)), {"prior": "auto"}


def class_pictures(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    return world.with_priors(folder / "class"), {"prior": "class-pictures"}


def buckets(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    """One step sees all shapes."""
    pictures = pictures_of(folder / "shapes", SHAPES, PROMPT)
    return replace(world, subject=pictures), {"aspect_buckets": True, "bucket_step": 16, "batch_size": len(SHAPES)}


def masks(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    pictures = pictures_of(folder / "masked", [(64, 64)] * 2, PROMPT, masked=True)
    return replace(world, subject=pictures), {"mask_background": 0.25, "batch_size": 2}


def everything_of_the_data(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    pictures = with_class_captions(pictures_of(folder / "all", SHAPES, "sks, dog, at noon", masked=True))
    changes = {"aspect_buckets": True, "bucket_step": 16, "batch_size": 2, "mask_background": 0.25, "flip": True}
    changes |= {"caption_dropout": 0.3, "shuffle_tags": True, "noise_offset": 0.05, "input_perturbation": 0.1}
    changes |= {"loss": "huber-snr", "timestep_bias": 0.5, "validation_pictures": 1, "prior": "model"}
    return replace(world, subject=pictures), {**changes, "dropout": 0.2, "ema_decay": 0.7, "lr_schedule": "cosine"}


def consistency_and_penalty(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    return world, {"dco_beta": 100.0, "weight_penalty": 0.01}


def checkpointed(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    return world, {"gradient_checkpointing": True}


def half_precision(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    return world, {"precision": "bf16"}


def four_bits(world: World, folder: Path) -> tuple[World, dict[str, Any]]:
    pytest.importorskip("bitsandbytes")
    return world, {"base_quantization": "nf4"}


Make = Callable[[World, Path], tuple[World, dict[str, Any]]]
WAYS: dict[str, Make] = {
    way.__name__.replace("_", " "): way
    for way in (
        base_prediction,
        class_pictures,
        buckets,
        masks,
        everything_of_the_data,
        consistency_and_penalty,
        checkpointed,
        half_precision,
        four_bits,
    )
}
# a block of BOFT divides the outputs into a power of two; the smallest that does so for 1152 is 18
FITTING: dict[str, dict[str, Any]] = {**KINDS, "BOFT": {**KINDS["BOFT"], "rank": 18}}


# every kind of adapter once, and what depends on the family with each
RUNS = [("flux2", name) for name in (*WAYS, *FITTING)]
RUNS += [(family, name) for family in ("zimage", "krea2", "anima") for name in WAYS]


@pytest.mark.parametrize(
    ("plain", "name"),
    mostly_slow(RUNS, *((family, "base prediction") for family in ("flux2", "zimage", "krea2", "anima"))),
    indirect=["plain"],
)
def test_a_run_writes_a_file_that_can_be_applied(name: str, world: World, tmp_path: Path) -> None:
    where, changes = WAYS[name](world, tmp_path) if name in WAYS else (world, FITTING[name])
    result = where.train(tmp_path, listener := Recorder(), **{"steps": 2, "rank": 2, **changes})
    losses = step_losses(listener)
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    model = loaded(world, result.path)
    same_in_memory = world.base.family.build(world.base)
    names = set(adapter_names(model).values())
    assert result.adapter.layers.keys() <= names
    if changes.get("targets") == "all":
        pattern = model.family.targets["all"]
        assert result.adapter.layers.keys() == {
            name
            for path, name in adapter_names(model).items()
            if path.component == "unet" and re.fullmatch(pattern, path.path)
        }
    before = predicted(same_in_memory)
    merge_into(same_in_memory, result.adapter, 1.0)
    torch.testing.assert_close(predicted(model), predicted(same_in_memory), rtol=0, atol=1e-5)
    assert (predicted(model) - before).abs().max() > 1e-3


@pytest.mark.slow
def test_class_captions_alone_let_the_base_be_the_teacher(world: World, tmp_path: Path) -> None:
    """It is the default; its first loss is that of a run without, since nothing has been learned yet."""
    where, changes = base_prediction(world, tmp_path)
    with_teacher = where.recipe(tmp_path / "with", first := Recorder(), **changes)
    assert with_teacher.settings.prior == "model"
    with_teacher.run()
    where.train(tmp_path / "without", second := Recorder(), prior="none")
    assert first.losses[0] == pytest.approx(second.losses[0], rel=0, abs=1e-6)
    assert first.losses[2] > second.losses[2] + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_changes_nothing(quantization: str, world: World, tmp_path: Path) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    changes = {"targets": "all", "base_quantization": quantization, "steps": 2, "dropout": 0.2}
    plain, checkpointed = (
        world.train(tmp_path / str(given), gradient_checkpointing=given, **changes) for given in (False, True)
    )
    assert_same_end(checkpointed, plain)


@pytest.mark.slow
def test_held_out_pictures_are_measured(world: World, tmp_path: Path) -> None:
    world.train(tmp_path, listener := Recorder(), validation_pictures=1, checkpoint_every=2)
    measured = [event for event in listener.events if isinstance(event, Validation)]
    assert [event.step for event in measured] == [0, 2, 4]
    assert len({event.loss for event in measured}) == 3
    assert all(0 < event.loss < 10 for event in measured)


@pytest.mark.slow
def test_previews_are_generated(world: World, tmp_path: Path) -> None:
    """With guidance, and so with the empty prompt, too; those of the base differ from those of the last step."""
    longer = f"{PROMPT} on a beach, at noon, in summer"  # than the captions, as long as whose longest these are
    previews = {"preview_every": 4, "preview_prompts": longer, "preview_count": 1, "preview_steps": 2}
    result = world.train(tmp_path, **previews, preview_guidance=4.0, targets="all")
    plain = world.train(tmp_path / "plain", targets="all")
    assert_same_end(result, plain)
    pictures = [result.run / "previews" / f"step-{step:08d}" / "subject-00-00.png" for step in (0, 4)]
    sizes = [Image.open(picture).size for picture in pictures]
    assert sizes == [(64, 64)] * 2
    first, last = (np.asarray(Image.open(picture)).astype(int) for picture in pictures)
    assert np.abs(first - last).max() > 3


STOPPED: dict[str, Make] = {
    "with the base's predictions": base_prediction,
    "with all of the data": everything_of_the_data,
    "in four bits, with consistency": lambda world, folder: (
        world,
        {**four_bits(world, folder)[1], "dco_beta": 100.0, "adapter": "lokr", "targets": "all"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_a_stop_leaves_no_trace(name: str, world: World, tmp_path: Path) -> None:
    where, changes = STOPPED[name](world, tmp_path)
    straight = where.train(tmp_path / "straight", told := Recorder(), **changes)
    where.stop_after(3, tmp_path / "stopped", **changes)
    [run] = runs_in(tmp_path / "stopped")
    assert (newest_step(run), steps_in(run)) == (3, [3])
    resumed = where.train(tmp_path / "stopped", last := Recorder(), **changes)
    assert resumed.started_from == 3
    assert step_losses(last) == step_losses(told)[3:]
    assert_same_end(resumed, straight)
