"""Bad input: an error that names the thing and a remedy, before any long work, and nothing made before is lost.

The tables hold one small function for each mistake; it prepares the mistake and returns the settings that make it.
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import mostly_slow
from checkpoints import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, sd15_state_dict
from helpers import DEMO, TINY, Recorder
from pack.trainer.__main__ import main
from pack.trainer.adapters.kohya import Adapter, LoraLayer, write_adapter
from pack.trainer.adapters.layers import make_layer
from pack.trainer.cli.train import run_generate, run_train
from pack.trainer.core.errors import (
    AdapterError,
    DivergedError,
    PicturesError,
    SettingsError,
    StorageError,
    TrainerError,
    UnsupportedModelError,
    WeightsError,
)
from pack.trainer.core.events import Phase, Step
from pack.trainer.data.images import load_pictures
from pack.trainer.settings.train import GenerateCommand, TrainCommand
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

PROMPT = "a photo of sks dog"
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class World:
    """What a mistake is made with: a good base model, good pictures, and an output folder that holds earlier work."""

    path: Path
    base: Path
    pictures: Path
    out: Path
    monkeypatch: pytest.MonkeyPatch

    def training(self, changes: Values) -> Values:
        """Settings that train well, but for `changes`."""
        return {
            "base": self.base,
            "tokenizer": self.base.parent / "tokenizer",
            "images": self.pictures,
            "class_prompt": "a photo of a dog",
            "prior_count": 1,
            "prior_steps": 1,
            "steps": 1,
            "rank": 2,
            "resolution": 64,
            "device": "cpu",
            "output_dir": self.out,
            **changes,
        }

    def checkpoint(self, name: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
        """A variation of the tiny base model."""
        tensors = tiny_tensors()
        change(tensors)
        save_file(tensors, self.path / name)
        return self.path / name

    def folder(self, name: str) -> Path:
        """The demo's base model in diffusers' layout; its files may be replaced."""
        path = self.path / name
        for file in (DEMO / "base").rglob("*"):
            if file.is_file():
                copy = path / file.relative_to(DEMO / "base")
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.symlink_to(file)
        return path


@pytest.fixture
def world(
    tmp_path: Path, tiny_checkpoint: Path, picture_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> World:
    out = tmp_path / "my loras"
    for name in ("my-subject.safetensors", "runs/cat-0123/step-00000009/state.json", "class-pictures/4567/00000.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(f"earlier work: {name}".encode())
    return World(tmp_path, tiny_checkpoint, picture_folder(name="good"), out, monkeypatch)


def tiny_tensors() -> dict[str, Tensor]:
    if not _TINY:
        _TINY.update(sd15_state_dict(TINY))
    return dict(_TINY)


_TINY: dict[str, Tensor] = {}


pytestmark = pytest.mark.usefixtures("quick")


def files_below(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "metrics.jsonl")  # which grows
    return {path: path.read_bytes() for path in files}


def everything(world: World) -> tuple[list[str], dict[Path, bytes]]:
    """The earlier work, and what lies beside it."""
    return sorted(path.name for path in world.path.iterdir()), files_below(world.out)


Case = Callable[[World], Values]
TRAINING: list[Any] = []
DRAWING: list[Any] = []


def add(
    table: list[Any],
    label: str,
    case: Case,
    error: type[TrainerError],
    *names: str,
    remedy: str = "",
) -> None:
    """Enter a mistake: the error it must give, what the error's problem and remedy must name."""
    table.append(pytest.param(case, error, names, remedy, id=label))


def mistake(table: list[Any], error: type[TrainerError], *names: str, remedy: str = "") -> Callable[[Case], Case]:
    """Enter the decorated function."""

    def enter(case: Case) -> Case:
        add(table, case.__name__.replace("_", " "), case, error, *names, remedy=remedy)
        return case

    return enter


@mistake(TRAINING, PicturesError, "no-such-folder", "exist", remedy="path")
def missing_folder(world: World) -> Values:
    return {"images": world.path / "no-such-folder"}


@mistake(TRAINING, PicturesError, "empty folder", "no pictures", remedy="3 to 20")
def empty_folder(world: World) -> Values:
    (world.path / "empty folder").mkdir()
    return {"images": world.path / "empty folder"}


@mistake(TRAINING, PicturesError, "texts", "no pictures", remedy="3 to 20")
def folder_without_pictures(world: World) -> Values:
    (world.path / "texts").mkdir()
    (world.path / "texts" / "1.txt").write_text("a caption alone")
    return {"images": world.path / "texts"}


@mistake(TRAINING, PicturesError, "good", "denied", remedy="permissions")
def unreadable_folder(world: World) -> Values:
    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any = ".") -> Any:
            if Path(path) == world.pictures:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path)

        return guarded

    world.monkeypatch.setattr(os, "listdir", guard(os.listdir))
    world.monkeypatch.setattr(os, "scandir", guard(os.scandir))
    return {}


@mistake(TRAINING, PicturesError, "0.jpg", "1.png", remedy="JPEG")
def no_picture_is_good(world: World) -> Values:
    folder = world.path / "broken"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(b"<html>404</html>")
    (folder / "1.png").write_bytes((world.pictures / "1.png").read_bytes()[:200])
    return {"images": folder}


@mistake(TRAINING, PicturesError, "dot.png", "1×1", "32 pixels")
def one_pixel(world: World) -> Values:
    (world.path / "dots").mkdir()
    Image.new("RGB", (1, 1)).save(world.path / "dots" / "dot.png")
    return {"images": world.path / "dots"}


def png_header(width: int, height: int) -> bytes:
    """The beginning of a 1-bit PNG; enough to know its size, too little to decode it."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT": zlib.compress(bytes(9))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


@mistake(TRAINING, PicturesError, "huge.png", "13350×13350", "too large", "8000 pixels")
def above_178_megapixels(world: World) -> Values:
    (world.path / "huge").mkdir()
    (world.path / "huge" / "huge.png").write_bytes(png_header(13350, 13350))
    return {"images": world.path / "huge"}


@mistake(TRAINING, PicturesError, "vast.png", "too large", "8000 pixels")
def thousands_of_megapixels(world: World) -> Values:
    (world.path / "vast").mkdir()
    (world.path / "vast" / "vast.png").write_bytes(png_header(60000, 60000))
    return {"images": world.path / "vast"}


@mistake(TRAINING, PicturesError, "0.png", "neither a folder nor a zip", remedy="folder")
def one_picture_instead_of_a_folder(world: World) -> Values:
    return {"images": world.pictures / "0.png"}


@mistake(TRAINING, PicturesError, "xxxxx", remedy="path")
def picture_path_longer_than_the_system_takes(world: World) -> Values:
    return {"images": world.path / ("x" * 5000)}


def zipped(world: World, entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    path = world.path / "dog.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def good_entries(world: World) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(world.pictures.iterdir())}


def patched(path: Path, signature: bytes, offset: int, change: bytes) -> None:
    """Overwrite some bytes behind every place where a zip's signature stands."""
    content, start = bytearray(path.read_bytes()), 0
    while (start := content.find(signature, start)) >= 0:
        content[start + offset : start + offset + len(change)] = change
        start += 4
    path.write_bytes(content)


