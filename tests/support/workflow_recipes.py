"""The example workflows, as `make_workflows.py` builds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
XL_CHECKPOINT = "sd_xl_base_1.0.safetensors"
KLEIN = {
    "diffusion_models": "flux-2-klein-base-4b.safetensors",
    "text_encoders": "qwen_3_4b.safetensors",
    "vae": "flux2-vae.safetensors",
}
Z_IMAGE = {
    "diffusion_models": "z_image_bf16.safetensors",
    "text_encoders": "qwen_3_4b.safetensors",
    "vae": "ae.safetensors",
}
KREA_2 = {
    "diffusion_models": "krea2_raw_fp8_scaled.safetensors",
    "text_encoders": "qwen3vl_4b_fp8_scaled.safetensors",
    "vae": "qwen_image_vae.safetensors",
}
ANIMA = {
    "diffusion_models": "anima-base-v1.0.safetensors",
    "text_encoders": "qwen_3_06b_base.safetensors",
    "vae": "qwen_image_vae.safetensors",
}
KREA_2_TURBO = "krea2_turbo_fp8_scaled.safetensors"
LORAS = ("dog.safetensors", "pixel-art.safetensors")
Link = tuple[str, str]
SUBJECT: dict[str, Link] = {"subject": ("subject", "subject")}
WITH_PRIORS: dict[str, Link] = SUBJECT | {"priors": ("priors", "priors")}


@dataclass(frozen=True)
class Node:
    """A node: its type and place, widget → value, input → (node, name or type of an output)."""

    type: str
    at: tuple[int, int]
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    title: str = ""
    size: tuple[int, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """For the browser."""
        return asdict(self)


@dataclass(frozen=True)
class Recipe:
    """A workflow."""

    nodes: dict[str, Node]
    note: str = ""


@dataclass(frozen=True)
class Blueprint:
    """A subgraph: the types of the nodes of a workflow that go into it, and (type, widget) of what it shows."""

    description: str
    recipe: Recipe
    inside: tuple[str, ...]
    shown: tuple[tuple[str, str], ...]


def loader(at: tuple[int, int], checkpoint: str = CHECKPOINT) -> Node:
    return Node("CheckpointLoaderSimple", at, {"ckpt_name": checkpoint}, size=(330, 110))


def parts(source: str = "base") -> dict[str, Link]:
    """MODEL, CLIP and VAE of a loader."""
    return {"model": (source, "MODEL"), "clip": (source, "CLIP"), "vae": (source, "VAE")}


def prompt(text: str, clip: Link, at: tuple[int, int], title: str = "Prompt") -> Node:
    return Node("CLIPTextEncode", at, {"text": text}, {"clip": clip}, title, (340, 110))


def sampler(model: Link, positive: str, negative: str, latent: str, at: tuple[int, int], title: str = "") -> Node:
    values = {"seed": 1, "control_after_generate": "fixed", "steps": 30, "cfg": 7.5}
    values |= {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
    links = {
        "model": model,
        "positive": (positive, "CONDITIONING"),
        "negative": (negative, "CONDITIONING"),
        "latent_image": (latent, "LATENT"),
    }
    return Node("KSampler", at, values, links, title, (320, 270))


def decoder(samples: str, at: tuple[int, int]) -> Node:
    return Node("VAEDecode", at, {}, {"samples": (samples, "LATENT"), "vae": ("base", "VAE")}, size=(220, 60))


def note(text: str, at: tuple[int, int], title: str, size: tuple[int, int] = (720, 260)) -> Node:
    return Node("MarkdownNote", at, {"": text}, title=title, size=size)


def subject(at: tuple[int, int], folder: str = "dog", token: str = "sks", noun: str = "dog", title: str = "") -> Node:
    values = {"folder": folder, "token": token, "class_noun": noun}
    return Node("DreamBoothSubject", at, values, title=title, size=(330, 420))


def priors(at: tuple[int, int], subject: str = "subject", **values: Any) -> Node:
    return Node("DreamBoothClassPriors", at, {"count": 100} | values, parts() | {"subject": (subject, "subject")})


def train(at: tuple[int, int], links: dict[str, Link], title: str = "", **values: Any) -> Node:
    return Node("DreamBoothTrainLora", at, {"seed": 0} | values, parts() | links, title, (380, 570))


def drawing(model: Link, clip: Link, text: str, at: tuple[int, int], prefix: str, side: int = 512) -> dict[str, Node]:
    """Prompt to saved picture, two columns from `at`."""
    left, top = at
    return {
        "prompt": prompt(text, clip, at),
        "negative": prompt("blurry, low quality", clip, (left, top + 170), "Negative prompt"),
        "latent": Node(
            "EmptyLatentImage", (left, top + 340), {"width": side, "height": side, "batch_size": 1}, size=(340, 110)
        ),
        "sample": sampler(model, "prompt", "negative", "latent", (left + 400, top)),
        "decode": decoder("sample", (left + 400, top + 320)),
        "save": Node(
            "SaveImage",
            (left + 760, top),
            {"filename_prefix": prefix},
            {"images": ("decode", "IMAGE")},
            size=(420, 440),
        ),
    }


START = """1. Drop 3 to 20 pictures of your subject on **Subject**, or put them into a folder in ComfyUI's `input`
folder and choose it.
2. Enter what it is in `class_noun` (dog, backpack, man …). `token` is the rare word for it: *sks dog*
in prompts.
3. Choose a checkpoint (Stable Diffusion 1.x, 2.x or SDXL; for SDXL set the resolution of **Train LoRA**
and the size of **Empty Latent Image** to 1024), adapt the prompt, and press **Run**.

