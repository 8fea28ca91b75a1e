"""What each format can hold, and checkpoints that are read again through their config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qserve.kernels.activations import Activations
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import OptionError
from qserve.quant.formats.bitsandbytes import NF4
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.compressed_schemes import Kind, KvCacheScheme
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.nested_scales import NestedWeight, nest
from qserve.quant.formats.registry import OutputFormat, make_writer
from qserve.quant.formats.writer import Coding, LayerScheme, Writer, scheme_of

INTEGERS = LayerScheme(64, 128, Coding.INTEGER, 4, 32)
PER_ROW = replace(INTEGERS, bits=8, group_size=128)


def integers(
    bits: int = 4, group_size: int = 32, *, symmetric: bool = True, outer: bool = False
) -> GroupedWeight:
    """64 outputs and 128 inputs, codes over their whole range."""
    draw = torch.Generator().manual_seed(bits + group_size)
    groups, high = (64, 128 // group_size), 1 << bits
    zero_points = torch.randint(0, high, groups, generator=draw, dtype=torch.uint8)
    scales = torch.rand(groups, generator=draw) + 0.01
    return GroupedWeight(
        codes=torch.randint(0, high, (64, 128), generator=draw, dtype=torch.uint8),
        scales=(scales * 125).ceil() if outer else scales.half(),
        zero_points=zero_points.fill_(high // 2) if symmetric else zero_points,
        bits=bits,
        group_size=group_size,
        channel_scales=torch.rand(64, generator=draw) + 0.1 if outer else None,
    )


def codebook(*, nested: bool = False) -> CodebookWeight:
    """The same shape in nf4."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 128), generator=draw, dtype=torch.uint8)
    scales = torch.rand(128, generator=draw)
    if nested:
        inner = nest(scales)
        return NestedWeight(codes, NF4, inner.dequantize(), 64, inner)
    return CodebookWeight(codes, NF4, scales, 64)


