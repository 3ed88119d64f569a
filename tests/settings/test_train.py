"""Every setting is defined once and comes in through flags, TOML or code with the same meaning."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from helpers import DEMO
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.cli.flags import add_flags, settings_from
from pack.trainer.core.errors import SettingsError
from pack.trainer.core.toml import read_toml
from pack.trainer.settings.base import Settings, field_extra
from pack.trainer.settings.data import DataSettings
from pack.trainer.settings.objective import ObjectiveSettings
from pack.trainer.settings.optimizer import FUSABLE
from pack.trainer.settings.preservation import PreservationSettings
from pack.trainer.settings.train import GenerateCommand, PriorsCommand, TrainCommand, TrainSettings
from pydantic.fields import FieldInfo

COMMANDS = {"train": TrainCommand, "priors": PriorsCommand, "generate": GenerateCommand}
TABLES = {"subject"}  # only in settings files
FIELDS = [(command, name) for command, kind in COMMANDS.items() for name in kind.model_fields if name not in TABLES]
REQUIRED = {
    "train": {"base": "model.safetensors", "images": "dog"},
    "priors": {"base": "model.safetensors", "class_prompt": "a photo of a dog", "prior_count": 1},
    "generate": {"base": "model.safetensors", "prompt": "a dog"},
}
# A value other than the default for every setting of every command.
OTHER: dict[str, Any] = {
    "preset": "animal",
    "log_with": "tensorboard",
    "name": "hündin-1",
    "steps": 77,
    "learning_rate": 3.5e-05,
    "rank": 5,
    "alpha": 2.5,
    "adapter": "dora",
    "rank_stabilized": True,
    "targets": "attention",
    "conv_rank": 3,
    "conv_alpha": 1.5,
    "include": r"^conv_in$ mid_block\..*to_v",
    "exclude": r"down_blocks\.0 ff\.net",
    "block_ranks": r"down_blocks=4 mid_block\.=32:16.5",
    "lokr_factor": 8,
    "dropout": 0.125,
    "max_norm": 1.5,
    "start_from": "my loras/Hündin 犬.safetensors",
    "combine": True,
    "text_encoder_lr": 2.5e-05,
    "text_encoder_2_lr": 1.5e-05,
    "text_encoder_until": 0.75,
    "token_vectors": 3,
    "token_lr": 2e-3,
    "token_until": 0.25,
    "token_start": "roter Hund",
    "resolution": 320,
    "seed": 2**64 - 1,
    "batch_size": 3,
    "gradient_accumulation": 2,
    "prior_weight": 0.25,
    "flip": True,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 7,
    "lr_cycles": 5,
    "lr_power": 0.5,
    "prior": "model",
    "prior_every": 3,
    "prior_prompts": "eine Katze | ein Haus",
    "prior_empty": 0.25,
    "dco_beta": 1000.0,
    "weight_penalty": 0.001,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "optimizer": "lion",
    "optimizer_options": "betas=(0.9, 0.95)",
    "lora_plus_ratio": 16.5,
    "ema_decay": 0.9995,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "fit": "off",
    "base_quantization": "nf4",
    "rank_schedule": "timestep",
    "min_rank": 3,
    "rank_power": 0.5,
    "lora_init": "orthogonal",
    "checkpoint_every": 0,
    "keep_checkpoints": 9,
    "keep_adapters": False,
    "preview_every": 25,
    "preview_prompts": "ein sks Hund | sks dog im Schnee",
    "preview_count": 3,
    "preview_steps": 11,
    "preview_guidance": 2.5,
    "preview_seed": 2**63,
    "token": "rraj",
    "score_clip": "models/clip ü",
    "score_dino": "models/dino",
    "early_stop": 3,
    "aspect_buckets": True,
    "bucket_step": 32,
    "mask_background": 0.5,
    "caption_dropout": 0.25,
    "shuffle_tags": True,
    "keep_tags": 2,
    "validation_pictures": 2,
    "loss": "huber",
    "huber_c": 0.25,
    "loss_weighting": "min-snr",
    "min_snr_gamma": 3.0,
    "noise_offset": 0.0625,
    "multires_noise_iterations": 6,
    "multires_noise_discount": 0.5,
    "input_perturbation": 0.125,
    "zero_terminal_snr": True,
    "min_timestep": 10,
    "max_timestep": 900,
    "timestep_bias": 0.5,
    "timestep_sampling": "uniform",
    "timestep_shift": 2.5,
    "gradient_checkpointing_interval": 3,
    "swap_blocks": 12,
    "compile": "blocks",
    "fused_backward_pass": True,
    "gallery_files": False,
    "thumbnail": False,
    "base_preview": "before-first-step",
    "class_noun": "Hündin",
    "captions": "file-names",
    "masks": "alpha",
    "repeats": 3,
    "class_images": "Bilder/Hunde",
    "resume": "never",
    "save_precision": "fp32",
    "base": "my models/sd 1.5.safetensors",
    "tokenizer": "tokenizer folder",
    "vae": "vae folder",
    "text_encoder": "models/qwen.safetensors",
    "prediction_type": "v_prediction",
    "clip_skip": 2,
    "base_lora": ("style.safetensors", "C:\\b.safetensors:0.5"),
    "device": "cuda:1",
    "images": "Bilder/Hündin 犬",
    "instance_prompt": 'a "sks" dog, 100 % good = yes',
    "class_prompt": "a photo of a dog",
    "prior_count": 12,
    "prior_scheduler": "pndm",
    "prior_steps": 11,
    "prior_guidance": 1.5,
    "prior_seed": 2**63,
    "prior_batch_size": 2,
    "prior_guidance_start": 0.25,
    "prior_guidance_end": 0.75,
    "output_dir": "somewhere else",
    "lora": ("a.safetensors", "C:\\b.safetensors:0.5"),
    "embedding": ("dog-sks.safetensors", "C:\\b.safetensors"),
    "prompt": "sks dog\nin the snow",
    "negative_prompt": "blurry",
    "scheduler": "pndm",
    "guidance": 2.0,
    "count": 4,
    "size": "512x768",
    "output": "out dir/picture.webp",
}
# The settings without which a setting's other value is refused or without effect.
COMPANY: dict[str, dict[str, Any]] = {
    "score_clip": {"preview_every": 50},
    "score_dino": {"preview_every": 50},
    "early_stop": {"preview_every": 50, "score_clip": "clip"},
    "lr_warmup_steps": {"lr_schedule": "linear"},
    "prior_count": {"class_prompt": "a dog"},
    "conv_rank": {"targets": "all"},
    "conv_alpha": {"targets": "all"},
    "lokr_factor": {"adapter": "lokr"},
    "combine": {"base_lora": ("style.safetensors",)},
    "text_encoder_until": {"text_encoder_lr": 5e-5},
    **{name: {"token_vectors": 2} for name in ("token_lr", "token_until", "token_start")},
    "lr_cycles": {"lr_schedule": "cosine_with_restarts"},
    "lr_power": {"lr_schedule": "polynomial"},
    "min_rank": {"rank_schedule": "timestep"},
    "rank_power": {"rank_schedule": "timestep"},
    "prior_every": {"prior": "model"},
    "prior_prompts": {"prior": "model"},
    "prior_empty": {"prior": "model"},
    "huber_c": {"loss": "huber"},
    "min_snr_gamma": {"loss_weighting": "min-snr"},
    "multires_noise_discount": {"multires_noise_iterations": 6},
    "bucket_step": {"aspect_buckets": True},
    "keep_tags": {"shuffle_tags": True},
    "fused_backward_pass": {"max_grad_norm": 0.0},
}
APART = {  # which do not go with DoRA, or with Lion
    "fused_backward_pass",
    "lokr_factor",
    "combine",
    "rank_schedule",
    "min_rank",
    "rank_power",
    "lora_init",
    "weight_penalty",
}


def toml(values: dict[str, Any]) -> str:
    """Plain values as TOML; a JSON string, number, boolean or list of them is valid TOML."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def plain(value: Settings) -> dict[str, Any]:
    """Settings as they would stand in a file; None has no place in TOML and is left out."""
    return {name: entry for name, entry in value.model_dump(mode="json").items() if entry is not None}


