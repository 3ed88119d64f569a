"""What strangers' adapter files hold and what lies beside them: read right or refused by name, never a traceback."""

from __future__ import annotations

import codecs
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_maths import WEIGHTS, kinds_for, shapes_of
from broken_files import BROKEN_FILES, DOWN, NAME, UP
from hypothesis import given
from hypothesis import strategies as st
from layer_worlds import assert_close, randomise
from pack.trainer.adapters.kohya import Adapter, parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.layers import LoraLayer
from pack.trainer.cli.inspect import facts_as_text, inspect
from pack.trainer.cli.merge import run_convert, run_merge
from pack.trainer.core.errors import AdapterError, TrainerError
from pack.trainer.core.events import SilentListener
from pack.trainer.models.open import open_base
from pack.trainer.settings.merge import ConvertCommand, MergeCommand
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PEFT = "base_model.model."
RANK = 4


def lora(name: str = NAME, *, size: int = 8) -> dict[str, Tensor]:
    """A LoRA of one module under kohya's names, without alpha."""
    source = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn((RANK, size), generator=source),
        f"{name}.lora_up.weight": torch.randn((size, RANK), generator=source),
    }


def peft_lora(path: str = "mid_block.attentions.0.proj_in", prefix: str = PEFT) -> dict[str, Tensor]:
    down, up = lora().values()
    return {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}