**Train LoRA** shows its progress. You can cancel at any time; run again and it resumes. The LoRA is
saved in `models/loras`. A finished run is not trained again. All runs are in the sidebar, under
*Trainings*."""
PRIORS = """Like **train_then_generate**, but the model first generates 100 pictures of the class and trains on them
as well, so that other dogs stay as they are. They are generated once, kept on disk and reused. Training
takes longer with them."""
TWO = """One adapter for each subject, then both in one picture. Give them different rare words (*sks*, *rraj*)
and train each with class pictures of its own kind. If they blend in one picture, lower both strengths
to 0.8, or generate them one after the other with inpainting."""
ONE_RUN = """Both subjects in one training and one adapter: connect the second **Subject** to the *subject* input of
the first. **Class Priors** generates pictures of both classes. Give them different rare words;
*repeats* balances them if one has fewer pictures. Train longer than for one subject."""
SMALL = """SDXL on a card of 8 to 12 GB: gradient checkpointing, batch 1, attention layers only, resolution 1024
(768 works, too). Precision `auto` uses bf16 if the card supports it. Before the first step the log
reports the memory that the training needs; `base_quantization` nf4 and `optimizer` adamw-8bit (both
need bitsandbytes) lower it. If memory runs out, no progress is lost."""
STAGES = """First a concept (clothes, a style, a pose), then a person or pet on top of it: the second training uses
the first adapter, so that the two fit together. `combine` in **Training Settings** writes one file that
contains both."""
MERGE = """Choose your subject and your style (files of the same model family) and the checkpoint. **Merge LoRAs**
adds an input for every adapter; *strengths* has one number for each.

The heat map shows how much of each is kept in every block. **orthogonal** keeps the first adapter
unchanged and removes from the second what would interfere; **sum** is the plain sum of both."""
SCORE = """Trains with a checkpoint every 100 steps, generates pictures with each, and keeps the best:

1. Choose the folder in **Subject** and the checkpoint, as for training.
2. **Pick Best Checkpoint** measures subject fidelity, prompt following and the drift of the class. The
star in its plot marks the step that it picks; its help page (press **?**) explains how.
3. **Score Table** shows pictures without and with the picked adapter side by side, with their scores.

