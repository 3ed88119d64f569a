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
from pack.trainer.adapters.kohya import read_adapter, write_adapter
from webui_host import WebUI, text_of


@pytest.fixture
def loras(webui: WebUI) -> Iterator[Path]:
    """The host's folder of LoRAs, with two of them, which the page's lists know."""
    for name, number in (("äpple", 1.0), ("boat", 2.0)):
        write_adapter(webui.loras / f"{name}.safetensors", adapter_of(number), torch.float32)
    for list_ in ("merge_loras", "resize_lora", "inspect_lora"):
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


def test_what_is_missing_is_said(webui: WebUI, loras: Path) -> None:
    both = {"merge_loras": ["äpple", "boat"], "merge_name": "both"}
    before = sorted(loras.iterdir())
    for tool, values, problem in (
        ("merge", both | {"merge_loras": []}, "Fewer than two LoRAs are chosen."),
        ("merge", both | {"merge_loras": ["äpple"]}, "Fewer than two LoRAs are chosen."),
        ("merge", both | {"merge_strengths": "1"}, "There are 1 strengths for 2 LoRAs."),
        ("merge", both | {"merge_strengths": "1, x"}, "The strength 'x' is no number."),
        ("merge", both | {"merge_name": " "}, "The result has no name."),
        ("merge", both | {"merge_name": "../both"}, "'../both' can't be a file name."),
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
    assert picture, "the picture of the report"
    wanted = {name: change(layer) for name, layer in read_adapter(loras / "äpple.safetensors").layers.items()}
    made = read_adapter(loras / "both.safetensors")
    for name, layer in made.layers.items():  # 1 of it, and half of what is twice as large
        torch.testing.assert_close(change(layer), 2 * wanted[name])
    assert json.loads((loras / "both.json").read_text(encoding="utf-8"))["preferred weight"] == 0.9
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
    assert "still at work" not in said(webui, "resize", resize_lora="äpple", resize_name="other", resize_rank=1)
