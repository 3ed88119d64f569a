"""The example workflows, as `make_workflows.py` builds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
XL_CHECKPOINT = "sd_xl_base_1.0.safetensors"
LORAS = ("dog.safetensors", "pixel-art.safetensors")
Link = tuple[str, str]


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


SCORE = """Trains with a checkpoint every 100 steps, draws with every one, and keeps the best:

1. Choose the folder in **Subject** and the checkpoint, as for training.
2. **Pick Best Checkpoint** measures likeness, prompt following and the drift of the class. The star in its plot is the
   step that it picks; its page (press **?**) tells how.
3. **Score Table** puts pictures without and with the picked adapter side by side, with their scores.

The models that judge are folders in `models/feature_models`: *openai/clip-vit-base-patch32* and, finer,
*facebook/dino-vits16*. Turn **download** on to fetch them once, or name a file in `models/clip_vision`."""

RECIPES: dict[str, Recipe] = {
    "train_score_pick": Recipe(
        {
            "note": note(SCORE, (0, -340), "Know when it is good", (1110, 330)),
            "base": loader((0, 40)),
            "subject": Node(
                "DreamBoothSubject", (0, 210), {"folder": "dog", "token": "sks", "class_noun": "dog"}, size=(330, 190)
            ),
            "priors": Node(
                "DreamBoothClassPriors", (380, 40), {"count": 100}, parts() | {"subject": ("subject", "subject")}
            ),
            "settings": Node(
                "DreamBoothTrainingSettings",
                (380, 440),
                {"checkpoint_every": 100, "keep_adapters": True},
                size=(330, 300),
            ),
            "train": Node(
                "DreamBoothTrainLora",
                (770, 40),
                {"name": "my-dog", "steps": 800, "seed": 0},
                parts()
                | {
                    "subject": ("subject", "subject"),
                    "priors": ("priors", "priors"),
                    "settings": ("settings", "settings"),
                },
                size=(340, 560),
            ),
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
    ),
}
