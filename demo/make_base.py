"""Makes the demo's base models, their scorer and their pictures, from random numbers alone.

    python demo/make_base.py --out FOLDER [--stages drawings,vae,clip,unet,rare,language,transformer,flux2,pictures] \
        [--effort 1.0]

Stages run in this order; one whose output is already in FOLDER is skipped, so a run that was cut short
goes on where it stopped. Intermediate results are kept in FOLDER/work.
"""

import argparse
import json
import logging
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from flow import (
    MAX_TOKENS,
    embed_unused_words,
    encode_in_template,
    flux2_autoencoder,
    load_language_tokenizer,
    normalized_latents,
    tokenize_in_template,
    train_language,
    train_language_vocabulary,
    train_transformer,
)
from palette import SIZE
from PIL import Image
from torch import Tensor
from training import encode_captions, encode_pictures, make_scheduler, train_clip, train_unet, train_vae
from transformers import CLIPModel, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging
from words import (
    embed_unused_tokens,
    load_tokenizer,
    save_tokenizer,
    text_encoder_of,
    tokenize,
    train_vocabulary,
    use_prefixed_names,
)
from world import SUBJECT_PLACES, patterned_pictures, sample, style_picture, subject_picture

LOG = logging.getLogger("demo")

PICTURES = 24000
MIN_PICTURES = 256
PATTERNED_PICTURES = 9000
MIN_PATTERNED_PICTURES = 96
STYLE_PICTURES = 24
SAMPLING_STEPS = 25

DRAWINGS_SEED = 1
PATTERNED_SEED = 7
RARE_SEED = 0
SAMPLES_SEED = 0
SUBJECT_AND_STYLE_SEED = 42

SAMPLE_PROMPTS = (
    "a red dog on the grass",
    "a blue cat in the snow",
    "a photo of a dog on the beach",
    "a yellow car on a brick street",
    "a purple mug on a wooden floor",
    "a white robot at night wearing a red hat",
    "a dog",
    "a green fish on pink fabric",
)
SAMPLES_PER_PROMPT = 3


class MissingStageError(Exception):
    """A stage needs the output of one that has not run.

    Args:
        missing: The file or folder that does not exist.
        remedy: What to do about it.
    """

    def __init__(self, missing: Path, remedy: str) -> None:
        """Composes the message of its two parts."""
        super().__init__(f"{missing} is missing: {remedy}")
        self.missing = missing
        self.remedy = remedy


@dataclass(frozen=True)
class Run:
    """What all stages share.

    Attributes:
        out: The output folder.
        effort: Scales the number of pictures and of training steps; 1 is the effort that went into the shipped base.
        device: On which models are trained.
    """

    out: Path
    effort: float
    device: torch.device

    def scaled(self, count: int, at_least: int) -> int:
        """Returns `effort` times a number of pictures, but at least `at_least`."""
        return max(at_least, round(self.effort * count))

    def require(self, output: str, stage: str) -> Path:
        """Returns the path of another stage's output.

        Raises:
            MissingStageError: It does not exist.
        """
        path = self.out / output
        if not path.exists():
            raise MissingStageError(path, f"run the stage {stage!r} first")
        return path


class Drawings(NamedTuple):
    """The output of the stage `drawings`.

    Attributes:
        pictures: Pictures of the world, uint8 (n, SIZE, SIZE, 3).
        captions: Their captions.
        patterned: Patterned and pixelated things, uint8 (m, SIZE, SIZE, 3).
    """

    pictures: Tensor
    captions: list[str]
    patterned: Tensor


