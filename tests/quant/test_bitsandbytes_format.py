"""bitsandbytes: bytes as its owner packs them, double quantization, LLM.int8."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.bitsandbytes import (
    CODEBOOKS,
    FP4,
    NF4,
    STATE,
    BitsAndBytesFormat,
    BitsAndBytesWriter,
)
from qserve.quant.formats.layer_format import in_memory
from qserve.quant.formats.nested_scales import NestedScales, NestedWeight, dynamic_map, nest

Tensors = dict[str, torch.Tensor]
READER = BitsAndBytesFormat()


def random_weight(kind: str = "nf4", shape: tuple[int, int] = (16, 128)) -> CodebookWeight:
    """Codes over their whole range, in blocks of 64."""
    draw = torch.Generator().manual_seed(0)
    count = shape[0] * shape[1]
    return CodebookWeight(
        codes=torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8),
        codebook=CODEBOOKS[kind],
        block_scales=torch.rand(-(-count // 64), generator=draw) + 0.01,
        block_size=64,
    )


def nested_weight(num_blocks: int = 600) -> NestedWeight:
    """A weight whose scales are quantized too, in more than one block of them."""
    weight = random_weight(shape=(num_blocks // 2, 128))
    nested = nest(weight.block_scales)
    return NestedWeight(weight.codes, weight.codebook, nested.dequantize(), 64, nested)


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("shape", [(16, 128), (3, 7)])
def test_codes_are_read_as_written(kind: str, shape: tuple[int, int]) -> None:
    weight = random_weight(kind, shape)
    read = READER.read("layer", in_memory(BitsAndBytesWriter().encode(weight)))
    assert isinstance(read, CodebookWeight)
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.dequantize(), weight.dequantize())


def test_double_quantization_is_read_as_written() -> None:
    weight = nested_weight()
    tensors = BitsAndBytesWriter().encode(weight)
    assert tensors["weight.absmax"].dtype is torch.uint8
    assert tensors["weight.nested_absmax"].shape == (3,)
    read = READER.read("layer", in_memory(tensors))
    assert isinstance(read, NestedWeight)
    assert torch.equal(read.nested.codes, weight.nested.codes)
    assert torch.equal(read.block_scales, weight.block_scales)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert BitsAndBytesWriter().encode(read).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("kind", "first", "rest"),
    [("nf4", [0xC0, 0xA7, 0xF6, 0xE2], 0x77), ("fp4", [0x5B, 0x70, 0x3E, 0x2A], 0x00)],
)
def test_bytes_are_those_of_bitsandbytes(kind: str, first: list[int], rest: int) -> None:
    values = torch.zeros(1, 64)
    values[0, :8] = torch.tensor([0.5, -1, 0.25, 0, 1, -0.1, 0.75, -0.6])
    codes = (values[..., None] - CODEBOOKS[kind]).abs().argmin(-1).to(torch.uint8)
    weight = CodebookWeight(codes, CODEBOOKS[kind], torch.ones(1), 64)
    tensors = BitsAndBytesWriter("float32").encode(weight)
    # Computed with bitsandbytes 0.50.2.
    assert tensors["weight"].flatten().tolist() == [*first, *[rest] * 28]
    assert bytes(tensors[f"{STATE}{kind}"].tolist()).decode() == (
        f'{{"quant_type": "{kind}", "blocksize": 64, "dtype": "float32", "shape": [1, 64]}}'
    )


def test_a_codebook_in_another_order_is_written_in_that_of_its_owner() -> None:
    weight = random_weight("fp4")
    rising, order = FP4.sort(stable=True)
    codes = order.argsort()[weight.codes.long()].to(torch.uint8)
    tensors = BitsAndBytesWriter().encode(replace(weight, codes=codes, codebook=rising))
    assert torch.equal(tensors["weight.quant_map"], FP4)
    read = READER.read("layer", in_memory(tensors))
    assert torch.equal(read.dequantize(), weight.dequantize())


def test_codebooks_are_those_of_bitsandbytes() -> None:
    assert NF4[[0, 7, 8, 15]].tolist() == torch.tensor([-1, 0, 0.07958029955625534, 1]).tolist()
    assert torch.allclose(FP4[:3], torch.tensor([0, 0.00520833, 0.66666669]), atol=1e-8)
    assert FP4[9] == -FP4[1]
    values = dynamic_map()
    assert values.shape == (256,)
    assert bool((values.diff() > 0).all())
    # As bitsandbytes.functional.create_dynamic_map() of 0.50.2 gives them.
    expected = [-0.9929687976837158, 0.0, 1.0]
    assert values[[0, 127, 255]].tolist() == pytest.approx(expected, abs=1e-7)


def test_nested_scales_are_the_nearest() -> None:
    scales = torch.rand(700, generator=torch.Generator().manual_seed(0)) + 0.5
    nested = nest(scales)
    spread = nested.scales.repeat_interleave(256)[:700]
    steps = ((scales - nested.offset) / spread)[:, None] - nested.code_map
    nearest = steps.abs().amin(1)
    chosen = steps.gather(1, nested.codes.long()[:, None])[:, 0].abs()
    assert bool((chosen <= nearest + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_storage_types_hold_the_same_bytes(dtype: torch.dtype) -> None:
    weight = random_weight()
    tensors = BitsAndBytesWriter().encode(weight)
    tensors["weight"] = tensors["weight"].view(dtype if dtype.itemsize == 1 else torch.uint8)
    tensors["weight"] = tensors["weight"].flatten().view(dtype)[:, None]
    read = READER.read("layer", in_memory(tensors))
    assert torch.equal(read.dequantize(), weight.dequantize())


def int8_weight() -> GroupedWeight:
    """The rows that formats' owner was asked about."""
    values = torch.tensor([[1, -2, 0.5, 4], [0.1, 0.2, -0.3, 0.05]]).half().float()
    scales = values.abs().amax(1, keepdim=True) / 127
    codes = (values / scales).round() + 128
    zero_points = torch.full((2, 1), 128, dtype=torch.uint8)
    return GroupedWeight(codes.to(torch.uint8), scales, zero_points, 8, 4)


