"""Checkpoint tensors become layers: joined where they can be, checked, with their biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qserve.kernels.activations import Activations
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError
from qserve.quant.formats import awq
from qserve.quant.formats.awq import AwqWriter
from qserve.quant.formats.bitsandbytes import CODEBOOKS
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.registry import OutputFormat, make_writer
from qserve.quant.formats.writer import scheme_of
from qserve.serve.config import HeadDtype
from qserve.serve.layers.linear import Linear
from qserve.serve.weights import WeightReader

INPUTS, GROUP_SIZE = 64, 32
X = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1))


def write(
    folder: Path, tensors: dict[str, torch.Tensor], block: dict[str, Any] | None = None
) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(
        json.dumps(config | ({"quantization_config": block} if block else {}))
    )
    return Checkpoint(folder)


def random_weight(outputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, INPUTS, generator=torch.Generator().manual_seed(seed)).half()


def random_grouped(outputs: int, seed: int, group_size: int = GROUP_SIZE) -> GroupedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = (outputs, INPUTS // group_size)
    return GroupedWeight(
        torch.randint(0, 16, (outputs, INPUTS), generator=generator).byte(),
        (torch.rand(groups, generator=generator) * 0.1 + 0.01).half(),
        torch.randint(0, 16, groups, generator=generator).byte(),
        4,
        group_size,
    )


def packed(weights: dict[str, GroupedWeight]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, weight in weights.items()
        for key, value in AwqWriter().encode(weight).items()
    }


def run(layer: Linear) -> torch.Tensor:
    return layer(X, torch.empty(len(X), layer.out_features))


def test_float_layers_of_one_input_are_joined(tmp_path: Path) -> None:
    weights = {"q": random_weight(32, 1), "k": random_weight(16, 2)}
    checkpoint = write(tmp_path, {f"{name}.weight": w for name, w in weights.items()})
    layer = WeightReader(checkpoint).linear("q", "k", shape=(48, INPUTS))
    expected = torch.cat([X @ w.float().T for w in weights.values()], dim=1)
    torch.testing.assert_close(run(layer), expected, rtol=1e-5, atol=1e-4)
    assert (layer.in_features, layer.out_features) == (INPUTS, 48)


def test_packed_layers_of_one_input_are_joined(tmp_path: Path) -> None:
    weights = {"q": random_grouped(64, 1), "k": random_grouped(32, 2)}
    checkpoint = write(tmp_path, packed(weights), awq.config_block(GROUP_SIZE, []))
    layer = WeightReader(checkpoint, Activations.FLOAT32).linear("q", "k", shape=(96, INPUTS))
    expected = torch.cat([X @ w.dequantize().T for w in weights.values()], dim=1)
    torch.testing.assert_close(run(layer), expected, rtol=1e-4, atol=1e-3)


def rounded_to_rows(outputs: int, seed: int) -> GroupedWeight:
    """8 bits, symmetric, with one scale a row."""
    weight = random_weight(outputs, seed).float()
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round() + 128
    return GroupedWeight(codes.byte(), scales, torch.full_like(scales, 128).byte(), 8, INPUTS)


def ordered(outputs: int, seed: int) -> GroupedWeight:
    """Symmetric, with the inputs of q and k in one order of their own."""
    plain = random_grouped(outputs, seed)
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(5))
    order = torch.cat([part.sort().values for part in order.split(GROUP_SIZE)])
    middle = torch.full_like(plain.zero_points, 8)
    return GroupedWeight(plain.codes, plain.scales, middle, 4, GROUP_SIZE, order)


def in_floats8(outputs: int, seed: int) -> Float8Weight:
    values = random_weight(outputs, seed).to(torch.float8_e4m3fn)
    generator = torch.Generator().manual_seed(seed)
    return Float8Weight(values, torch.rand(outputs, 1, generator=generator) + 0.5, (1, INPUTS))


def in_nf4(outputs: int, seed: int) -> CodebookWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, INPUTS), generator=generator).byte()
    return CodebookWeight(codes, CODEBOOKS["nf4"], torch.rand(outputs, generator=generator), 64)


@pytest.mark.parametrize(
    ("make", "output", "made_for"),
    [
        (ordered, OutputFormat.GPTQ, None),
        (in_nf4, OutputFormat.BITSANDBYTES, None),
        (rounded_to_rows, OutputFormat.COMPRESSED_TENSORS, Activations.INT8_TOKEN),
        (in_floats8, OutputFormat.COMPRESSED_TENSORS, Activations.FLOAT8_TOKEN),
    ],
    ids=["activation order", "codebook", "int8", "float8"],
)
def test_weights_of_every_form_are_joined_and_computed_as_their_checkpoint_asks(
    tmp_path: Path,
    make: Callable[[int, int], QuantizedWeight],
    output: OutputFormat,
    made_for: Activations | None,
) -> None:
    weights = {"q": make(64, 1), "k": make(32, 2)}
    writer = make_writer(output, "qserve test", activations=made_for)
    tensors = {
        f"{name}.{key}": value
        for name, weight in weights.items()
        for key, value in writer.encode(weight).items()
    }
    schemes = {name: scheme_of(weight) for name, weight in weights.items()}
    checkpoint = write(tmp_path, tensors, writer.config_block(schemes, []))
    reader = WeightReader(checkpoint)
    assert reader.activations is (made_for or Activations.INT8)
    layer = reader.linear("q", "k", shape=(96, INPUTS))
    assert len(layer.weights) == 1
    expected = torch.cat([X @ w.dequantize().T for w in weights.values()], dim=1)
    error = (run(layer) - expected).abs().max() / expected.abs().max()
    assert 0 < float(error) < 0.05, "activations in 8 bits"
    exact = WeightReader(checkpoint, Activations.FLOAT32).linear("q", "k", shape=(96, INPUTS))
    torch.testing.assert_close(run(exact), expected, rtol=1e-3, atol=1e-3)


def test_a_layer_that_was_left_in_16_bits_lies_beside_packed_ones(tmp_path: Path) -> None:
    grouped, dense = random_grouped(64, 1), random_weight(32, 2)
    tensors = packed({"q": grouped}) | {"k.weight": dense}
    checkpoint = write(tmp_path, tensors, awq.config_block(GROUP_SIZE, ["k"]))
    layer = WeightReader(checkpoint, Activations.FLOAT32).linear("q", "k", shape=(96, INPUTS))
    expected = torch.cat([X @ grouped.dequantize().T, X @ dense.float().T], dim=1)
    torch.testing.assert_close(run(layer), expected, rtol=1e-4, atol=1e-3)


def test_a_bias_is_added_where_there_is_one(tmp_path: Path) -> None:
    q, k, bias = random_weight(32, 1), random_weight(16, 2), torch.arange(16.0).bfloat16()
    checkpoint = write(tmp_path, {"q.weight": q, "k.weight": k, "k.bias": bias})
    layer = WeightReader(checkpoint).linear("q", "k", shape=(48, INPUTS))
    expected = torch.cat([X @ q.float().T, X @ k.float().T + bias.float()], dim=1)
    torch.testing.assert_close(run(layer), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, INPUTS), (32, INPUTS * 2)])
def test_a_shape_that_config_json_does_not_say_is_refused(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    reader = WeightReader(write(tmp_path, {"q.weight": random_weight(32)}))
    with pytest.raises(CheckpointError, match="contradicts itself"):
        reader.linear("q", shape=shape)
    with pytest.raises(CheckpointError, match="q has shape"):
        reader.embedding("q", shape)
    with pytest.raises(CheckpointError, match="q has shape"):
        WeightReader(reader._checkpoint, head_dtype=HeadDtype.INT8).head("q", shape)


def test_a_norm_is_float32_and_checked(tmp_path: Path) -> None:
    reader = WeightReader(write(tmp_path, {"norm.weight": torch.ones(8).bfloat16()}))
    assert reader.norm("norm", 8).dtype is torch.float32
    with pytest.raises(CheckpointError, match="norm has shape"):
        reader.norm("norm", 9)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    reader = WeightReader(write(tmp_path, {"q.weight": random_weight(32)}))
    with pytest.raises(CheckpointError, match=r"no tensor k\.weight"):
        reader.linear("q", "k", shape=(48, INPUTS))


def test_the_head_of_a_quantized_model_is_8_bit_and_of_a_float_model_as_it_is(
    tmp_path: Path,
) -> None:
    head = random_weight(256)
    tensors = {"lm_head.weight": head}
    (tmp_path / "float").mkdir()
    (tmp_path / "awq").mkdir()
    exact = WeightReader(write(tmp_path / "float", tensors))
    rounded = WeightReader(
        write(tmp_path / "awq", tensors, awq.config_block(GROUP_SIZE, ["lm_head"]))
    )
    assert (exact.head_dtype, exact.activations) == (HeadDtype.FLOAT, Activations.FLOAT32)
    assert (rounded.head_dtype, rounded.activations) == (HeadDtype.INT8, Activations.INT8)
    expected = X @ head.float().T
    shape = (256, INPUTS)
    torch.testing.assert_close(run(exact.head("lm_head", shape)), expected, rtol=1e-5, atol=1e-4)
    error = (run(rounded.head("lm_head", shape)) - expected).abs().max() / expected.std()
    assert 0.0 < float(error) < 0.1
    asked = WeightReader(rounded._checkpoint, head_dtype=HeadDtype.FLOAT)
    torch.testing.assert_close(run(asked.head("lm_head", shape)), expected, rtol=1e-5, atol=1e-4)


def test_a_packed_head_stays_packed(tmp_path: Path) -> None:
    grouped = random_grouped(64, 3)
    checkpoint = write(tmp_path, packed({"lm_head": grouped}), awq.config_block(GROUP_SIZE, []))
    layer = WeightReader(checkpoint, Activations.FLOAT32).head("lm_head", (64, INPUTS))
    torch.testing.assert_close(run(layer), X @ grouped.dequantize().T, rtol=1e-4, atol=1e-3)
