"""What reads the files of strangers, a target each: broken content goes in, and only an error of our own comes out.

`tests/test_hostile_files.py` tries a few inputs of each target every day, `tools/fuzz.py` as many as its time allows.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bare_host import bare_host
from checkpoints import sd15_checkpoint
from helpers import DEMO, TINY, Recorder
from hostile_bytes import (
    damaged,
    json_files,
    json_lines,
    png_files,
    safetensors_files,
    text_files,
    toml_files,
    zip_files,
)
from hostile_requests import Request, assert_harmless, hostile_requests
from hypothesis import strategies as st
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.cli.flags import settings_from
from pack.trainer.cli.inspect import facts_as_text, inspect
from pack.trainer.cli.merge import run_convert, run_merge
from pack.trainer.core.errors import TrainerError
from pack.trainer.data.images import load_pictures
from pack.trainer.models.open import open_base
from pack.trainer.settings.merge import ConvertCommand, MergeCommand
from pack.trainer.settings.train import TrainCommand
from pack.trainer.training.runs.checkpoint import read_checkpoint
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.index import RunIndex
from PIL import Image
from sites import Site, make_site

VERSION = Path(__file__).resolve().parents[1] / "golden" / "versions" / "0.4.0"


@dataclass(frozen=True)
class Target:
    """Something that reads content from outside.

    Attributes:
        contents: Draws broken content.
        read: Reads it; gets the content and an empty folder. An error that is no `TrainerError` is a fault.
    """

    contents: Callable[[], st.SearchStrategy[bytes]]
    read: Callable[[bytes, Path], None]

    def check(self, content: bytes) -> None:
        """Read the content.

        Raises:
            Exception: Any but a `TrainerError`: a fault.
        """
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                self.read(content, Path(folder))
            except TrainerError as error:
                if not (error.problem.strip() and error.remedy.strip()):
                    raise AssertionError("an error without words") from error


@cache
def _small_adapter() -> bytes:
    """A LoRA of two modules of the demo's UNet, with metadata."""
    from safetensors.torch import save

    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {}
    for module in (name, text):
        tensors[f"{module}.lora_down.weight"] = torch.ones(2, 8)
        tensors[f"{module}.lora_up.weight"] = torch.ones(8, 2)
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    peft = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 2}, "unet.rank_pattern": {}}
    metadata = {
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "ss_tag_frequency": json.dumps({"10_dog": {"sks dog": 3}}),
        "ss_bucket_info": json.dumps({"buckets": {"0": {"resolution": [64, 64], "count": 4}}}),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "lora_adapter_metadata": json.dumps(peft),
    }
    return save(tensors, metadata)


@cache
def _small_checkpoint() -> bytes:
    with TemporaryDirectory() as folder:
        return sd15_checkpoint(Path(folder) / "tiny.safetensors", size=TINY).read_bytes()


@cache
def _png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((32, 24), 90).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@cache
def _encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.effect_noise((32, 24), 90).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    picture.save(buffer, form, exif=exif.tobytes())
    return buffer.getvalue()


def _read_adapter_file(content: bytes, folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(content)
    _use_adapter(path, folder)


def _use_adapter(path: Path, folder: Path) -> None:
    """Describe, convert and merge it; what was written reads as finite numbers."""
    facts_as_text(inspect(path, blocks=True))
    for form in ("kohya", "diffusers"):
        settings = ConvertCommand(lora=path, output=folder / f"{form}.safetensors", format=form)
        written, _ = run_convert(settings, Recorder())
        assert _is_finite(written), f"{form}: not finite"
    merged, _ = run_merge(MergeCommand(loras=(f"{path}:0.5",), output=folder / "merged.safetensors"), Recorder())
    assert _is_finite(merged), "merged: not finite"


def _is_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in read_adapter(path).state_dict().values())


def _read_peft_folder(content: bytes, folder: Path) -> None:
    from safetensors.torch import save_file

    peft = folder / "peft"
    peft.mkdir()
    module = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_bytes(content)
    _use_adapter(peft, folder)


_PEFT = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "alpha_pattern": {"to_q": 2},
    "rank_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "target_modules": ["to_q"],
    "modules_to_save": None,
}