@contextmanager
def _finished(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` at the end: what has that name is complete."""
    part = path.with_name(f"part-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(part)
    yield part
    _remove(path)
    part.rename(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def draw_world(run: Run) -> None:
    """Draws captioned pictures for all models and patterned ones for the autoencoder; learns the vocabulary."""
    count = run.scaled(PICTURES, MIN_PICTURES)
    pictures = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    captions = []
    rng = random.Random(DRAWINGS_SEED)
    for index in range(count):
        picture, caption = sample(rng)
        pictures[index] = np.asarray(picture)
        captions.append(caption)
    patterned_count = run.scaled(PATTERNED_PICTURES, MIN_PATTERNED_PICTURES)
    patterned = np.stack(
        [np.asarray(picture) for picture in patterned_pictures(patterned_count, random.Random(PATTERNED_SEED))]
    )
    LOG.info("drawings: %d pictures of the world, %d patterned", count, patterned_count)
    with _finished(run.out / "work/tokenizer") as folder:
        folder.mkdir()
        train_vocabulary(captions, folder)
    with _finished(run.out / "work/drawings.npz") as file:
        np.savez(file, pictures=pictures, captions=np.array(captions), patterned=patterned)


def _load_drawings(run: Run) -> Drawings:
    with np.load(run.require("work/drawings.npz", "drawings")) as file:
        return Drawings(
            pictures=torch.from_numpy(file["pictures"]),
            captions=file["captions"].tolist(),
            patterned=torch.from_numpy(file["patterned"]),
        )


def make_vae(run: Run) -> None:
    """Trains the autoencoder."""
    drawings = _load_drawings(run)
    vae = train_vae(drawings.pictures, drawings.patterned, run.effort, run.device)
    with _finished(run.out / "work/vae") as folder:
        vae.save_pretrained(folder)


def make_clip(run: Run) -> None:
    """Trains CLIP: its text tower conditions the denoiser, and the whole model is the scorer."""
    drawings = _load_drawings(run)
    tokenizer = load_tokenizer(run.require("work/tokenizer", "drawings"))
    clip = train_clip(drawings.pictures, drawings.captions, tokenizer, run.effort, run.device)
    with _finished(run.out / "work/clip") as folder:
        clip.save_pretrained(folder)


def make_unet(run: Run) -> None:
    """Trains the denoiser on latents and embeddings that are computed once."""
    drawings = _load_drawings(run)
    tokenizer = load_tokenizer(run.require("work/tokenizer", "drawings"))
    vae = AutoencoderKL.from_pretrained(run.require("work/vae", "vae")).to(run.device)
    clip = CLIPModel.from_pretrained(run.require("work/clip", "clip"))
    text_encoder = text_encoder_of(clip).to(run.device)
    latents = encode_pictures(vae, drawings.pictures, run.device) * vae.config.scaling_factor
    embeddings, rows = encode_captions(text_encoder, tokenizer, drawings.captions, run.device)
    LOG.info("unet: %d latents, %d different captions", len(latents), len(embeddings) - 1)
    unet = train_unet(latents, embeddings, rows, run.effort, run.device)
    with _finished(run.out / "work/unet") as folder:
        unet.save_pretrained(folder)


def make_language(run: Run) -> None:
    """Learns the vocabulary of the language model that encodes klein's prompts, and trains it."""
    captions = _load_drawings(run).captions
    with _finished(run.out / "work/language-tokenizer") as folder:
        folder.mkdir()
        train_language_vocabulary(captions, folder)
    tokenizer = load_language_tokenizer(run.out / "work/language-tokenizer")
    model = train_language(captions, tokenizer, run.effort, run.device)
    used = set(tokenize_in_template(tokenizer, sorted(set(captions))).flatten().tolist())
    embed_unused_words(model.to("cpu"), used, torch.Generator().manual_seed(RARE_SEED))
    with _finished(run.out / "work/language") as folder:
        model.save_pretrained(folder)


def make_transformer(run: Run) -> None:
    """Trains klein's transformer on latents and embeddings that are computed once."""
    drawings = _load_drawings(run)
    tokenizer = load_language_tokenizer(run.require("work/language-tokenizer", "language"))
    language = Qwen3ForCausalLM.from_pretrained(run.require("work/language", "language"), dtype=torch.float32)
    embeddings, rows = encode_in_template(language.to(run.device), tokenizer, drawings.captions, run.device)
    vae = AutoencoderKL.from_pretrained(run.require("work/vae", "vae")).to(run.device)
    means = encode_pictures(vae, drawings.pictures, run.device)
    autoencoder = flux2_autoencoder(vae, means)
    LOG.info("transformer: %d latents, %d different captions", len(means), len(embeddings) - 1)
    latents = normalized_latents(autoencoder.to(run.device), means)
    state = run.out / "work/transformer-state.pt"
    transformer = train_transformer(latents, embeddings, rows, run.effort, run.device, state)
    with _finished(run.out / "work/flux2-vae") as folder:
        autoencoder.to("cpu").save_pretrained(folder)
    with _finished(run.out / "work/transformer") as folder:
        transformer.save_pretrained(folder)
    state.unlink(missing_ok=True)


def write_flux2(run: Run) -> None:
    """Writes klein's pipeline in fp16, and a sheet of samples generated in fp32."""
    words = run.require("work/language-tokenizer", "language")
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2.from_pretrained(run.require("work/flux2-vae", "transformer")),
        text_encoder=Qwen3ForCausalLM.from_pretrained(run.require("work/language", "language"), dtype=torch.float32),
        tokenizer=load_language_tokenizer(words),
        transformer=Flux2Transformer2DModel.from_pretrained(run.require("work/transformer", "transformer")),
    )
    with _finished(run.out / "samples-flux2.png") as file:
        steps = min(SAMPLING_STEPS, run.scaled(SAMPLING_STEPS, 2))
        _generate_samples(pipeline, run.device, steps, max_sequence_length=MAX_TOKENS).save(file)
    with _finished(run.out / "flux2") as folder:
        for model in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
            model.to("cpu").half()
        pipeline.save_pretrained(folder)
        for file in words.iterdir():  # transformers 4 reads files that 5 leaves out
            shutil.copyfile(file, folder / "tokenizer" / file.name)
        (folder / "text_encoder/generation_config.json").unlink(missing_ok=True)
        for part in ("vae", "text_encoder", "transformer"):
            _drop_origin(folder / part / "config.json")


def write_models(run: Run) -> None:
    """Gives rare tokens an embedding, then writes the pipeline, the scorer and a sheet of samples.

    The models are written in fp16; the sheet is generated in fp32.
    """
    words = run.require("work/tokenizer", "drawings")
    tokenizer = load_tokenizer(words)
    clip = CLIPModel.from_pretrained(run.require("work/clip", "clip"))
    text_encoder = text_encoder_of(clip)
    captions = sorted(set(_load_drawings(run).captions))
    used = set(tokenize(tokenizer, captions).flatten().tolist())
    embed_unused_tokens(text_encoder, used, torch.Generator().manual_seed(RARE_SEED))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(run.require("work/vae", "vae")),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(run.require("work/unet", "unet")),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with _finished(run.out / "samples.png") as file:
        scheduler = pipeline.scheduler
        pipeline.scheduler = DDIMScheduler.from_config(scheduler.config)
        steps = min(SAMPLING_STEPS, run.scaled(SAMPLING_STEPS, 2))
        _generate_samples(pipeline, run.device, steps).save(file)
        pipeline.scheduler = scheduler
    with _finished(run.out / "scorer") as folder:
        clip.half().save_pretrained(folder)
        _drop_origin(folder / "config.json")
        save_tokenizer(tokenizer, words, folder)
    with _finished(run.out / "base") as folder:
        for model in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            model.to("cpu").half()
        pipeline.save_pretrained(folder)
        save_tokenizer(tokenizer, words, folder / "tokenizer")
        use_prefixed_names(folder / "text_encoder/model.safetensors")
        for part in ("vae", "text_encoder", "unet"):
            _drop_origin(folder / part / "config.json")


def _drop_origin(config_file: Path) -> None:
    """Drops the path of the loaded model, which some versions write into its configuration."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def _generate_samples(pipeline: DiffusionPipeline, device: torch.device, steps: int, **options: int) -> Image.Image:
    """Generates a sheet of pictures, a prompt per column, enlarged three times."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline.to(device)(
        prompt=list(SAMPLE_PROMPTS * SAMPLES_PER_PROMPT),
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(SAMPLES_SEED),
        height=SIZE,
        width=SIZE,
        **options,
    ).images
    columns = len(SAMPLE_PROMPTS)
    sheet = Image.new("RGB", (columns * SIZE, SAMPLES_PER_PROMPT * SIZE))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * SIZE, index // columns * SIZE))
    return sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST)


def write_pictures(run: Run) -> None:
    """Draws the subject's pictures, and the style's with a caption beside each."""
    rng = random.Random(SUBJECT_AND_STYLE_SEED)
    with _finished(run.out / "subject") as folder:
        folder.mkdir()
        for index, place in enumerate(SUBJECT_PLACES):
            subject_picture(place, rng).save(folder / f"{index}.png")
    with _finished(run.out / "style") as folder:
        folder.mkdir()
        for index in range(STYLE_PICTURES):
            picture, caption = style_picture(rng)
            picture.save(folder / f"{index:02d}.png")
            (folder / f"{index:02d}.txt").write_text(f"{caption}\n", encoding="utf-8", newline="\n")


class Stage(NamedTuple):
    """A stage of the making.

    Attributes:
        make: Makes the outputs.
        outputs: Files and folders; if all of them exist, the stage is skipped.
    """

    make: Callable[[Run], None]
    outputs: tuple[str, ...]


STAGES = {
    "drawings": Stage(draw_world, ("work/tokenizer", "work/drawings.npz")),
    "vae": Stage(make_vae, ("work/vae",)),
    "clip": Stage(make_clip, ("work/clip",)),
    "unet": Stage(make_unet, ("work/unet",)),
    "rare": Stage(write_models, ("samples.png", "scorer", "base")),
    "language": Stage(make_language, ("work/language-tokenizer", "work/language")),
    "transformer": Stage(make_transformer, ("work/flux2-vae", "work/transformer")),
    "flux2": Stage(write_flux2, ("samples-flux2.png", "flux2")),
    "pictures": Stage(write_pictures, ("subject", "style")),
}


def make_base(run: Run, stages: Sequence[str]) -> None:
    """Runs stages in their own order, whatever the order in which they are named.

    Raises:
        MissingStageError: A stage needs the output of one that has not run.
    """
    for name, stage in STAGES.items():
        if name not in stages:
            continue
        if all((run.out / output).exists() for output in stage.outputs):
            LOG.info("%s: already there", name)
            continue
        stage.make(run)
        LOG.info("%s: done", name)


def _stage_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return names


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Makes the demo's base models, their scorer and their pictures.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--stages", type=_stage_names, default=list(STAGES), help=f"comma-separated; default {','.join(STAGES)}"
    )
    parser.add_argument(
        "--effort", type=_positive, default=1.0, help="scales pictures and training steps; 0.002 only tries it out"
    )
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, help="CPU threads that torch may use; default: torch's own choice")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parse_arguments(arguments)
    transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    LOG.setLevel(logging.INFO)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        make_base(Run(options.out, options.effort, device), options.stages)
    except MissingStageError as error:
        LOG.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
