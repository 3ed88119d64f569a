"""The bridge to ComfyUI, every day: paths, and what is asked of ComfyUI's modules, of which stand-ins note it."""

from __future__ import annotations

import importlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from bare_host import host_modules
from bare_nodes import CLIP_OF_BASE, UNET_OF_BASE, adapter_of
from pack.trainer.adapters.kohya import Adapter, parse_adapter
from pack.trainer.core.errors import AdapterError, CancelledError, PicturesError, SettingsError, WeightsError
from pack.trainer.models.families import FAMILIES
from pack.trainer.training.runs.folder import RunFolder, RunPaths
from PIL import Image
from sites import noisy


class Interrupted(Exception):
    """ComfyUI's exception of a prompt that was cancelled."""


class Comfy:
    """Stand-ins of ComfyUI's modules, which note what they are asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.device = torch.device("cpu")
        self.interrupted = False
        noted = self.noted
        management = {
            "get_torch_device": lambda: self.device,
            "unload_all_models": noted("unload"),
            "free_memory": noted("free"),
            "soft_empty_cache": noted("empty"),
            "throw_exception_if_processing_interrupted": self.throw,
            "InterruptProcessingException": Interrupted,
        }
        lora = {
            "calculate_weight": lambda patches, weight, key: weight + sum(patches),
            "model_lora_keys_unet": lambda network, keys: keys | network.keys,
            "model_lora_keys_clip": lambda network, keys: keys | network.keys,
        }
        sd = {
            "load_lora_for_models": noted("load", ("model'", "clip'")),
            "load_checkpoint_guess_config": noted("checkpoint", ("model", "clip", "vae", "vision")),
        }
        self.modules = {
            "comfy.model_management": management,
            "comfy.lora": lora,
            "comfy.sd": sd,
            "comfy.sd1_clip": {"__file__": str(Path("comfy", "sd1_clip.py"))},
        }

    def noted(self, name: str, answer: Any = None) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            self.asked.append((name, *args, *more.items()))
            return answer

        return call

    def throw(self) -> None:
        if self.interrupted:
            raise Interrupted("by the prompt")


@pytest.fixture
def comfy_stand_in(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    comfy = Comfy()
    package = ModuleType("comfy")
    monkeypatch.setitem(sys.modules, "comfy", package)
    for name, content in comfy.modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        setattr(package, name.partition(".")[2], module)
    return comfy


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Any]:
    with host_modules(tmp_path, web.RouteTableDef()):
        yield importlib.import_module("pack.nodes.host")


def module(name: str) -> Any:
    return importlib.import_module(f"pack.nodes.{name}")


# Paths


def test_folders_and_zip_files_are_listed(bridge: Any, tmp_path: Path) -> None:
    for folder in ("dog", "cat/young", ".hidden", "a/b/c"):
        (tmp_path / "input" / folder).mkdir(parents=True)
    for file in ("toys.zip", "picture.png", "cat/inner.zip", ".x.zip"):
        (tmp_path / "input" / file).write_bytes(b"")
    listed = ["(connected images)", "a", "a/b", "cat", "cat/young", "dog", "toys.zip"]
    assert bridge.subject_folders() == listed


def test_input_paths_stay_inside(bridge: Any, tmp_path: Path) -> None:
    assert bridge.input_path("cat/young") == tmp_path.resolve() / "input" / "cat" / "young"
    for name in ("../output", "cat/../../output", str(tmp_path), "cat/../dog"):
        with pytest.raises(WeightsError, match="is outside ComfyUI's input folder"):
            bridge.input_path(name)


def test_a_stamp_changes_with_files(bridge: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dog"
    (folder / "more").mkdir(parents=True)
    noisy((8, 8), 0).save(folder / "0.png")
    stamps = [bridge.folder_stamp(folder)]
    assert stamps[0] == bridge.folder_stamp(folder)
    (folder / "0.txt").write_text("a")
    stamps.append(bridge.folder_stamp(folder))
    noisy((8, 8), 1).save(folder / "more" / "1.png")
    stamps.append(bridge.folder_stamp(folder))
    (folder / "0.txt").write_text("ab")
    stamps.append(bridge.folder_stamp(folder))
    archive = tmp_path / "toys.zip"
    archive.write_bytes(b"1")
    stamps.append(bridge.folder_stamp(archive))
    archive.write_bytes(b"22")
    stamps.append(bridge.folder_stamp(archive))
    assert len(set(stamps)) == 6
    assert bridge.folder_stamp(tmp_path / "nothing") == "[]"


def test_the_pack_s_folders_are_comfyui_s(bridge: Any, tmp_path: Path) -> None:
    loras, checkpoints = tmp_path / "models" / "loras", tmp_path / "models" / "checkpoints"
    runs = tmp_path / "output" / "dreambooth" / "runs"
    assert bridge.loras_folder() == loras
    assert bridge.checkpoints_folder() == checkpoints
    assert bridge.work_folder() == tmp_path / "output" / "dreambooth"
    assert bridge.runs_folder() == runs
    assert bridge.run_paths() == RunPaths(loras, runs, checkpoints, tmp_path / "models" / "embeddings")
    assert bridge.shown_folder(runs / "dog") == "output/dreambooth/runs/dog"
    (loras / "b.safetensors").write_bytes(b"")
    assert bridge.lora_names() == ["b.safetensors"]
    assert bridge.lora_path("b.safetensors") == loras / "b.safetensors"


def test_a_run_is_given_by_its_name_or_its_path(bridge: Any) -> None:
    root = bridge.runs_folder().resolve()
    assert bridge.run_path(" dog-1 ") == root / "dog-1"
    assert bridge.run_path(str(root / "dog-1")) == root / "dog-1"
    for wrong in ("", " ", "..", ".", "../runs", "dog/1", "/", str(root)):
        with pytest.raises(SettingsError, match="is not a run in"):
            bridge.run_path(wrong)


def test_a_run_keeps_its_newest_workflow(bridge: Any) -> None:
    run = RunFolder(bridge.run_path("dog-1"))
    for title in ("alt", "für später"):
        bridge.keep_workflow(run, {"title": title})
    content = run.workflow_path.read_bytes().decode()
    assert json.loads(content) == {"title": "für später"}
    assert "für später" in content


def test_models_are_found_in_comfyui_s_folders(bridge: Any, tmp_path: Path, comfy_stand_in: Comfy) -> None:
    models = tmp_path / "models"
    host_models = module("host_models")
    (models / "feature_models" / "clip").mkdir(parents=True)
    for file in ("clip_vision/eyes.safetensors", "text_encoders/words.safetensors", "clip_vision/a + b"):
        (models / file).parent.mkdir(exist_ok=True)
        (models / file).write_bytes(b"")
    eyes, words = models / "clip_vision" / "eyes.safetensors", models / "text_encoders" / "words.safetensors"
    assert host_models.feature_model("clip") == str(models / "feature_models" / "clip")
    assert host_models.feature_model("eyes.safetensors") == str(eyes)
    assert host_models.feature_model("eyes.safetensors + words.safetensors") == f"{eyes} + {words}"
    assert host_models.feature_model("a + b") == str(models / "clip_vision" / "a + b")
    assert host_models.feature_model("openai/clip") == "openai/clip"
    for kind, name in (("BLIP", "base"), ("blip", "large"), ("blip", "someone/base")):
        (models / kind / name).mkdir(parents=True)
        (models / kind / name / "config.json").write_text("{}")
    (models / "BLIP" / "empty").mkdir()
    found = {"base": "BLIP/base", "someone/base": "blip/someone/base", "Salesforce/large": "blip/large"}
    for name, path in found.items():
        assert Path(host_models.caption_model(name)) == models / path
    assert [host_models.caption_model(name) for name in ("empty", "other", "")] == ["empty", "other", ""]
    assert host_models.clip_tokenizer() == Path("comfy", "sd1_tokenizer")


# Pictures, URLs, numbers


def test_picture_folders_are_shown(bridge: Any, tmp_path: Path) -> None:
    folder = tmp_path / "input" / "my dog"
    folder.mkdir()
    noisy((400, 200), 0).save(folder / "0 ü.png")
    noisy((300, 300), 1).save(folder / "1.png")
    (folder / "1.txt").write_text("a {token} asleep")
    (folder / "2.png").write_bytes(b"no picture")
    (tmp_path / "input" / "toys.zip").write_bytes(b"")
    pictures = module("host_pictures")
    assert pictures.picture_folders() == {
        "no_folder": "(connected images)",
        "folders": [
            {"name": "my dog", "archive": False, "count": 3},
            {"name": "toys.zip", "archive": True, "count": None},
        ],
    }
    report = pictures.picture_report("my dog")
    url = "/dreambooth/folders/thumbnail?folder=my+dog&picture="
    assert report["pictures"] == [
        {"name": "0 ü.png", "caption": "", "width": 400, "height": 200, "thumbnail": f"{url}0+%C3%BC.png"},
        {"name": "1.png", "caption": "a {token} asleep", "width": 300, "height": 300, "thumbnail": f"{url}1.png"},
    ]
    assert "2.png" in {warning["picture"] for warning in report["warnings"]}
    assert report["problem"] is None
    small = Image.open(io.BytesIO(pictures.thumbnail("my dog", "0 ü.png")))
    assert (small.format, small.size) == ("JPEG", (192, 96))
    with pytest.raises(PicturesError, match=r"no picture '7\.png' in my dog"):
        pictures.thumbnail("my dog", "7.png")
    (tmp_path / "input" / "none").mkdir()
    nothing = pictures.picture_report("none")
    assert (nothing["pictures"], nothing["warnings"]) == ([], [])
    assert nothing["problem"]


def test_no_folder_outside_is_shown(bridge: Any, tmp_path: Path) -> None:
    pictures = module("host_pictures")
    (tmp_path / "input" / "out").symlink_to(tmp_path / "output")
    for name in ("", ".", "out", "nothing"):
        with pytest.raises(PicturesError, match="no folder"):
            pictures.picture_report(name)
        with pytest.raises(PicturesError, match="no folder"):
            pictures.thumbnail(name, "0.png")


# What is asked of ComfyUI


@pytest.mark.parametrize(
    ("device", "name", "algebra"),
    [("cuda:1", "cuda:1", "cuda:1"), ("mps", "mps", "cpu"), ("cpu", "cpu", "cpu"), ("xpu", "cpu", "cpu")],
)
def test_the_device_is_comfyui_s(
    device: str, name: str, algebra: str, bridge: Any, comfy_stand_in: Comfy, caplog: pytest.LogCaptureFixture
) -> None:
    comfy_stand_in.device = torch.device(device)
    assert (bridge.device_name(), bridge.algebra_device()) == (name, algebra)
    assert ("which is slow" in caplog.text) == (device == "xpu")


def test_training_frees_the_device_and_leaves_inference_mode(bridge: Any, comfy_stand_in: Comfy) -> None:
    def work() -> None:
        with bridge.training_mode():
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            comfy_stand_in.asked.append("training")
            raise ValueError("x")

    with torch.inference_mode():
        with pytest.raises(ValueError, match="x"):
            work()
        assert torch.is_inference_mode_enabled()
    freed = ("free", 1e30, torch.device("cpu"))
    assert comfy_stand_in.asked == [("unload",), freed, ("empty",), "training", ("empty",)]


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("mode", ["interruptible", "training_mode"])
def test_a_cancel_is_comfyui_s_interrupt(mode: str, interrupted: bool, bridge: Any, comfy_stand_in: Comfy) -> None:
    comfy_stand_in.interrupted = interrupted
    with pytest.raises(Interrupted) as caught, getattr(bridge, mode)():
        raise CancelledError("stopped")
    assert str(caught.value) == ("by the prompt" if interrupted else "")


def test_a_checkpoint_is_loaded_as_comfyui_loads_it(bridge: Any, comfy_stand_in: Comfy, tmp_path: Path) -> None:
    assert bridge.load_checkpoint(Path("x.safetensors")) == ("model", "clip", "vae")
    embeddings = [str(tmp_path / "models" / "embeddings"), str(tmp_path / "models" / "more" / "embeddings")]
    assert comfy_stand_in.asked == [("checkpoint", "x.safetensors", ("embedding_directory", embeddings))]


class Weights:
    """A MODEL or a CLIP with a weight: of itself, and of each patch."""

    def __init__(self, name: str, key: str, weight: torch.Tensor, *patches: torch.Tensor) -> None:
        self.keys = {name: key}
        self.model = self.cond_stage_model = self.patcher = self
        self.entries = {key: [(weight, lambda tensor: tensor), *patches]}

    def model_state_dict(self) -> dict[str, Any]:
        return dict.fromkeys(self.entries)

    def get_key_patches(self) -> dict[str, Any]:
        return self.entries


def test_an_adapter_is_given_to_comfyui(bridge: Any, comfy_stand_in: Comfy, caplog: pytest.LogCaptureFixture) -> None:
    model = Weights(UNET_OF_BASE, "unet.weight", torch.eye(4))
    clip = Weights(CLIP_OF_BASE, "clip.weight", torch.eye(4))
    adapter = adapter_of(2.0)
    assert bridge.apply_adapter(model, clip, adapter.state_dict(), 0.5, 0.25) == ("model'", "clip'")
    [(_, *asked)] = comfy_stand_in.asked
    assert asked[0] is model
    assert asked[1] is clip
    assert asked[3:] == [0.5, 0.25]
    assert asked[2].keys() == adapter.state_dict().keys()
    assert not caplog.records
    bridge.apply_adapter(model, None, adapter.state_dict(), 1.0, 1.0)
    assert {key.split(".")[0] for key in comfy_stand_in.asked[1][3]} == {UNET_OF_BASE}
    assert "1 of the adapter's 2 modules do not exist" in caplog.text
    with pytest.raises(AdapterError, match="changes nothing in what is connected"):
        bridge.apply_adapter(None, clip, adapter_of(1.0, UNET_OF_BASE).state_dict(), 1.0, 1.0)
    other = Weights("lora_unet_conv_in", "unet.weight", torch.eye(4))
    with pytest.raises(AdapterError, match="none of its 1 modules for the"):
        bridge.apply_adapter(other, clip, adapter.state_dict(), 1.0, 1.0)
    large = Weights(UNET_OF_BASE, "unet.weight", torch.eye(8))
    with pytest.raises(AdapterError, match=r"has shape \(4, 4\) in the adapter and \(8, 8\) in the model"):
        bridge.apply_adapter(large, clip, adapter.state_dict(), 1.0, 1.0)
    assert len(comfy_stand_in.asked) == 2


def test_the_magnitudes_of_a_dora_make_up_for_comfyui_s_norms(bridge: Any, comfy_stand_in: Comfy) -> None:
    """It divides by the rows' norms before the change; with these magnitudes the rows are as long as was trained."""
    weight = torch.rand((4, 4), generator=torch.Generator().manual_seed(0)) + 1
    patch = torch.ones(4, 4)
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    tensors = adapter_of(2.0, UNET_OF_BASE).state_dict() | {f"{UNET_OF_BASE}.dora_scale": scale}
    bridge.apply_adapter(Weights(UNET_OF_BASE, "key", weight, patch), None, tensors, 1.0, 1.0)
    given = comfy_stand_in.asked[0][3][f"{UNET_OF_BASE}.dora_scale"]
    changed = weight + patch + parse_adapter(adapter_of(2.0, UNET_OF_BASE).state_dict()).layers[UNET_OF_BASE].delta()
    theirs = given * changed / (weight + patch).norm(dim=1, keepdim=True)
    assert theirs.norm(dim=1) == pytest.approx(scale[:, 0], rel=1e-5)