def parsed(command: str, words: list[str]) -> Settings:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, COMMANDS[command])
    return settings_from(parser.parse_args(words), COMMANDS[command])


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_words(values: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            for entry in value if isinstance(value, list | tuple) else [value]:
                words.append(f"{flag(name)}={entry}")
    return words


def other_values(command: str) -> dict[str, Any]:
    return {name: OTHER[name] for name in COMMANDS[command].model_fields if name not in APART | TABLES}


def company(name: str, kind: type[Settings]) -> dict[str, Any]:
    return {other: value for other, value in COMPANY.get(name, {}).items() if other in kind.model_fields}


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_every_setting_is_described(command: str, name: str) -> None:
    kind = COMMANDS[command]
    field = kind.model_fields[name]
    assert field.description
    assert len(field.description) > 5
    facts = {"unit", "group", "advanced", "affects_result", "path", "step", "needs", "neutral"}
    assert set(field_extra(kind, name)) == facts
    if field.annotation is int and not any(word in name for word in ("seed", "rank", "keep", "factor")):
        assert field_extra(kind, name)["unit"], "a whole number needs a unit"


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_every_setting_has_a_flag_and_a_key(command: str, name: str, tmp_path: Path) -> None:
    """Given alone, beside what is required, it means the same as a flag, a key, a dashed key and a value in code."""
    values = {**REQUIRED[command], **company(name, COMMANDS[command]), name: OTHER[name]}
    expected = COMMANDS[command].checked(values)
    default = COMMANDS[command].model_fields[name].default
    assert getattr(expected, name) != default
    (tmp_path / "keys.toml").write_text(toml(values), encoding="utf-8")
    dashed = {key.replace("_", "-"): value for key, value in values.items()}
    (tmp_path / "dashed.toml").write_text(toml(dashed), encoding="utf-8")
    assert parsed(command, as_words(values)) == expected
    assert parsed(command, [str(tmp_path / "keys.toml")]) == expected
    assert parsed(command, [str(tmp_path / "dashed.toml")]) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_all_settings_round_trip_through_toml(command: str, tmp_path: Path) -> None:
    expected = COMMANDS[command].checked(other_values(command))
    (tmp_path / "run.toml").write_text(toml(plain(expected)), encoding="utf-8")
    again = parsed(command, [str(tmp_path / "run.toml")])
    assert again == expected
    assert again.model_dump() == expected.model_dump()


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_come_from_the_fields_alone(command: str) -> None:
    """A flag that is not given has no value, so that it can't win over the file."""
    assert parsed(command, as_words(REQUIRED[command])) == COMMANDS[command].checked(REQUIRED[command])
    parser = argparse.ArgumentParser()
    add_flags(parser, COMMANDS[command])
    assert vars(parser.parse_args([])) == {"config": None}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_win_over_the_file(command: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(toml(plain(COMMANDS[command].checked(REQUIRED[command]))), encoding="utf-8")
    values = other_values(command)
    assert parsed(command, [str(tmp_path / "run.toml"), *as_words(values)]) == COMMANDS[command].checked(values)


def test_a_flag_can_switch_off_what_the_file_switches_on(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(toml({**REQUIRED["train"], "flip": True}), encoding="utf-8")
    on, off = (parsed("train", [str(tmp_path / "run.toml"), *words]) for words in ([], ["--no-flip"]))
    assert isinstance(on, TrainCommand)
    assert isinstance(off, TrainCommand)
    assert on.flip
    assert not off.flip


def test_toml_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Windows' editor writes one."""
    (tmp_path / "run.toml").write_text(toml({"steps": 3}), encoding="utf-8-sig")
    assert read_toml(tmp_path / "run.toml") == {"steps": 3}


PATHS = [
    (command, name)
    for command, kind in COMMANDS.items()
    for name, field in kind.model_fields.items()
    if any(Path in (part, *get_args(part)) for part in (field.annotation, *get_args(field.annotation)))
]


def test_all_paths_are_found() -> None:
    assert {name for _, name in PATHS} == {
        "base",
        "class_images",
        "images",
        "output",
        "output_dir",
        "start_from",
        "text_encoder",
        "tokenizer",
        "vae",
    }


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("my models/x", "my models/x"),
        (' "my models/x" ', "my models/x"),
        ("'my models/x'", "my models/x"),
        ("Hündin 犬/", "Hündin 犬"),
        ("~/x", "HOME/x"),
    ],
    ids=["plain", "blanks and quotes", "single quotes", "trailing slash", "home"],
)
@pytest.mark.parametrize(("command", "name"), PATHS)
def test_paths_are_tidied(
    command: str, name: str, typed: str, meant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    chosen = COMMANDS[command].checked({**REQUIRED[command], name: typed})
    assert getattr(chosen, name) == Path(meant.replace("HOME", str(tmp_path)))


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_paths_that_no_system_has_are_refused(command: str, name: str) -> None:
    with pytest.raises(SettingsError, match="NUL") as caught:
        COMMANDS[command].checked({**REQUIRED[command], name: "dog\0.png"})
    assert name in caught.value.problem


@pytest.mark.parametrize("typed", ["", " ", '""'], ids=["empty", "blank", "quotes"])
@pytest.mark.parametrize("name", ["base", "images", "start_from", "vae"])
def test_no_path_is_not_the_current_folder(name: str, typed: str) -> None:
    """As when a shell's variable is not set."""
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({**REQUIRED["train"], name: typed})
    assert name in caught.value.problem


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_the_home_of_nobody_is_no_crash(command: str, name: str) -> None:
    typed = "~nobody-of-this-name/x"
    with contextlib.suppress(SettingsError):
        assert getattr(COMMANDS[command].checked({**REQUIRED[command], name: typed}), name) == Path(typed)


# Bounds: the nearest value that works, and the nearest that does not.
BOUNDS = [
    ("steps", 1, 0),
    ("steps", 1_000_000, 1_000_001),
    ("learning_rate", 1.0, 1.01),
    ("learning_rate", 1e-12, 0.0),
    ("rank", 1, 0),
    ("rank", 1024, 1025),
    ("alpha", 0.1, 0.0),
    ("resolution", 32, 24),
    ("resolution", 104, 100),
    ("resolution", 4096, 4104),
    ("seed", 0, -1),
    ("seed", 2**64 - 1, 2**64),
    ("batch_size", 1, 0),
    ("batch_size", 256, 257),
    ("gradient_accumulation", 1, 0),
    ("prior_weight", 0.0, -0.1),
    ("max_grad_norm", 0.0, -1.0),
    ("weight_decay", 1.0, 1.1),
    ("checkpoint_every", 0, -1),
    ("keep_checkpoints", 1, 0),
    ("prior_count", 0, -1),
    ("prior_steps", 1, 0),
    ("prior_steps", 200, 201),
    ("prior_guidance", 0.0, -0.5),
    ("prior_guidance_start", 0.0, -0.1),
    ("prior_guidance_end", 1.0, 1.1),
    ("prior_seed", 2**64 - 1, 2**64),
    ("prior_batch_size", 64, 65),
    ("device", "cuda:0", "gpu"),
    ("precision", "bf16", "bf32"),
    ("lr_schedule", "cosine", "cosin"),
    ("name", "dog.v1", "dog/v1"),
    ("name", "con-1", "CON"),
    ("name", "d" * 100, "d" * 101),
    ("name", "a b", "a "),
    ("name", "dog", ".."),
    ("instance_prompt", "sks", ""),
    ("instance_prompt", "sks", "  "),
    ("alpha", 1e6, math.inf),
    ("learning_rate", 1e-4, math.nan),
    ("prior_weight", 1.0, math.nan),
    ("max_grad_norm", 1.0, math.inf),
    ("adapter", "loha", "lora-fa"),
    ("targets", "b-lora-style", "everything"),
    ("conv_rank", 1024, 1025),
    ("conv_alpha", 0.1, 0.0),
    ("lokr_factor", 256, 257),
    ("lokr_factor", -1, -2),
    ("min_rank", 1024, 1025),
    ("min_rank", 0, -1),
    ("rank_power", 0.1, 0.0),
    ("rank_power", 10.0, 10.1),
    ("dropout", 0.99, 1.0),
    ("dropout", 0.0, -0.1),
    ("max_norm", 0.0, -1.0),
    ("max_norm", 1.0, math.inf),
    ("text_encoder_lr", 0.0, -1e-5),
    ("text_encoder_lr", 1.0, 1.01),
    ("text_encoder_2_lr", 1.0, 1.01),
    ("text_encoder_until", 0.01, 0.0),
    ("text_encoder_until", 1.0, 1.01),
    ("token_vectors", 64, 65),
    ("token_vectors", 0, -1),
    ("token_lr", 1.0, 0.0),
    ("token_until", 1.0, 0.0),
    ("include", r"a\.b", "("),
    ("exclude", "a|b [cd]", "[a"),
    ("block_ranks", "", "4"),
    ("block_ranks", "a=0", "a="),
    ("block_ranks", "a=b=4", "a=-4"),
    ("block_ranks", "a=4:0.5 b=8", "a=4 :2"),
    ("block_ranks", "a=4:1", "a=4:0.0"),
    ("prediction_type", "epsilon", "eps"),
    ("clip_skip", 0, -1),
    ("clip_skip", 32, 33),
    ("bucket_step", 8, 12),
    ("mask_background", 0.0, -0.1),
    ("caption_dropout", 1.0, 1.1),
    ("loss", "huber", "l3"),
    ("huber_c", 0.001, 0.0),
    ("min_snr_gamma", 0.1, 0.0),
    ("noise_offset", 0.0, -0.1),
    ("multires_noise_discount", 1.0, 1.1),
    ("min_timestep", 999, 1000),
    ("max_timestep", 1, 0),
    ("timestep_bias", -4.0, -4.5),
    ("timestep_shift", 100.0, 101.0),
    ("repeats", 1, 0),
]


@pytest.mark.parametrize(("name", "good", "bad"), BOUNDS)
def test_bounds(name: str, good: object, bad: object) -> None:
    values = {**REQUIRED["train"], **company(name, TrainCommand)}
    assert getattr(TrainCommand.checked({**values, name: good}), name) == good
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({**values, name: bad})
    assert name in caught.value.problem
    assert str(bad) in caught.value.problem
    assert caught.value.remedy


FOR_ADAPTERS = {
    "include": "conv_in",
    "exclude": "mid_block",
    "block_ranks": "mid_block=4",
    "max_norm": 1.0,
    "start_from": "dog.safetensors",
    "dropout": 0.1,
    "rank_stabilized": True,
    "token_vectors": 2,
    "preset": "person",
}
FOR_LORA = {"rank_schedule": "timestep", "lora_init": "orthogonal"}
CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(({"adapter": "full", name: value}, (name, "'full'", f"unset {name}")) for name, value in FOR_ADAPTERS.items()),
    *(
        ({"adapter": kind, name: FOR_ADAPTERS[name]}, (name, f"'{kind}'", "lora and dora", "unset"))
        for kind in ("loha", "lokr", "oft", "boft")
        for name in ("dropout", "rank_stabilized")
    ),
    *(
        ({"adapter": kind, "lokr_factor": 4}, ("lokr_factor", f"'{kind}'", "choose adapter = lokr"))
        for kind in ("lora", "dora", "loha", "oft", "boft", "full")
    ),
    *(
        ({"adapter": kind, "combine": True, "base_lora": ["a"]}, ("combine", f"'{kind}'", "combine = off"))
        for kind in ("dora", "loha", "lokr", "oft", "boft")
    ),
    *(
        ({"adapter": "lokr", **values}, ("LoKr", "alpha", "learning_rate"))
        for values in ({"alpha": 4.0}, {"targets": "all", "conv_alpha": 4.0}, {"block_ranks": "mid_block=4:2"})
    ),
    *(
        ({"adapter": kind, **values}, (kind.upper(), "alpha", "max_norm"))
        for kind in ("oft", "boft")
        for values in ({"alpha": 4.0}, {"targets": "all", "conv_alpha": 4.0}, {"block_ranks": "mid_block=4:2"})
    ),
    *(
        ({"adapter": kind, "lora_plus_ratio": 16.0}, (kind, "lora_plus_ratio = 0", "learning_rate"))
        for kind in ("oft", "boft")
    ),
    *(
        ({"adapter": kind, name: value}, (name, f"'{kind}'", f"set {name} = ", "choose adapter = lora"))
        for kind in ("dora", "loha", "lokr", "oft", "boft", "full")
        for name, value in FOR_LORA.items()
    ),
    ({"lora_init": "orthogonal", "max_norm": 1.0}, ("max_norm = 0", "lora_init = default")),
    ({"lora_init": "orthogonal", "lora_plus_ratio": 16.0}, ("lora_plus_ratio = 0", "lora_init = default")),
    ({"combine": True}, ("combine", "set base_lora", "combine = off")),
    ({"targets": "none"}, ("targets", "set include")),
    ({"targets": "none", "include": " "}, ("targets", "set include")),
    *(
        ({"targets": targets, **values}, ("conv_rank", "conv_alpha", f"'{targets}'", "targets = all"))
        for targets in ("attention", "attention-mlp", "b-lora-content", "b-lora-style")
        for values in ({"conv_rank": 4}, {"conv_alpha": 4.0})
    ),
    ({"text_encoder_until": 0.5}, ("text_encoder_until", "set text_encoder_lr", "text_encoder_until = 1")),
    ({"lr_warmup_steps": 5}, ("lr_schedule", "constant_with_warmup", "lr_warmup_steps = 0")),
    ({"lr_warmup_steps": 800, "lr_schedule": "linear"}, ("lr_warmup_steps (800)", "steps (800)", "train longer")),
    ({"prior_count": 1}, ("prior_count", "set class_prompt")),
    ({"min_timestep": 500, "max_timestep": 500}, ("min_timestep (500)", "max_timestep (500)")),
    ({"aspect_buckets": True, "resolution": 64}, ("bucket_step (64)", "resolution 64", "lower bucket_step")),
    ({"instance_prompt": "a {token} {class}"}, ("instance_prompt", "{class}", "class_noun is empty")),
    ({"subject": [{"images": "cat"}]}, ("images", "[[subject]]", "table")),
]


@pytest.mark.parametrize(("values", "told"), CONTRADICTIONS, ids=lambda value: str(value))
def test_settings_that_contradict_each_other_are_named_with_the_way_out(
    values: dict[str, Any], told: tuple[str, ...]
) -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({**REQUIRED["train"], **values})
    for words in told:
        assert words in caught.value.problem
    assert caught.value.remedy


CONSISTENT: list[dict[str, Any]] = [
    {"adapter": "full", "targets": "all", "conv_rank": 4, "text_encoder_lr": 1e-5},
    {"adapter": "full", "combine": True, "base_lora": ["a"]},
    {"adapter": "dora", "dropout": 0.1, "rank_stabilized": True},
    {"adapter": "loha", "max_norm": 1.0, "block_ranks": "mid=4"},
    {"adapter": "lokr", "lokr_factor": 4, "targets": "all"},
    {**FOR_LORA, "dropout": 0.1, "rank_stabilized": True, "ema_decay": 0.9, "combine": True, "base_lora": ["a"]},
    {"rank_schedule": "timestep", "max_norm": 1.0, "lora_plus_ratio": 16.0},
    {"targets": "none", "include": "conv_in", "conv_rank": 4},
    {"targets": "attention", "include": "conv_in", "conv_alpha": 4.0},
    {"text_encoder_until": 0.5, "text_encoder_2_lr": 1e-5},
]


@pytest.mark.parametrize("values", CONSISTENT, ids=str)
def test_settings_that_go_together(values: dict[str, Any]) -> None:
    assert TrainCommand.checked({**REQUIRED["train"], **values})


def test_block_ranks_are_read() -> None:
    read = TrainSettings(block_ranks=r"down_blocks\.0=4  a=b=32:16.5 self_attn=0").ranks_by_block
    assert [(entry.pattern.pattern, entry.rank, entry.alpha) for entry in read] == [
        (r"down_blocks\.0", 4, None),
        ("a=b", 32, 16.5),
        ("self_attn", 0, None),
    ]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"rank": 16}, 1.0),
        ({"rank": 16, "alpha": 8.0}, 0.5),
        ({"rank": 16, "rank_stabilized": True}, 4.0),
        ({"rank": 16, "alpha": 8.0, "rank_stabilized": True}, 2.0),
    ],
    ids=str,
)
def test_scale(values: dict[str, Any], scale: float) -> None:
    assert TrainSettings(**values).scale == scale


