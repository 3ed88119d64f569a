"""The tab's tools in the real gradio of Automatic1111 and of Forge: merge, resize, inspect, compare."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_nodes import adapter_of
from merge_worlds import random_adapter
from pack.trainer.adapters.kohya import read_adapter, write_adapter
from pack.trainer.models.open import open_base
from webui_host import WebUI, text_of


@pytest.fixture
def loras(webui: WebUI) -> Iterator[Path]:
    """The host's folder of LoRAs, with two of them, which the page's lists know."""
    for name, number in (("äpple", 1.0), ("boat", 2.0)):
        write_adapter(webui.loras / f"{name}.safetensors", adapter_of(number), torch.float32)
    lists = ("merge_loras", "learned_merge_subject", "learned_merge_style", "fuse_loras", "resize_lora", "inspect_lora")
    for list_ in lists:
        [update] = webui.call(f"{list_}_refresh")
        choices = [choice if isinstance(choice, str) else choice[1] for choice in update["choices"]]
        assert choices == ["boat", "äpple"]
    yield webui.loras
    webui.tidy()


def change(layer: Any) -> torch.Tensor:
    """What a LoRA adds to a weight."""
    return layer.alpha / layer.rank * layer.up.float() @ layer.down.float()


def said(webui: WebUI, tool: str, **values: Any) -> str:
    result, *_ = webui.call(f"{tool}_start", **values)
    return text_of(result)


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_a_name_that_is_no_utf8_hides_no_other(webui: WebUI, loras: Path) -> None:
    odd = loras / os.fsdecode(b"d\xff.safetensors")
    odd.write_bytes(b"")
    [update] = webui.call("merge_loras_refresh")
    assert {choice if isinstance(choice, str) else choice[1] for choice in update["choices"]} == {"boat", "äpple"}


@pytest.mark.parametrize("tabs", ["tools", "tool"])
def test_whoever_comes_to_the_tools_finds_lists_of_what_there_is(tabs: str, webui: WebUI, loras: Path) -> None:
    write_adapter(loras / "new.safetensors", adapter_of(3.0), torch.float32)
    found = {}
    for list_, update in zip(webui.outputs(tabs, "select"), webui.call(tabs, "select"), strict=True):
        found[list_] = [choice if isinstance(choice, str) else choice[1] for choice in update["choices"]]
    loras_of = ("merge_loras", "learned_merge_subject", "learned_merge_style", "fuse_loras", "resize_lora")
    for list_ in (*loras_of, "inspect_lora"):
        assert found.pop(list_) == ["boat", "new", "äpple"]
    assert found.pop("compare_run") == []
    base = webui.components()["dreambooth_base"]["props"]["value"]
    assert found == {key: [base] for key in ("learned_merge_base", "extract_tuned", "extract_base", "fuse_base")}


def test_what_is_missing_is_said(webui: WebUI, loras: Path) -> None:
    both = {"merge_loras": ["äpple", "boat"], "merge_name": "both"}
    before = sorted(loras.iterdir())
    for tool, values, problem in (
        ("merge", both | {"merge_loras": []}, "Fewer than two LoRAs are chosen."),
        ("merge", both | {"merge_loras": ["äpple"]}, "Fewer than two LoRAs are chosen."),
        ("merge", both | {"merge_strengths": "1"}, "There are 1 strengths for 2 LoRAs."),
        ("merge", both | {"merge_strengths": "1, x"}, "The strength 'x' is not a number."),
        ("merge", both | {"merge_name": " "}, "The result has no name."),
        ("merge", both | {"merge_name": "../both"}, "'../both' is not a valid file name."),
        ("learned_merge", {"learned_merge_subject": "boat", "learned_merge_name": "both"}, "No LoRA is chosen."),
        (
            "learned_merge",
            {"learned_merge_subject": "boat", "learned_merge_style": "äpple"},
            "The result has no name.",
        ),
        ("extract", {"extract_name": "../x"}, "'../x' is not a valid file name."),
        ("fuse", {"fuse_name": "all"}, "No LoRA is chosen."),
        ("fuse", {"fuse_loras": ["boat"], "fuse_name": "a/b"}, "'a/b' is not a valid file name."),
        ("resize", {"resize_name": "small"}, "No LoRA is chosen."),
        ("resize", {"resize_lora": "boat", "resize_name": ""}, "The result has no name."),
        ("inspect", {}, "No LoRA is chosen."),
        ("compare", {}, "No run is chosen."),
    ):
        message = said(webui, tool, **values)
        assert message.startswith(problem), (tool, values, message)
    (loras / "boat.safetensors").rename(loras / "boat.gone")
    assert said(webui, "merge", **both).startswith("There is no LoRA 'boat'.")
    (loras / "boat.gone").rename(loras / "boat.safetensors")
    assert sorted(loras.iterdir()) == before
    assert not (webui.data / "jobs").exists()


@pytest.mark.slow
def test_two_loras_are_merged(webui: WebUI, loras: Path) -> None:
    calls = webui.facts()["calls"]
    result, picture = webui.call(
        "merge_start", merge_loras=["äpple", "boat"], merge_strengths="1, 0.5", merge_name="both", merge_method="sum"
    )
    assert "both.safetensors" in text_of(result)
    assert "class='dreambooth-made'" in result, "by which the page knows that there is another LoRA"
    assert picture, "the picture of the report"
    wanted = {name: change(layer) for name, layer in read_adapter(loras / "äpple.safetensors").layers.items()}
    made = read_adapter(loras / "both.safetensors")
    for name, layer in made.layers.items():  # 1 of it, and half of what is twice as large
        torch.testing.assert_close(change(layer), 2 * wanted[name])
    assert json.loads((loras / "both.json").read_text(encoding="utf-8"))["preferred weight"] == 1.0
    facts = webui.facts()
    assert {"both", "boat", "äpple"} <= {*facts["networks"]}
    assert facts["calls"] == calls, "the host's model stays where it is"
    before = (loras / "both.safetensors").read_bytes()
    result, _ = webui.call("merge_start", merge_loras=["äpple", "boat"], merge_name="both", merge_method="sum")
    assert "both-2.safetensors" in text_of(result)
    assert (loras / "both.safetensors").read_bytes() == before, "nothing is replaced"


@pytest.mark.slow
def test_a_lora_is_made_smaller_and_inspected(webui: WebUI, loras: Path) -> None:
    assert "rank" in said(webui, "inspect", inspect_lora="äpple").lower()
    message = said(webui, "resize", resize_lora="äpple", resize_name="small", resize_rank=1)
    assert "small.safetensors" in message
    assert {layer.rank for layer in read_adapter(loras / "small.safetensors").layers.values()} == {1}
    message = said(webui, "resize", resize_lora="äpple", resize_name="other", resize_rank=-1)
    assert "rank" in message.lower()
    assert not (loras / "other.safetensors").exists()
    assert "still running" not in said(webui, "resize", resize_lora="äpple", resize_name="other", resize_rank=1)


QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def fitting(webui: WebUI, loras: Path, tiny_checkpoint: Path) -> Path:
    """The folder with LoRAs of the host's model, also under the names of those that fit none."""
    base = open_base(tiny_checkpoint)
    for seed, name in enumerate(("äpple", "boat")):
        adapter = random_adapter(base, pattern=QUERY, seed=seed)
        write_adapter(loras / f"{name}.safetensors", adapter, torch.float32, replace=True)
    (loras / "boat.json").write_text(json.dumps({"activation text": "sks boat"}))
    return loras


