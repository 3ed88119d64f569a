"""The harness itself: its checkpoints have the shapes of published models, and ComfyUI loads and samples them."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    OPEN_CLIP_PREFIX,
    SD2_SHAPES,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    SDXL_SHAPES,
    SHAPES,
    UNET_PREFIX,
    Entry,
    clip_shapes,
    sd2_checkpoint,
    sd2_state_dict,
    sd15_checkpoint,
    sd15_state_dict,
    sdxl_checkpoint,
    sdxl_state_dict,
    unet_shapes,
    vae_shapes,
)
from checkpoints_folders import diffusers_folder
from comfy_graphs import node
from comfy_host import (
    CHECKPOINT,
    ComfyServer,
    PromptFailed,
    PromptInterrupted,
    PromptRejected,
    ServerFailed,
    find_comfyui,
)
from comfy_page import Page
from diffusers import DiffusionPipeline
from PIL import Image


def numbers(entries: Iterable[Entry]) -> tuple[int, int]:
    """How many tensors and parameters there are; every name occurs once."""
    listed = list(entries)
    assert len({name for name, _ in listed}) == len(listed)
    return len(listed), sum(math.prod(dims) for _, dims in listed)


def test_full_shapes_are_those_of_the_published_files() -> None:
    """Counts of tensors and parameters as in v1-5-pruned, v2-1_768 and sd_xl_base_1.0 (without position_ids)."""
    sd2, sdxl = SD2_SHAPES["full"].text_encoders(), SDXL_SHAPES["full"].text_encoders()
    for entries, tensors, parameters in (
        (unet_shapes(SHAPES["full"]), 686, 859_520_964),
        (vae_shapes(SHAPES["full"]), 248, 83_653_863),
        (clip_shapes(SHAPES["full"]), 196, 123_060_480),
        (unet_shapes(SD2_SHAPES["full"]), 686, 865_910_724),
        (sd2[OPEN_CLIP_PREFIX], 294, 354_032_641),
        (unet_shapes(SDXL_SHAPES["full"]), 1680, 2_567_463_684),
        (sdxl[SDXL_CLIP_PREFIX], 196, 123_060_480),
        (sdxl[SDXL_OPEN_CLIP_PREFIX], 390, 694_659_841),
    ):
        assert numbers(entries) == (tensors, parameters)


@pytest.mark.parametrize(
    ("size", "millions"), [("ssd1b", 1_331), ("vega", 745), ("koala700m", 782), ("koala1b", 1_161)]
)
def test_relatives_of_sdxl_have_their_published_sizes(size: str, millions: int) -> None:
    _, parameters = numbers(unet_shapes(SDXL_SHAPES[size]))
    assert parameters // 1_000_000 == millions


def test_velocity_is_marked_as_in_published_files() -> None:
    twelve_blocks = replace(SD2_SHAPES["tiny"], channel_mult=(1, 1, 1, 1), num_res_blocks=2)
    plain, velocity = sd2_state_dict(twelve_blocks), sd2_state_dict(twelve_blocks, velocity=True)
    (changed,) = (name for name in plain if not torch.equal(plain[name], velocity[name]))
    assert changed == UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    assert velocity[changed].std() > 0.09
    marked = sdxl_state_dict("tiny", v_pred=True, ztsnr=True)
    assert marked.keys() - sdxl_state_dict("tiny").keys() == {"v_pred", "ztsnr"}


@pytest.mark.parametrize(
    ("family", "options", "prediction"),
    [
        ("sd2", {}, "epsilon"),
        ("sd2", {"velocity": True}, "v_prediction"),
        ("sdxl", {}, "epsilon"),
        ("sdxl", {"velocity": True, "ztsnr": True}, "v_prediction"),
        *(("sdxl", {"size": size}, "epsilon") for size in SDXL_SHAPES if size.startswith("tiny-")),
    ],
)
def test_folder_is_a_pipeline_of_diffusers(
    tmp_path: Path, family: Any, options: dict[str, Any], prediction: str
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(diffusers_folder(tmp_path, family, **options))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == prediction
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    last = pipeline.tokenizer if family == "sd2" else pipeline.tokenizer_2
    assert last.pad_token_id == 0
    pixels = pipeline("a photo of a dog", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert pixels.shape == (1, 64, 64, 3)
    assert pixels.std() > 0.1


def test_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    first = sd15_checkpoint(tmp_path / "first.safetensors", size="tiny", seed=7)
    second = sd15_checkpoint(tmp_path / "second.safetensors", size="tiny", seed=7)
    other = sd15_checkpoint(tmp_path / "other.safetensors", size="tiny", seed=8)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_half_precision_rounds_the_same_weights() -> None:
    single, half = sd15_state_dict("tiny"), sd15_state_dict("tiny", dtype=torch.float16)
    assert list(single) == list(half)
    for name, weight in half.items():
        assert weight.dtype == (torch.int64 if name.endswith("position_ids") else torch.float16)
        torch.testing.assert_close(weight, single[name].to(weight.dtype), rtol=2e-3, atol=1e-6)


def text_to_image(*, steps: int = 2, width: int = 64, checkpoint: str = CHECKPOINT) -> dict[str, dict[str, Any]]:
    """A prompt that samples one square picture from a checkpoint."""
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": node("CLIPTextEncode", text="a photo of a dog", clip=["model", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["model", 1]),
        "latent": node("EmptyLatentImage", width=width, height=width, batch_size=1),
        "sample": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=steps,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="slim"),
    }


@pytest.mark.comfy
class TestComfyUI:
    def test_pack_is_loaded(self, server: ComfyServer) -> None:
        server.log_start = 0
        (imported,) = (line for line in server.log().splitlines() if "seconds" in line and "dreambooth-lora" in line)
        assert "IMPORT FAILED" not in imported
        assert "KSampler" in server.object_info()

    def test_slim_checkpoint_samples_a_picture(self, server: ComfyServer) -> None:
        entry = server.wait(server.queue(text_to_image()))
        (image,) = entry["outputs"]["save"]["images"]
        picture = Image.open(io.BytesIO(server.view(image)))
        assert picture.size == (64, 64)
        assert max(high - low for low, high in picture.getextrema()) > 20, "the picture is of one colour"

    @pytest.mark.parametrize(
        ("name", "write", "prediction", "networks"),
        [
            ("sd2", sd2_checkpoint, "EPS", ["SD2ClipModel", "BaseModel"]),
            ("sd2-v", partial(sd2_checkpoint, velocity=True), "V_PREDICTION", ["SD2ClipModel", "BaseModel"]),
            ("sdxl", sdxl_checkpoint, "EPS", ["SDXLClipModel", "SDXL"]),
            ("sdxl-v", partial(sdxl_checkpoint, v_pred=True, ztsnr=True), "V_PREDICTION", ["SDXLClipModel", "SDXL"]),
        ],
    )
    def test_slim_checkpoint_of_a_later_family_samples_a_picture(
        self, server: ComfyServer, name: str, write: Callable[..., Path], prediction: str, networks: list[str]
    ) -> None:
        """ComfyUI's log says what it took the file for, and names no tensor that is missing or left over."""
        path = server.base_dir / "models" / "checkpoints" / f"slim-{name}.safetensors"
        write(path, size="slim", dtype=torch.float16)
        try:
            entry = server.wait(server.queue(text_to_image(steps=1, checkpoint=path.name)))
        finally:
            server.free()
            path.unlink()
        log = server.log()
        assert f"model_type {prediction}\n" in log
        assert [line.split()[-1] for line in log.splitlines() if "Requested to load" in line][:2] == networks
        assert not any(word in log for word in ("missing", "unexpected", "left over", "WARNING", "ERROR")), log
        (image,) = entry["outputs"]["save"]["images"]
        picture = Image.open(io.BytesIO(server.view(image)))
        assert picture.size == (64, 64)
        assert max(high - low for low, high in picture.getextrema()) > 20, "the picture is of one colour"

    @pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
    def test_memory_is_measured(self, server: ComfyServer) -> None:
        server.wait(server.queue(text_to_image()))
        peak_of_loading = server.peak_rss()
        server.reset_peak_rss()
        resident = server.rss()
        assert peak_of_loading > server.peak_rss() >= resident > 1e9

    def test_failed_prompt_names_node_and_exception(self, server: ComfyServer) -> None:
        (server.base_dir / "models" / "checkpoints" / "broken.safetensors").write_bytes(b"not a checkpoint")
        prompt = text_to_image()
        prompt["model"]["inputs"]["ckpt_name"] = "broken.safetensors"
        with pytest.raises(PromptFailed) as failure:
            server.wait(server.queue(prompt))
        assert failure.value.node_id == "model"
        assert failure.value.node_type == "CheckpointLoaderSimple"
        assert failure.value.exception_type
        assert "load_checkpoint" in failure.value.traceback

    def test_invalid_prompt_is_rejected(self, server: ComfyServer) -> None:
        with pytest.raises(PromptRejected) as rejection:
            server.queue(text_to_image(steps=-1))
        assert "sample" in rejection.value.node_errors

    def test_interrupted_prompt_is_told_apart(self, server: ComfyServer) -> None:
        with Page(server, "interrupted") as page:
            prompt_id = server.queue(text_to_image(steps=10_000), client_id="interrupted")
            page.wait_for_progress("sample")
            with pytest.raises(TimeoutError):
                server.wait(prompt_id, timeout=0.1)
            server.interrupt()
            with pytest.raises(PromptInterrupted) as interruption:
                server.wait(prompt_id)
        assert interruption.value.node_id == "sample"

    @pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
    def test_failed_start_shows_the_log(self, tmp_path: Path) -> None:
        with pytest.raises(ServerFailed, match="unrecognized arguments: --no-such-flag"):
            ComfyServer(tmp_path, pack=tmp_path, extra_args=["--no-such-flag"]).__enter__()