@pytest.mark.parametrize(
    ("steps", "until", "expected"), [(800, 1.0, 800), (800, 0.25, 200), (3, 0.5, 2), (10, 0.001, 1)]
)
def test_text_encoders_are_trained_for_at_least_one_step(steps: int, until: float, expected: int) -> None:
    assert TrainSettings(steps=steps, text_encoder_until=until, text_encoder_lr=1e-5).text_encoder_steps == expected


def test_text_encoders_that_are_trained() -> None:
    assert TrainSettings().text_encoder_rates == {}
    both = TrainSettings(text_encoder_lr=1e-5, text_encoder_2_lr=2e-5)
    assert both.text_encoder_rates == {"text_encoder": 1e-5, "text_encoder_2": 2e-5}
    assert TrainSettings(text_encoder_2_lr=2e-5).text_encoder_rates == {"text_encoder_2": 2e-5}


@pytest.mark.parametrize("size", ["64", "64x96", "4096X32"])
def test_sizes(size: str) -> None:
    chosen = GenerateCommand.checked({**REQUIRED["generate"], "size": size})
    assert chosen.width_height == tuple(int(part) for part in (size.lower().split("x") * 2)[:2])


@pytest.mark.parametrize("size", ["", "x", "64x", "100", "64x64x64", "0", "24", "4104", "-64", "64.0", "²", "big"])
def test_wrong_sizes(size: str) -> None:
    with pytest.raises(SettingsError, match="WIDTHxHEIGHT") as caught:
        GenerateCommand.checked({**REQUIRED["generate"], "size": size})
    assert "size" in caught.value.problem


