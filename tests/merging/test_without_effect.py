"""What changes nothing is no success: it is refused where a model should change, and named where it may be meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_maths import NAME, WEIGHTS, added, error, merged, random_weight, settings, single
from helpers import DEMO
from pack.trainer.adapters.kohya import Adapter, LoraLayer, parse_adapter
from pack.trainer.adapters.layers import OftLayer
from pack.trainer.core.errors import AdapterError
from pack.trainer.merging.fuse import fuse
from pack.trainer.merging.merge import WeightedAdapter, merge
from safetensors.torch import load_file
from torch import Tensor

BASE = DEMO / "base"
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PROJ_IN = "lora_unet_down_blocks_0_attentions_0_proj_in"


def lora(size: int = 1) -> Adapter:
    return Adapter({TO_Q: LoraLayer(torch.full((1, 64), float(size)), torch.ones(64, 1), 1.0)})


def text_encoder(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


@pytest.mark.parametrize(
    ("adapter", "strength", "told"),
    [
        (Adapter({}, vectors={f"{TO_Q}.diff_b": torch.ones(64)}), 1.0, f"{TO_Q}.diff_b"),
        (Adapter({}, vectors={f"{PROJ_IN}.diff": torch.ones(64)}), 1.0, f"{PROJ_IN}.diff"),
        (Adapter({"lora_unet_up_blocks_3_resnets_0_norm1": lora().layers[TO_Q]}), 1.0, "norm1"),
        (lora(), 0.0, "strength 0"),
        (lora(0), 1.0, "do not change the model"),
        (lora(), 1e-30, "do not change the model"),
        (Adapter({}), 1.0, "do not change the model"),
    ],
    ids=[
        "a bias of a layer without one",
        "a vector for a matrix",
        "a matrix for a norm",
        "no strength",
        "never trained",
        "lost in rounding",
        "no modules",
    ],
)
def test_a_fuse_that_changes_nothing_is_refused(adapter: Adapter, strength: float, told: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        fuse(BASE, [(adapter, strength)], tmp_path / "fused")
    assert told in caught.value.problem
    assert not (tmp_path / "fused").exists()


def test_one_of_two_without_strength_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fuse(BASE, [(lora(), 1.0), (lora(), 0.0)], tmp_path / "fused")
    assert "strength 0" in caplog.text


def test_text_encoders_of_old_files_are_fused(tmp_path: Path) -> None:
    """Each of the four matrices of diffusers 0.15 to 0.19, in the layer where it was trained."""
    generator = torch.Generator().manual_seed(1)
    before = text_encoder(BASE)
    width = before["text_model.encoder.layers.0.self_attn.q_proj.weight"].shape[0]
    tensors, expected = {}, {}
    for letter in ("q", "k", "v", "out"):
        down, up = torch.randn((4, width), generator=generator), torch.randn((width, 4), generator=generator)
        stem = f"text_encoder.text_model.encoder.layers.0.self_attn.to_{letter}_lora"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        expected[f"text_model.encoder.layers.0.self_attn.{letter}_proj.weight"] = up @ down
    fuse(BASE, [(parse_adapter(tensors), 0.5)], tmp_path / "fused")
    after = text_encoder(tmp_path / "fused")
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(after[name].float(), before[name].float() + 0.5 * delta, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("blocks", [(4, 4, 4), (3, 4, 4, 4)], ids=["OFT", "BOFT"])
def test_a_rotation_is_merged_at_strength_0_and_1_without_its_weight(
    blocks: tuple[int, ...], alpha: float, strength: float
) -> None:
    """An alpha of 0 is no limit; a strength of 0 leaves a rotation by nothing, which needs no weight to be written."""
    generator = torch.Generator().manual_seed(0)
    layer = OftLayer(torch.randn(blocks, generator=generator), alpha)
    part = WeightedAdapter(Adapter({NAME: layer}), "turned", strength, strength)
    result = merge([part], settings())
    weight = random_weight((16, 10))
    again = parse_adapter(result.adapter.state_dict(torch.float16)).layers[NAME]
    expected = strength * layer.delta(weight)
    assert (again.delta(weight) - expected).norm() <= 2e-3 * weight.norm()
    assert ("strength 0" in " ".join(result.report.warnings)) == (strength == 0)


def test_an_adapter_without_strength_is_named_in_the_report() -> None:
    shape = WEIGHTS["linear"]
    one, other = single("LoRA", shape, 1), single("LoRA", shape, 2)
    result = merged(one, (other, 0.0))
    assert error(added(result.adapter.layers[NAME], shape), added(one.layers[NAME], shape)) < 1e-6
    assert any("strength 0" in warning for warning in result.report.warnings)
    assert not any("strength 0" in warning for warning in merged(one, (other, 0.1)).report.warnings)