def test_lent_weights_are_patched_copies(bridge: Any, comfy_stand_in: Comfy) -> None:
    weight = torch.eye(4, dtype=torch.float16)
    model = Weights(UNET_OF_BASE, "unet.weight", weight, torch.ones(4, 4))
    clip = Weights(CLIP_OF_BASE, "clip.weight", 3 * torch.eye(4))
    lent = bridge.lent_weights(model, clip)
    assert set(lent) == {UNET_OF_BASE, CLIP_OF_BASE}
    assert len(lent) == 2
    assert UNET_OF_BASE in lent
    assert "lora_unet_conv_in" not in lent
    assert torch.equal(lent[UNET_OF_BASE], torch.eye(4) + 1)
    assert torch.equal(weight, torch.eye(4, dtype=torch.float16))
    assert torch.equal(lent[CLIP_OF_BASE], 3 * torch.eye(4))
    assert set(bridge.lent_weights(None, clip)) == {CLIP_OF_BASE}
    assert set(bridge.lent_weights(model, None)) == {UNET_OF_BASE}
    assert not bridge.lent_weights(None, None)


# The base model


@pytest.fixture
def samplings(comfy_stand_in: Comfy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's classes of sampling, as far as they are told apart."""
    stand_in = ModuleType("comfy.model_sampling")
    discrete = type("ModelSamplingDiscrete", (), {"sigmas": torch.tensor([0.1, 14.6])})
    eps = type("EPS", (), {"calculate_denoised": lambda self: "eps"})
    velocity = type("V_PREDICTION", (eps,), {"calculate_denoised": lambda self: "v"})
    edm = type("EDM", (velocity,), {"calculate_denoised": lambda self: "edm"})
    classes = {"ModelSamplingDiscrete": discrete, "EPS": eps, "V_PREDICTION": velocity, "EDM": edm}
    vars(stand_in).update(classes)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    sys.modules["comfy"].model_sampling = stand_in  # type: ignore[attr-defined]
    return stand_in


class Network(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), value, dtype=torch.float16))
        self.other = torch.nn.Parameter(torch.full((1,), value))