def test_a_missing_setting_is_named_and_nothing_else() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({"images": "dog", "steps": 77})
    assert "base" in caught.value.problem
    assert "images" not in caught.value.problem
    assert "77" not in caught.value.problem


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({**REQUIRED["train"], "steps": 0, "rank": "many", "flip": "perhaps"})
    assert all(name in caught.value.problem for name in ("steps", "rank", "flip", "many", "perhaps"))


@pytest.mark.parametrize(
    ("unknown", "near"),
    [
        ("stepps", "steps"),
        ("learningrate", "learning_rate"),
        ("instanceprompt", "instance_prompt"),
        ("rnak", "rank"),
        ("blockranks", "block_ranks"),
        ("text_encoder2_lr", "text_encoder_2_lr"),
    ],
)
def test_an_unknown_setting_is_named_with_its_neighbour(unknown: str, near: str) -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({**REQUIRED["train"], unknown: 1})
    assert unknown in caught.value.problem
    assert f"'{near}'" in caught.value.remedy


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainSettings().steps = 3  # type: ignore[misc]


def result_of(**values: Any) -> dict[str, Any]:
    return TrainSettings.checked(values).result_settings()


AFFECTING = {
    "learning_rate",
    "adapter",
    "rank",
    "alpha",
    "rank_stabilized",
    "targets",
    "conv_rank",
    "conv_alpha",
    "include",
    "exclude",
    "block_ranks",
    "lokr_factor",
    "dropout",
    "max_norm",
    "text_encoder_lr",
    "text_encoder_2_lr",
    "text_encoder_until",
    "token_vectors",
    "token_lr",
    "token_until",
    "token_start",
    "resolution",
    "seed",
    "batch_size",
    "gradient_accumulation",
    "prior_weight",
    "flip",
    "lr_schedule",
    "lr_cycles",
    "lr_power",
    "lr_warmup_steps",
    "max_grad_norm",
    "weight_decay",
    "optimizer",
    "optimizer_options",
    "lora_plus_ratio",
    "ema_decay",
    "precision",
    *DataSettings.model_fields,
    *ObjectiveSettings.model_fields,
    "base_quantization",
    "rank_schedule",
    "min_rank",
    "rank_power",
    "lora_init",
    *PreservationSettings.model_fields,
}


