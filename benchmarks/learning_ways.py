"""The ways of learning a subject that benchmarks/learning.py compares: ours as settings, the peers' as commands."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

TOKEN = "sks"
INSTANCE_PROMPT = f"a photo of {TOKEN} {{thing}}"
CLASS_PROMPT = "a photo of a {thing}"
CLASS_PICTURES: dict[str, Any] = {  # as demo.toml
    "prior": "class-pictures",
    "class_prompt": CLASS_PROMPT,
    "prior_count": 32,
    "prior_steps": 25,
    "prior_guidance": 4.0,
    "prior_batch_size": 16,
}
UNNAMED: dict[str, Any] = {"prior_scheduler": "ddim", "prior_guidance_start": 0.0, "prior_guidance_end": 1.0}
"""What the pack's defaults for class pictures were when the first ways ran; their results don't name them."""
HALF_PRICE: dict[str, Any] = {
    **CLASS_PICTURES,
    "prior_scheduler": "dpm++",
    "prior_steps": 15,
    "prior_guidance_start": 0.2,
    "prior_guidance_end": 0.8,
}
PRIOR_MODEL: dict[str, Any] = {"prior": "model", "prior_every": 2, "class_prompt": CLASS_PROMPT}
PIVOTAL: dict[str, Any] = {"token": TOKEN, "class_noun": "{thing}", "token_vectors": 2}
RECIPE: dict[str, Any] = {
    "instance_prompt": INSTANCE_PROMPT,
    "steps": 200,
    "batch_size": 1,
    "learning_rate": 8e-4,
    "rank": 16,
    "targets": "attention-mlp",
    "resolution": 64,
    "checkpoint_every": 50,
    "prior": "none",
}
"""What all of our ways have in common; `{thing}` is the noun of the subject's class.

Twice demo.toml's rate at half its steps and batch: as much fidelity and no more drift, for a quarter of the work. The
layers are the pack's default.
"""

WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "class-pictures": CLASS_PICTURES,
    "class-pictures, half price": HALF_PRICE,
    "prior model": PRIOR_MODEL,
    "prior model, half the weight": {**PRIOR_MODEL, "prior_weight": 0.5},
    "prior model, every step, half the weight": {**PRIOR_MODEL, "prior_every": 1, "prior_weight": 0.5},
    "prior model, half the weight, pivotal": {**PRIOR_MODEL, **PIVOTAL, "prior_weight": 0.5},
    "DCO": {"dco_beta": 100.0},
    "weight penalty": {"weight_penalty": 1e-3},
    "OFT": {"adapter": "oft"},
    "T-LoRA": {"rank_schedule": "timestep", "lora_init": "orthogonal"},
    "pivotal": PIVOTAL,
}
"""Way → its settings over `RECIPE`."""

SEARCHED_FROM: dict[str, Any] = {**RECIPE, **PRIOR_MODEL, "prior_weight": 0.5}
"""The recipe that `search` tries to better. The weight that the pack takes by default was found by it."""

ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "learning_rate": (4e-4, 1.6e-3),
    "rank": (4, 32),
    "targets": ("attention",),
    "timestep_bias": (-1.0, 1.0),
    "loss_weighting": ("min-snr", "debiased"),
    "ema_decay": (0.98,),
    "lora_plus_ratio": (16.0,),
    "lr_schedule": ("cosine",),
    "rank_schedule": ("timestep",),
    "prior_weight": (0.25, 1.0),
}
"""Setting → values that `search` tries in the place of the recipe's."""


def single_changes() -> dict[str, dict[str, Any]]:
    """Title → a change of one setting."""
    return {f"{name} {value}": {name: value} for name, values in ALTERNATIVES.items() for value in values}


