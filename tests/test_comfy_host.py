"""The harness itself: the checkpoints it makes have SD 1.5's shape, and a real ComfyUI loads and samples them."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, clip_shapes, sd15_checkpoint, sd15_state_dict, unet_shapes, vae_shapes
from comfy_host import ComfyServer, PromptFailed, PromptInterrupted, PromptRejected, ServerFailed, find_comfyui
from PIL import Image

comfy = pytest.mark.comfy
needs_comfyui = pytest.mark.skipif(
    find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI"
)


def test_full_shape_is_that_of_sd15() -> None:
    """Counts of tensors and parameters as in v1-5-pruned (without CLIP's position_ids)."""
    for entries, tensors, parameters in (
        (unet_shapes(SHAPES["full"]), 686, 859_520_964),
        (vae_shapes(SHAPES["full"]), 248, 83_653_863),
        (clip_shapes(SHAPES["full"]), 196, 123_060_480),
    ):
        listed = list(entries)
        assert len({name for name, _ in listed}) == tensors
        assert sum(math.prod(dims) for _, dims in listed) == parameters


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI with an empty pack and the slim checkpoint."""
    pack = tmp_path_factory.mktemp("pack")
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    base_dir = tmp_path_factory.mktemp("comfy")
    checkpoint = sd15_checkpoint(base_dir / "models" / "checkpoints" / "slim.safetensors")
    with ComfyServer(base_dir, pack=pack, pack_name="empty-pack") as running:
        yield running
    checkpoint.unlink()


def text_to_image(*, steps: int = 2, width: int = 64) -> dict[str, dict[str, Any]]:
    """A prompt that samples one square picture from slim.safetensors."""
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name="slim.safetensors"),
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


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node in ComfyUI's API format."""
    return {"class_type": class_type, "inputs": inputs}


@comfy
@needs_comfyui
class TestComfyUI:
    def test_pack_is_loaded(self, server: ComfyServer) -> None:
        (imported,) = (line for line in server.log().splitlines() if "seconds" in line and "empty-pack" in line)
        assert "IMPORT FAILED" not in imported
        assert "KSampler" in server.object_info()

    def test_slim_checkpoint_samples_a_picture(self, server: ComfyServer) -> None:
        entry = server.wait(server.queue(text_to_image()))
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
        prompt_id = server.queue(text_to_image(steps=10_000))
        with pytest.raises(TimeoutError):
            server.wait(prompt_id, timeout=3)
        server.interrupt()
        with pytest.raises(PromptInterrupted) as interruption:
            server.wait(prompt_id, timeout=60)
        assert interruption.value.node_id == "sample"

    def test_failed_start_shows_the_log(self, tmp_path: Path) -> None:
        with pytest.raises(ServerFailed, match="unrecognized arguments: --no-such-flag"):
            ComfyServer(tmp_path, pack=tmp_path, extra_args=["--no-such-flag"]).__enter__()