@pytest.mark.parametrize("name", TrainSettings.model_fields)
@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "cosine"])
def test_the_result_depends_on_what_is_learned_alone(name: str, schedule: str) -> None:
    """What an adapter to start from holds counts as well, but not its place."""
    start: dict[str, Any] = {"steps": 800, "lr_schedule": schedule, **company(name, TrainSettings)}
    value = "linear" if name == "lr_schedule" else OTHER[name]
    changes = result_of(**start) != result_of(**{**start, name: value})
    assert changes == (name in AFFECTING or (name == "steps" and schedule == "cosine"))


def test_the_result_knows_alpha_equal_to_the_rank_by_either_name() -> None:
    assert result_of(rank=8) == result_of(rank=8, alpha=8.0)
    assert result_of(rank=8) != result_of(rank=8, alpha=4.0)
    assert result_of(rank=8) != result_of(rank=16)
    assert result_of(rank=16, rank_stabilized=True) == result_of(rank=16, rank_stabilized=True, alpha=16.0)


def test_the_result_is_plain_json() -> None:
    assert json.loads(json.dumps(result_of())) == result_of()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_falling_rate_depends_on_the_length(schedule: str) -> None:
    assert result_of(lr_schedule=schedule, steps=10) != result_of(lr_schedule=schedule, steps=11)