@mistake(TRAINING, PicturesError, "dog.zip", "encrypted", "without a password")
def encrypted_zip(world: World) -> Values:
    path = zipped(world, good_entries(world))
    patched(path, b"PK\3\4", 6, b"\1")
    patched(path, b"PK\1\2", 8, b"\1")
    return {"images": path}


@mistake(TRAINING, PicturesError, "dog.zip", remedy="zip")
def truncated_zip(world: World) -> Values:
    path = zipped(world, good_entries(world))
    path.write_bytes(path.read_bytes()[:-30])
    return {"images": path}


@mistake(TRAINING, PicturesError, "dog.zip", "0.png", "damaged", "create the zip file again")
def zip_with_a_broken_entry(world: World) -> Values:
    path = zipped(world, good_entries(world), zipfile.ZIP_DEFLATED)
    patched(path, b"PK\3\4", 30 + len("0.png"), b"\x07")  # a deflate block of the reserved type
    return {"images": path}


@mistake(TRAINING, PicturesError, "dog.zip", "0.png", "damaged", "create the zip file again")
def zip_with_a_wrong_checksum(world: World) -> Values:
    path = zipped(world, good_entries(world))
    patched(path, b"PK\3\4", 30 + len("0.png") + 40, b"\x55\xaa\x55")
    return {"images": path}


@mistake(TRAINING, PicturesError, "dog.zip", "0.png", "600 MB")
def zip_bomb(world: World) -> Values:
    path = zipped(world, {"0.png": b"small"})
    patched(path, b"PK\1\2", 24, struct.pack("<I", 600_000_000))
    return {"images": path}


@mistake(TRAINING, PicturesError, "The zip file", "dog.zip", "contains no pictures", remedy="3 to 20")
def zip_without_pictures(world: World) -> Values:
    return {"images": zipped(world, {"readme.txt": b"hello"})}


@mistake(TRAINING, WeightsError, "no-such-model.safetensors", "exist", remedy="path")
def missing_checkpoint(world: World) -> Values:
    return {"base": world.path / "no-such-model.safetensors"}


@mistake(TRAINING, WeightsError, "xxxxx", remedy="path")
def base_path_longer_than_the_system_takes(world: World) -> Values:
    return {"base": world.path / ("x" * 5000)}


