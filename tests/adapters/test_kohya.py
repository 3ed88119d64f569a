"""The adapter file: names, shapes, hashes and metadata that other programs expect, and the dialects that are read."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import mostly_slow
from checkpoints import SHAPES, clip_shapes, unet_shapes, vae_shapes
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import DEMO, ROOT, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import Adapter, LoraLayer, file_hashes, parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.metadata import CONFIG_KEY, FINGERPRINT_KEY
from pack.trainer.adapters.module_paths import module_name
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import AdapterError
from pack.trainer.dreambooth import TrainResult
from pack.trainer.models.families import identify
from pack.trainer.models.families.base import BaseWeights, DiffusionModel, Prediction
from pack.trainer.models.families.clip import text_component
from pack.trainer.models.families.ldm import unet_component, unet_config, vae_component
from pack.trainer.models.open import open_base
from pack.trainer.settings.base import field_extra
from pack.trainer.settings.train import PriorSettings, TrainCommand, TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

Golden = dict[str, list[list[int]]]
GOLDEN: Golden = json.loads((ROOT / "tests/golden/kohya_sd15_keys.json").read_text())
GOLDEN_CONV: Golden = json.loads((ROOT / "tests/golden/kohya_sd15_conv_keys.json").read_text())


# Names and shapes


@pytest.fixture(scope="module")
def sd15() -> BaseWeights:
    """Stable Diffusion 1.5 at full size, on the meta device."""

    def on_meta(entries: Any) -> dict[str, Tensor]:
        return {name: torch.empty(dims, device="meta") for name, dims in entries}

    shape = SHAPES["full"]
    unet, vae, text = (on_meta(entries(shape)) for entries in (unet_shapes, vae_shapes, clip_shapes))
    config = unet_config(unet) | {"attention_head_dim": 8}
    family = identify(config)
    parts = (unet_component(unet, config), vae_component(vae, 0.18215), [text_component(text, family.text_encoders[0])])
    return BaseWeights(family, *parts, [None], {}, Prediction(), 0, "meta", "0")


@pytest.mark.parametrize(
    ("targets", "mark", "count"),
    [("attention", ("_attn1_", "_attn2_"), 128), ("attention-mlp", ("_attentions_",), 192)],
)
def test_unet_modules_are_named_and_shaped_as_kohyas(
    targets: Any, mark: tuple[str, ...], count: int, sd15: BaseWeights
) -> None:
    lora = TrainableAdapter(sd15.family.build(sd15), TrainSettings(rank=4, targets=targets))
    ours = shapes_of(lora)
    golden = {
        name: shapes
        for name, shapes in GOLDEN.items()
        if name.startswith("lora_unet_") and any(m in name for m in mark)
    }
    assert len(golden) == count
    assert ours == golden


def shapes_of(lora: TrainableAdapter, start: str = "lora_") -> Golden:
    """Shapes of the two matrices of every module whose name begins so."""
    return {
        name: [list(part.shape) for part in layer.parameters.values()]
        for name, layer in lora.layers.items()
        if name.startswith(start)
    }


def test_text_encoder_modules_are_named_as_kohyas(sd15: BaseWeights) -> None:
    lora = TrainableAdapter(sd15.family.build(sd15), TrainSettings(rank=4, text_encoder_lr=1e-5))
    assert shapes_of(lora) == GOLDEN
    assert len(shapes_of(lora, "lora_te_")) == 72
    encoder = sd15.family.build(sd15).text_encoders["text_encoder"]
    named = {module_name("text_encoder", path) for path, _ in encoder.named_modules()}
    assert named >= set(shapes_of(lora, "lora_te_"))


def test_convolutions_are_named_and_shaped_as_kohyas(sd15: BaseWeights) -> None:
    """Kohya's conv_dim is the rank of 3×3 convolutions alone."""
    settings = TrainSettings(rank=4, conv_rank=2, targets="all", text_encoder_lr=1e-5)
    assert shapes_of(TrainableAdapter(sd15.family.build(sd15), settings)) == GOLDEN_CONV


# The file


