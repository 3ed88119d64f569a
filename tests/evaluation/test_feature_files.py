"""Feature models from single files are those of the folders they were taken from."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from feature_worlds import SIZES, picture
from helpers import DEMO, ROOT
from pack.trainer.core.errors import WeightsError
from pack.trainer.evaluation.feature_configs import FeatureWeights, inferred_config
from pack.trainer.evaluation.feature_extractors import FeatureExtractors, open_feature_model
from pack.trainer.evaluation.feature_files import are_files
from safetensors.torch import load_file, save_file
from torch import Tensor

CPU = torch.device("cpu")
PROMPTS = ["a photo of a red dog", "a house at night " * 30, ""]
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
CLIP_VALUES = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET_VALUES = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def tower(width: int, **more: Any) -> dict[str, Any]:
    facts = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": width // 64}
    return facts | {"projection_dim": 32} | more


def text_tower(width: int, **more: Any) -> dict[str, Any]:
    return tower(width, vocab_size=234, max_position_embeddings=32, bos_token_id=232, eos_token_id=233, **more)


def clip(vision: dict[str, Any], text: dict[str, Any], projection: int = 32) -> Any:
    return transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)
    )


def clip_preprocessing(side: int) -> dict[str, Any]:
    return CLIP_VALUES | {"size": {"shortest_edge": side}, "crop_size": square(side), "resample": 3}


DINOV2 = IMAGENET_VALUES | {"size": {"shortest_edge": 256}, "crop_size": square(224), "resample": 3}
DINO = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "clip": (
        lambda: clip(tower(128, hidden_act="gelu", image_size=32, patch_size=8), text_tower(64, hidden_act="gelu")),
        clip_preprocessing(32),
    ),
    "clip as OpenAI's": (
        lambda: clip(
            tower(768, hidden_act="quick_gelu", image_size=48, patch_size=16),
            text_tower(512, hidden_act="quick_gelu", num_hidden_layers=1),
        ),
        clip_preprocessing(48),
    ),
    "clip_vision_model": (
        lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                **tower(1280, hidden_act="gelu", image_size=28, patch_size=14) | {"num_attention_heads": 16}
            )
        ),
        clip_preprocessing(28),
    ),
    "dinov2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO, image_size=28, patch_size=14)),
        DINOV2,
    ),
    "dinov2 as the giant": (
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(**DINO, image_size=28, patch_size=14, use_swiglu_ffn=True)
        ),
        DINOV2,
    ),
    "vit": (
        lambda: transformers.ViTModel(
            transformers.ViTConfig(**DINO, intermediate_size=96, image_size=32, patch_size=16), add_pooling_layer=False
        ),
        IMAGENET_VALUES | {"size": square(32), "resample": 2},
    ),
}


def copy_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copy(DEMO / "scorer" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folders/… as transformers writes them, files/….safetensors of the same networks, and a tokenizer."""
    root = tmp_path_factory.mktemp("feature files ü")
    (root / "files").mkdir()
    copy_tokenizer(root / "words")
    for number, (name, (build, preprocessing)) in enumerate(NETWORKS.items()):
        torch.manual_seed(number)
        network, folder = build(), root / "folders" / name
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)  # biases and norms, which begin as 0 and 1, count too
        network.save_pretrained(folder)
        common = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        crop = {"do_center_crop": True} if "crop_size" in preprocessing else {}
        (folder / "preprocessor_config.json").write_text(json.dumps(common | crop | preprocessing))
        if name.startswith("clip") and name != "clip_vision_model":
            copy_tokenizer(folder)
        shutil.copy(folder / "model.safetensors", root / "files" / f"{name}.safetensors")
    return root