@mistake(TRAINING, WeightsError, "half.safetensors", remedy="again")
def truncated_checkpoint(world: World) -> Values:
    content = world.base.read_bytes()
    (world.path / "half.safetensors").write_bytes(content[: len(content) // 2])
    return {"base": world.path / "half.safetensors"}


@mistake(TRAINING, WeightsError, "page.safetensors", remedy="again")
def web_page_named_safetensors(world: World) -> Values:
    (world.path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html><body>Not found</body></html>")
    return {"base": world.path / "page.safetensors"}


@mistake(TRAINING, WeightsError, "empty.safetensors", remedy="again")
def empty_checkpoint(world: World) -> Values:
    (world.path / "empty.safetensors").touch()
    return {"base": world.path / "empty.safetensors"}


class _Trap:
    """What a malicious pickle holds: code that runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@mistake(TRAINING, WeightsError, "trap.ckpt", remedy=".safetensors version")
def pickle_with_code(world: World) -> Values:
    torch.save({"state_dict": {"a": torch.zeros(2)}, "extra": _Trap(world.path / "sprung")}, world.path / "trap.ckpt")
    return {"base": world.path / "trap.ckpt"}


@mistake(TRAINING, WeightsError, "bare.ckpt", remedy=".safetensors version")
def bare_pickle_with_code(world: World) -> Values:
    (world.path / "bare.ckpt").write_bytes(pickle.dumps(_Trap(world.path / "sprung")))
    return {"base": world.path / "bare.ckpt"}


@mistake(TRAINING, WeightsError, "odd.ckpt")
def pickle_without_a_state_dict(world: World) -> Values:
    torch.save({"state_dict": torch.zeros(2)}, world.path / "odd.ckpt")
    return {"base": world.path / "odd.ckpt"}


@mistake(TRAINING, WeightsError, "half.ckpt")
def truncated_pickle(world: World) -> Values:
    torch.save({"state_dict": {"a": torch.zeros(2000)}}, world.path / "half.ckpt")
    (world.path / "half.ckpt").write_bytes((world.path / "half.ckpt").read_bytes()[:3000])
    return {"base": world.path / "half.ckpt"}


@mistake(TRAINING, WeightsError, "adapter (LoRA)", remedy="checkpoint that the adapter was made for")
def adapter_given_as_base(world: World) -> Values:
    write_adapter(world.path / "lora.safetensors", tiny_adapter(), torch.float16)
    return {"base": world.path / "lora.safetensors"}


@mistake(TRAINING, WeightsError, "unet.safetensors", "text encoder", remedy="full checkpoint")
def unet_alone(world: World) -> Values:
    return {"base": world.checkpoint("unet.safetensors", lambda tensors: keep(tensors, UNET_PREFIX))}


@mistake(TRAINING, WeightsError, "vae.safetensors", "UNet", remedy="full checkpoint")
def vae_alone(world: World) -> Values:
    return {"base": world.checkpoint("vae.safetensors", lambda tensors: keep(tensors, VAE_PREFIX))}


@mistake(TRAINING, WeightsError, "VAE")
def no_vae(world: World) -> Values:
    return {"base": world.checkpoint("no-vae.safetensors", lambda tensors: keep(tensors, UNET_PREFIX, CLIP_PREFIX))}


def keep(tensors: dict[str, Tensor], *prefixes: str) -> None:
    for name in [name for name in tensors if not name.startswith(prefixes)]:
        del tensors[name]


def checkpoint_without(lost: str) -> Case:
    return lambda world: {"base": world.checkpoint("incomplete.safetensors", lambda tensors: tensors.pop(lost))}


for _lost in (
    f"{UNET_PREFIX}input_blocks.0.0.weight",
    f"{UNET_PREFIX}time_embed.0.weight",
    f"{UNET_PREFIX}middle_block.0.in_layers.2.weight",
    f"{UNET_PREFIX}out.2.weight",
    f"{VAE_PREFIX}decoder.conv_in.weight",
    f"{CLIP_PREFIX}text_model.encoder.layers.1.mlp.fc2.weight",
):
    add(TRAINING, f"checkpoint without {_lost}", checkpoint_without(_lost), WeightsError, remedy="omplete")


@mistake(TRAINING, WeightsError, "(64, 64, 1, 1)")
def tensor_of_another_shape(world: World) -> Values:
    wrong = {f"{UNET_PREFIX}middle_block.0.in_layers.2.weight": torch.zeros(64, 64, 1, 1)}
    return {"base": world.checkpoint("wrong.safetensors", lambda tensors: tensors.update(wrong))}


@mistake(TRAINING, WeightsError, "quantised", "int8", remedy="fp16")
def quantised_checkpoint(world: World) -> Values:
    small = {f"{UNET_PREFIX}time_embed.0.weight": torch.zeros(128, 32, dtype=torch.int8)}
    return {"base": world.checkpoint("int8.safetensors", lambda tensors: tensors.update(small))}


@mistake(TRAINING, WeightsError, "no-tokens", "tokenizer", remedy="folder")
def folder_without_a_tokenizer(world: World) -> Values:
    (world.path / "no-tokens").mkdir()
    return {"tokenizer": world.path / "no-tokens"}


@mistake(TRAINING, WeightsError, "model_index.json", remedy="diffusers")
def folder_without_a_model(world: World) -> Values:
    return {"base": world.pictures}


@mistake(TRAINING, WeightsError, "no weights", remedy="again")
def folder_without_weights(world: World) -> Values:
    folder = world.folder("hollow")
    next((folder / "unet").glob("*.safetensors")).unlink()
    return {"base": folder}


@mistake(TRAINING, WeightsError, "sample", remedy="epsilon")
def folder_that_predicts_samples(world: World) -> Values:
    return {"base": with_json(world.folder("sample"), "scheduler/scheduler_config.json", prediction_type="sample")}


def with_json(folder: Path, name: str, **values: Any) -> Path:
    content = json.loads((folder / name).read_text())
    (folder / name).unlink()
    (folder / name).write_text(json.dumps({**content, **values}))
    return folder


def linear_projections(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(("proj_in.weight", "proj_out.weight"))]:
        if tensors[name].ndim == 4:
            tensors[name] = tensors[name][:, :, 0, 0].contiguous()


def label_embedding(tensors: dict[str, Tensor]) -> None:
    linear_projections(tensors)
    tensors[f"{UNET_PREFIX}label_emb.0.0.weight"] = torch.zeros(128, 2816)


def context_width(tensors: dict[str, Tensor], width: int) -> None:
    for name in [name for name in tensors if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]:
        tensors[name] = torch.zeros(len(tensors[name]), width)


def input_channels(tensors: dict[str, Tensor], channels: int) -> None:
    tensors[f"{UNET_PREFIX}input_blocks.0.0.weight"] = torch.zeros(32, channels, 3, 3)


def all_of(*changes: Callable[[dict[str, Tensor]], None]) -> Callable[[dict[str, Tensor]], None]:
    def change_all(tensors: dict[str, Tensor]) -> None:
        for change in changes:
            change(tensors)

    return change_all


def only(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors.update({name: torch.zeros(1) for name in names})

    return change


OTHER_FAMILIES: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "SDXL refiner": (all_of(label_embedding, lambda t: context_width(t, 1280)), "SDXL refiner"),
    "inpainting": (lambda t: input_channels(t, 9), "inpainting model (SD 1.x)"),
    "SD 2 inpainting": (all_of(linear_projections, lambda t: input_channels(t, 9)), "inpainting model (SD 2.x)"),
    "SDXL inpainting": (all_of(label_embedding, lambda t: input_channels(t, 9)), "inpainting model (SDXL)"),
    "InstructPix2Pix": (lambda t: input_channels(t, 8), "InstructPix2Pix"),
    "depth": (lambda t: input_channels(t, 5), "depth model"),
    "upscaler": (lambda t: input_channels(t, 7), "upscaler"),
    "Flux": (only("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"), "Flux"),
    "Flux transformer alone": (only("double_blocks.0.img_mod.lin.weight"), "Flux"),
    "SD 3": (only("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    "SD 3 of diffusers": (only("transformer_blocks.0.attn.norm_added_k.weight"), "SD 3"),
    "AuraFlow": (only("model.double_layers.0.attn.w1q.weight"), "AuraFlow"),
    "PixArt": (only("t_block.1.weight"), "PixArt"),
    "Wan": (only("blocks.0.cross_attn.norm_k.weight"), "Wan"),
    "HunyuanVideo": (only("txt_in.individual_token_refiner.blocks.0.norm1.weight"), "HunyuanVideo"),
    "Stable Cascade": (only("down_blocks.0.0.depthwise.weight"), "Stable Cascade"),
    "Stable Video": (
        lambda t: t.update({f"{UNET_PREFIX}input_blocks.1.0.time_stack.emb_layers.1.weight": torch.zeros(1)}),
        "Stable Video Diffusion",
    ),
}


def checkpoint_of(change: Callable[[dict[str, Tensor]], None]) -> Case:
    return lambda world: {"base": world.checkpoint("foreign.safetensors", change)}


for _family, (_change, _title) in OTHER_FAMILIES.items():
    _remedy = "Stable Diffusion 1.x"
    add(TRAINING, _family, checkpoint_of(_change), UnsupportedModelError, _title, remedy=_remedy)


def folder_whose_unet(**changes: Any) -> Case:
    return lambda world: {"base": with_json(world.folder("foreign"), "unet/config.json", **changes)}


for _label, _title, _changes in (
    ("inpainting", "inpainting model (SD 1.x)", {"in_channels": 9}),
    ("SDXL inpainting", "inpainting model (SDXL)", {"in_channels": 9, "addition_embed_type": "text_time"}),
    ("InstructPix2Pix", "InstructPix2Pix", {"in_channels": 8}),
    ("SD 2 depth", "depth model (SD 2.x)", {"in_channels": 5, "use_linear_projection": True}),
    ("the upscaler", "upscaler", {"in_channels": 7}),
    ("the refiner", "SDXL refiner", {"addition_embed_type": "text_time", "cross_attention_dim": 1280}),
    ("unCLIP", "Stable unCLIP", {"class_embed_type": "projection", "use_linear_projection": True}),
    ("PixArt", "PixArt", {"_class_name": "PixArtTransformer2DModel"}),
    ("a class nobody knows", "Unet7DModel", {"_class_name": "Unet7DModel"}),
):
    add(
        TRAINING,
        f"folder of {_label}",
        folder_whose_unet(**_changes),
        UnsupportedModelError,
        _title,
        remedy="Stable Diffusion 1.x, Stable Diffusion 2.x, Stable Diffusion XL",
    )


@mistake(TRAINING, WeightsError, "text_encoder_2", "no weights", remedy="again")
def folder_of_SDXL_without_its_second_text_encoder(world: World) -> Values:
    changes = {"addition_embed_type": "text_time", "use_linear_projection": True}
    return {"base": with_json(world.folder("xl"), "unet/config.json", **changes)}


@mistake(TRAINING, WeightsError, "xl.safetensors", "Stable Diffusion XL", "clip_l", remedy="full checkpoint")
def sdxl_without_text_encoders(world: World) -> Values:
    return {"base": world.checkpoint("xl.safetensors", all_of(label_embedding, lambda t: context_width(t, 2048)))}


@mistake(TRAINING, WeightsError, "v2.safetensors", "Stable Diffusion 2.x", "clip_h", remedy="full checkpoint")
def sd2_without_a_text_encoder(world: World) -> Values:
    return {"base": world.checkpoint("v2.safetensors", linear_projections)}


@mistake(
    TRAINING,
    UnsupportedModelError,
    "Stable unCLIP",
    remedy="Stable Diffusion 2.x",
)
def unclip(world: World) -> Values:
    def change(tensors: dict[str, Tensor]) -> None:
        linear_projections(tensors)
        context_width(tensors, 1024)
        tensors[f"{UNET_PREFIX}label_emb.0.0.weight"] = torch.zeros(128, 2048)
        tensors["noise_augmentor.data_mean"] = torch.zeros(1, 1024)
        tensors["embedder.model.visual.class_embedding"] = torch.zeros(1280)

    return {"base": world.checkpoint("unclip.safetensors", change)}


def marked(key: str) -> Case:
    return lambda world: {"base": world.checkpoint("edm.safetensors", lambda t: t.update({key: torch.zeros(1)}))}


for _key in ("edm_mean", "edm_vpred.sigma_max"):
    add(TRAINING, f"EDM by {_key}", marked(_key), UnsupportedModelError, "EDM", remedy="epsilon or velocity")


@mistake(TRAINING, UnsupportedModelError, "Flux", remedy="Stable Diffusion 1.x")
def folder_of_Flux(world: World) -> Values:
    (world.path / "flux").mkdir()
    (world.path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": []}')
    return {"base": world.path / "flux"}


@mistake(TRAINING, WeightsError, "no-such-vae.safetensors", "exist", remedy="path")
def missing_vae(world: World) -> Values:
    return {"vae": world.path / "no-such-vae.safetensors"}


@mistake(TRAINING, WeightsError, "VAE", "encoder", remedy="VAE")
def vae_without_an_encoder(world: World) -> Values:
    def decoder(tensors: dict[str, Tensor]) -> None:
        keep(tensors, f"{VAE_PREFIX}decoder.", f"{VAE_PREFIX}post_quant_conv.")

    return {"vae": world.checkpoint("decoder.safetensors", decoder)}


@mistake(TRAINING, AdapterError, "no-such-adapter", remedy="path")
def missing_adapter_to_start_from(world: World) -> Values:
    return {"start_from": world.path / "no-such-adapter.safetensors"}


@mistake(TRAINING, AdapterError, "tiny.safetensors", "no LoRA", remedy="adapter file")
def base_to_start_from(world: World) -> Values:
    return {"start_from": world.base}


@mistake(TRAINING, AdapterError, "lora_unet_input_blocks_4_1_proj_in", remedy="model of this size")
def adapter_to_start_from_with_other_modules(world: World) -> Values:
    layer = LoraLayer(torch.ones(2, 32), torch.ones(32, 2), 2.0)
    return {"start_from": written(world, Adapter({"lora_unet_input_blocks_4_1_proj_in": layer}))}


@mistake(TRAINING, SettingsError, "text_encoder_lr", "no part", remedy="Set text_encoder_lr = 0")
def adapter_to_start_from_without_its_text_encoder(world: World) -> Values:
    return {"start_from": written(world, tiny_adapter()), "text_encoder_lr": 1e-5}


@mistake(TRAINING, SettingsError, "a part for the text_encoder", remedy="Set text_encoder_lr")
def adapter_to_start_from_whose_text_encoder_would_stand_still(world: World) -> Values:
    layer = LoraLayer(torch.ones(2, 64), torch.ones(128, 2), 2.0)
    layers = {**tiny_adapter().layers, "lora_te_text_model_encoder_layers_0_mlp_fc1": layer}
    return {"start_from": written(world, Adapter(layers))}


@mistake(TRAINING, AdapterError, "no-such-adapter", remedy="path")
def missing_adapter_for_the_base(world: World) -> Values:
    return {"base_lora": [str(world.path / "no-such-adapter.safetensors")]}


@mistake(TRAINING, AdapterError, "sdxl_base_v1-0", "Stable Diffusion 1.x", remedy="family")
def adapter_of_another_family_for_the_base(world: World) -> Values:
    layer = LoraLayer(torch.ones(2, 32), torch.ones(32, 2), 2.0)
    adapter = Adapter({"lora_unet_input_blocks_4_1_proj_in": layer}, {"ss_base_model_version": "sdxl_base_v1-0"})
    return {"base_lora": [str(written(world, adapter))]}


@mistake(TRAINING, SettingsError, "Rank 33", "32")
def rank_of_the_lora_that_is_taken_out_of_all_weights(world: World) -> Values:
    return {"adapter": "full", "rank": 33}


@mistake(TRAINING, SettingsError, "combine", "LoHa", remedy="Set combine = off")
def combining_with_a_loha(world: World) -> Values:
    return {"combine": True, "base_lora": [str(written(world, tiny_loha()))]}


@mistake(TRAINING, SettingsError, "combine", "LoHa", remedy="Set combine = off")
def combining_what_starts_from_a_loha(world: World) -> Values:
    write_adapter(world.path / "style.safetensors", tiny_adapter(), torch.float32)
    start = written(world, tiny_loha())
    return {"combine": True, "base_lora": [str(world.path / "style.safetensors")], "start_from": start}


def tiny_loha() -> Adapter:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    shapes = {"a": (32, 2), "b": (2, 32)}
    parts = {f"hada_{side}_{end}": torch.ones(shape) for side in ("w1", "w2") for end, shape in shapes.items()}
    return Adapter({name: make_layer(name, parts, 2.0)})


def written(world: World, adapter: Adapter) -> Path:
    write_adapter(world.path / "dog.safetensors", adapter, torch.float32)
    return world.path / "dog.safetensors"


WRONG_SETTINGS: dict[str, tuple[Values, tuple[str, ...]]] = {
    "no steps": ({"steps": 0}, ("steps", "0")),
    "resolution 100": ({"resolution": 100}, ("resolution", "100", "8")),
    "seed too large": ({"seed": 2**64}, ("seed", str(2**64))),
    "as much warm-up as steps": (
        {"steps": 5, "lr_warmup_steps": 5, "lr_schedule": "cosine"},
        ("lr_warmup_steps (5)", "steps (5)"),
    ),
    "warm-up of a constant rate": ({"steps": 5, "lr_warmup_steps": 2}, ("lr_schedule", "constant_with_warmup")),
    "class pictures without a prompt": ({"class_prompt": " "}, ("prior_count", "class_prompt", "a photo of a dog")),
    "class is the subject": ({"class_prompt": PROMPT}, ("class_prompt", "instance_prompt")),
    "rank above a layer": ({"rank": 33}, ("Rank 33", "32")),
    "rank of a part above a layer": ({"block_ranks": "mid_block=65"}, ("Rank 65", "mid_block", "64")),
    "rank of convolutions above a layer": ({"conv_rank": 33, "targets": "all"}, ("Rank 33", "conv", "32")),
    "an unknown kind": ({"adapter": "ia3"}, ("adapter", "ia3", "boft")),
    "full fine-tuning with dropout": ({"adapter": "full", "dropout": 0.1}, ("dropout", "'full'", "unset dropout")),
    "full fine-tuning of some layers": (
        {"adapter": "full", "include": "mid"},
        ("include", "'full'", "choose adapter = lora"),
    ),
    "full fine-tuning without some layers": ({"adapter": "full", "exclude": "mid"}, ("exclude", "'full'", "unset")),
    "full fine-tuning by blocks": ({"adapter": "full", "block_ranks": "mid=4"}, ("block_ranks", "'full'", "unset")),
    "full fine-tuning with a limit": ({"adapter": "full", "max_norm": 1.0}, ("max_norm", "'full'", "unset")),
    "full fine-tuning from an adapter": ({"adapter": "full", "start_from": "x"}, ("start_from", "'full'", "unset")),
    "full fine-tuning, rank-stabilised": (
        {"adapter": "full", "rank_stabilized": True},
        ("rank_stabilized", "'full'", "unset"),
    ),
    "LoHa with dropout": ({"adapter": "loha", "dropout": 0.1}, ("dropout", "lora and dora", "'loha'", "unset")),
    "LoKr, rank-stabilised": (
        {"adapter": "lokr", "rank_stabilized": True},
        ("rank_stabilized", "lora and dora", "'lokr'", "unset"),
    ),
    "OFT with an alpha": ({"adapter": "oft", "alpha": 1e-3}, ("OFT", "alpha", "max_norm")),
    "BOFT with LoRA+": ({"adapter": "boft", "lora_plus_ratio": 16.0}, ("lora_plus_ratio", "boft", "learning_rate")),
    "BOFT of blocks that are too small": ({"adapter": "boft", "rank": 1}, ("Rank 1", "BOFT", "outputs (2)")),
    "a factor without LoKr": ({"lokr_factor": 4}, ("lokr_factor", "'lora'", "choose adapter = lokr")),
    "DoRA combined": (
        {"adapter": "dora", "combine": True, "base_lora": ["x"]},
        ("combine", "'dora'", "set combine = off"),
    ),
    "combined with nothing": ({"combine": True}, ("combine", "set base_lora", "set combine = off")),
    "no layers": ({"targets": "none"}, ("targets", "'none'", "set include")),
    "rank of convolutions without any": ({"conv_rank": 4}, ("conv_rank", "'attention-mlp'", "targets = all")),
    "alpha of convolutions without any": (
        {"conv_alpha": 4.0, "targets": "attention"},
        ("conv_alpha", "'attention'", "targets = all"),
    ),
    "the end of what never began": (
        {"text_encoder_until": 0.5},
        ("text_encoder_until", "set text_encoder_lr", "set text_encoder_until = 1"),
    ),
    "a second text encoder": ({"text_encoder_2_lr": 1e-5}, ("text_encoder_2_lr", "Stable Diffusion 1.x")),
    "B-LoRA": ({"targets": "b-lora-content"}, ("b-lora-content", "Stable Diffusion 1.x")),
    "include of nothing": ({"include": "midblock"}, ("include", "'midblock'", "no layer")),
    "exclude of everything": ({"exclude": "attentions"}, ("unet", "exclude")),
    "exclude of all of the text encoder": (
        {"exclude": "self_attn mlp", "text_encoder_lr": 1e-5},
        ("text_encoder", "exclude"),
    ),
    "include that is no expression": ({"include": "mid_block ("}, ("include", "'('", "regular expression", "\\")),
    "exclude that is no expression": ({"exclude": "*mid"}, ("exclude", "'*mid'", "regular expression")),
    "a block without a rank": ({"block_ranks": "mid_block"}, ("block_ranks", "'mid_block'", "PATTERN=RANK")),
    "a block with an alpha of zero": ({"block_ranks": "mid=4:0"}, ("block_ranks", "'mid=4:0'", "mid_block=32:16")),
    "a block that is no expression": ({"block_ranks": "[=4"}, ("block_ranks", "'['", "regular expression")),
    "clip_skip above the layers": ({"clip_skip": 3}, ("clip_skip 3", "clip_l")),
    "an unknown prediction": ({"prediction_type": "v"}, ("prediction_type", "v_prediction")),
    "fp16 on the CPU": ({"precision": "fp16"}, ("fp16", "cpu")),
    "no such device": ({"device": "cuda:99"}, ("cuda:99",)),
    "unknown device": ({"device": "tpu"}, ("device", "tpu")),
    "unknown setting": ({"learningrate": 1}, ("learningrate",)),
    "name with a slash": ({"name": "my/dog"}, ("name", "my/dog")),
}


def settings_with(values: Values) -> Case:
    return lambda world: values


for _label, (_values, _names) in WRONG_SETTINGS.items():
    add(TRAINING, _label, settings_with(_values), SettingsError, *_names)


@pytest.mark.parametrize("letters", mostly_slow([60, 80, 100], 80, 100))
def test_long_name_in_any_script_is_refused_or_works(world: World, letters: int) -> None:
    """A name that can't be a file's is told before the work, not when the file is to be written."""
    values = world.training({"name": "犬" * letters, "prior_count": 0})
    try:
        command = TrainCommand.checked(values)
    except SettingsError as error:
        assert letters > 60
        problem, remedy = error.problem, error.remedy
    else:
        assert run_train(command, Recorder()).path == world.out / f"{'犬' * letters}.safetensors"
        return
    assert "name" in problem
    assert remedy


@mistake(TRAINING, StorageError, "in the way", "not a folder", remedy="folder")
def output_folder_is_a_file(world: World) -> Values:
    (world.path / "in the way").write_text("a text")
    return {"output_dir": world.path / "in the way"}


@mistake(TRAINING, StorageError, "my loras", "can't be written", remedy="another output folder")
def output_folder_is_read_only(world: World) -> Values:
    refuse_writes(world, errno.EACCES)
    return {}


@mistake(TRAINING, StorageError, "my loras", "can't be written", remedy="another output folder")
def output_disk_is_read_only(world: World) -> Values:
    refuse_writes(world, errno.EROFS)
    return {}


@mistake(TRAINING, StorageError, "my loras", "No space left", remedy="Free some space")
def disk_is_full(world: World) -> Values:
    full = SimpleNamespace(total=10**12, used=10**12 - 1000, free=1000)
    world.monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    return {}


def refuse_writes(world: World, number: int) -> None:
    """Let every attempt to make or write something in the output folder fail as the system would."""
    real_open, real_mkdir = builtins.open, os.mkdir

    def guarded_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike) and set(mode) & set("wax+") and Path(file).is_relative_to(world.out):
            raise OSError(number, os.strerror(number), str(file))
        return real_open(file, mode, *arguments, **options)

    def guarded_mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if not Path(path).exists() and Path(path).is_relative_to(world.out):
            raise OSError(number, os.strerror(number), str(path))
        real_mkdir(path, *arguments, **options)

    world.monkeypatch.setattr(builtins, "open", guarded_open)
    world.monkeypatch.setattr(io, "open", guarded_open)
    world.monkeypatch.setattr(os, "mkdir", guarded_mkdir)


@pytest.mark.parametrize(("case", "error", "names", "remedy"), TRAINING)
def test_training_refuses(
    world: World, case: Case, error: type[TrainerError], names: tuple[str, ...], remedy: str
) -> None:
    values = world.training(case(world))
    before, listener = everything(world), Recorder()
    with pytest.raises(error) as caught:
        run_train(TrainCommand.checked(values), listener)
    world.monkeypatch.undo()
    for name in names:
        assert name in caught.value.problem
    assert remedy in caught.value.remedy
    assert caught.value.remedy.strip()
    assert not [event for event in listener.events if isinstance(event, Step | Phase)], "long work had begun"
    assert everything(world) == before
    assert not (world.path / "sprung").exists(), "code in a pickle was run"
    for told in ("BytesIO", "weights_only", "mmap", "Traceback"):
        assert told not in str(caught.value), "words from inside the program"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"stepps = 3\n", ("stepps", "'steps'")),
        (b"learning-rat = 3\n", ("learning_rat", "'learning_rate'")),
        (b"[train]\nsteps = 3\n", ("train",)),
        (b"steps = \n", ("run.toml", "line 1")),
        (b"steps: 3\n", ("run.toml", "line 1")),
        (b"name = sks dog\n", ("run.toml", "line 1")),
        (b'base = "C:\\models\\x.safetensors"\n', ("run.toml", "single quotes")),
        (b"steps = 1\nsteps = 2\n", ("run.toml",)),
        ("name = 'Hündin'\n".encode("cp1252"), ("run.toml", "UTF-8")),
        (bytes(range(256)), ("run.toml",)),
        (b'steps = "many"\n', ("steps", "many")),
        (b"flip = 7\n", ("flip", "7")),
    ],
    ids=[
        "typing error",
        "typing error with a dash",
        "table",
        "no value",
        "colon",
        "text without quotes",
        "Windows path in double quotes",
        "key twice",
        "Windows-1252",
        "binary",
        "text for a number",
        "number for a switch",
    ],
)
def test_settings_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: tuple[str, ...]
) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    assert main(["train", str(tmp_path / "run.toml"), "--base", "x", "--images", "y"]) == 1
    output = capsys.readouterr()
    assert not output.out
    assert all(word in output.err for word in told)
    assert "\nfix: " in output.err


@pytest.mark.parametrize(
    "typed",
    [
        "my dog's pictures",
        "Hündin Über Straße",
        "犬の写真",
        "собака",
        "trailing/",
        "inner/../plain",
        "deep\\folder",
        "deep\\folder\\",
        '"quoted folder"',
        "dog [1] {a,b} *" if os.name != "nt" else "dog [1]",
    ],
)
def test_odd_picture_paths_work(world: World, typed: str) -> None:
    folder = world.path / typed.strip('"').replace("\\", "/")
    (world.path / "inner").mkdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(world.pictures, folder)
    given = f'"{world.path}/{typed[1:]}' if typed.startswith('"') else f"{world.path}/{typed}"
    command = TrainCommand.checked(world.training({"images": given}))
    assert len(load_pictures(command.images, PROMPT, Recorder())) == 4


def test_relative_picture_path_works(world: World) -> None:
    world.monkeypatch.chdir(world.pictures.parent)
    command = TrainCommand.checked(world.training({"images": f"./{world.pictures.name}"}))
    assert len(load_pictures(command.images, PROMPT, Recorder())) == 4


def test_the_largest_seed_works(world: World) -> None:
    result = run_train(TrainCommand.checked(world.training({"seed": 2**64 - 1, "prior_seed": 2**64 - 1})), Recorder())
    assert result.adapter.metadata["ss_seed"] == str(2**64 - 1)


@pytest.mark.slow
def test_a_hundred_megapixels_are_scaled(world: World) -> None:
    image = Image.new("1", (10_000, 10_000), 0)
    image.paste(1, (0, 0, 5_000, 10_000))
    image.save(world.pictures / "huge.png", compress_level=1)
    listener = Recorder()
    pictures = load_pictures(world.pictures, PROMPT, listener)
    assert [picture.name for picture in pictures][-1] == "huge.png"
    assert not listener.warnings
    small = np.array(pictures[-1].open().reduce(100))
    assert small.shape == (100, 100, 3)
    assert small[:, :50].min() == 255
    assert small[:, 50:].max() == 0


# Files that are no pictures, or only the beginning of one.
CORRUPT: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "truncated PNG": ("bad.png", lambda content: content[: len(content) // 2]),
    "PNG without data": ("bad.png", lambda content: content[:33]),
    "damaged PNG": ("bad.png", lambda content: content[:60] + bytes(200) + content[260:]),
    "truncated JPEG": ("bad.jpg", lambda content: as_jpeg(content)[:700]),
    "web page": ("bad.jpg", lambda content: b"<html>404</html>"),
    "empty": ("bad.webp", lambda content: b""),
    "phone's own format": ("bad.heic", lambda content: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)),
    "one pixel": ("bad.png", lambda content: as_png(1, 1)),
    "a line": ("bad.png", lambda content: as_png(500, 1)),
    "unknown DDS": ("bad.dds", lambda content: b"DDS " + struct.pack("<I", 124) + bytes(120)),
}


def as_jpeg(png: bytes) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).save(stream, "JPEG")
    return stream.getvalue()


def as_png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_picture_among_good_ones_is_named_and_left_out(world: World, name: str, kind: str) -> None:
    file, damage = CORRUPT[name]
    (world.pictures / file).write_bytes(damage((world.pictures / "0.png").read_bytes()))
    source = world.pictures if kind == "folder" else zipped(world, good_entries(world))
    listener = Recorder()
    pictures = load_pictures(source, PROMPT, listener)
    assert [picture.name for picture in pictures] == ["0.png", "1.png", "2.png", "3.png"]
    [warning] = listener.warnings
    assert file in warning
    assert "is skipped" in warning
    assert "BytesIO" not in warning, "words from inside the program"


def test_an_unreadable_picture_among_good_ones_is_named_and_left_out(world: World) -> None:
    real = io.open

    def guarded(file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike) and Path(file).name == "2.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real(file, *arguments, **options)

    world.monkeypatch.setattr(io, "open", guarded)
    world.monkeypatch.setattr(builtins, "open", guarded)
    listener = Recorder()
    assert [picture.name for picture in load_pictures(world.pictures, PROMPT, listener)] == ["0.png", "1.png", "3.png"]
    [warning] = listener.warnings
    assert "2.png" in warning
    assert "denied" in warning


def test_a_corrupt_picture_does_not_stop_the_training(world: World) -> None:
    (world.pictures / "2.png").write_bytes(b"no picture")
    listener = Recorder()
    result = run_train(TrainCommand.checked(world.training({"prior_count": 0})), listener)
    assert result.adapter.metadata["ss_num_train_images"] == "3"
    assert [warning for warning in listener.warnings if "2.png" in warning]


@pytest.mark.parametrize(("count", "advised"), [(1, True), (2, True), (3, False)])
def test_fewer_than_three_pictures_give_advice(picture_folder: Callable[..., Path], count: int, advised: bool) -> None:
    listener = Recorder()
    assert len(load_pictures(picture_folder(count), PROMPT, listener)) == count
    assert [str(count) in warning and "3 to 20" in warning for warning in listener.warnings] == [True] * advised


def tiny_adapter(metadata: Mapping[str, str] | None = None) -> Adapter:
    """An adapter for two modules of the tiny model, one square and one that is wider than high."""
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    shapes = {f"{block}_attn1_to_q": (32, 32), f"{block}_attn2_to_k": (32, 64)}
    layers = {name: LoraLayer(torch.ones(2, wide), torch.ones(high, 2), 2.0) for name, (high, wide) in shapes.items()}
    return Adapter(layers, metadata or {})


def lora(world: World, adapter: Adapter) -> Values:
    write_adapter(world.path / "dog.safetensors", adapter, torch.float32)
    return {"lora": [str(world.path / "dog.safetensors")]}


def lora_tensors(world: World, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> Values:
    path = world.path / "dog.safetensors"
    write_adapter(path, tiny_adapter(), torch.float32)
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or None)
    return {"lora": [str(path)]}


@mistake(DRAWING, AdapterError, "no-such-adapter", remedy="path")
def missing_adapter(world: World) -> Values:
    return {"lora": [str(world.path / "no-such-adapter.safetensors")]}


@mistake(DRAWING, AdapterError, "dog.safetensors", remedy="complete")
def truncated_adapter(world: World) -> Values:
    values = lora(world, tiny_adapter())
    path = world.path / "dog.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return values


@mistake(DRAWING, AdapterError, "dog.safetensors", remedy="complete")
def empty_adapter(world: World) -> Values:
    (world.path / "dog.safetensors").touch()
    return {"lora": [str(world.path / "dog.safetensors")]}


@mistake(DRAWING, AdapterError, "tiny.safetensors", "no LoRA", remedy="adapter file")
def base_given_as_adapter(world: World) -> Values:
    return {"lora": [str(world.base)]}


@mistake(DRAWING, AdapterError, "lora_unet_input_blocks_4_1_proj_in", remedy="family")
def adapter_with_other_modules(world: World) -> Values:
    layer = LoraLayer(torch.ones(2, 32), torch.ones(32, 2), 2.0)
    return lora(world, Adapter({"lora_unet_input_blocks_4_1_proj_in": layer}))


def with_layer(adapter: Adapter, part: str, layer: LoraLayer) -> Adapter:
    [name] = [name for name in adapter.layers if name.endswith(part)]
    return Adapter({**adapter.layers, name: layer}, adapter.metadata)


@mistake(DRAWING, AdapterError, "attn2_to_k", "(32, 768)", remedy="size")
def adapter_of_a_wider_model(world: World) -> Values:
    wide = LoraLayer(torch.ones(2, 768), torch.ones(32, 2), 2.0)
    return lora(world, with_layer(tiny_adapter(), "attn2_to_k", wide))


@mistake(DRAWING, AdapterError, "attn2_to_k", "(64, 32)", remedy="size")
def adapter_of_a_turned_shape(world: World) -> Values:
    turned = LoraLayer(torch.ones(2, 32), torch.ones(64, 2), 2.0)
    return lora(world, with_layer(tiny_adapter(), "attn2_to_k", turned))


@mistake(DRAWING, AdapterError, "attn2_to_k")
def adapter_whose_halves_have_other_ranks(world: World) -> Values:
    return lora(world, with_layer(tiny_adapter(), "attn2_to_k", LoraLayer(torch.ones(1, 64), torch.ones(32, 2), 2.0)))


@mistake(DRAWING, AdapterError, "dog.safetensors", "attn2_to_k", "up")
def adapter_without_a_half(world: World) -> Values:
    return lora_tensors(
        world, lambda tensors: tensors.pop(next(n for n in tensors if n.endswith("to_k.lora_up.weight")))
    )


@mistake(DRAWING, AdapterError, "dog.safetensors")
def adapter_with_a_number_for_a_matrix(world: World) -> Values:
    return lora_tensors(world, lambda tensors: tensors.update({n: torch.ones(()) for n in tensors if "down" in n}))


@mistake(DRAWING, AdapterError, "dog.safetensors")
def adapter_with_many_alphas(world: World) -> Values:
    return lora_tensors(world, lambda tensors: tensors.update({n: torch.ones(3) for n in tensors if "alpha" in n}))


@mistake(DRAWING, AdapterError, "dog.safetensors")
def adapter_with_damaged_metadata(world: World) -> Values:
    def without_alphas(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "alpha" in name]:
            del tensors[name]

    return lora_tensors(world, without_alphas, lora_adapter_metadata="{")


@mistake(DRAWING, AdapterError, "attn2_to_k", "finite")
def adapter_with_nan(world: World) -> Values:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "attn2_to_k" in name and "down" in name)
        tensors[name] = tensors[name] * torch.nan

    return lora_tensors(world, spoil)


@mistake(DRAWING, AdapterError, "GLoRA", remedy="LoRA")
def adapter_of_another_kind(world: World) -> Values:
    return lora_tensors(world, lambda tensors: tensors.update({"lora_unet_x.a1.weight": torch.ones(2, 2)}))


@mistake(DRAWING, AdapterError, "conv_out", "oft_blocks", "(2, 2)", remedy="again")
def oft_without_blocks(world: World) -> Values:
    return lora_tensors(world, lambda tensors: tensors.update({"lora_unet_conv_out.oft_blocks": torch.ones(2, 2)}))


@mistake(DRAWING, AdapterError, "LoHa", "conv_out", "hada_w1_b", remedy="again")
def loha_without_a_part(world: World) -> Values:
    return lora_tensors(world, lambda tensors: tensors.update({"lora_unet_conv_out.hada_w1_a": torch.ones(2, 2)}))


@mistake(DRAWING, SettingsError, "much", remedy="0.8")
def strength_that_is_no_number(world: World) -> Values:
    return {"lora": [str(world.path / "dog.safetensors:much")]}


@mistake(DRAWING, SettingsError, "nan", remedy="0.8")
def strength_that_is_nan(world: World) -> Values:
    [file] = lora(world, tiny_adapter())["lora"]
    return {"lora": [f"{file}:nan"]}


@mistake(DRAWING, TrainerError, "picture.xyz", remedy=".png")
def picture_of_an_unknown_format(world: World) -> Values:
    return {"output": world.path / "picture.xyz"}


@mistake(DRAWING, TrainerError, "picture", remedy=".png")
def picture_without_an_ending(world: World) -> Values:
    return {"output": world.path / "picture"}


@mistake(DRAWING, TrainerError, "good")
def picture_that_is_a_folder(world: World) -> Values:
    return {"output": world.pictures}


@mistake(DRAWING, StorageError, "my loras", "No space left", remedy="Free some space")
def no_room_for_the_picture(world: World) -> Values:
    disk_is_full(world)
    return {"output": world.out / "picture.png"}


@mistake(DRAWING, SettingsError, "size", "100")
def size_100(world: World) -> Values:
    return {"size": "100"}


@mistake(DRAWING, UnsupportedModelError, "SDXL refiner", remedy="Stable Diffusion 1.x")
def drawing_with_the_refiner(world: World) -> Values:
    refiner = all_of(label_embedding, lambda tensors: context_width(tensors, 1280))
    return {"base": world.checkpoint("refiner.safetensors", refiner)}


@mistake(DRAWING, SettingsError, "clip_skip 9", "clip_l", remedy="1 to 2")
def clip_skip_above_the_layers(world: World) -> Values:
    return {"clip_skip": 9}


@pytest.mark.parametrize(("case", "error", "names", "remedy"), DRAWING)
def test_drawing_refuses(
    world: World, case: Case, error: type[TrainerError], names: tuple[str, ...], remedy: str
) -> None:
    values = world.training({"prompt": PROMPT, "size": "64"})
    values = {name: value for name, value in values.items() if name in GenerateCommand.model_fields}
    values = {**values, "output": world.path / "picture.png", **case(world)}
    before, listener = everything(world), Recorder()
    with pytest.raises(error) as caught:
        run_generate(GenerateCommand.checked(values), listener)
    world.monkeypatch.undo()
    for name in names:
        assert name in caught.value.problem
    assert remedy in caught.value.remedy
    assert caught.value.remedy.strip()
    assert not [event for event in listener.events if isinstance(event, Phase)], "long work had begun"
    assert everything(world) == before


def test_nan_in_the_base_model_is_not_blamed_on_the_learning_rate(world: World) -> None:
    """Before the first update the adapter adds nothing; what is NaN then comes from the base or the pictures."""
    name = f"{UNET_PREFIX}middle_block.0.in_layers.2.weight"
    base = world.checkpoint("nan.safetensors", lambda tensors: tensors.update({name: tensors[name] * torch.nan}))
    with pytest.raises((DivergedError, WeightsError)) as caught:
        run_train(TrainCommand.checked(world.training({"base": base, "prior_count": 0})), Recorder())
    assert "learning_rate" not in caught.value.remedy
    assert "base model" in str(caught.value)
    assert (world.out / "my-subject.safetensors").read_bytes().startswith(b"earlier work")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [False, True], ids=["as the folder says", "as the user says"])
def test_a_wrong_prediction_type_is_found_out(world: World, chosen: bool) -> None:
    """The demo's model predicts epsilon; trained as what it is not, it would learn noise without an error."""
    wrong = {"prior_count": 0, "class_prompt": "", "resolution": 64, "steps": 1, "name": "wrong"}
    if chosen:
        wrong |= {"base": DEMO / "base", "prediction_type": "v_prediction"}
    else:
        folder = world.folder("velocity")
        wrong["base"] = with_json(folder, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    command, listener = TrainCommand.checked(world.training(wrong)), Recorder()
    if chosen:
        assert run_train(command, listener).path == world.out / "wrong.safetensors"
        [told] = [text for text in listener.warnings if "has no effect" not in text]
    else:
        with pytest.raises(WeightsError) as caught:
            run_train(command, listener)
        assert "prediction_type = epsilon" in caught.value.remedy
        assert not listener.losses
        assert not (world.out / "wrong.safetensors").exists()
        told = caught.value.problem
    assert "as v_prediction" in told
    assert "predicts epsilon" in told
    assert ("your setting" if chosen else "scheduler") in told