def random_layer(in_features: int, out_features: int, rank: int, alpha: float, seed: int) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, in_features), generator=generator)
    return LoraLayer(down, torch.randn((out_features, rank), generator=generator), alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = {
        f"lora_unet_down_blocks_{n}_resnets_0_conv1": random_layer(6, 8, 4, alpha, n)
        for n, alpha in ((1, 4.0), (2, 2.5))
    }
    path = tmp_path / "a" / "adapter.safetensors"
    write_adapter(path, Adapter(layers), dtype)
    tensors = load_file(path)
    assert len(tensors) == 6
    for name, layer in layers.items():
        assert torch.equal(tensors[f"{name}.lora_down.weight"], layer.down.to(dtype))
        assert torch.equal(tensors[f"{name}.lora_up.weight"], layer.up.to(dtype))
        assert tensors[f"{name}.alpha"].shape == ()
        assert tensors[f"{name}.alpha"].item() == layer.alpha
    back = read_adapter(path)
    assert {name: layer.alpha for name, layer in back.layers.items()} == {n: la.alpha for n, la in layers.items()}


def test_hashes_are_kohyas(tmp_path: Path) -> None:
    """Large enough that the legacy hash sees tensor bytes."""
    layers = {f"lora_unet_{n}": random_layer(3000, 3000, 32, 32.0, n) for n in range(3)}
    metadata = {"ss_steps": "5", "ss_seed": "7", "modelspec.title": "left out of the hashed bytes"}
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, Adapter(layers, metadata), torch.float16)
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        written = file.metadata()
    header = int.from_bytes(content[:8], "little")
    model_hash = hashlib.sha256(content[8 + header :]).hexdigest()
    assert written["sshs_model_hash"] == model_hash
    assert written["modelspec.hash_sha256"] == f"0x{model_hash}"
    bare = io.BytesIO(save(load_file(path), {"ss_steps": "5", "ss_seed": "7"}))
    bare.seek(0x100000)
    legacy = hashlib.sha256(bare.read(0x10000)).hexdigest()[:8]
    assert legacy != hashlib.sha256(b"").hexdigest()[:8]
    assert written["sshs_legacy_hash"] == legacy


@pytest.mark.parametrize("size", [0xFFF00, 0x100000, 0x108001, 0x10FF00, 0x110000, 0x120003], ids=hex)
def test_hashes_are_kohyas_however_large_the_metadata(size: int) -> None:
    """The bytes of the legacy hash begin in the header, or lie in it."""
    tensors = {"lora_unet_m.lora_down.weight": torch.arange(0x10000, dtype=torch.float32)}
    counted = {"ss_tag_frequency": "犬" + "x" * size}
    content = save(tensors, counted)
    hashed = hashlib.sha256(content[-4 * 0x10000 :]).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()
    assert file_hashes(tensors, counted | {"modelspec.title": "dog"}) == (hashed[0], hashed[1][:8])


HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
LOOK_LIKE_HASHES = {
    "marks of the length of the short hash": "a photo of a dog!!!!!!!! now",
    "marks of the length of the long hash": "?" * 64,
    "longer marks": "0x" + "?" * 64 + "!" * 24 + "?" * 130,
    "zeros": "0" * 8 + " " + "0" * 64 + " 0x" + "0" * 64,
    "quoted, as JSON in JSON": json.dumps({key: "!" * 8 for key in HASH_KEYS} | {"a": json.dumps(["?" * 64])}),
    "a header that is cut off": ',"sshs_legacy_hash":"!!!!!!!!","sshs_model_hash":"' + "0" * 64,
    "backslashes at the ends": '\\","sshs_legacy_hash":"00000000\\',
    "not ASCII": "„" + "!" * 8 + "“ 犬\U0001f415\u2028" + "?" * 64 + "\x7f",
    "controls": "\0\t\n\x1f" + "!" * 8 + "\n" + "0" * 64,
}