def half(tensors: dict[str, Tensor], words: str) -> dict[str, Tensor]:
    """The tensors of one tower of a CLIP."""
    return {name: tensor for name, tensor in tensors.items() if re.match(rf"{words}_(model|projection)\.", name)}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def halves(world: Path, folder: Path, name: str = "clip") -> tuple[Path, Path]:
    """A CLIP's towers in two files; the vision tower has no `logit_scale`, the text tower has position_ids."""
    whole = load_file(world / "files" / f"{name}.safetensors")
    text = half(whole, "text") | {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    vision = half(whole, "vision") | half(whole, "visual")
    return write(folder / "eyes.safetensors", vision), write(folder / "words.safetensors", text)


def assert_same(found: Any, wanted: Any) -> None:
    images = [picture(size, number) for number, size in enumerate(SIZES)]
    assert found.kind == wanted.kind
    torch.testing.assert_close(found.pixels(images[1:2]), wanted.pixels(images[1:2]), atol=0, rtol=0)
    torch.testing.assert_close(found.image_features(images), wanted.image_features(images), atol=1e-5, rtol=0)
    if wanted.tokenizer is not None:
        torch.testing.assert_close(found.text_features(PROMPTS), wanted.text_features(PROMPTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_is_its_folder(name: str, world: Path) -> None:
    model = open_feature_model(world / "files" / f"{name}.safetensors", CPU, tokenizer=world / "words")
    assert (model.name, model.kind) == (name, name.split(" as ")[0])
    assert not model.network.training
    assert_same(model, open_feature_model(world / "folders" / name, CPU))


def test_half_precision_is_computed_in_full(world: Path, tmp_path: Path) -> None:
    tensors = load_file(world / "files" / "clip.safetensors")
    rounded = write(tmp_path / "half.safetensors", {name: tensor.half() for name, tensor in tensors.items()})
    widened = write(tmp_path / "wide.safetensors", {name: tensor.half().float() for name, tensor in tensors.items()})
    models = [open_feature_model(path, CPU, tokenizer=world / "words") for path in (rounded, widened)]
    assert {parameter.dtype for parameter in models[0].network.parameters()} == {torch.float32}
    assert_same(*models)


def test_a_model_file_in_its_folder_is_taken_by_the_configuration_there() -> None:
    """The demo's scorer has heads of 32 channels and a mean of 0.5, which no shape shows."""
    model = open_feature_model(DEMO / "scorer" / "model.safetensors", CPU)
    assert model.name == "scorer"
    assert_same(model, open_feature_model(DEMO / "scorer", CPU))


def test_two_towers_are_the_whole(world: Path, tmp_path: Path) -> None:
    wanted = open_feature_model(world / "folders" / "clip", CPU)
    eyes, words = halves(world, tmp_path)
    for source in (f"{eyes} + {words}", f"{words} + {eyes}", f"{world / 'files' / 'clip.safetensors'} + {words}"):
        model = open_feature_model(source, CPU, tokenizer=world / "words")
        assert model.name.split(" + ")[1] == "words"
        assert_same(model, wanted)
    assert_same(open_feature_model(f"{eyes} + {world / 'folders' / 'clip'}", CPU), wanted)
    extractors = FeatureExtractors.open(f"{eyes} + {words}", "", CPU, tokenizer=world / "words")
    torch.testing.assert_close(extractors.text_features(PROMPTS), wanted.text_features(PROMPTS), atol=1e-5, rtol=0)


def test_two_towers_of_different_models_may_be_joined(world: Path, tmp_path: Path) -> None:
    """The vision tower of the one, the text tower of the other, however many towers the files hold."""
    clips = [open_feature_model(world / "folders" / name, CPU) for name in ("clip", "clip as OpenAI's")]
    files = [world / "files" / f"{model.name}.safetensors" for model in clips]
    joined = open_feature_model(f"{files[0]} + {files[1]}", CPU, tokenizer=world / "words")
    seen = [picture(size, number) for number, size in enumerate(SIZES)]
    torch.testing.assert_close(joined.image_features(seen), clips[0].image_features(seen), atol=1e-5, rtol=0)
    torch.testing.assert_close(joined.text_features(PROMPTS), clips[1].text_features(PROMPTS), atol=1e-5, rtol=0)


# Names


def in_open_clip_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenCLIP names a CLIP, after its source: text tower at the root, vision tower under visual."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "final_layer_norm": "ln_final",
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {}
    for name, tensor in tensors.items():
        inner = name.replace("vision_model.", "visual.").removeprefix("text_model.")
        for old, new in names.items():
            inner = inner.replace(old, new)
        if "q_proj" in name:
            rows = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[inner.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(rows)
        elif name in ("visual_projection.weight", "text_projection.weight"):
            found["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.t()
        elif "k_proj" not in name and "v_proj" not in name:
            found[inner] = tensor
    return found


def test_open_clips_names(world: Path, tmp_path: Path) -> None:
    tensors = in_open_clip_names(load_file(world / "files" / "clip.safetensors"))
    wanted = open_feature_model(world / "folders" / "clip", CPU)
    assert {name.split(".")[0] for name in tensors} == {
        *("visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection"),
        "logit_scale",
    }
    whole = write(tmp_path / "open_clip.safetensors", tensors)
    assert_same(open_feature_model(whole, CPU, tokenizer=world / "words"), wanted)
    visual = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    eyes, words = (write(tmp_path / f"{name}.safetensors", one) for name, one in (("eyes", visual), ("words", text)))
    assert open_feature_model(eyes, CPU).kind == "clip_vision_model"
    assert_same(open_feature_model(f"{eyes} + {words}", CPU, tokenizer=world / "words"), wanted)


def test_a_tower_may_lack_its_prefix(world: Path, tmp_path: Path) -> None:
    tensors = load_file(world / "files" / "clip_vision_model.safetensors")
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    bare["embeddings.position_ids"] = torch.arange(5)[None]
    model = open_feature_model(write(tmp_path / "bare.safetensors", bare), CPU)
    assert_same(model, open_feature_model(world / "folders" / "clip_vision_model", CPU))


# Architectures, from shapes alone


def published_clip(vision: tuple[int, ...], text: tuple[int, ...], width: int, act: str) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size")
    common = {"projection_dim": width, "hidden_act": act, "layer_norm_eps": 1e-5}
    text_config = dict(zip(names[:4], text)) | {"vocab_size": 49408, "max_position_embeddings": 77}
    return {
        "vision_config": dict(zip(names, vision)) | {"num_channels": 3} | common,
        "text_config": text_config | common,
        "projection_dim": width,
    }


def published_dino(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    common = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": "gelu"}
    return common | {"num_channels": 3, "qkv_bias": True} | more


def published_dinov2(width: int, layers: int, heads: int, gated: bool = False) -> dict[str, Any]:
    facts = {"patch_size": 14, "image_size": 518, "mlp_ratio": 4, "use_mask_token": True, "use_swiglu_ffn": gated}
    return published_dino(width, layers, heads, layer_norm_eps=1e-6, **facts)


B_TEXT, L_TEXT = (512, 12, 8, 2048), (768, 12, 12, 3072)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "openai/clip-vit-base-patch32": (
        "clip",
        published_clip((768, 12, 12, 3072, 32, 224), B_TEXT, 512, "quick_gelu"),
    ),
    "openai/clip-vit-base-patch16": (
        "clip",
        published_clip((768, 12, 12, 3072, 16, 224), B_TEXT, 512, "quick_gelu"),
    ),
    "openai/clip-vit-large-patch14": (
        "clip",
        published_clip((1024, 24, 16, 4096, 14, 224), L_TEXT, 768, "quick_gelu"),
    ),
    "openai/clip-vit-large-patch14-336": (
        "clip",
        published_clip((1024, 24, 16, 4096, 14, 336), L_TEXT, 768, "quick_gelu"),
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (
        "clip",
        published_clip((1280, 32, 16, 5120, 14, 224), (1024, 24, 16, 4096), 1024, "gelu"),
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": (
        "clip",
        published_clip((1664, 48, 16, 8192, 14, 224), (1280, 32, 20, 5120), 1280, "gelu"),
    ),
    "facebook/dino-vits16": (
        "vit",
        published_dino(384, 12, 6, intermediate_size=1536, patch_size=16, image_size=224, layer_norm_eps=1e-12),
    ),
    "facebook/dinov2-small": ("dinov2", published_dinov2(384, 12, 6)),
    "facebook/dinov2-base": ("dinov2", published_dinov2(768, 12, 12)),
    "facebook/dinov2-large": ("dinov2", published_dinov2(1024, 24, 16)),
    "facebook/dinov2-giant": ("dinov2", published_dinov2(1536, 40, 24, gated=True)),
}


def names_in_files(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO's and DINOv2's tensors by the names that files have, which transformers 5 changes in memory."""
    names = {
        r"^layers\.": "encoder.layer.",
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.up_proj": "mlp.weights_in",
        r"mlp\.down_proj": "mlp.weights_out",
    }
    if any(name.startswith("layers.") for name in tensors):
        names |= {r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense"}
    found = {}
    for name, tensor in tensors.items():
        if "gate_proj" not in name:
            for pattern, old in names.items():
                name = re.sub(pattern, old, name)
            found[name] = tensor
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_told_from_their_shapes(name: str) -> None:
    kind, wanted = PUBLISHED[name]
    config = transformers.AutoConfig.for_model(kind, **wanted)
    classes = {"clip": transformers.CLIPModel, "dinov2": transformers.Dinov2Model, "vit": transformers.ViTModel}
    more = {"add_pooling_layer": False} if kind == "vit" else {}
    with torch.device("meta"):
        tensors = classes[kind](config, **more).state_dict()
    if kind != "clip":
        tensors = names_in_files(tensors)
    assert inferred_config(FeatureWeights(name, Path(name), tensors)) == (kind, wanted)
    if kind == "clip":
        vision = half(tensors, "vision") | half(tensors, "visual")
        assert inferred_config(FeatureWeights(name, Path(name), vision)) == (
            "clip_vision_model",
            wanted["vision_config"],
        )


# Tokenizers


def test_a_tokenizer_beside_the_file_comes_first(world: Path, tmp_path: Path) -> None:
    _, words = halves(world, copy_tokenizer(tmp_path))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 8192}))
    model = open_feature_model(f"{tmp_path / 'eyes.safetensors'} + {words}", CPU, tokenizer=tmp_path / "not there")
    assert model.tokenizer.model_max_length == 32
    wanted = open_feature_model(world / "folders" / "clip", CPU)
    torch.testing.assert_close(model.text_features(PROMPTS), wanted.text_features(PROMPTS), atol=1e-5, rtol=0)


def test_a_tokenizer_of_another_vocabulary_is_refused(world: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((world / "words" / "vocab.json").read_text()) | {"<|more|>": 234}
    vocabulary["<|endoftext|>"] = 235
    shutil.copy(world / "words" / "merges.txt", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(WeightsError, match="end token is 235 instead of 233") as caught:
        open_feature_model(world / "files" / "clip.safetensors", CPU, tokenizer=tmp_path)
    assert "tokenizer" in caught.value.remedy


def test_without_a_tokenizer_it_says_what_to_give(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pack.trainer.models.tokenizer._candidate_folders", lambda checkpoint: iter(()))
    with pytest.raises(WeightsError, match="No CLIP tokenizer was found for the text tower clip") as caught:
        open_feature_model(world / "files" / "clip.safetensors", CPU)
    assert "vocab.json and merges.txt" in caught.value.remedy
    with pytest.raises(WeightsError, match="contains no CLIP tokenizer"):
        open_feature_model(world / "files" / "clip.safetensors", CPU, tokenizer=world / "files")


# What can go wrong


Change = Callable[[dict[str, Tensor]], None]


def without(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def with_(name: str, shape: tuple[int, ...]) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("kind", "change", "problem", "remedy"),
    [
        ("clip", without("vision_model.post_layernorm.bias"), "lacks vision_model.post_layernorm.bias", "complete"),
        ("clip", with_("vision_model.more", (2,)), "unknown tensor: vision_model.more", "complete"),
        ("clip", with_("vision_model.encoder.layers.1.mlp.fc2.bias", (3,)), "wrong shape: vision_model.enc", "compl"),
        ("clip", without("text_projection.weight"), "has no text_projection.weight", "clip-vit-large-patch14"),
        ("clip", without("visual_projection.weight"), "lacks the tensor visual_projection.weight", "complete"),
        ("clip", with_("text_projection.weight", (16, 64)), "feature width 32, clip has 16", "the same CLIP"),
        ("clip_vision_model", without("visual_projection.weight"), "lacks the tensor visual_projection", "projection"),
        ("clip_vision_model", with_("vision_model.embeddings.position_embedding.weight", (7, 1280)), "7 positions", ""),
        ("clip_vision_model", with_("vision_model.embeddings.patch_embedding.weight", (9, 9)), "wrong shape", "CLIP"),
        (
            "clip_vision_model",
            with_("visual_projection.comfy_quant", (3,)),
            "unknown tensor: visual_projection.comfy",
            "",
        ),
        ("dinov2", without("encoder.layer.1.norm1.weight"), "lacks encoder.layer.1.norm1.weight", "complete"),
        (
            "dinov2",
            with_("embeddings.register_tokens", (1, 4, 128)),
            "unknown tensor: embeddings.register_tokens",
            "regist",
        ),
        ("dinov2 as the giant", without("layernorm.weight"), "lacks layernorm.weight", "complete"),
        ("vit", without("encoder.layer.0.intermediate.dense.weight"), "lacks the tensor encoder.layer.0.inter", ""),
        (
            "vit",
            with_("pooler.dense.weight", (128, 128)),
            "a pooler, so it is not a DINO",
            "preprocessor_config.json",
        ),
        ("vit", with_("embeddings.patch_embeddings.projection.weight", (100, 3, 16, 16)), "100 channels wide", "fold"),
        ("vit", without("embeddings.cls_token"), "not a known feature model", "SigLIP"),
    ],
)
def test_bad_files_are_named(kind: str, change: Change, problem: str, remedy: str, world: Path, tmp_path: Path) -> None:
    tensors = load_file(world / "files" / f"{kind}.safetensors")
    change(tensors)
    path = write(tmp_path / "clip.safetensors", tensors)
    with pytest.raises(WeightsError) as caught:
        open_feature_model(path, CPU, tokenizer=world / "words")
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
    assert caught.value.remedy


def test_a_text_projection_that_was_never_trained_is_refused(world: Path, tmp_path: Path) -> None:
    tensors = load_file(world / "files" / "clip.safetensors")
    tensors["text_projection.weight"] = torch.eye(64)
    with pytest.raises(WeightsError, match="has the identity as its text_projection"):
        open_feature_model(write(tmp_path / "clip.safetensors", tensors), CPU, tokenizer=world / "words")


def test_bad_sources_are_named(world: Path, tmp_path: Path) -> None:
    eyes, words = halves(world, tmp_path)
    dino = world / "files" / "vit.safetensors"
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    (tmp_path / "empty").mkdir()
    for source, problem in {
        f"{tmp_path / 'none.safetensors'}": "none.safetensors does not exist",
        f"{eyes} + none": "file none does not exist",
        f"{eyes} + {eyes} + {words}": "names 3 files",
        f"{eyes} + {eyes}": "eyes and eyes do not form a CLIP: the first contains a vision tower, the second a vision",
        f"{dino} + {words}": "the first contains no CLIP tower, the second a text tower",
        f"{words}": "words contains only a text tower",
        f"{tmp_path / 'damaged.safetensors'}": "damaged.safetensors is not a readable safetensors file",
        f"{eyes} + {tmp_path / 'empty'}": "contains no weights",
    }.items():
        with pytest.raises(WeightsError) as caught:
            open_feature_model(source, CPU, tokenizer=world / "words")
        assert problem in caught.value.problem
        assert caught.value.remedy


def test_what_is_taken_for_a_file(world: Path) -> None:
    assert are_files(world / "files" / "vit.safetensors")
    assert are_files("not there.safetensors")
    assert are_files("one + other")
    assert not are_files(world / "folders" / "vit")
    assert not are_files("openai/clip-vit-base-patch32")


def test_comfyui_finds_each_part_by_its_name(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_path(kind: str, name: str) -> str | None:
        path = tmp_path / kind / name
        return str(path) if path.is_file() else None

    for file in ("clip_vision/eyes.safetensors", "clip_vision/a + b.safetensors", "text_encoders/words.safetensors"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "feature_models" / "world").mkdir(parents=True)
    fake = SimpleNamespace(models_dir=str(tmp_path), get_full_path=full_path)
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    spec = importlib.util.spec_from_file_location("pack.nodes.host_models", ROOT / "nodes" / "host_models.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    eyes, words = (str(tmp_path / name) for name in ("clip_vision/eyes.safetensors", "text_encoders/words.safetensors"))
    folder = str(tmp_path / "feature_models" / "world")
    for name, place in {
        "world": folder,
        "eyes.safetensors": eyes,
        "a + b.safetensors": str(tmp_path / "clip_vision" / "a + b.safetensors"),
        "eyes.safetensors + words.safetensors": f"{eyes} + {words}",
        "world  +  words.safetensors": f"{folder} + {words}",
        "eyes.safetensors + /somewhere/else": f"{eyes} + /somewhere/else",
        "openai/clip-vit-base-patch32": "openai/clip-vit-base-patch32",
    }.items():
        assert found.feature_model(name) == place