def _read_checkpoint_file(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    open_base(path, DEMO / "base" / "tokenizer")


def _read_model_folder(file: str) -> Callable[[bytes, Path], None]:
    """Opens the demo's base model with one file replaced."""

    def read(content: bytes, folder: Path) -> None:
        base = folder / "base"
        shutil.copytree(DEMO / "base", base, copy_function=lambda source, target: Path(target).symlink_to(source))
        (base / file).unlink()
        (base / file).write_bytes(content)
        open_base(base)

    return read


def _demo_json(file: str) -> Callable[[], st.SearchStrategy[bytes]]:
    return lambda: json_files(json.loads((DEMO / "base" / file).read_text(encoding="utf-8")))


def _read_pictures(path: Path) -> None:
    for picture in load_pictures(path, "a photo of sks dog", Recorder()):
        picture.open()


def _read_picture(content: bytes, folder: Path) -> None:
    (folder / "0.png").write_bytes(content)
    _read_pictures(folder)


def _read_mask(content: bytes, folder: Path) -> None:
    (folder / "0.png").write_bytes(_png())
    (folder / "0_mask.png").write_bytes(content)
    _read_pictures(folder)


def _read_caption(content: bytes, folder: Path) -> None:
    (folder / "0.png").write_bytes(_png())
    (folder / "0.txt").write_bytes(content)
    _read_pictures(folder)


def _read_metadata_lines(content: bytes, folder: Path) -> None:
    (folder / "0.png").write_bytes(_png())
    (folder / "metadata.jsonl").write_bytes(content)
    _read_pictures(folder)


def _read_metadata_rows(content: bytes, folder: Path) -> None:
    (folder / "0.png").write_bytes(_png())
    (folder / "metadata.csv").write_bytes(content)
    _read_pictures(folder)


def _read_zip(content: bytes, folder: Path) -> None:
    (folder / "pictures.zip").write_bytes(content)
    _read_pictures(folder / "pictures.zip")


def _read_toml(content: bytes, folder: Path) -> None:
    path = folder / "run.toml"
    path.write_bytes(content)
    settings_from(argparse.Namespace(config=path), TrainCommand)


_KEYS = {
    "base": '"model.safetensors"',
    "images": '"pictures"',
    "steps": "10",
    "rank": "4",
    "learning_rate": "1e-4",
    "text_encoder_lr": "1e-5",
    "resolution": "512",
    "seed": "7",
    "flip": "true",
    "class_prompt": '"a photo of a dog"',
    "block_ranks": '"mid_block=4"',
    "base_lora": '["x.safetensors:0.5"]',
    "preview_prompts": '"a dog | a cat"',
    "save_precision": '"fp16"',
}


def _run_with(file: str) -> Callable[[bytes, Path], None]:
    """Reads a run of an earlier version with one file replaced: as the pages list it, and as one that is resumed."""

    def read(content: bytes, folder: Path) -> None:
        [source] = (VERSION / "runs").iterdir()
        run = folder / "runs" / source.name
        shutil.copytree(source, run)
        (run / file).write_bytes(content)
        index = RunIndex(folder / "runs")
        for name in index.names():  # a page that lists runs shows the others, too: no error at all
            index.summary(name)
            json.dumps(index.details(name))
            json.dumps(index.curve(name))
        opened = RunFolder.existing(run)
        for step in opened.steps():
            read_checkpoint(opened.checkpoint_path(step), step)

    return read


def _run_file(file: str) -> bytes:
    [source] = (VERSION / "runs").iterdir()
    return (source / file).read_bytes()


def _lines(file: str) -> list[object]:
    return [json.loads(line) for line in _run_file(file).splitlines()]


@cache
def _site() -> tuple[Site, TemporaryDirectory[str]]:
    """A host's folders, which are gone when the process ends."""
    folder = TemporaryDirectory(ignore_cleanup_errors=True)
    return make_site(Path(folder.name)), folder


def _requests() -> st.SearchStrategy[bytes]:
    return hostile_requests(_site()[0]).map(Request.to_bytes)


def _answer(content: bytes, folder: Path) -> None:
    site, _ = _site()
    with bare_host(site.base_dir) as url:
        assert_harmless(replace(site, url=url), Request.from_bytes(content))


_STATE = "step-00000004/state.json"
_PICTURES = ("JPEG", "WEBP", "GIF", "BMP", "TIFF")
_TREE = ("10_sks dog/a.png", "10_sks dog/b.png", "10_sks dog/b.txt")

TARGETS: dict[str, Target] = {
    "adapter": Target(lambda: safetensors_files(_small_adapter()), _read_adapter_file),
    "adapter-config": Target(lambda: json_files(_PEFT), _read_peft_folder),
    "checkpoint": Target(lambda: safetensors_files(_small_checkpoint()), _read_checkpoint_file),
    "model-index": Target(_demo_json("model_index.json"), _read_model_folder("model_index.json")),
    "unet-config": Target(_demo_json("unet/config.json"), _read_model_folder("unet/config.json")),
    "text-config": Target(_demo_json("text_encoder/config.json"), _read_model_folder("text_encoder/config.json")),
    "vae-config": Target(_demo_json("vae/config.json"), _read_model_folder("vae/config.json")),
    "scheduler": Target(
        _demo_json("scheduler/scheduler_config.json"), _read_model_folder("scheduler/scheduler_config.json")
    ),
    "vocabulary": Target(_demo_json("tokenizer/vocab.json"), _read_model_folder("tokenizer/vocab.json")),
    "png": Target(lambda: png_files(_png()), _read_picture),
    "picture": Target(lambda: st.sampled_from(_PICTURES).flatmap(lambda form: damaged(_encoded(form))), _read_picture),
    "mask": Target(lambda: png_files(_png()), _read_mask),
    "caption": Target(
        lambda: text_files("a photo of {token} {class} on the lawn | sks dog, \n side view"), _read_caption
    ),
    "metadata-lines": Target(
        lambda: json_lines([{"file_name": "0.png", "text": "sks dog"}, {"file_name": "1.png", "caption": "x"}]),
        _read_metadata_lines,
    ),
    "metadata-rows": Target(
        lambda: text_files('file_name,text\n0.png,a sks dog\n1.png,"a dog, asleep"\n'), _read_metadata_rows
    ),
    "request": Target(_requests, _answer),
    "zip": Target(
        lambda: zip_files({name: b"sks dog" if name.endswith(".txt") else _png() for name in _TREE}), _read_zip
    ),
    "toml": Target(lambda: toml_files(_KEYS), _read_toml),
    "run-record": Target(lambda: json_files(json.loads(_run_file("run.json"))), _run_with("run.json")),
    "run-state": Target(lambda: json_files(json.loads(_run_file(_STATE))), _run_with(_STATE)),
    "run-metrics": Target(lambda: json_lines(_lines("metrics.jsonl")), _run_with("metrics.jsonl")),
    "run-adapter": Target(
        lambda: safetensors_files(_run_file("step-00000004/adapter.safetensors")),
        _run_with("step-00000004/adapter.safetensors"),
    ),
    "run-optimizer": Target(
        lambda: safetensors_files(_run_file("step-00000004/optimizer.safetensors")),
        _run_with("step-00000004/optimizer.safetensors"),
    ),
}
