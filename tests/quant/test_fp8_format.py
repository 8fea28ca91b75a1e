"""8-bit float releases: block scales, one scale a tensor, one a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qserve.kernels.activations import Activations
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.fp8 import Float8Format
from qserve.quant.formats.layer_format import in_memory

Tensors = dict[str, torch.Tensor]
VALUES = torch.randn(130, 200, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_block_scales_are_factors_despite_their_name() -> None:
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    reader = Float8Format.from_config(BLOCKS)
    read = reader.read("layer", in_memory({"weight": VALUES, "weight_scale_inv": scales}))
    dense = read.dequantize()
    assert torch.equal(dense[:128, :128], VALUES[:128, :128].float())
    assert torch.equal(dense[128:, :128], VALUES[128:, :128].float() * 4)
    assert torch.equal(dense[128:, 128:], VALUES[128:, 128:].float() * 8)
    assert reader.activations is Activations.FLOAT8_TOKEN


@pytest.mark.parametrize(
    ("block", "scales"),
    [
        ({"quant_method": "fp8"}, torch.tensor(0.5)),
        ({"quant_method": "fp8"}, torch.tensor([0.5])),
        ({"quant_method": "fbgemm_fp8"}, torch.full((130, 1), 0.5)),
        ({"quant_method": "fbgemm_fp8"}, torch.full((130,), 0.5).bfloat16()),
        (BLOCKS, torch.full((2, 2), 0.5).to(torch.float8_e8m0fnu)),
    ],
)
def test_scales_of_every_shape_are_read(block: dict[str, Any], scales: torch.Tensor) -> None:
    key = "weight_scale_inv" if block is BLOCKS else "weight_scale"
    tensors = {"weight": VALUES, key: scales, "input_scale": torch.ones(1)}
    read = Float8Format.from_config(block).read("layer", in_memory(tensors))
    assert torch.equal(read.dequantize(), VALUES.float() * 0.5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("weight"), "weight missing"),
        (lambda t: t.update(weight=t["weight"].to(torch.float8_e5m2)), "weight F8_E5M2: expected"),
        (lambda t: t.update(weight=t["weight"].float()), "weight F32: expected weight F8_E4M3"),
        (lambda t: t.update(weight_scale_inv=torch.ones(2)), "do not fit one scale"),
        (lambda t: t.update(weight_scale_inv=torch.ones(2, 1)), "do not fit one scale"),
        (lambda t: t["weight_scale_inv"].fill_(float("nan")), "the file is damaged"),
        (lambda t: t["weight_scale_inv"].zero_(), "the file is damaged"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    damage: Callable[[Tensors], object], message: str
) -> None:
    tensors = {"weight": VALUES, "weight_scale_inv": torch.ones(2, 2)}
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        Float8Format.from_config(BLOCKS).read("layer", in_memory(tensors))


def test_a_layer_in_16_bits_is_not_described() -> None:
    stored = in_memory({"weight": VALUES.half()})
    assert Float8Format.from_config(BLOCKS).describe("layer", stored) is None
