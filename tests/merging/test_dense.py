"""What is computed of dense changes: the leading part of a large matrix, and what is refused."""

from __future__ import annotations

import pytest
import torch
from pack.trainer.core.errors import AdapterError
from pack.trainer.merging import deltas
from pack.trainer.merging.deltas import Delta, Truncation, truncate
from pack.trainer.merging.extract import extract_between
from pack.trainer.settings.merge import ExtractSettings


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_leading_part_is_that_of_the_whole_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the eigenvectors of the Gram matrix, wide or tall, as by the full decomposition."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = truncate(Delta(shape, matrix), Truncation(rank=5))
    monkeypatch.setattr(deltas, "_FULL_SVD_SIZE", 8)
    leading = truncate(Delta(shape, matrix), Truncation(rank=5))
    assert leading.rank == whole.rank == 5
    torch.testing.assert_close(
        leading.dense(), whole.dense(), rtol=1e-4, atol=1e-5
    )  # float32 squared by the Gram matrix
    values = torch.linalg.svdvals(matrix)
    assert torch.linalg.svdvals(leading.dense())[:5] == pytest.approx(values[:5], rel=1e-4)


def test_layers_of_different_shapes_are_named() -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    with pytest.raises(AdapterError) as refused:
        extract_between({name: torch.ones(4, 6)}, {name: torch.ones(4, 8)}, ExtractSettings(rank=1))
    assert name in refused.value.problem
    with pytest.raises(AdapterError) as refused:
        extract_between({name: torch.ones(4, 6)}, {}, ExtractSettings(rank=1))
    assert name in refused.value.problem


def test_models_that_do_not_differ_have_no_difference() -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    with pytest.raises(AdapterError, match="do not differ"):
        extract_between({name: torch.ones(4, 6)}, {name: torch.ones(4, 6)}, ExtractSettings(rank=1))