The score models are folders in `models/feature_models`: *openai/clip-vit-base-patch32* and, more
discriminating, *facebook/dino-vits16*. Turn **download** on to fetch them once, or name a file in
`models/clip_vision`."""

SCORE_AND_PICK = Recipe(
    {
        "note": note(SCORE, (0, -340), "Pick the best checkpoint", (1110, 330)),
        "base": loader((0, 40)),
        "subject": subject((0, 210)),
        "priors": priors((380, 40)),
        "settings": Node(
            "DreamBoothTrainingSettings",
            (380, 440),
            {"checkpoint_every": 100, "keep_adapters": True},
            size=(330, 300),
        ),
        "train": train((770, 40), WITH_PRIORS | {"settings": ("settings", "settings")}, name="my-dog", steps=800),
        "pick": Node(
            "DreamBoothPickBest",
            (1170, 40),
            {},
            parts() | {"subject": ("subject", "subject"), "run": ("train", "run")},
            size=(400, 760),
        ),
        "apply": Node(
            "DreamBoothApplyLora",
            (1620, 40),
            {},
            {"model": ("base", "MODEL"), "clip": ("base", "CLIP"), "lora": ("pick", "lora")},
            size=(270, 150),
        ),
        "plain": prompt("a photo of a dog on the beach", ("base", "CLIP"), (1620, 240), "Prompt, base"),
        "wanted": prompt("a photo of sks dog on the beach", ("apply", "clip"), (1620, 400), "Prompt, subject"),
        "negative": prompt("blurry, low quality", ("base", "CLIP"), (1620, 560), "Negative prompt"),
        "latent": Node(
            "EmptyLatentImage", (1620, 720), {"width": 512, "height": 512, "batch_size": 4}, size=(340, 110)
        ),
        "draw base": sampler(("base", "MODEL"), "plain", "negative", "latent", (2020, 40), "Without"),
        "draw": sampler(("apply", "model"), "wanted", "negative", "latent", (2020, 360), "With"),
        "decode base": decoder("draw base", (2020, 690)),
        "decode": decoder("draw", (2020, 790)),
        "table": Node(
            "DreamBoothScoreTable",
            (2400, 40),
            {"titles": "base\nbest checkpoint", "prompts": "a photo of a dog on the beach"},
            {
                "settings.images_0": ("decode base", "IMAGE"),
                "settings.images_1": ("decode", "IMAGE"),
                "subject": ("subject", "subject"),
            },
            size=(480, 760),
        ),
    }
)
KLEIN_NOTE = """FLUX.2 klein **base** 4B is a free model (Apache 2.0) in three files: choose them in the loaders.
Prompts are encoded by the graph's CLIP; nothing is loaded twice. Train on the base, not on the
distilled klein: the LoRA works with both. On a card of 12 GB keep **fit** in Training Settings on, or
set **base_quantization** to nf4."""

Z_IMAGE_NOTE = """Z-Image **base** is a free model (Apache 2.0) in three files: choose them in the loaders. Prompts are
encoded by the graph's CLIP; nothing is loaded twice. Train on the base, not on Z-Image Turbo: the LoRA
works with both. On a card of 16 GB keep **fit** in Training Settings on, or set **base_quantization**
to nf4."""


ANIMA_NOTE = """Anima **base** is a 2B model for drawings and anime, in three files: choose them in the loaders. Prompts
are encoded by the graph's CLIP; nothing is loaded twice. It understands tags as well as sentences. On a
card of 8 GB keep **fit** in Training Settings on."""


KREA_2_NOTE = """Krea 2 **RAW** is the model to train, Krea 2 **Turbo** the one to generate with, in eight steps: the
LoRA is trained on the first and applied to the second. Choose both, and the two files that they share,
in the loaders. Prompts are encoded by the graph's CLIP; nothing is loaded twice. On a card of 24 GB
keep **fit** in Training Settings on; on one of 12 GB also set **base_quantization** to nf4."""


def krea_2_drawing(at: tuple[int, int], prefix: str) -> dict[str, Node]:
    """The adapter on Turbo, then prompt to saved picture as ComfyUI's own template for Turbo draws."""
    left, top = at
    nodes = drawing(
        ("apply", "model"), ("clip", "CLIP"), "a photo of sks dog on the beach", (left, top + 280), prefix, 1024
    )
    sample, decode = nodes["sample"], nodes["decode"]
    values = {"steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    return nodes | {
        "turbo": Node("UNETLoader", at, {"unet_name": KREA_2_TURBO}, title="Turbo, to generate with", size=(340, 90)),
        "apply": Node(
            "DreamBoothApplyLora",
            (left + 400, top),
            {},
            {"model": ("turbo", "MODEL"), "lora": ("train", "lora")},
            size=(320, 150),
        ),
        "sample": replace(sample, values={**sample.values, **values}),
        "decode": replace(decode, links={**decode.links, "vae": ("vae", "VAE")}),
    }