@pytest.mark.parametrize("text", LOOK_LIKE_HASHES.values(), ids=LOOK_LIKE_HASHES)
def test_metadata_that_look_like_hashes_are_written_as_given(text: str, tmp_path: Path) -> None:
    """Whatever stands in for the hashes while they are computed is replaced in their own entries alone."""
    layers = {f"lora_unet_{n}": random_layer(3000, 3000, 32, 32.0, n) for n in range(3)}
    layers["lora_unet_!!!!!!!!"] = random_layer(4, 4, 2, 2.0, 3)  # as no program names a module
    keys = ["!", "a", "modelspec.title", "modelspec.hash", "modelspec.hash_sha256x", "n", "ss_tag_frequency", "ss_z"]
    keys += ["sshs_legacy_hash ", "sshs_model_hash2", "xsshs_model_hash", '"sshs_model_hash', "zz", "\U0001f415", text]
    metadata = {key: f"{text} {key}" for key in keys} | {"ss_comment": text, "exactly": text}
    stale = dict.fromkeys(HASH_KEYS, text)  # of the file that the metadata come from
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, Adapter(layers, metadata | stale), torch.float16)
    with safe_open(path, "pt") as file:
        written = dict(file.metadata())
    model_hash = hashlib.sha256(path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :]).hexdigest()
    bare = save(load_file(path), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    legacy_hash = hashlib.sha256(bare[0x100000:0x110000]).hexdigest()[:8]
    hashes = (model_hash, legacy_hash, f"0x{model_hash}")
    assert written == metadata | dict(zip(HASH_KEYS, hashes, strict=True))
    assert {name.partition(".")[0] for name in load_file(path)} == set(layers)


# Metadata

READ_BY_OTHERS = [
    "ss_output_name",
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_clip_skip",
    "ss_training_started_at",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_tag_frequency",
    "ss_datasets",
    "ss_learning_rate",
    "ss_unet_lr",
    "ss_text_encoder_lr",
    "ss_optimizer",
    "ss_lr_scheduler",
    "ss_steps",
    "ss_seed",
    "ss_mixed_precision",
    "ss_prior_loss_weight",
    "ss_noise_offset",
    "ss_min_snr_gamma",
    "ss_resolution",
    "ss_num_train_images",
    "ss_num_reg_images",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.resolution",
    "modelspec.date",
    "modelspec.trigger_phrase",
    "modelspec.prediction_type",
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
]


@pytest.fixture(scope="module")
def command(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainCommand:
    return TrainCommand(
        base=tiny_checkpoint,
        images=DEMO / "subject",
        instance_prompt="a photo of sks dog",
        class_prompt="a photo of a dog",
        prior_count=2,
        prior_steps=2,
        prior_seed=5,
        prior_scheduler="euler",
        device="cpu",
        output_dir=tmp_path_factory.mktemp("output"),
        name="dog",
        steps=2,
        rank=4,
        alpha=3.0,
        targets="attention",
        resolution=64,
        seed=2**64 - 1,
        learning_rate=3e-4,
        prior_weight=0.7,
        gradient_accumulation=2,
        lr_schedule="cosine",
        lr_warmup_steps=1,
    )


@pytest.fixture(scope="module")
def result(command: TrainCommand) -> TrainResult:
    return run_train(command, Recorder())


@pytest.fixture(scope="module")
def metadata(result: TrainResult) -> dict[str, str]:
    with safe_open(result.path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("key", READ_BY_OTHERS)
def test_metadata_that_other_programs_read(key: str, metadata: dict[str, str]) -> None:
    assert isinstance(metadata.get(key), str)


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "ss_output_name": "dog",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "tiny",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "3.0",
        "ss_learning_rate": "0.0003",
        "ss_unet_lr": "0.0003",
        "ss_lr_scheduler": "cosine",
        "ss_steps": "2",
        "ss_seed": "18446744073709551615",
        "ss_mixed_precision": "no",
        "ss_prior_loss_weight": "0.7",
        "ss_gradient_accumulation_steps": "2",
        "ss_num_train_images": "5",
        "ss_num_reg_images": "2",
        "ss_resolution": "(64, 64)",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "dog",
        "modelspec.resolution": "64x64",
        "modelspec.trigger_phrase": "a photo of sks dog",
        "modelspec.prediction_type": "epsilon",
    }.items(),
)
def test_metadata_values(key: str, value: str, metadata: dict[str, str]) -> None:
    assert metadata[key] == value


@pytest.mark.slow
def test_metadata_of_a_run_that_goes_on_with_an_adapter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Kind, rank and alpha are the adapter's, whatever the settings say."""
    common: dict[str, Any] = {
        "base": tiny_checkpoint,
        "images": DEMO / "subject",
        "device": "cpu",
        "output_dir": tmp_path,
    }
    common |= {"steps": 1, "resolution": 64, "targets": "attention"}
    first = run_train(TrainCommand(**common, adapter="loha", rank=2, name="first"), Recorder())
    again = run_train(TrainCommand(**common, rank=8, alpha=1.0, start_from=first.path, name="again"), Recorder())
    assert {layer.rank for layer in again.adapter.layers.values()} == {2}
    metadata = again.adapter.metadata
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("2", 2.0)
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"])["algo"] == "loha"


def test_metadata_is_well_formed(metadata: dict[str, str]) -> None:
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"a photo of sks dog": 5}}
    assert json.loads(metadata["ss_dataset_dirs"])["dog"]["img_count"] == 5
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"] == {"resolution": [64, 64], "count": 5}
    assert isinstance(json.loads(metadata["ss_network_args"]), dict)
    assert float(metadata["ss_training_started_at"]) > 1.7e9
    assert datetime.fromisoformat(metadata["modelspec.date"]).year >= 2024
    assert len(metadata[FINGERPRINT_KEY]) == 64


