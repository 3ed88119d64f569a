"""Where an adapter works: shares of energy, used rank and overlap, block by block, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pack.trainer.adapters.kohya import Adapter, LoraLayer, parse_adapter
from pack.trainer.adapters.layers import LohaLayer
from pack.trainer.cli.inspect import facts_as_text
from pack.trainer.merging.profile import profile_adapter
from torch import Tensor

MID = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
MID_TOO = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(singular_values: list[float], size: int = 8) -> LoraLayer:
    """A LoRA whose delta is diagonal, with these numbers on the diagonal."""
    rank = len(singular_values)
    down, up = torch.zeros(rank, size), torch.zeros(size, rank)
    for index, value in enumerate(singular_values):
        down[index, index] = 1.0
        up[index, index] = value
    return LoraLayer(down=down, up=up, alpha=float(rank))


def test_energy_is_a_share_of_the_squared_norms() -> None:
    table = profile_adapter(Adapter({MID: lora([3.0, 0.0]), MID_TOO: lora([4.0, 0.0]), DOWN: lora([5.0, 5.0])}, {}))
    down, mid = table.values()
    assert down["energy"] == pytest.approx(50 / 75)
    assert mid["energy"] == pytest.approx(25 / 75)
    assert "overlap" not in mid


def test_used_rank_holds_95_percent_of_the_energy() -> None:
    """Of rank 4: one singular value of 10 holds 100 of 103; four equal ones are all needed."""
    [concentrated] = profile_adapter(Adapter({MID: lora([10.0, 1.0, 1.0, 1.0])}, {})).values()
    assert concentrated["rank used"] == pytest.approx(1 / 4)
    [spread] = profile_adapter(Adapter({MID: lora([2.0, 2.0, 2.0, 2.0])}, {})).values()
    assert spread["rank used"] == pytest.approx(1.0)
    [both] = profile_adapter(
        Adapter({MID: lora([10.0, 1.0, 1.0, 1.0]), MID_TOO: lora([2.0, 2.0, 2.0, 2.0])}, {})
    ).values()
    assert both["rank used"] == pytest.approx((1 / 4 + 1) / 2)


def test_the_rank_of_a_loha_is_that_of_its_product() -> None:
    """Two products of rank 2, number by number, have rank 4."""
    source = torch.Generator().manual_seed(1)
    up = [torch.randn(32, 2, generator=source) for _ in range(2)]
    down = [torch.randn(2, 32, generator=source) for _ in range(2)]
    layer = LohaLayer(w1_a=up[0], w1_b=down[0], w2_a=up[1], w2_b=down[1], alpha=2.0)
    energies = torch.linalg.svdvals((up[0] @ down[0]) * (up[1] @ down[1])).square()
    used = int((energies.cumsum(0) < 0.95 * energies.sum()).sum()) + 1
    [row] = profile_adapter(Adapter({MID: layer}, {})).values()
    assert row["rank used"] == pytest.approx(used / 4)


@pytest.mark.parametrize(
    ("other", "overlap"),
    [([3.0, 0.0], 1.0), ([-1.0, 0.0], -1.0), ([0.0, 2.0], 0.0), ([1.0, 1.0], 1 / math.sqrt(2))],
)
def test_overlap_is_the_cosine_of_the_deltas(other: list[float], overlap: float) -> None:
    first, second = Adapter({MID: lora([2.0, 0.0])}, {}), Adapter({MID: lora(other)}, {})
    [row] = profile_adapter(first, second).values()
    assert row["overlap"] == pytest.approx(overlap, abs=1e-6)


def test_a_layer_that_the_other_lacks_has_no_overlap() -> None:
    table = profile_adapter(Adapter({MID: lora([1.0]), DOWN: lora([1.0])}, {}), Adapter({MID: lora([1.0])}, {}))
    assert ["overlap" in row for row in table.values()].count(True) == 1


def dora(magnitude: float) -> Adapter:
    tensors: dict[str, Tensor] = {
        f"{MID}.lora_down.weight": torch.zeros(1, 4),
        f"{MID}.lora_up.weight": torch.zeros(4, 1),
        f"{MID}.alpha": torch.tensor(1.0),
        f"{MID}.dora_scale": torch.full((4, 1), magnitude),
    }
    return parse_adapter(tensors)


def test_a_dora_is_left_out_without_the_weights() -> None:
    assert profile_adapter(dora(2.0)) == {}
    weight = torch.eye(4)
    [row] = profile_adapter(
        dora(2.0), weights={MID: weight}
    ).values()  # magnitude 2 of rows of length 1: delta = weight
    assert row["energy"] == pytest.approx(1.0)
    [compared] = profile_adapter(dora(2.0), dora(3.0), {MID: weight}).values()
    assert compared["overlap"] == pytest.approx(1.0, abs=1e-6)


def test_the_table_is_part_of_what_inspect_prints() -> None:
    blocks = profile_adapter(Adapter({MID: lora([1.0])}, {}))
    text = facts_as_text({"file": "x", "kind": "LoRA", "rank": [1, 2], "blocks": blocks, "metadata": {"a": "b" * 300}})
    assert "energy" in text
    assert "rank: 1, 2" in text
    assert f"a = {'b' * 200}\n" in text + "\n"
