"""Weights of one input become one, of the same values to the bit, or stay apart."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.joined_rows import join_rows
from qserve.kernels.linear_weight import NeutralWeight

INPUTS = 64


def make_grouped(outputs: int, group_size: int = 32) -> GroupedWeight:
    groups = (outputs, INPUTS // group_size)
    codes = torch.randint(0, 16, (outputs, INPUTS)).byte()
    return GroupedWeight(codes, torch.rand(groups), torch.full(groups, 8).byte(), 4, group_size)


def make_codebook(outputs: int, block_size: int = 64, shift: float = 0.0) -> CodebookWeight:
    codes = torch.randint(0, 16, (outputs, INPUTS)).byte()
    table = torch.linspace(-1, 1, 16) + shift
    num_blocks = -(-outputs * INPUTS // block_size)
    return CodebookWeight(codes, table, torch.rand(num_blocks), block_size)


def make_float8(outputs: int, block: tuple[int, int]) -> Float8Weight:
    rows, columns = block
    scales = torch.rand(-(-outputs // rows), -(-INPUTS // columns))
    return Float8Weight(torch.randn(outputs, INPUTS).to(torch.float8_e4m3fn), scales, block)


def make_float(outputs: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(outputs, INPUTS).to(dtype)


def values_of(weight: NeutralWeight) -> torch.Tensor:
    return weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()


@pytest.mark.parametrize(
    "weights",
    [
        [make_float(3), make_float(5)],
        [make_grouped(16), make_grouped(8), make_grouped(8)],
        [make_codebook(3), make_codebook(5)],
        [make_codebook(2, 128), make_codebook(4, 128)],
        [make_float8(4, (1, INPUTS)), make_float8(2, (1, INPUTS))],
        [make_float8(4, (4, INPUTS)), make_float8(6, (6, INPUTS))],
        [make_float8(4, (4, INPUTS)), make_float8(6, (1, INPUTS))],
        [make_float8(8, (4, 32)), make_float8(4, (4, 32))],
        [make_codebook(3, 128)],
    ],
    ids=["float", "grouped", "codebook", "wide blocks", "rows", "tensors", "both", "blocks", "one"],
)
def test_joined_weights_have_the_values_of_their_parts(weights: list[NeutralWeight]) -> None:
    joined = join_rows(weights)
    assert joined is not None
    assert torch.equal(values_of(joined), torch.cat([values_of(weight) for weight in weights]))


@pytest.mark.parametrize(
    "weights",
    [
        [make_float(3), make_float(5, torch.float16)],
        [make_grouped(16), make_float(8)],
        [make_grouped(16), make_grouped(8, 64)],
        [make_codebook(4), make_codebook(4, 128)],
        [make_codebook(4), make_codebook(4, shift=0.1)],
        [make_codebook(3, 128), make_codebook(4, 128)],
        [make_codebook(4), make_float8(4, (1, INPUTS))],
        [make_float8(6, (4, 32)), make_float8(4, (4, 32))],
        [make_float8(8, (4, 32)), make_float8(4, (4, 16))],
        [make_float8(8, (4, 32)), make_float8(4, (1, INPUTS))],
    ],
    ids=["dtype", "form", "groups", "blocks", "table", "a block over two", "forms", "rest"]
    + ["columns", "granularity"],
)
def test_what_cannot_be_joined_stays_apart(weights: list[NeutralWeight]) -> None:
    assert join_rows(weights) is None