def peft_folder(folder: Path, tensors: dict[str, Tensor], config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(content)
    return folder


# Headers


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named(case: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.safetensors"
    path.write_bytes(BROKEN_FILES[case])
    output = tmp_path / "out.safetensors"
    listener = SilentListener()
    doors = {
        "read": lambda: read_adapter(path),
        "inspect": lambda: inspect(path),
        "merge": lambda: run_merge(MergeCommand(loras=[str(path)], output=output), listener),
        "convert": lambda: run_convert(ConvertCommand(lora=path, output=output), listener),
        "base model": lambda: open_base(path),
    }
    for door in doors.values():
        with pytest.raises(TrainerError) as caught:
            door()
        assert "strange.safetensors" in caught.value.problem
        assert caught.value.remedy
    assert not output.exists()


@given(position=st.integers(0, 500), replaced=st.binary(max_size=8), cut=st.integers(0, 8))
def test_any_damage_of_a_file_is_named_or_harmless(
    position: int, replaced: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damage") / "strange.safetensors"
    tensors = lora(size=4) | {f"{NAME}.alpha": torch.tensor(2.0), f"{NAME}.diff_b": torch.ones(4)}
    save_file(tensors, path, {"lora_adapter_metadata": '{"unet.r": 4, "unet.alpha_pattern": {"proj_in": 3}}'})
    content = path.read_bytes()
    path.write_bytes(content[:position] + replaced + content[position + cut :])
    try:
        assert isinstance(read_adapter(path), Adapter)
    except AdapterError as error:
        assert "strange.safetensors" in error.problem  # noqa: PT017


@st.composite
def nearly_right_shapes(draw: st.DrawFn) -> dict[str, list[int]]:
    """The tensors of a layer of any kind, of which one or two have another shape, are missing, or are too many."""
    weight = draw(st.sampled_from(sorted(WEIGHTS)))
    kind = draw(st.sampled_from(kinds_for(weight)))
    shapes = {suffix: list(shape) for suffix, shape in shapes_of(kind, WEIGHTS[weight], 2).items()}
    for _ in range(draw(st.integers(1, 2))):
        if shapes and draw(st.integers(0, 5)) == 0:
            shapes.pop(draw(st.sampled_from(sorted(shapes))))
        suffix = draw(
            st.sampled_from([*sorted(shapes), "hada_t1", "lokr_w2", "lora_mid.weight", "dora_scale", "alpha"])
        )
        shape = shapes.get(suffix, [2, 2])
        position = draw(st.integers(0, max(0, len(shape) - 1)))
        inserted = draw(st.lists(st.sampled_from([0, 1, 2, 3, 12, 20]), max_size=2))
        shapes[suffix] = shape[:position] + inserted + shape[position + 1 :]
    return shapes


@given(shapes=nearly_right_shapes())
def test_tensors_of_other_shapes_are_a_layer_or_named(shapes: dict[str, list[int]]) -> None:
    """A layer that is read knows its shape and what it adds."""
    source = torch.Generator().manual_seed(0)
    tensors = {f"{NAME}.{suffix}": torch.randn(shape, generator=source) for suffix, shape in shapes.items()}
    try:
        adapter = parse_adapter(tensors)
    except AdapterError as error:
        assert error.remedy  # noqa: PT017
        return
    adapter.state_dict(torch.float16)
    for layer in adapter.layers.values():
        assert layer.rank > 0
        layer.factors()
        if not layer.needs_weight:
            assert layer.delta().shape == layer.shape


# JSON


SHAPES_OF_HEADERS = {
    "null": ("null", "an object"),
    "a list": ("[1]", "an object"),
    "a number": ("3", "an object"),
    "no JSON": ("{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "nested without end": ("[" * 100_000, "nested"),
    "patterns that are a list": ('{"unet.alpha_pattern": ["to_q"]}', "alpha_pattern"),
    "patterns that are a string": ('{"unet.alpha_pattern": "to_q"}', "alpha_pattern"),
    "a rank that is a list": ('{"unet.rank_pattern": {"to_q": [3]}}', "rank_pattern.to_q"),
    "a rank of zero": ('{"unet.rank_pattern": {"to_q": 0}}', "rank_pattern.to_q"),
    "no expression": ('{"unet.alpha_pattern": {"to_q(": 3}}', "to_q("),
    "an endless repetition": ('{"unet.alpha_pattern": {"a{99999999999999}": 3}}', "alpha_pattern"),
    "an alpha that is a list": ('{"unet.lora_alpha": [8]}', "lora_alpha"),
    "an alpha that is a string": ('{"unet.lora_alpha": "8"}', "lora_alpha"),
    "an alpha that is a switch": ('{"unet.lora_alpha": true}', "lora_alpha"),
    "an alpha that is no number": ('{"unet.lora_alpha": NaN}', "lora_alpha"),
    "an infinite alpha": ('{"unet.lora_alpha": 1e999}', "lora_alpha"),
    "an alpha without end": ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "lora_alpha"),
    "a scale that is a number": ('{"unet.use_rslora": 1}', "use_rslora"),
    "a start that is a list": ('{"unet.init_lora_weights": []}', "init_lora_weights"),
    "a method that is a number": ('{"unet.peft_type": 3}', "peft_type"),
    "of a text encoder": ('{"text_encoder.lora_alpha": []}', "lora_alpha"),
    "of a network that is not there": ('{"transformer.lora_alpha": {}}', "lora_alpha"),
}


@pytest.mark.parametrize("case", SHAPES_OF_HEADERS)
def test_a_header_of_another_shape_is_named(case: str, tmp_path: Path) -> None:
    value, key = SHAPES_OF_HEADERS[case]
    path = tmp_path / "strange.safetensors"
    save_file(peft_lora(prefix="unet."), path, {"lora_adapter_metadata": value})
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    for word in ("strange.safetensors", "lora_adapter_metadata", key):
        assert word in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("case", SHAPES_OF_HEADERS)
def test_a_configuration_of_another_shape_is_named(case: str, tmp_path: Path) -> None:
    value, key = SHAPES_OF_HEADERS[case]
    content = value.replace("unet.", "").replace("text_encoder.", "").replace("transformer.", "")
    folder = peft_folder(tmp_path / "strange", peft_lora(), content.encode())
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    for word in ("strange", "adapter_config.json", key):
        assert word in caught.value.problem


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OPTIONS = sorted(LoraConfig().to_dict())


@given(config=st.dictionaries(st.sampled_from(OPTIONS) | st.text(max_size=8), JSON_VALUES, max_size=4) | JSON_VALUES)
def test_any_configuration_is_used_or_named(config: Any) -> None:
    header = {f"unet.{name}": value for name, value in config.items()} if isinstance(config, dict) else config
    try:
        adapter = parse_adapter(peft_lora(prefix="unet."), {"lora_adapter_metadata": json.dumps(header)})
    except AdapterError as error:
        assert error.remedy  # noqa: PT017
    else:
        assert torch.isfinite(adapter.layers[NAME].delta()).all()


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"], ids=lambda name: name
)
def test_a_configuration_in_any_encoding_is_read(encoding: str, tmp_path: Path) -> None:
    """Windows' editors write a byte-order mark, PowerShell's > writes UTF-16."""
    text = json.dumps({"peft_type": "LORA", "lora_alpha": 16, "base_model_name_or_path": "größe"}, ensure_ascii=False)
    folder = peft_folder(tmp_path / "peft", peft_lora(), codecs.encode(text, encoding))
    assert read_adapter(folder).layers[NAME].alpha == 16


# What lies beside a file


def test_the_configuration_beside_a_file_is_read(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", peft_lora(), {"r": RANK, "lora_alpha": 16})
    assert read_adapter(folder).layers[NAME].alpha == 16
    assert read_adapter(folder / "adapter_model.safetensors").layers[NAME].alpha == 16


def test_a_scale_that_is_not_known_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = peft_folder(tmp_path / "peft", peft_lora(), {"r": RANK, "lora_alpha": 16})
    renamed = folder / "my lora.safetensors"
    shutil.move(folder / "adapter_model.safetensors", renamed)
    with caplog.at_level(logging.WARNING):
        assert read_adapter(renamed).layers[NAME].alpha == RANK
    assert "adapter_config.json" in caplog.text
    assert str(renamed) in caplog.text


def test_a_folder_without_its_configuration_is_named(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", peft_lora(), {})
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config.json"):
        read_adapter(folder)


def test_a_folder_for_each_network_is_one_adapter(tmp_path: Path) -> None:
    """As PEFT's own DreamBooth example saves them: unet/ and text_encoder/, each with its scale."""
    text_path = "text_model.encoder.layers.0.self_attn.q_proj"
    peft_folder(tmp_path / "lora" / "unet", peft_lora(), {"r": RANK, "lora_alpha": 16})
    for number, alpha in (("", 2), ("_2", 3)):
        peft_folder(tmp_path / "lora" / f"text_encoder{number}", peft_lora(text_path), {"r": RANK, "lora_alpha": alpha})
    adapter = read_adapter(tmp_path / "lora")
    text_name = "text_model_encoder_layers_0_self_attn_q_proj"
    alphas = {name: layer.alpha for name, layer in adapter.layers.items()}
    assert alphas == {NAME: 16, f"lora_te_{text_name}": 2, f"lora_te2_{text_name}": 3}


def test_the_metadata_of_all_networks_files_are_kept(tmp_path: Path) -> None:
    paths = {"unet": "mid_block.attentions.0.proj_in", "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj"}
    for network, path in paths.items():
        folder = peft_folder(tmp_path / "lora" / network, peft_lora(path), {"r": RANK, "lora_alpha": 16})
        save_file(peft_lora(path), folder / "adapter_model.safetensors", {f"of_{network}": "kept"})
    metadata = read_adapter(tmp_path / "lora").metadata
    assert metadata.items() >= {"of_unet": "kept", "of_text_encoder": "kept"}.items()


def test_the_inner_folder_is_named(tmp_path: Path) -> None:
    """PEFT saves an adapter that is not called "default" in a folder of its name."""
    inner = peft_folder(tmp_path / "run" / "dog", peft_lora(), {"lora_alpha": 4})
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "run")
    assert str(inner) in caught.value.remedy


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_files_are_read_without_running_code(legacy: bool, tmp_path: Path) -> None:
    """adapter_model.bin of PEFT, pytorch_lora_weights.bin of diffusers, .pt and .ckpt of kohya's scripts."""
    peft = peft_folder(tmp_path / "peft", peft_lora(), {"r": RANK, "lora_alpha": 16})
    (peft / "adapter_model.safetensors").unlink()
    diffusers = tmp_path / "diffusers"
    diffusers.mkdir()
    files: dict[Path, tuple[dict[str, Tensor], Path, float]] = {
        peft / "adapter_model.bin": (peft_lora(), peft, 16.0),
        diffusers / "pytorch_lora_weights.bin": (peft_lora(prefix="unet."), diffusers, 4.0),
        tmp_path / "kohya.pt": (lora() | {f"{NAME}.alpha": torch.tensor(2.0)}, tmp_path / "kohya.pt", 2.0),
        tmp_path / "kohya.ckpt": ({"state_dict": lora()}, tmp_path / "kohya.ckpt", 4.0),  # type: ignore[dict-item]
    }
    for file, (tensors, source, alpha) in files.items():
        torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
        for path in {file, source}:
            layer = read_adapter(path).layers[NAME]
            assert isinstance(layer, LoraLayer)
            assert layer.alpha == alpha
            assert torch.equal(layer.down, lora()[DOWN])
            assert torch.equal(layer.up, lora()[UP])


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02}q\x00.", b"PK\x03\x04junk"])
def test_a_broken_pickled_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "strange.bin"
    path.write_bytes(content)
    for door in (read_adapter, inspect, open_base):
        with pytest.raises(TrainerError, match=r"strange.bin"):
            door(path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.bin", tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> Any:
            return (trace.write_text, ("was here",))

    torch.save({"a": Evil()}, path)
    with pytest.raises(AdapterError, match="more than plain weights"):
        read_adapter(path)
    assert not trace.exists()


# PEFT's options


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.mid_block = nn.Module()
        self.mid_block.to_q = nn.Linear(8, 8)
        self.mid_block.norm = nn.LayerNorm(8)
        self.mid_block.conv1 = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mid_block.norm(self.mid_block.to_q(x))  # type: ignore[no-any-return]


def saved_by_peft(folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter folder of PEFT, and the network's parameters without and with it, as PEFT merges it."""
    torch.manual_seed(0)
    config = LoraConfig(**({"r": RANK, "lora_alpha": 6, "target_modules": ["to_q"]} | options))
    trained = get_peft_model(Net(), config)
    randomise(trained)
    trained.save_pretrained(folder)
    torch.manual_seed(0)
    fresh = Net()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    after = PeftModel.from_pretrained(fresh, folder).merge_and_unload().state_dict()
    return before, after


def has_option(name: str) -> bool:
    return name in LoraConfig().to_dict()


HARMLESS: dict[str, dict[str, Any]] = {
    "alpha 0": {"lora_alpha": 0},
    "alpha 0 by pattern": {"alpha_pattern": {"to_q": 0}},
    "a negative alpha": {"lora_alpha": -3},
    "lora_bias": {"lora_bias": True},
    "lora_bias, rank-stabilised": {"lora_bias": True, "use_rslora": True},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "start of MiCA": {"init_lora_weights": "mica"},
    "random start": {"init_lora_weights": False},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "excluded modules": {"target_modules": ["to_q", "conv1"], "exclude_modules": ["conv1"]},
    "dropout": {"lora_dropout": 0.5},
    "a convolution": {"target_modules": ["conv1"], "rank_pattern": {"conv1": 2}},
}
NEEDED = {"lora_bias": "lora_bias", "exclude_modules": "exclude_modules"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", HARMLESS)
def test_an_adapter_adds_what_peft_adds(case: str, tmp_path: Path) -> None:
    options = HARMLESS[case]
    if any(name in options and not has_option(name) for name in NEEDED):
        pytest.skip("this PEFT has no such option")
    try:
        before, after = saved_by_peft(tmp_path / "peft", **options)
    except ValueError as error:
        if "initialization" not in str(error):
            raise
        pytest.skip("this PEFT has no such start")
    changes = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    adapter = read_adapter(tmp_path / "peft")
    write_adapter(tmp_path / "ours.safetensors", adapter, torch.float32)
    for ours in (adapter, read_adapter(tmp_path / "ours.safetensors")):
        added: dict[str, Tensor] = {}
        for name, layer in ours.layers.items():
            path = name.removeprefix("lora_unet_").replace("mid_block_", "mid_block.")
            if layer.delta().any():
                added[f"{path}.weight"] = layer.delta()
        for key, vector in ours.vectors.items():
            name, _, suffix = key.rpartition(".")
            path = name.removeprefix("lora_unet_").replace("mid_block_", "mid_block.")
            added[f"{path}.{'bias' if suffix == 'diff_b' else 'weight'}"] = vector
        assert added.keys() == changes.keys()
        for key, change in changes.items():
            assert_close(added[key].float(), change)


def test_alpha_zero_is_zero_for_every_reader(tmp_path: Path) -> None:
    """kohya's scripts and LyCORIS read an alpha of 0 in a file as the rank, ComfyUI as 0."""
    folder = peft_folder(tmp_path / "peft", peft_lora(), {"r": RANK, "lora_alpha": 0})
    write_adapter(tmp_path / "out.safetensors", read_adapter(folder), torch.float32)
    tensors = load_file(tmp_path / "out.safetensors")
    assert not tensors[UP].any()
    assert float(tensors[f"{NAME}.alpha"]) == RANK


UNREADABLE_OPTIONS: dict[str, dict[str, Any]] = {
    "IA3": {"peft_type": "IA3"},
    "ADALORA": {"peft_type": "ADALORA"},
    "VERA": {"peft_type": "VERA"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "target_parameters": {"target_parameters": ["experts.gate"]},
    "use_qalora": {"use_qalora": True},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "arrow_config": {"arrow_config": {"top_k": 3}},
    "kasa_config": {"kasa_config": {"beta": 1e-4}},
    "monteclora_config": {"monteclora_config": {"num_samples": 8}},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_16": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "newest": {"init_lora_weights": "newest"},
}


@pytest.mark.parametrize("case", UNREADABLE_OPTIONS)
def test_options_that_change_the_result_are_refused_by_name(case: str, tmp_path: Path) -> None:
    options = UNREADABLE_OPTIONS[case]
    folder = peft_folder(tmp_path / "peft", peft_lora(), {"peft_type": "LORA", "r": RANK, "lora_alpha": 8} | options)
    header = {f"unet.{name}": value for name, value in options.items()}
    save_file(peft_lora(prefix="unet."), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    for path in (folder, folder / "adapter_model.safetensors", tmp_path / "a.safetensors"):
        with pytest.raises(AdapterError) as caught:
            read_adapter(path)
        assert case in caught.value.problem
        assert caught.value.remedy


def test_an_option_that_is_not_known_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unset = {"later": None, "next": False, "then": [], "after": {}}
    folder = peft_folder(tmp_path / "a", peft_lora(), {"lora_alpha": 8, "newest_option": {"a": 1}, **unset})
    with caplog.at_level(logging.WARNING):
        assert read_adapter(folder).layers[NAME].alpha == 8
    assert "(newest_option)" in caplog.text


def test_every_option_of_this_peft_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of what PEFT writes by default is read without a word, and every other option is decided on."""
    from pack.trainer.adapters.peft_config import _UNREADABLE_OPTIONS, _WITHOUT_EFFECT, PeftConfig

    saved_by_peft(tmp_path / "peft")
    with caplog.at_level(logging.WARNING):
        read_adapter(tmp_path / "peft")
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "lora_unet_mid_block_to_q" not in message] == []  # no model has that one
    known = _WITHOUT_EFFECT | _UNREADABLE_OPTIONS.keys() | PeftConfig.model_fields.keys()
    assert set(LoraConfig().to_dict()) <= known


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "the model's biases": ({"bias": "all"}, "biases"),
    "biases of adapted modules": ({"bias": "lora_only"}, "biases"),
    "a whole module": ({"modules_to_save": ["conv1"]}, "modules_to_save"),
    "a whole norm": ({"modules_to_save": ["norm"]}, "modules_to_save"),
    "an embedding": ({"target_modules": ["to_q", "embed"]}, "embedding"),
    "tokens": ({"trainable_token_indices": {"embed": [1, 2]}}, "tokens"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", PARTS)
def test_what_peft_saves_beside_the_layers_is_refused_by_name(case: str, tmp_path: Path) -> None:
    options, word = PARTS[case]
    if any(not has_option(name) for name in options):
        pytest.skip("this PEFT has no such option")
    torch.manual_seed(0)
    trained = get_peft_model(Net(), LoraConfig(**({"r": RANK, "target_modules": ["to_q"]} | options)))
    trained.save_pretrained(tmp_path / "peft")
    if all(".lora_A." in name or ".lora_B." in name for name in load_file(tmp_path / "peft/adapter_model.safetensors")):
        pytest.skip("this PEFT forgets to save them")
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "peft")
    assert word in caught.value.problem
    assert caught.value.remedy


def test_a_dora_without_magnitudes_is_incomplete(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", peft_lora(), {"use_dora": True, "lora_alpha": 8})
    with pytest.raises(AdapterError, match=f"DoRA {NAME} lacks its lora_magnitude_vector"):
        read_adapter(folder)


# Types


@pytest.mark.parametrize(
    "dtype",
    [torch.complex64, torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["lora_up.weight", "dora_scale", "diff_b"])
def test_numbers_of_other_types_are_refused(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    key = f"{NAME}.{suffix}"
    tensors = lora() | {key: torch.ones((8, RANK) if suffix.startswith("lora") else (8,)).to(dtype)}
    with pytest.raises(AdapterError) as caught:
        parse_adapter(tensors)
    for word in (key, str(dtype).removeprefix("torch.")):
        assert word in caught.value.problem


@pytest.mark.parametrize("value", [None, 3, "lora", [1.0], {}], ids=str)
def test_what_is_no_tensor_is_refused(value: Any) -> None:
    """A LORA_MODEL wire may come from any pack."""
    with pytest.raises(AdapterError, match=f"{UP} is not a tensor"):
        parse_adapter(lora() | {UP: value})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16], ids=str)
def test_an_alpha_may_be_an_integer(dtype: torch.dtype) -> None:
    assert parse_adapter(lora() | {f"{NAME}.alpha": torch.tensor(2, dtype=dtype)}).layers[NAME].alpha == 2


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool], ids=str)
def test_an_alpha_is_a_number(dtype: torch.dtype) -> None:
    with pytest.raises(AdapterError, match=r"alpha has the type"):
        parse_adapter(lora() | {f"{NAME}.alpha": torch.ones((), dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64], ids=str)
def test_plain_floats_of_any_size_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in lora().items()}, path)
    expected = lora()[UP].to(dtype).double() @ lora()[DOWN].to(dtype).double()
    assert_close(read_adapter(path).layers[NAME].delta(), expected)


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", "input_scale", "comfy_quant"])
def test_quantised_numbers_are_refused(suffix: str, tmp_path: Path) -> None:
    """Without their scales they mean something else; before, these were left out with a warning."""
    key = f"{NAME}.lora_down.{suffix}"
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in lora().items()} | {key: torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    for read in (lambda: parse_adapter(tensors), lambda: read_adapter(tmp_path / "a.safetensors")):
        with pytest.raises(AdapterError, match="quantised") as caught:
            read()
        assert key in caught.value.problem


# What is shown


def test_metadata_do_not_move_the_cursor(tmp_path: Path) -> None:
    """Escape sequences in a stranger's metadata can clear a terminal or forge its lines."""
    metadata = {"modelspec.title": "\x1b[2Jgone\r犬", "ss_comment": "first\nsecond\x07"}
    save_file(lora(), tmp_path / "a.safetensors", metadata)
    facts = inspect(tmp_path / "a.safetensors")
    text = facts_as_text(facts)
    assert all(char.isprintable() for char in text.replace("\n", ""))
    assert "\\x1b[2Jgone\\r犬" in text
    assert "first\\nsecond" in text
    assert facts["metadata"] == metadata  # for programs they stay as they are


# What is written again


def test_configurations_of_another_file_are_not_written(tmp_path: Path) -> None:
    """They tell a scale that the tensors have by then, to diffusers, and paths of whoever trained it, to everyone."""
    folder = peft_folder(
        tmp_path / "peft", peft_lora(), {"lora_alpha": 16, "use_rslora": True, "base_model_name_or_path": "/home/me/x"}
    )
    header = json.dumps({"unet.lora_alpha": 16, "unet.base_model_name_or_path": "/home/me/x"})
    save_file(peft_lora(prefix="unet."), tmp_path / "a.safetensors", {"lora_adapter_metadata": header})
    for source in (folder, tmp_path / "a.safetensors"):
        output = tmp_path / f"{source.stem} out.safetensors"
        write_adapter(output, read_adapter(source), torch.float32)
        assert b"/home/me" not in output.read_bytes()
        with safe_open(output, "pt") as file:
            assert not {"peft_config", "lora_adapter_metadata"} & file.metadata().keys()
        assert_close(read_adapter(output).layers[NAME].delta(), read_adapter(source).layers[NAME].delta())


@given(
    texts=st.dictionaries(st.text(max_size=80), st.text(alphabet='!?0x"\\,: {}sh_ab\x00\n犬', max_size=140), max_size=4)
)
def test_metadata_are_written_as_given(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hashes go into their own entries, whatever the others look like."""
    hashes = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
    path = tmp_path_factory.mktemp("metadata") / "a.safetensors"
    write_adapter(path, Adapter(parse_adapter(lora()).layers, texts), torch.float32)
    with safe_open(path, "pt") as file:
        written = file.metadata()
    expected = {key.encode("utf-8", "replace").decode(): value for key, value in texts.items() if key not in hashes}
    expected.pop("dreambooth.config", None)
    assert {key: value for key, value in written.items() if key not in hashes} == expected
    assert len(written["sshs_model_hash"]) == 64
