"""compressed-tensors: every packing, which layer has which scheme, and what is not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qserve.kernels.activations import Activations
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats.compressed_schemes import read_schemes
from qserve.quant.formats.compressed_tensors import CompressedFormat, CompressedWriter
from qserve.quant.formats.layer_format import QuantizedWeight, in_memory

Tensors = dict[str, torch.Tensor]
INT8_PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FLOAT8_PER_TOKEN = INT8_PER_TOKEN | {"type": "float"}


def config(inputs: Any = None, **weights: Any) -> dict[str, Any]:
    """A configuration with one group for all linear layers."""
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": args | weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def read(block: dict[str, Any], tensors: Tensors) -> QuantizedWeight:
    """The layer that the tensors hold under a configuration."""
    return CompressedFormat.from_config(block).read("layer", in_memory(tensors))


def random_weight(bits: int, *, symmetric: bool, group_size: int = 32) -> GroupedWeight:
    """64 outputs and 96 inputs; codes and zero points over their whole range."""
    draw = torch.Generator().manual_seed(bits)
    groups, high = (64, 96 // group_size), 1 << bits
    zero_points = torch.randint(0, high, groups, generator=draw, dtype=torch.uint8)
    return GroupedWeight(
        codes=torch.randint(0, high, (64, 96), generator=draw, dtype=torch.uint8),
        scales=(torch.rand(groups, generator=draw) + 0.01).bfloat16(),
        zero_points=zero_points.fill_(high // 2) if symmetric else zero_points,
        bits=bits,
        group_size=group_size,
    )


def assert_same(found: QuantizedWeight, weight: GroupedWeight) -> None:
    """Bit for bit."""
    assert isinstance(found, GroupedWeight)
    for name in ("codes", "scales", "zero_points"):
        assert torch.equal(getattr(found, name), getattr(weight, name)), name
    assert (found.bits, found.group_size) == (weight.bits, weight.group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_packed_integers_are_read_as_written(bits: int, symmetric: bool, strategy: str) -> None:
    group_size = 32 if strategy == "group" else 96
    weight = random_weight(bits, symmetric=symmetric, group_size=group_size)
    block = config(num_bits=bits, symmetric=symmetric, strategy=strategy)
    tensors = CompressedWriter().encode(weight)
    assert_same(read(block, tensors), weight)
    assert ("weight_zero_point" in tensors) is not symmetric


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 96])
def test_plain_integers_are_read_as_written(bits: int, symmetric: bool, group_size: int) -> None:
    weight = random_weight(bits, symmetric=symmetric, group_size=group_size)
    tensors = CompressedWriter(Activations.INT8_TOKEN).encode(weight)
    block = config(
        num_bits=bits, symmetric=symmetric, strategy="group" if group_size == 32 else "channel"
    )
    assert tensors["weight"].dtype is torch.int8
    assert_same(read(block, tensors), weight)


def test_words_are_those_of_compressed_tensors() -> None:
    signed = torch.tensor([-8, -1, 0, 7, 3, -4, 2, -6])
    zeros = torch.tensor([[*range(-8, 0)], [1, 2, 3, 4, 5, 6, 7, 0]]).T
    weight = GroupedWeight(
        codes=(signed + 8).to(torch.uint8).repeat(8, 2),
        scales=torch.ones(8, 2),
        zero_points=(zeros + 8).to(torch.uint8),
        bits=4,
        group_size=8,
    )
    tensors = CompressedWriter().encode(weight)
    # Computed with compressed-tensors 0.20.
    assert tensors["weight_packed"][0].tolist() == [0x2A4BF870] * 2
    assert tensors["weight_zero_point"].tolist() == [[0x76543210, 0x8FEDCBA9 - (1 << 32)]]
    assert tensors["weight_shape"].tolist() == [8, 16]


DENSE_3 = [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
PADDED_3 = [0x08FAC688, 0x1A23EB1A, 0x2C688FAC, 0x0000003E]
DENSE_5 = [0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB]
PADDED_5 = [0x0A418820, 0x16A4A0E6, 0x2307B9AC, 0x2F6AD272, 0x3BCDEB38, 0x000003FE]


@pytest.mark.parametrize("with_shape", [True, False])
@pytest.mark.parametrize(
    ("bits", "words"), [(3, DENSE_3), (3, PADDED_3), (5, DENSE_5), (5, PADDED_5)]
)
def test_both_packings_of_odd_widths_are_read(
    bits: int, words: list[int], with_shape: bool
) -> None:
    stored = torch.tensor([word - (1 << 32) if word >> 31 else word for word in words])
    tensors = {
        "weight_packed": stored.to(torch.int32)[None],
        "weight_scale": torch.ones(1, 1).bfloat16(),
        "weight_shape": torch.tensor([1, 32]),
    }
    if not with_shape:
        del tensors["weight_shape"]
    expected = torch.arange(32) % (1 << bits) - (1 << (bits - 1))
    found = read(config(num_bits=bits), tensors)
    assert found.dequantize().tolist() == [expected.tolist()]
    assert isinstance(found, GroupedWeight)
    assert found.is_symmetric


@pytest.mark.parametrize(
    ("strategy", "scales", "block"),
    [
        ("tensor", torch.full((1,), 0.5), (130, 256)),
        ("tensor", torch.tensor(0.5), (130, 256)),
        ("channel", torch.linspace(0.1, 1, 130)[:, None], (1, 256)),
        ("block", torch.linspace(0.1, 1, 4).view(2, 2), (128, 128)),
    ],
)
def test_float8_is_read_at_every_granularity(
    strategy: str, scales: torch.Tensor, block: tuple[int, int]
) -> None:
    values = torch.randn(130, 256, generator=torch.Generator().manual_seed(0))
    stored = values.to(torch.float8_e4m3fn)
    found = read(
        config(type="float", num_bits=8, strategy=strategy, block_structure=[128, 128]),
        {"weight": stored, "weight_scale": scales},
    )
    assert isinstance(found, Float8Weight)
    assert found.block == block
    again = read(
        config(type="float", num_bits=8, strategy=strategy, block_structure=[128, 128]),
        CompressedWriter().encode(found),
    )
    assert torch.equal(again.dequantize(), found.dequantize())
    assert found.dequantize()[0, 0] == stored[0, 0].float() * scales.flatten()[0]


def test_old_activation_order_is_read() -> None:
    weight = random_weight(4, symmetric=True)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    natural = torch.empty_like(weight.codes)
    natural[:, order] = weight.codes
    stored = GroupedWeight(natural, weight.scales, weight.zero_points, 4, 32)
    index = torch.empty(96, dtype=torch.int32)
    index[order] = torch.arange(96, dtype=torch.int32) // 32
    tensors = CompressedWriter().encode(stored) | {"weight_g_idx": index}
    expected = (natural.float() - 8) * weight.scales.float()[:, index.long()]
    assert torch.equal(read(config(), tensors).dequantize(), expected)


def test_names_count_before_classes_and_ignored_layers_have_no_scheme() -> None:
    block = config()
    block["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj$", "model.special"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    }
    block["ignore"] = ["lm_head", r"re:.*\.gate$"]
    table = read_schemes(block)
    assert [table.scheme_of(name) for name in ("lm_head", "a.gate")] == [None, None]
    widths = {name: table.scheme_of(name) for name in ("a.down_proj", "model.special", "a.up")}
    assert [scheme and scheme.bits for scheme in widths.values()] == [8, 8, 4]


@pytest.mark.parametrize(
    ("inputs", "activations"),
    [
        (None, None),
        (INT8_PER_TOKEN, Activations.INT8_TOKEN),
        ({"num_bits": 8, "type": "int", "strategy": "tensor"}, Activations.INT8_TOKEN),
        (FLOAT8_PER_TOKEN, Activations.FLOAT8_TOKEN),
    ],
)
def test_the_activations_it_was_made_for_are_told(
    inputs: object, activations: Activations | None
) -> None:
    assert CompressedFormat.from_config(config(inputs)).activations is activations


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (config(num_bits=9), "9 bits"),
        (config(type="float"), "4 bits"),
        (config(type="complex"), "type 'complex'"),
        (config(strategy="tensor_group"), "'tensor_group'"),
        (config(strategy="block", block_structure=None), "in blocks of None"),
        (config(group_size=0), "group_size 0"),
        (config({"num_bits": 4, "type": "int"}), "activations that are not 8 bits"),
        (config() | {"format": "marlin-24"}, "marlin-24"),
        (config() | {"format": "nvfp4-pack-quantized"}, "nvfp4"),
        (config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (config() | {"config_groups": {}}, "without config_groups"),
        (config() | {"config_groups": {"a": {}}}, "no targets"),
        (config() | {"config_groups": {"a": {"targets": [], "weights": 4}}}, "expected an object"),
    ],
)
def test_other_kinds_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        CompressedFormat.from_config(block)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("weight_scale"), "weight_scale missing"),
        (lambda t: t.pop("weight_zero_point"), "weight_zero_point missing"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:, :2]), "do not fit 4 bits"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, :11]), "do not fit 4 bits"),
        (lambda t: t.update(weight_packed=t["weight_packed"].byte()), "4-bit floats"),
        (lambda t: t.update(weight_zero_point=t["weight_zero_point"][:3]), "do not fit"),
        (lambda t: t.update(weight_shape=torch.tensor([96, 64])), r"weight_shape \[96, 64\]"),
        (lambda t: t.update(weight_shape=torch.tensor([64, 128])), "do not fit"),
        (lambda t: t.update(weight_scale=t["weight_scale"].int()), "weight_scale I32"),
        (lambda t: t["weight_scale"][3].fill_(float("nan")), "the file is damaged"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    damage: Callable[[Tensors], object], message: str
) -> None:
    tensors = CompressedWriter().encode(random_weight(4, symmetric=False))
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        read(config(symmetric=False), tensors)


def test_a_packed_layer_that_the_config_ignores_is_refused() -> None:
    tensors = CompressedWriter().encode(random_weight(4, symmetric=True))
    with pytest.raises(CheckpointError, match="layer is packed, but config.json ignores it"):
        read(config() | {"ignore": ["layer"]}, tensors)