def test_the_file_alone_tells_its_run(metadata: dict[str, str], command: TrainCommand) -> None:
    config = json.loads(metadata[CONFIG_KEY])
    for settings in (TrainSettings, PriorSettings):
        paths = {name for name in settings.model_fields if field_extra(settings, name)["path"]}
        values = {name: config[name] for name in settings.model_fields if name not in paths}
        left_open = {"prior": "class-pictures"} if "prior" in values else {}  # and the file says what was chosen
        assert settings.checked(values) == settings(**{name: getattr(command, name) for name in values} | left_open)
        assert not paths & set(config)
    assert config["captions"] == ["a photo of sks dog"] * 5
    assert config["base_fingerprint"] == open_base(command.base).fingerprint


def test_a_checkpoint_is_a_complete_adapter_file(result: TrainResult, metadata: dict[str, str]) -> None:
    with safe_open(result.run / "step-00000002" / "adapter.safetensors", "pt") as file:
        own = dict(file.metadata())
    different = {key for key in own.keys() | metadata.keys() if own.get(key) != metadata.get(key)}
    hashes = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}  # of another precision
    assert different <= hashes | {"ss_training_finished_at", "modelspec.date", "modelspec.usage_hint"}


# diffusers reads what is written


@pytest.fixture(scope="module")
def demo_base() -> BaseWeights:
    return open_base(DEMO / "base")


def built(base: BaseWeights) -> DiffusionModel:
    """A model in float32."""
    model = base.family.build(base)
    for network in (model.denoiser, model.vae, *model.text_encoders.values()):
        nn.Module.float(network)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, 4, 16, 16), generator=generator)
    return latents, torch.tensor([100, 700]), torch.randn((2, 32, 128), generator=generator)


@torch.no_grad()
def prediction(model: DiffusionModel) -> Tensor:
    latents, timesteps, text = inputs()
    return model.predict(latents, timesteps, {"text": text})


def pipeline() -> Any:
    return StableDiffusionPipeline.from_pretrained(DEMO / "base", local_files_only=True).to(torch.float32)


@torch.no_grad()
def diffusers_prediction(pipe: Any) -> Tensor:
    return pipe.unet(*inputs(), return_dict=False)[0]