def test_rows_of_llm_int8_are_those_of_bitsandbytes() -> None:
    tensors = BitsAndBytesWriter().encode(int8_weight())
    # Computed with bitsandbytes 0.50.2.
    assert tensors["weight"].tolist() == [[32, -64, 16, 127], [42, 85, -127, 21]]
    assert tensors["SCB"].tolist() == [4.0, 0.300048828125]
    read = READER.read("layer", in_memory(tensors))
    assert isinstance(read, GroupedWeight)
    assert torch.equal(read.codes, int8_weight().codes)
    expected = tensors["weight"].float() * tensors["SCB"][:, None] / 127
    torch.testing.assert_close(read.dequantize(), expected, rtol=2e-7, atol=0)


def test_a_row_of_zeros_is_zero() -> None:
    tensors = {"weight": torch.zeros(2, 4, dtype=torch.int8), "SCB": torch.tensor([0.0, 1.0])}
    assert not READER.read("layer", in_memory(tensors)).dequantize().any()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (replace(int8_weight(), codes=torch.zeros(2, 4, dtype=torch.uint8)), "-127 to 127"),
        (replace(int8_weight(), scales=-int8_weight().scales), "positive"),
        (replace(int8_weight(), bits=4), "8 bits with one scale a row"),
        (replace(int8_weight(), zero_points=torch.zeros(2, 1).byte()), "symmetric"),
    ],
)
def test_weights_that_llm_int8_cannot_hold_are_refused(weight: GroupedWeight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitsAndBytesWriter().encode(weight)


def test_another_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="codebooks nf4 and fp4"):
        BitsAndBytesWriter().encode(replace(random_weight(), codebook=NF4 * 2))


def set_state(tensors: Tensors, **changes: object) -> None:
    """Change fields of the JSON object; None removes one."""
    key = f"{STATE}nf4"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    kept = {name: value for name, value in state.items() if value is not None}
    tensors[key] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{STATE}nf4"), "quant_state.bitsandbytes__nf4 missing"),
        (lambda t: t.pop("weight"), "weight missing"),
        (lambda t: t.pop("weight.quant_map"), "weight.quant_map missing"),
        (lambda t: t.pop("weight.nested_absmax"), "weight.nested_absmax missing"),
        (lambda t: t.update(weight=t["weight"][:-1]), "do not fit a weight 300 x 128"),
        (lambda t: t.update({"weight.absmax": t["weight.absmax"][:9]}), "do not fit a weight"),
        (lambda t: t[f"{STATE}nf4"].fill_(65), "not the JSON object"),
        (lambda t: set_state(t, shape=None), "not the JSON object"),
        (lambda t: set_state(t, shape=[300, -128]), r"shape \[300, -128\]"),
        (lambda t: set_state(t, blocksize="64"), "block size '64'"),
        (lambda t: set_state(t, nested_offset=None), "lacks the nested block size or offset"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    damage: Callable[[Tensors], object], message: str
) -> None:
    tensors = BitsAndBytesWriter().encode(nested_weight())
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        READER.read("layer", in_memory(tensors))


def test_nested_scales_count_from_their_offset() -> None:
    codes = torch.tensor([0, 127, 255], dtype=torch.uint8)
    nested = NestedScales(codes, dynamic_map(), torch.tensor([2.0]), 3.0)
    assert nested.dequantize().tolist() == pytest.approx([3 - 2 * 0.9929688, 3.0, 5.0])