def parts_of(sampling: Any, name: str) -> tuple[Any, Any, Any]:
    """A MODEL, CLIP and VAE."""
    unet = Network(1.0)
    unet.input_blocks = torch.nn.ModuleList()
    model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=unet),
        patches={"diffusion_model.weight": [10.0], "elsewhere.weight": [1.0]},
        get_model_object=lambda kind: sampling if kind == "model_sampling" else None,
        cached_patcher_init=(None, ("/models/dream.v1.safetensors",)),
    )
    stage = torch.nn.Module()
    for each, value in ((name, 2.0), ("unknown", 9.0)):
        encoder = torch.nn.Module()
        encoder.transformer = Network(value)
        stage.add_module(each, encoder)
    clip = SimpleNamespace(
        cond_stage_model=stage,
        patcher=SimpleNamespace(patches={f"{name}.transformer.other": [5.0]}),
        tokenizer=SimpleNamespace(**{name: SimpleNamespace(tokenizer="its tokenizer")}),
        layer_idx=-2,
    )
    return model, clip, SimpleNamespace(first_stage_model=Network(3.0))


def test_the_base_is_borrowed_with_its_patches(
    bridge: Any, samplings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pack.trainer.models.open.open_base", lambda tensors: tensors)
    name = FAMILIES[0].text_encoders[0].short_name
    sampling = type("Sampling", (samplings.ModelSamplingDiscrete, samplings.EPS), {})()
    model, clip, vae = parts_of(sampling, name)
    lent = bridge.borrow_base(model, clip, vae)
    assert {key: float(tensor[0]) for key, tensor in lent.denoiser.items()} == {"weight": 11.0, "other": 1.0}
    assert lent.denoiser["weight"].dtype == torch.float16
    assert model.model.diffusion_model.weight[0].item() == 1.0, "the model's own stays"
    assert lent.denoiser["other"].data_ptr() == model.model.diffusion_model.other.data_ptr(), "no copy"
    assert {key: float(tensor[0]) for key, tensor in lent.vae.items()} == {"weight": 3.0, "other": 3.0}
    assert list(lent.text_encoders) == [name]
    encoder = {key: float(tensor[0]) for key, tensor in lent.text_encoders[name].items()}
    assert encoder == {"weight": 2.0, "other": 7.0}
    assert dict(lent.tokenizers) == {name: "its tokenizer"}
    assert (lent.title, lent.clip_skip, lent.prediction.type) == ("dream.v1", 2, "epsilon")
    assert not caplog.records
    clip.layer_idx = None
    model.cached_patcher_init = None
    model.injections = {"bypass": []}
    again = bridge.borrow_base(model, clip, vae)
    assert (again.clip_skip, again.title) == (0, "SimpleNamespace")
    assert [(record.levelno, "bypass mode" in record.message) for record in caplog.records] == [(logging.WARNING, True)]


@pytest.mark.parametrize(
    ("kinds", "last_sigma", "expected"),
    [
        (("ModelSamplingDiscrete", "EPS"), 14.6, ("epsilon", False)),
        (("ModelSamplingDiscrete", "V_PREDICTION"), 14.6, ("v_prediction", False)),
        (("ModelSamplingDiscrete", "V_PREDICTION"), 4518.0, ("v_prediction", True)),
        (("ModelSamplingDiscrete", "EDM"), 14.6, None),
        (("EPS",), 14.6, None),
        (("V_PREDICTION",), 14.6, None),
    ],
    ids=str,
)
def test_what_the_model_predicts_is_read_from_its_sampling(
    kinds: tuple[str, ...], last_sigma: float, expected: tuple[str, bool] | None, bridge: Any, samplings: Any
) -> None:
    sampling = type("Sampling", tuple(getattr(samplings, kind) for kind in kinds), {})()
    sampling.sigmas = torch.tensor([0.1, last_sigma])
    model, _, _ = parts_of(sampling, "clip_l")
    if expected is None:
        with pytest.raises(WeightsError, match=f"sampling is {' with '.join(kinds)}, which is not supported"):
            bridge._prediction(model)
        del model.model.diffusion_model.input_blocks
        assert bridge._prediction(model) is None, "no UNet: its family is told by its weights"
        return
    prediction = bridge._prediction(model)
    assert (prediction.type, prediction.zero_terminal_snr) == expected
    assert prediction.source == "the model's sampling in the graph"


def test_bundled_embeddings_are_told_where_no_prompt_can_call_them(
    bridge: Any, comfy_stand_in: Comfy, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = adapter_of(2.0, UNET_OF_BASE).state_dict()
    bundled = Adapter(parse_adapter(tensors).layers, {}, embeddings={"bundle_emb.sks.string_to_param.*": torch.ones(1)})
    model = Weights(UNET_OF_BASE, "unet.weight", torch.eye(4))
    bridge.apply_adapter(model, None, bundled.state_dict(), 1.0, 1.0)
    assert comfy_stand_in.asked[0][3].keys() == tensors.keys()
    assert "contains embeddings, which prompts can't use unless clip is connected: sks" in caplog.text