@pytest.mark.parametrize(
    ("targets", "dtype"),
    mostly_slow(
        [("attention", torch.float16), ("attention-mlp", torch.float32), ("attention-mlp", torch.float16)],
        ("attention-mlp", torch.float16),
    ),
)
def test_diffusers_and_merging_reproduce_the_trained_model(
    targets: Any, dtype: torch.dtype, demo_base: BaseWeights, tmp_path: Path
) -> None:
    model = built(demo_base)
    plain = prediction(model)
    lora = TrainableAdapter(model, TrainSettings(rank=4, alpha=2.0, targets=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora.layers.values():
            for part in layer.parameters.values():  # numbers that half precision holds exactly
                part.copy_(0.05 * torch.randn(part.shape, generator=generator)).copy_(part.to(dtype))
    trained = prediction(model)
    assert (trained - plain).abs().max() > 0.01

    write_adapter(tmp_path / "adapter.safetensors", lora.adapter(), dtype)
    merged = built(demo_base)
    merge_into(merged, read_adapter(tmp_path / "adapter.safetensors"), 1.0)
    torch.testing.assert_close(prediction(merged), trained, rtol=0, atol=1e-4)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    torch.testing.assert_close(diffusers_prediction(pipe), trained, rtol=0, atol=1e-4)


LORA_WRITER = StableDiffusionPipeline.save_lora_weights


@pytest.mark.parametrize("announced", [True, False], ids=["with its header", "without a header"])
def test_files_of_diffusers_are_read_with_their_alpha(announced: bool, demo_base: BaseWeights, tmp_path: Path) -> None:
    """In newer files alpha stands in the header; without one, diffusers takes the rank for it."""
    if announced and "unet_lora_adapter_metadata" not in inspect.signature(LORA_WRITER).parameters:
        pytest.skip("this diffusers writes no header")
    alpha = 8.0 if announced else 4.0
    pipe = pipeline()
    unet_config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v", "to_out.0", "ff.net.2"])
    text_config = LoraConfig(r=4, lora_alpha=alpha * 2 if announced else 4, target_modules=["q_proj", "fc1"])
    pipe.unet.add_adapter(unet_config)
    inject_adapter_in_model(text_config, pipe.text_encoder)  # its own add_adapter wants the newest peft
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for network in (pipe.unet, pipe.text_encoder):
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    options: dict[str, Any] = {}
    if announced:
        options = {
            "unet_lora_adapter_metadata": unet_config.to_dict(),
            "text_encoder_lora_adapter_metadata": text_config.to_dict(),
        }
        for config in options.values():
            for key in [key for key, value in config.items() if isinstance(value, set | tuple)]:
                config[key] = sorted(config[key])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
        **options,
    )
    model = built(demo_base)
    before = prediction(model)
    merge_into(model, read_adapter(tmp_path / "pytorch_lora_weights.safetensors"), 1.0)
    expected = diffusers_prediction(pipe)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(prediction(model), expected, rtol=0, atol=1e-4)
    ids = pipe.tokenizer("a photo of sks dog", padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(ids)[0]
        torch.testing.assert_close(model.encode_prompts(["a photo of sks dog"])["text"], expected, rtol=0, atol=1e-4)


# Dialects: the same five layers, as different programs name them

RANK, ALPHA = 2, 3.0
UNET_MODULES = {
    # diffusers' path: (in, out, original path)
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32, "input_blocks.1.1"),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (32, 32, "input_blocks.1.1"),
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k": (64, 32, "output_blocks.3.1"),
}
TEXT_MODULES = {"encoder.layers.0.self_attn.q_proj": (64, 64), "encoder.layers.1.mlp.fc1": (64, 128)}
Dialect = Callable[[], dict[str, Tensor]]


def layer_of(path: str) -> LoraLayer:
    sizes = UNET_MODULES.get(path) or TEXT_MODULES[path]
    return random_layer(sizes[0], sizes[1], RANK, ALPHA, len(path))


def deltas() -> dict[str, Tensor]:
    """What each module's weight gains, by path."""
    return {path: ALPHA / RANK * layer_of(path).up @ layer_of(path).down for path in [*UNET_MODULES, *TEXT_MODULES]}


def written(
    unet: Callable[[str], str] | None,
    text: Callable[[str], str] | None,
    down: str,
    up: str,
    alpha: str | None,
) -> dict[str, Tensor]:
    """The layers under the given names; a dialect without alphas has the scale in its `up` matrices."""
    tensors = {}
    for modules, name in ((UNET_MODULES, unet), (TEXT_MODULES, text)):
        for path in modules if name else ():
            layer = layer_of(path)
            tensors[name(path) + down] = layer.down
            tensors[name(path) + up] = layer.up if alpha else layer.up * (ALPHA / RANK)
            if alpha:
                tensors[name(path) + alpha] = torch.tensor(ALPHA)
    return tensors


def underscored(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path


def processor(prefix: str) -> Callable[[str], str]:
    """diffusers' attention processors: …attn1.processor.to_q_lora.down.weight, and to_out without a number."""

    def name(path: str) -> str:
        block, _, projection = path.removesuffix(".0").rpartition(".")
        return f"{prefix}{block}.processor.{projection}"

    return name


def original(path: str) -> str:
    """The paths of a UNet that ComfyUI has loaded."""
    return f"diffusion_model.{UNET_MODULES[path][2]}.{path.partition('.attentions.')[2].partition('.')[2]}"


KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT_NAMES = (".lora_A.weight", ".lora_B.weight")
DIALECTS: dict[str, Dialect] = {
    "kohya": lambda: written(underscored("lora_unet_"), underscored("lora_te_text_model_"), *KOHYA),
    "kohya without alpha": lambda: written(
        underscored("lora_unet_"), underscored("lora_te_text_model_"), *KOHYA[:2], None
    ),
    "diffusers": lambda: written(dotted("unet."), dotted("text_encoder.text_model."), *PEFT_NAMES, None),
    "diffusers, transformers 5": lambda: written(dotted("unet."), dotted("text_encoder."), *PEFT_NAMES, None),
    "diffusers with alphas": lambda: written(dotted("unet."), dotted("text_encoder."), *PEFT_NAMES, ".alpha"),
    "diffusers 0.2x": lambda: (
        written(dotted("unet."), None, ".lora.down.weight", ".lora.up.weight", None)
        | written(
            None,
            dotted("text_encoder.text_model."),
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
            None,
        )
    ),
    "diffusers 0.1x": lambda: written(processor("unet."), None, "_lora.down.weight", "_lora.up.weight", None),
    "diffusers, the first": lambda: written(processor(""), None, "_lora.down.weight", "_lora.up.weight", None),
    "PEFT's own": lambda: written(dotted("base_model.model."), None, *PEFT_NAMES, None),
    "PEFT's own with the adapter's name": lambda: written(
        dotted("base_model.model."), None, ".lora_A.default.weight", ".lora_B.default.weight", None
    ),
    "ComfyUI's trainer": lambda: written(original, None, *KOHYA),
}


@pytest.fixture(scope="module")
def tiny_base(tiny_checkpoint: Path) -> BaseWeights:
    return open_base(tiny_checkpoint)


def weights_of(model: DiffusionModel) -> dict[str, Tensor]:
    found = {name.removesuffix(".weight"): tensor for name, tensor in model.denoiser.state_dict().items()}
    for name, tensor in model.text_encoders["text_encoder"].state_dict().items():
        found[name.removeprefix("text_model.").removesuffix(".weight")] = tensor
    return found


def gains(base: BaseWeights, adapter: Adapter) -> dict[str, Tensor]:
    """What merging the adapter adds to each weight that it changes, by path."""
    model = base.family.build(base)
    before = weights_of(model)
    merge_into(model, adapter, 1.0)
    after = weights_of(model)
    return {path: after[path] - before[path] for path in before if not torch.equal(after[path], before[path])}


def assert_gains(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for path, delta in expected.items():
        torch.testing.assert_close(found[path], delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_means_the_same(dialect: str, tiny_base: BaseWeights, tmp_path: Path) -> None:
    tensors = DIALECTS[dialect]()
    texts = any("encoder.layers" in name or "lora_te" in name for name in tensors)
    expected = {path: delta for path, delta in deltas().items() if texts or path in UNET_MODULES}
    assert_gains(gains(tiny_base, parse_adapter(tensors)), expected)
    save_file(tensors, tmp_path / "adapter.safetensors")
    adapter = read_adapter(tmp_path / "adapter.safetensors")
    write_adapter(tmp_path / "again.safetensors", adapter, torch.float32)
    assert_gains(gains(tiny_base, read_adapter(tmp_path / "again.safetensors")), expected)


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 6},
    "rank-stabilised": {"lora_alpha": 6, "use_rslora": True},
    "alpha of its own for some": {"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 1.5, "fc1": 2.5}},
    "rank and alpha of its own for some": {
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"attn1.to_q": 2, "fc1": 2},
        "alpha_pattern": {"attn1.to_q": 1.5, "fc1": 2.5},
    },
    "alpha by regular expression": {"lora_alpha": 6, "alpha_pattern": {r".*blocks.0.*to_q": 1.5, "^encoder.*0.*": 3.0}},
}


@pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("config", PEFT_CONFIGS)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_folders_of_peft_are_read_with_their_scale(
    component: str, config: str, tiny_base: BaseWeights, tmp_path: Path
) -> None:
    """Written by PEFT, and compared with what PEFT adds to the weights."""
    model = tiny_base.family.build(tiny_base)
    network, targets = (
        (model.denoiser, ["attn1.to_q", "to_out.0", "proj_in"])
        if component == "unet"
        else (model.text_encoders["text_encoder"], ["q_proj", "fc1"])
    )
    wrapped = get_peft_model(network, LoraConfig(r=4, target_modules=targets, **PEFT_CONFIGS[config]))
    generator = torch.Generator().manual_seed(3)
    expected = {}
    with torch.no_grad():
        for path, module in wrapped.named_modules():
            if hasattr(module, "get_delta_weight"):
                up = module.lora_B["default"].weight
                up.copy_(torch.randn(up.shape, generator=generator))
                own_path = path.removeprefix("base_model.model.").removeprefix("text_model.")
                expected[own_path] = module.get_delta_weight("default")
    wrapped.save_pretrained(tmp_path / "adapter")
    assert_gains(gains(tiny_base, read_adapter(tmp_path / "adapter")), expected)


@pytest.mark.parametrize(
    ("down", "mid"),
    [((3, 32, 3, 3), None), ((3, 32, 1, 1), (3, 3, 3, 3))],
    ids=["full kernel", "Tucker core"],
)
def test_convolutions(down: tuple[int, ...], mid: tuple[int, ...] | None, tiny_base: BaseWeights) -> None:
    """The gain acts on a picture as the factors do one after the other."""
    generator = torch.Generator().manual_seed(4)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {"lora_down.weight": down, "lora_up.weight": (32, 3, 1, 1), "lora_mid.weight": mid}
    tensors = {f"{name}.{part}": torch.randn(s, generator=generator) for part, s in shapes.items() if s}
    tensors[f"{name}.alpha"] = torch.tensor(1.5)
    gain = gains(tiny_base, parse_adapter(tensors))
    assert set(gain) == {"down_blocks.0.resnets.0.conv1"}
    picture = torch.randn((1, 32, 8, 8), generator=generator)
    steps = [tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]]
    if mid:
        steps.insert(1, tensors[f"{name}.lora_mid.weight"])
    expected = picture
    for step in steps:
        expected = F.conv2d(expected, step, padding=step.shape[-1] // 2)
    actual = F.conv2d(picture, gain["down_blocks.0.resnets.0.conv1"], padding=1)
    torch.testing.assert_close(actual, expected * 0.5, rtol=1e-4, atol=1e-3)


# Refusals

MODULE = "lora_unet_mid_block_attentions_0_proj_in"
OTHER_KINDS = {
    "OFT, PEFT": [f"base_model.model.mid_block.attentions.0.proj_in.{part}" for part in ("oft_R.weight", "oft_r")],
    "OFT beside a LoRA": [f"{MODULE}.{part}" for part in ("lora_down.weight", "lora_up.weight", "oft_diag")],
    "GLoRA": [f"{MODULE}.{part}" for part in ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")],
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    tensors = {name: torch.ones(2, 2) for name in OTHER_KINDS[kind]}
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match=kind.split(",")[0].split(" beside")[0]):
        read_adapter(tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match=kind.split(",")[0].split(" beside")[0]):
        parse_adapter(tensors)


@pytest.mark.parametrize(
    ("part", "lacking"), [("lora_down.weight", "up"), ("lora_up.weight", "down"), ("alpha", "down")]
)
def test_half_a_layer_is_named(part: str, lacking: str) -> None:
    tensors = DIALECTS["kohya"]() | {
        f"{MODULE}.{part}": torch.ones(2, 2)[0, 0] if part == "alpha" else torch.ones(2, 2)
    }
    with pytest.raises(AdapterError) as caught:
        parse_adapter(tensors)
    assert MODULE in caught.value.problem
    assert lacking in caught.value.problem


@pytest.mark.parametrize("name", [f"{MODULE}.w_norm", f"{MODULE}.lora_down.bias", "something.else"])
def test_an_unknown_tensor_is_not_dropped_silently(name: str, caplog: pytest.LogCaptureFixture) -> None:
    try:
        parse_adapter(DIALECTS["kohya"]() | {name: torch.ones(2, 2)})
    except AdapterError as error:
        told = str(error)
    else:
        told = caplog.text
    assert name in told


def test_a_file_without_a_lora_is_refused(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.ones(2, 2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match="no LoRA"):
        read_adapter(tmp_path / "adapter.safetensors")