def test_text_encoders_that_stop_depend_on_the_length() -> None:
    whole, half = ({"text_encoder_lr": 1e-5, "text_encoder_until": until} for until in (1.0, 0.5))
    assert result_of(**whole, steps=10) == result_of(**whole, steps=11)
    assert result_of(**half, steps=10) != result_of(**half, steps=11)


def test_vectors_that_stop_depend_on_the_length() -> None:
    whole, half = ({"token_vectors": 1, "token_until": until} for until in (1.0, 0.5))
    assert result_of(**whole, steps=10) == result_of(**whole, steps=11)
    assert result_of(**half, steps=10) != result_of(**half, steps=11)


def test_without_vectors_nothing_of_them_is_in_the_result() -> None:
    """So that runs of earlier versions are found."""
    assert not [name for name in result_of() if name.startswith("token")]
    assert result_of(token_lr=1e-3, token_until=0.1, token_start="dog") == result_of()


def test_the_demo_is_parsed() -> None:
    values = read_toml(DEMO / "demo.toml")
    command = TrainCommand.checked({**values, "base": DEMO / "base", "images": DEMO / "subject"})
    assert command.prior_count > 0
    assert command.instance_prompt != command.class_prompt
    assert {name: getattr(command, name) for name in values} == values


PATTERNS = st.sampled_from([r"down_blocks\.0", "mid_block", r"^conv_in$", "[ab]|c", 'q"uote', "a=b", "ü犬", r"\\"])