def flow_drawing(at: tuple[int, int], prefix: str, *, steps: int, sampler_name: str) -> dict[str, Node]:
    """Prompt to saved picture as ComfyUI's own templates for Z-Image and Anima draw, two columns from `at`."""
    nodes = drawing(("train", "model"), ("train", "clip"), "a photo of sks dog on the beach", at, prefix, 1024)
    latent, sample, decode = nodes["latent"], nodes["sample"], nodes["decode"]
    values = {"steps": steps, "cfg": 4.0, "sampler_name": sampler_name, "scheduler": "simple"}
    return nodes | {
        "latent": replace(latent, type="EmptySD3LatentImage"),
        "sample": replace(sample, values={**sample.values, **values}),
        "decode": replace(decode, links={**decode.links, "vae": ("vae", "VAE")}),
    }


def klein_drawing(at: tuple[int, int], prefix: str, side: int = 1024) -> dict[str, Node]:
    """Prompt to saved picture with ComfyUI's nodes for FLUX.2, two columns from `at`."""
    left, top = at
    guided = {
        "model": ("train", "model"),
        "positive": ("prompt", "CONDITIONING"),
        "negative": ("negative", "CONDITIONING"),
    }
    sampled = {
        "noise": ("noise", "NOISE"),
        "guider": ("guider", "GUIDER"),
        "sampler": ("sampler", "SAMPLER"),
        "sigmas": ("sigmas", "SIGMAS"),
        "latent_image": ("latent", "LATENT"),
    }
    size = {"width": side, "height": side}
    return {
        "prompt": prompt("a photo of sks dog on the beach", ("train", "clip"), at),
        "negative": prompt("", ("train", "clip"), (left, top + 170), "Negative prompt"),
        "latent": Node("EmptyFlux2LatentImage", (left, top + 340), {**size, "batch_size": 1}, size=(340, 110)),
        "sigmas": Node("Flux2Scheduler", (left, top + 500), {"steps": 20, **size}, size=(340, 110)),
        "noise": Node(
            "RandomNoise", (left + 400, top), {"noise_seed": 1, "control_after_generate": "fixed"}, size=(320, 90)
        ),
        "guider": Node("CFGGuider", (left + 400, top + 140), {"cfg": 4.0}, guided, size=(320, 110)),
        "sampler": Node("KSamplerSelect", (left + 400, top + 300), {"sampler_name": "euler"}, size=(320, 60)),
        "sample": Node("SamplerCustomAdvanced", (left + 400, top + 410), {}, sampled, size=(320, 130)),
        "decode": Node(
            "VAEDecode",
            (left + 400, top + 590),
            {},
            {"samples": ("sample", "output"), "vae": ("vae", "VAE")},
            size=(220, 60),
        ),
        "save": Node(
            "SaveImage",
            (left + 780, top),
            {"filename_prefix": prefix},
            {"images": ("decode", "IMAGE")},
            size=(420, 440),
        ),
    }