def joint_changes(titles: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Title → the first two and the first three of some single changes together.

    Args:
        titles: Of single changes, the best first; of those of one setting only the first is taken.
    """
    changes = single_changes()
    chosen: dict[str, str] = {}  # setting → title
    for title in titles:
        chosen.setdefault(next(iter(changes[title])), title)
    joint = {}
    for count in (2, 3):
        parts = list(chosen.values())[:count]
        if len(parts) == count:
            joint[", ".join(parts)] = {name: value for part in parts for name, value in changes[part].items()}
    return joint


def filled(settings: Mapping[str, Any], thing: str) -> dict[str, Any]:
    """The settings with the noun of the class in the place of `{thing}`."""
    return {
        name: value.replace("{thing}", thing) if isinstance(value, str) else value for name, value in settings.items()
    }


@dataclass(frozen=True)
class PeerWay:
    """Another project's script with options of its own.

    Attributes:
        project: "diffusers" or "kohya": the flag that gives its folder.
        options: Its own names of options → values; `True` for a flag alone.
        class_pictures: Whether it gets the class pictures that the way "class-pictures" generates.
        steps: To train.
    """

    project: str
    options: Mapping[str, Any] = field(default_factory=dict)
    class_pictures: bool = False
    steps: int = RECIPE["steps"]


PEERS: dict[str, PeerWay] = {
    "diffusers, its defaults": PeerWay("diffusers", steps=400),
    "diffusers, its README": PeerWay("diffusers", {"learning_rate": 1e-4, "train_batch_size": 1}, steps=500),
    "diffusers, our recipe": PeerWay(
        "diffusers",
        {"learning_rate": RECIPE["learning_rate"], "train_batch_size": RECIPE["batch_size"], "rank": RECIPE["rank"]},
        class_pictures=True,
    ),
    "kohya, its guide": PeerWay("kohya", {"learning_rate": 1e-4, "network_dim": 16, "network_alpha": 1}, steps=400),
    "kohya, our recipe": PeerWay(
        "kohya",
        {
            "learning_rate": RECIPE["learning_rate"],
            "train_batch_size": 2 * RECIPE["batch_size"],  # class pictures are samples of their own
            "network_dim": RECIPE["rank"],
            "network_alpha": RECIPE["rank"],
            "network_train_unet_only": True,
        },
        class_pictures=True,
    ),
}
"""Way → a peer with its defaults, with what its own documentation advises, and with our rate, rank and class pictures.

Of the base they are told its 64 pixels. diffusers' default is a batch of 4, its README says 500 steps of batch 1.
"""


@dataclass(frozen=True)
class PeerJob:
    """One training by a peer.

    Attributes:
        way: What is run.
        base: The demo's base.
        images: Folder of the subject's pictures.
        class_images: Folder of class pictures; None: without.
        thing: Noun of the class.
        seed: Of the run.
        out: Folder for what the script writes.
        steps: To train.
        every: Steps between checkpoints.
    """

    way: PeerWay
    base: Path
    images: Path
    class_images: Path | None
    thing: str
    seed: int
    out: Path
    steps: int
    every: int


def diffusers_command(job: PeerJob, folder: Path) -> list[str]:
    """The script and its arguments.

    Args:
        job: What to train.
        folder: Of the script: a checkout's, or the one that holds it.
    """
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": job.base,
        "instance_data_dir": job.images,
        "instance_prompt": INSTANCE_PROMPT.format(thing=job.thing),
        "resolution": 64,
        "output_dir": job.out,
        "max_train_steps": job.steps,
        "checkpointing_steps": job.every,
        "seed": job.seed,
        **job.way.options,
    }
    if job.class_images is not None:
        options |= {
            "with_prior_preservation": True,
            "class_data_dir": job.class_images,
            "class_prompt": CLASS_PROMPT.format(thing=job.thing),
            "num_class_images": len(list(job.class_images.iterdir())),
        }
    return [str(_script(folder, "train_dreambooth_lora.py", "examples/dreambooth")), *as_arguments(options)]


def kohya_command(job: PeerJob, folder: Path) -> list[str]:
    """The script and its arguments; see `diffusers_command`.

    The base is written once more with the scale of latents that kohya's scripts take for granted, and the pictures'
    folders are named as they want them: number of repeats, then the caption.
    """
    pictures = job.out / "pictures" / f"1_{INSTANCE_PROMPT.format(thing=job.thing)}"
    shutil.copytree(job.images, pictures)
    tokenizers = job.out / "tokenizers"
    shutil.copytree(job.base / "tokenizer", tokenizers / "openai_clip-vit-large-patch14")
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": write_with_usual_scale(job.base, job.out / "base"),
        "tokenizer_cache_dir": tokenizers,
        "train_data_dir": pictures.parent,
        "resolution": 64,
        "output_dir": job.out,
        "output_name": "lora",
        "save_model_as": "safetensors",
        "network_module": "networks.lora",
        "max_train_steps": job.steps,
        "save_every_n_steps": job.every,
        "seed": job.seed,
        "mixed_precision": "no",
        "max_data_loader_n_workers": 0,  # else every epoch of five steps starts processes of its own
        **job.way.options,
    }
    if job.class_images is not None:
        regular = job.out / "class-pictures" / f"1_{CLASS_PROMPT.format(thing=job.thing)}"
        shutil.copytree(job.class_images, regular)
        options["reg_data_dir"] = regular.parent
    return [str(_script(folder, "train_network.py")), *as_arguments(options)]


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [
        word
        for name, value in options.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def checkpoints_of(job: PeerJob) -> dict[int, Path]:
    """Step → adapter file, ascending, of a training that has ended."""
    if job.way.project == "diffusers":
        paths = {int(path.parent.name.split("-")[1]): path for path in job.out.glob("checkpoint-*/*.safetensors")}
        last = job.out / "pytorch_lora_weights.safetensors"
    else:
        paths = {int(path.stem.split("step")[1]): path for path in job.out.glob("lora-step*.safetensors")}
        last = job.out / "lora.safetensors"
    return dict(sorted({**paths, job.steps: last}.items()))


def _script(folder: Path, name: str, *below: str) -> Path:
    for candidate in (folder, *(folder / part for part in below)):
        if (candidate / name).is_file():
            return (candidate / name).resolve()
    raise SystemExit(f"{folder} holds no {name}. Give the folder of a checkout.")


def write_with_usual_scale(base: Path, folder: Path) -> Path:
    """Write a base whose latents have the scale of Stable Diffusion 1.x, 0.18215, and are otherwise the same.

    The autoencoder's last layer of encoding gives them larger by the quotient of the two scales, its first layer of
    decoding takes them back.
    """
    shutil.copytree(base, folder)
    config_file = folder / "vae" / "config.json"
    weights_file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    factor = config["scaling_factor"] / 0.18215
    tensors = {name: tensor.float() for name, tensor in load_file(weights_file).items()}
    channels = config["latent_channels"]
    for name in ("quant_conv.weight", "quant_conv.bias"):
        tensors[name][:channels] *= factor
    tensors["quant_conv.bias"][channels:] += 2 * math.log(factor)
    tensors["post_quant_conv.weight"] /= factor
    save_file(tensors, weights_file, {"format": "pt"})
    config_file.write_text(json.dumps(config | {"scaling_factor": 0.18215}), encoding="utf-8")
    return folder