@pytest.mark.slow
def test_a_lora_is_fused_into_a_model_and_extracted_again(webui: WebUI, fitting: Path) -> None:
    models = webui.folder / "models" / "Stable-diffusion"
    base = webui.components()["dreambooth_base"]["props"]["value"]
    try:
        message = said(webui, "fuse", fuse_base=base, fuse_loras=["boat"], fuse_strengths="2", fuse_name="with boat")
        assert "with boat.safetensors" in message
        assert (models / "with boat.safetensors").is_file()
        [update] = webui.call("extract_tuned_refresh")
        titles = [choice if isinstance(choice, str) else choice[1] for choice in update["choices"]]
        [tuned] = [title for title in titles if title.startswith("with boat")]
        message = said(webui, "extract", extract_tuned=tuned, extract_base=base, extract_name="again", extract_rank=4)
    finally:
        (models / "with boat.safetensors").unlink(missing_ok=True)
        webui.call("refresh")
    assert "again.safetensors" in message
    [(name, made)] = read_adapter(fitting / "again.safetensors").layers.items()
    assert name == QUERY
    wanted = 2 * change(read_adapter(fitting / "boat.safetensors").layers[QUERY])
    torch.testing.assert_close(change(made), wanted, rtol=1e-3, atol=1e-3)
    assert "again" in webui.facts()["networks"]


@pytest.mark.slow
def test_a_subject_and_a_style_are_merged_by_learning(webui: WebUI, fitting: Path) -> None:
    calls = webui.facts()["calls"]
    chosen: dict[str, Any] = {
        "learned_merge_subject": "boat",
        "learned_merge_style": "äpple",
        "learned_merge_name": "both",
    }
    chosen |= {"learned_merge_base": webui.components()["dreambooth_base"]["props"]["value"]}
    chosen |= {"learned_merge_steps": 1, "learned_merge_resolution": 64}
    assert "subject prompt" in said(webui, "learned_merge", **chosen), "the engine says what is missing"
    chosen |= {"learned_merge_subject_prompt": "a photo of sks boat", "learned_merge_style_prompt": "pixel art"}
    message = said(webui, "learned_merge", **chosen)
    assert "both.safetensors" in message
    assert read_adapter(fitting / "both.safetensors").layers.keys() == {QUERY}
    assert json.loads((fitting / "both.json").read_text(encoding="utf-8"))["activation text"] == "sks boat"
    assert webui.facts()["calls"][len(calls) :][-2:] == ["unload", "load"], "the card was the merge's meanwhile"