MERGED = Recipe(
    {
        "note": note(MERGE, (0, 470), "Merge two LoRAs", (330, 330)),
        "base": loader((0, 0)),
        "dog": Node("DreamBoothLoadLora", (0, 180), {"file": LORAS[0]}, title="Subject", size=(330, 90)),
        "style": Node("DreamBoothLoadLora", (0, 330), {"file": LORAS[1]}, title="Style", size=(330, 90)),
        "merge": Node(
            "DreamBoothMergeLoras",
            (400, 180),
            {"strengths": "1.0, 0.8", "method": "orthogonal"},
            {"loras.lora_0": ("dog", "LORA_MODEL"), "loras.lora_1": ("style", "LORA_MODEL")},
            size=(330, 270),
        ),
        "report": Node("PreviewImage", (400, 510), {}, {"images": ("merge", "heat_map")}, "What is kept", (330, 260)),
        "apply": Node(
            "DreamBoothApplyLora",
            (800, 0),
            {},
            {"model": ("base", "MODEL"), "clip": ("base", "CLIP"), "lora": ("merge", "lora")},
            size=(280, 150),
        ),
        "keep": Node(
            "DreamBoothSaveLora", (800, 260), {"name": "dog-pixel-art"}, {"lora": ("merge", "lora")}, size=(280, 140)
        ),
        **drawing(
            ("apply", "model"),
            ("apply", "clip"),
            "pixel art, a photo of sks dog on the beach",
            (1140, 0),
            "dog-pixel-art",
        ),
    }
)
RECIPES: dict[str, Recipe] = {
    "train_then_generate": Recipe(
        {
            "note": note(START, (0, -310), "Train on your subject"),
            "base": loader((0, 40)),
            "subject": subject((0, 210)),
            "train": train((390, 40), SUBJECT, name="my-dog"),
            **drawing(("train", "model"), ("train", "clip"), "a photo of sks dog on the beach", (830, 40), "my-dog"),
        }
    ),
    "train_with_priors": Recipe(
        {
            "note": note(PRIORS, (0, -190), "Other dogs stay dogs", (720, 170)),
            "base": loader((0, 40)),
            "subject": subject((0, 210)),
            "priors": priors((390, 40)),
            "look": Node("PreviewImage", (390, 470), {}, {"images": ("priors", "IMAGE")}, "Class pictures", (330, 300)),
            "train": train((780, 40), WITH_PRIORS, name="my-dog-with-priors", steps=800),
            **drawing(("train", "model"), ("train", "clip"), "a photo of sks dog on the beach", (1220, 40), "my-dog"),
        }
    ),
    "two_subjects": Recipe(
        {
            "note": note(TWO, (0, -200), "Two subjects in one picture", (780, 170)),
            "base": loader((0, 40)),
            "subject": subject((0, 210), title="First subject"),
            "other": subject((0, 700), "cat", "rraj", "cat", "Second subject"),
            "priors": priors((390, 40)),
            "other priors": priors((390, 460), "other"),
            "train": train((780, 40), WITH_PRIORS, "Train the first", name="first", steps=800),
            "other train": train(
                (1220, 40),
                {"subject": ("other", "subject"), "priors": ("other priors", "priors")},
                "Train the second",
                name="second",
                steps=800,
            ),
            "merge": Node(
                "DreamBoothMergeLoras",
                (1660, 40),
                {"strengths": "1.0, 1.0", "method": "orthogonal"},
                {"loras.lora_0": ("train", "lora"), "loras.lora_1": ("other train", "lora")},
                size=(330, 270),
            ),
            "apply": Node(
                "DreamBoothApplyLora",
                (1660, 380),
                {},
                {"model": ("base", "MODEL"), "clip": ("base", "CLIP"), "lora": ("merge", "lora")},
                size=(330, 150),
            ),
            **drawing(
                ("apply", "model"),
                ("apply", "clip"),
                "a photo of sks dog and rraj cat on the beach",
                (2050, 40),
                "both",
            ),
        }
    ),
    "two_subjects_one_run": Recipe(
        {
            "note": note(ONE_RUN, (0, -200), "Two subjects in one adapter", (780, 170)),
            "base": loader((0, 40)),
            "other": subject((0, 210), "cat", "rraj", "cat", "Second subject"),
            "subject": replace(
                subject((0, 700), title="First subject"), links={"subject": ("other", "subject")}, size=(330, 440)
            ),
            "priors": priors((390, 40)),
            "train": train((780, 40), WITH_PRIORS, name="dog-and-cat", steps=1600),
            **drawing(
                ("train", "model"),
                ("train", "clip"),
                "a photo of sks dog and rraj cat on the beach",
                (1220, 40),
                "both",
            ),
        }
    ),
    "sdxl_on_a_small_card": Recipe(
        {
            "note": note(SMALL, (0, -200), "SDXL on a small card", (780, 170)),
            "base": loader((0, 40), XL_CHECKPOINT),
            "subject": subject((0, 210)),
            "settings": Node(
                "DreamBoothTrainingSettings",
                (390, 40),
                {"gradient_checkpointing": True, "batch_size": 1},
            ),
            "train": train(
                (780, 40),
                SUBJECT | {"settings": ("settings", "settings")},
                name="my-dog-xl",
                steps=800,
                rank=8,
                targets="attention",
                resolution=1024,
                preview_every=0,
            ),
            **drawing(
                ("train", "model"), ("train", "clip"), "a photo of sks dog on the beach", (1220, 40), "my-dog-xl", 1024
            ),
        }
    ),
    "flux2_klein": Recipe(
        {
            "note": note(KLEIN_NOTE, (0, -220), "FLUX.2 klein", (780, 190)),
            "base": Node("UNETLoader", (0, 40), {"unet_name": KLEIN["diffusion_models"]}, size=(330, 90)),
            "clip": Node(
                "CLIPLoader", (0, 180), {"clip_name": KLEIN["text_encoders"], "type": "flux2"}, size=(330, 110)
            ),
            "vae": Node("VAELoader", (0, 340), {"vae_name": KLEIN["vae"]}, size=(330, 60)),
            "subject": subject((0, 460)),
            "train": replace(
                train((390, 40), SUBJECT, name="my-dog-klein", preset="animal"),
                links={"model": ("base", "MODEL"), "clip": ("clip", "CLIP"), "vae": ("vae", "VAE")} | SUBJECT,
            ),
            **klein_drawing((830, 40), "my-dog-klein"),
        }
    ),
    "z_image": Recipe(
        {
            "note": note(Z_IMAGE_NOTE, (0, -220), "Z-Image", (780, 190)),
            "base": Node("UNETLoader", (0, 40), {"unet_name": Z_IMAGE["diffusion_models"]}, size=(330, 90)),
            "clip": Node(
                "CLIPLoader", (0, 180), {"clip_name": Z_IMAGE["text_encoders"], "type": "lumina2"}, size=(330, 110)
            ),
            "vae": Node("VAELoader", (0, 340), {"vae_name": Z_IMAGE["vae"]}, size=(330, 60)),
            "subject": subject((0, 460)),
            "train": replace(
                train((390, 40), SUBJECT, name="my-dog-z-image", preset="animal"),
                links={"model": ("base", "MODEL"), "clip": ("clip", "CLIP"), "vae": ("vae", "VAE")} | SUBJECT,
            ),
            **flow_drawing((830, 40), "my-dog-z-image", steps=25, sampler_name="euler"),
        }
    ),
    "anima": Recipe(
        {
            "note": note(ANIMA_NOTE, (0, -220), "Anima", (780, 190)),
            "base": Node("UNETLoader", (0, 40), {"unet_name": ANIMA["diffusion_models"]}, size=(330, 90)),
            "clip": Node(
                "CLIPLoader",
                (0, 180),
                {"clip_name": ANIMA["text_encoders"], "type": "stable_diffusion"},
                size=(330, 110),
            ),
            "vae": Node("VAELoader", (0, 340), {"vae_name": ANIMA["vae"]}, size=(330, 60)),
            "subject": subject((0, 460)),
            "train": replace(
                train((390, 40), SUBJECT, name="my-dog-anima", preset="animal"),
                links={"model": ("base", "MODEL"), "clip": ("clip", "CLIP"), "vae": ("vae", "VAE")} | SUBJECT,
            ),
            **flow_drawing((830, 40), "my-dog-anima", steps=30, sampler_name="er_sde"),
        }
    ),
    "krea_2": Recipe(
        {
            "note": note(KREA_2_NOTE, (0, -220), "Krea 2", (780, 190)),
            "base": Node(
                "UNETLoader", (0, 40), {"unet_name": KREA_2["diffusion_models"]}, title="RAW, to train", size=(330, 90)
            ),
            "clip": Node(
                "CLIPLoader", (0, 180), {"clip_name": KREA_2["text_encoders"], "type": "krea2"}, size=(330, 110)
            ),
            "vae": Node("VAELoader", (0, 340), {"vae_name": KREA_2["vae"]}, size=(330, 60)),
            "subject": subject((0, 460)),
            "train": replace(
                train((390, 40), SUBJECT, name="my-dog-krea-2", preset="animal"),
                links={"model": ("base", "MODEL"), "clip": ("clip", "CLIP"), "vae": ("vae", "VAE")} | SUBJECT,
            ),
            **krea_2_drawing((830, 40), "my-dog-krea-2"),
        }
    ),
    "two_stages": Recipe(
        {
            "note": note(STAGES, (0, -190), "A concept first, then a subject on top", (780, 160)),
            "base": loader((0, 40)),
            "concept": subject((0, 210), "style", "rraj", "style", "Concept"),
            "subject": subject((0, 700)),
            "first": train((390, 40), {"subject": ("concept", "subject")}, "First stage", name="concept", steps=800),
            "settings": Node("DreamBoothTrainingSettings", (820, 40), {"combine": True}, size=(330, 820)),
            "train": train(
                (1200, 40),
                SUBJECT | {"settings": ("settings", "settings"), "base_lora": ("first", "lora")},
                "Second stage",
                name="concept-and-dog",
                steps=600,
            ),
            **drawing(
                ("train", "model"), ("train", "clip"), "rraj style, a photo of sks dog", (1640, 40), "two-stages"
            ),
        }
    ),
    "merge_subject_and_style": MERGED,
    "train_score_pick": SCORE_AND_PICK,
}
BLUEPRINTS: dict[str, Blueprint] = {
    "DreamBooth - Train with Priors": Blueprint(
        "Pictures of a subject and class pictures in, the trained model out.",
        RECIPES["train_with_priors"],
        ("DreamBoothSubject", "DreamBoothClassPriors", "DreamBoothTrainLora"),
        (
            ("DreamBoothSubject", "folder"),
            ("DreamBoothSubject", "token"),
            ("DreamBoothSubject", "class_noun"),
            ("DreamBoothClassPriors", "count"),
            ("DreamBoothTrainLora", "name"),
            ("DreamBoothTrainLora", "steps"),
            ("DreamBoothTrainLora", "resolution"),
        ),
    ),
    "DreamBooth - Pick and Apply": Blueprint(
        "The best checkpoint of a run, put on its model.",
        SCORE_AND_PICK,
        ("DreamBoothPickBest", "DreamBoothApplyLora"),
        (
            ("DreamBoothPickBest", "prompts"),
            ("DreamBoothPickBest", "count"),
            ("DreamBoothPickBest", "clip_model"),
            ("DreamBoothApplyLora", "strength_model"),
        ),
    ),
}