def float8(block: tuple[int, int]) -> Float8Weight:
    """The same shape in 8-bit floats."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(64, 128, generator=draw).to(torch.float8_e4m3fn)
    shape = (-(-64 // block[0]), -(-128 // block[1]))
    return Float8Weight(values, torch.rand(shape, generator=draw) + 0.1, block)


def write(folder: Path, writer: Writer, layers: Mapping[str, QuantizedWeight]) -> Checkpoint:
    """A checkpoint with these layers and a head in 16 bits."""
    tensors = {
        f"{name}.{key}": value
        for name, weight in layers.items()
        for key, value in writer.encode(weight).items()
    }
    save_file(tensors | {"lm_head.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    schemes = {name: scheme_of(weight) for name, weight in layers.items()}
    block = json.loads(json.dumps(writer.config_block(schemes, ["lm_head"])))
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))
    return Checkpoint(folder)


INT8, FP8 = Activations.INT8_TOKEN, Activations.FLOAT8_TOKEN
CASES: dict[str, tuple[OutputFormat, Activations | None, list[QuantizedWeight]]] = {
    "awq": (OutputFormat.AWQ, None, [integers(symmetric=False)]),
    "awq, one group a row": (OutputFormat.AWQ, None, [integers(group_size=128)]),
    "gptq": (OutputFormat.GPTQ, None, [integers(), integers(8, 64), integers(2, 128)]),
    "gptq-v2": (OutputFormat.GPTQ_V2, None, [integers(3, symmetric=False), integers(3)]),
    "packed": (
        OutputFormat.COMPRESSED_TENSORS,
        None,
        [integers(), integers(8, 128), integers(3, symmetric=False), float8((1, 128))],
    ),
    "int8": (OutputFormat.COMPRESSED_TENSORS, INT8, [integers(8, 128), integers(4, 32)]),
    "float8 per row": (OutputFormat.COMPRESSED_TENSORS, FP8, [float8((1, 128))]),
    "float8 per tensor": (OutputFormat.COMPRESSED_TENSORS, FP8, [float8((64, 128))]),
    "float8 in blocks": (OutputFormat.COMPRESSED_TENSORS, None, [float8((32, 64))]),
    "nf4": (OutputFormat.BITSANDBYTES, None, [codebook(), codebook(nested=True)]),
    "qoq": (OutputFormat.QOQ, INT8, [integers(outer=True, symmetric=False)]),
}


@pytest.mark.parametrize(("output", "activations", "weights"), CASES.values(), ids=CASES)
def test_a_checkpoint_is_read_as_it_was_written(
    tmp_path: Path,
    output: OutputFormat,
    activations: Activations | None,
    weights: list[QuantizedWeight],
) -> None:
    writer = make_writer(output, "test", activations=activations)
    layers = {f"layers.{i}.up": weight for i, weight in enumerate(weights)}
    assert [writer.refusal(scheme_of(weight)) for weight in weights] == [None] * len(weights)
    checkpoint = write(tmp_path, writer, layers)
    assert checkpoint.activations is activations
    for name, weight in layers.items():
        read = checkpoint.linear(name)
        assert type(read) is type(weight)
        assert scheme_of(read) == scheme_of(weight)
        assert torch.equal(read.dequantize(), weight.dequantize())
        packed = checkpoint.describe(name)
        assert packed is not None
        assert (packed.out_features, packed.in_features) == (64, 128)
    assert isinstance(checkpoint.linear("lm_head"), torch.Tensor)


def test_rows_of_llm_int8_differ_in_the_last_digit_of_their_scale_at_most(tmp_path: Path) -> None:
    weight = integers(8, 128)
    codes = weight.codes.clamp(min=1)
    weight = replace(weight, codes=codes, scales=weight.scales.float())
    writer = make_writer(OutputFormat.BITSANDBYTES, "test")
    read = write(tmp_path, writer, {"up": weight}).linear("up")
    assert isinstance(read, GroupedWeight)
    assert torch.equal(read.codes, codes)
    torch.testing.assert_close(read.scales, weight.scales, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        (
            OutputFormat.AWQ,
            {"bits": 8},
            "4-bit integer codes, got 8-bit integer codes in groups of 32",
        ),
        (OutputFormat.AWQ, {"coding": Coding.CODEBOOK}, "4-bit integer codes, got 4-bit codebook"),
        (OutputFormat.AWQ, {"out_features": 48}, "multiple of 32 outputs"),
        (OutputFormat.AWQ, {"activation_order": True}, "neither activation order"),
        (OutputFormat.AWQ, {"outer_scales": True}, "nor outer scales"),
        (OutputFormat.GPTQ, {"coding": Coding.FLOAT8}, "integer codes of 2, 3, 4 or 8"),
        (OutputFormat.GPTQ, {"symmetric": False}, "take gptq-v2"),
        (OutputFormat.GPTQ, {"in_features": 144}, "multiples of 32"),
        (OutputFormat.GPTQ_V2, {"outer_scales": True}, "no outer scales"),
        (OutputFormat.COMPRESSED_TENSORS, {"coding": Coding.CODEBOOK}, "integers and 8-bit floats"),
        (OutputFormat.COMPRESSED_TENSORS, {"activation_order": True}, "neither activation order"),
        (OutputFormat.COMPRESSED_TENSORS, {"in_features": 100}, "multiples of 8"),
        (OutputFormat.BITSANDBYTES, {"bits": 8}, "8 bits with one scale a row"),
        (OutputFormat.BITSANDBYTES, {"bits": 4, "group_size": 128}, "nf4, fp4"),
        (OutputFormat.QOQ, {}, "whole-number scales"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_anything_is_packed(
    output: OutputFormat, changes: dict[str, Any], message: str
) -> None:
    refusal = make_writer(output, "test").refusal(replace(INTEGERS, **changes))
    assert refusal is not None
    assert message in refusal


def test_packing_what_is_refused_raises_the_reason() -> None:
    for output, weight in (
        (OutputFormat.AWQ, codebook()),
        (OutputFormat.GPTQ, float8((64, 128))),
        (OutputFormat.COMPRESSED_TENSORS, codebook()),
        (OutputFormat.BITSANDBYTES, integers()),
        (OutputFormat.QOQ, integers()),
    ):
        writer = make_writer(output, "test")
        with pytest.raises(ValueError) as caught:
            writer.encode(weight)
        assert str(caught.value) == writer.refusal(scheme_of(weight))


def test_activations_must_suit_the_codes() -> None:
    writer = make_writer(OutputFormat.COMPRESSED_TENSORS, "test", activations=INT8)
    assert "do not go with" in str(writer.refusal(scheme_of(float8((1, 128)))))
    with pytest.raises(OptionError, match="awq cannot state quantized activations"):
        make_writer(OutputFormat.AWQ, "test", activations=INT8)
    with pytest.raises(OptionError, match="gptq cannot state key-value scales"):
        make_writer(OutputFormat.GPTQ, "test", kv_cache=KvCacheScheme())


@pytest.mark.parametrize(
    ("output", "others"),
    [
        (OutputFormat.AWQ, {"group_size": 64}),
        (OutputFormat.BITSANDBYTES, {"coding": Coding.CODEBOOK, "bits": 4, "group_size": 64}),
        (OutputFormat.QOQ, {"group_size": 64}),
    ],
)
def test_layers_that_must_agree_are_refused_together(
    output: OutputFormat, others: dict[str, Any]
) -> None:
    layers = {"a": INTEGERS, "b": replace(INTEGERS, **others)}
    with pytest.raises(ValueError, match="one group size for all layers|not both"):
        make_writer(output, "test").config_block(layers, [])


def test_a_layer_as_wide_as_a_group_is_no_exception() -> None:
    wide = replace(INTEGERS, in_features=256, group_size=128)
    block = make_writer(OutputFormat.GPTQ, "test").config_block(
        {"a": replace(INTEGERS, group_size=128), "b": wide}, []
    )
    assert block["group_size"] == 128
    assert "dynamic" not in block
    block = make_writer(OutputFormat.GPTQ, "test").config_block(
        {"a": PER_ROW, "b": replace(wide, bits=8, group_size=256)}, []
    )
    assert block["group_size"] == -1
    assert "dynamic" not in block


def test_compressed_groups_name_their_layers_when_they_differ() -> None:
    writer = make_writer(
        OutputFormat.COMPRESSED_TENSORS,
        "test",
        kv_cache=KvCacheScheme(Kind.FLOAT, per_head=True),
    )
    one = writer.config_block({"a": INTEGERS, "b": INTEGERS}, [])
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert one["kv_cache_scheme"]["strategy"] == "attn_head"
    assert writer.config_block({"a": PER_ROW}, [])["config_groups"]["group_0"]["weights"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel",
    }
    two = writer.config_block(
        {"a": INTEGERS, "b": replace(INTEGERS, coding=Coding.FLOAT8, bits=8, group_size=128)}, []
    )
    assert two["format"] == "mixed-precision"
    assert [group["targets"] for group in two["config_groups"].values()] == [["a"], ["b"]]
    formats = [group["format"] for group in two["config_groups"].values()]
    assert formats == ["pack-quantized", "naive-quantized"]


def test_qoq_scales_are_whole_numbers() -> None:
    weight = integers(outer=True)
    with pytest.raises(ValueError, match="whole numbers"):
        make_writer(OutputFormat.QOQ, "test").encode(replace(weight, scales=weight.scales + 0.5))