def words(entries: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Up to three entries as a person types them."""
    return st.lists(entries, max_size=3).map("  ".join)


def repaired(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of which each is good, without those that contradict others."""
    values = dict(values)
    alone = {
        "prodigy": ["token_vectors", "text_encoder_lr", "text_encoder_2_lr", "lora_plus_ratio"],
        "adamw-schedule-free": ["lr_schedule", "ema_decay", "max_norm"],
    }
    for name in alone.get(values.get("optimizer", "adamw"), []):
        values.pop(name, None)
    if values.get("optimizer") == "prodigy":
        values["learning_rate"] = 1.0
    if values.get("lr_schedule", "constant") == "constant":
        values.pop("lr_warmup_steps", None)
    if "lr_warmup_steps" in values:
        values["lr_warmup_steps"] %= values.get("steps", 800)
    kind = values.get("adapter", "lora")
    unfit = {
        "full": [*FOR_ADAPTERS, *FOR_LORA, "lora_plus_ratio", "swap_blocks"],
        "dora": ["combine", *FOR_LORA],
        "loha": ["combine", "dropout", "rank_stabilized", *FOR_LORA],
        "lokr": ["combine", "dropout", "rank_stabilized", "alpha", "conv_alpha", "block_ranks", *FOR_LORA],
    }
    unfit |= {rotation: [*unfit["lokr"], "lora_plus_ratio"] for rotation in ("oft", "boft")}
    if values.get("lora_init") == "orthogonal":
        values.pop("max_norm", None)
        values.pop("lora_plus_ratio", None)
    for name in [*unfit.get(kind, []), *([] if kind == "lokr" and values.get("lokr_factor") else ["lokr_factor"])]:
        values.pop(name, None)
    if values.get("targets") == "none" and not values.get("include"):
        del values["targets"]
    if values.get("targets") != "all" and not values.get("include"):
        values.pop("conv_rank", None)
        values.pop("conv_alpha", None)
    if not values.get("text_encoder_lr") and not values.get("text_encoder_2_lr"):
        values.pop("text_encoder_until", None)
    if not values.get("preview_every"):
        values.pop("score_clip", None)
        values.pop("score_dino", None)
    if "score_clip" not in values and "score_dino" not in values:
        values.pop("early_stop", None)
    if values.get("min_timestep", 0) >= values.get("max_timestep", 1000):
        values.pop("min_timestep", None)
    if 2 * values.get("bucket_step", 64) > values.get("resolution", 512):
        values.pop("aspect_buckets", None)
    if kind == "full":
        values.pop("base_quantization", None)
    if kind in ("dora", "oft", "boft"):
        values.pop("weight_penalty", None)
    if values.get("fused_backward_pass"):
        values["max_grad_norm"] = 0.0
        values.pop("compile", None)
        if values.get("optimizer", "adamw") not in FUSABLE:
            values["fused_backward_pass"] = False
    most_cycles = max(1, (values.get("steps", 800) - values.get("lr_warmup_steps", 0)) // 2)
    values["lr_cycles"] = min(values.get("lr_cycles", 3), most_cycles)
    return values


def _values(name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Every value that the field's type and bounds allow."""
    bounds = {key: getattr(rule, key) for rule in field.metadata for key in vars_of(rule)}
    kind = next(part for part in (get_args(field.annotation) or (field.annotation,)) if part is not type(None))
    if get_origin(field.annotation) is Literal:
        return st.sampled_from(get_args(field.annotation))
    if name in ("include", "exclude"):
        return words(PATTERNS)
    if name == "block_ranks":
        entries = st.builds("{}={}{}".format, PATTERNS, st.integers(0, 9999), st.sampled_from(["", ":1", ":16.25"]))
        return words(entries)
    if name == "optimizer_options":
        return st.sampled_from(["", "betas=(0.5, 0.75)", "eps=1e-6  d_coef=2", "amsgrad=True betas=(0.9,None)"])
    if Path in (kind, *get_args(kind)):
        return st.none() | st.text("aZ09-_ü犬[]{}%$./\\", max_size=60).map(lambda text: f"-{text}-")
    if name == "name":
        return st.text("aZ09-_ü犬[]{}%'$.", min_size=1, max_size=60).map(lambda text: f"-{text}-")
    if kind is bool:
        return st.booleans()
    if kind is int:
        step = bounds.get("multiple_of", 1)
        high = min(bounds.get("le", 10**6), 2**64 - 1)
        return st.integers(-(-bounds["ge"] // step), high // step).map(lambda number: number * step)
    if kind is str:
        return st.text("aZ09-_ü犬 |", max_size=60).map(lambda text: f"-{text}-")
    assert kind is float
    low, open_below = (bounds["gt"], True) if "gt" in bounds else (bounds["ge"], False)
    high, open_above = (bounds["lt"], True) if "lt" in bounds else (bounds.get("le", 1e9), False)
    numbers = st.floats(low, high, exclude_min=open_below, exclude_max=open_above, allow_subnormal=False)
    return st.none() | numbers if field.default is None else numbers


def vars_of(rule: object) -> list[str]:
    return [key for key in ("ge", "gt", "le", "lt", "multiple_of") if hasattr(rule, key)]


@given(
    values=st.fixed_dictionaries({}, optional={n: _values(n, f) for n, f in TrainSettings.model_fields.items()}),
)
def test_valid_settings_survive_json_and_toml(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    chosen = TrainSettings.checked(repaired(values))
    dumped = chosen.model_dump(mode="json")
    assert TrainSettings.checked(dumped) == chosen
    assert TrainSettings.checked(json.loads(json.dumps(dumped))).result_settings() == chosen.result_settings()
    path = tmp_path_factory.getbasetemp() / f"settings-{os.getpid()}.toml"
    path.write_text(toml(plain(chosen)), encoding="utf-8")
    assert TrainSettings.checked(read_toml(path)) == chosen
    divisor = math.sqrt(chosen.rank) if chosen.rank_stabilized else chosen.rank
    assert math.isclose(chosen.scale * divisor, chosen.rank if chosen.alpha is None else chosen.alpha)
