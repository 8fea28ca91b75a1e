"""Every method on a whole model: what is written reads back as what later layers saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.calibrated import CalibratedQuantizer
from qserve.quant.decoder import Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.methods import PUBLISHED, profile_of
from qserve.quant.options import Effort, Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.plan import make_plan
from qserve.quant.storage import as_stored
from qserve.serve.weights import WeightReader

LAYER = "model.layers.1.mlp.down_proj"

CHECKPOINTS = {
    Method.AWQ: "awq",
    Method.RTN: "awq",
    Method.GPTQ: "gptq",
    Method.INT4: "compressed-tensors",
    Method.QOQ: "qoq",
    Method.HQQ: "awq",
    Method.INT8: "compressed-tensors",
    Method.SMOOTHQUANT: "compressed-tensors",
    Method.FLOAT8: "compressed-tensors",
    Method.FLOAT8_WEIGHT: "compressed-tensors",
    Method.NF4: "bitsandbytes",
    Method.FP4: "bitsandbytes",
    Method.LLM_INT8: "bitsandbytes",
}
"""What the written checkpoint calls itself."""

ACTIVATIONS = {
    Method.QOQ: Activations.INT8_TOKEN,
    Method.SMOOTHQUANT: Activations.INT8_TOKEN,
    Method.FLOAT8: Activations.FLOAT8_TOKEN,
}

WORST = {
    Method.INT8: 0.015,
    Method.SMOOTHQUANT: 0.02,
    Method.LLM_INT8: 0.02,
    Method.FLOAT8: 0.06,
    Method.FLOAT8_WEIGHT: 0.06,
}
"""Error of a layer's weights relative to their size; 0.3 for 4 bits."""


def options_for(method: Method, **changes: Any) -> QuantizeOptions:
    return QuantizeOptions(method=method, num_samples=8, seq_len=64, **changes)


@pytest.mark.parametrize("method", Method, ids=lambda method: method.value)
def test_a_method_writes_its_format_and_keeps_the_weights(
    method: Method, tiny_llama: Path, tmp_path: Path
) -> None:
    report = quantize(Checkpoint(tiny_llama), tmp_path, options_for(method), lambda _: None)
    assert {layer.name for layer in report.layers} >= {LAYER}
    written = Checkpoint(tmp_path)
    assert written.method == CHECKPOINTS[method]
    assert written.activations is ACTIVATIONS.get(method)
    weight = written.linear(LAYER)
    assert not isinstance(weight, torch.Tensor)
    # Undo the scale that was folded in: a column of the written weight is a multiple of the float.
    original = Checkpoint(tiny_llama).linear(LAYER)
    assert isinstance(original, torch.Tensor)
    stored, original = weight.dequantize(), original.float()
    scale = (stored * original).sum(0) / original.square().sum(0)
    error = (stored / scale - original).norm() / original.norm()
    assert float(error) < WORST.get(method, 0.3)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_hqq_of_other_widths_is_stored_with_its_zero_points(
    bits: int, tiny_llama: Path, tmp_path: Path
) -> None:
    quantize(Checkpoint(tiny_llama), tmp_path, options_for(Method.HQQ, bits=bits), lambda _: None)
    written = Checkpoint(tmp_path)
    weight = written.linear(LAYER)
    assert written.method == "compressed-tensors"
    assert isinstance(weight, GroupedWeight)
    assert weight.bits == bits and not weight.is_symmetric


def test_qoq_weights_are_int8_after_whole_number_arithmetic(
    tiny_llama: Path, tmp_path: Path
) -> None:
    quantize(Checkpoint(tiny_llama), tmp_path, options_for(Method.QOQ), lambda _: None)
    weight = Checkpoint(tmp_path).linear(LAYER)
    assert isinstance(weight, GroupedWeight) and weight.channel_scales is not None
    assert torch.equal(weight.scales, weight.scales.round())
    spread = weight.scales.repeat_interleave(weight.group_size, 1)
    zeros = weight.zero_points.repeat_interleave(weight.group_size, 1)
    codes = (weight.codes.float() - zeros) * spread
    assert 100 < float(codes.abs().max()) <= 127
    torch.testing.assert_close(weight.dequantize(), codes * weight.channel_scales[:, None])


@pytest.mark.parametrize("method", [Method.GPTQ, Method.NF4, Method.SMOOTHQUANT, Method.QOQ])
def test_later_layers_were_calibrated_on_what_is_written(
    method: Method, tiny_llama: Path, tmp_path: Path
) -> None:
    options = options_for(method)
    quantize(Checkpoint(tiny_llama), tmp_path, options, lambda _: None)
    decoder = Decoder(Checkpoint(tiny_llama))
    windows = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    hidden = as_stored(decoder.embed(windows))
    profile = profile_of(options)
    quantizer = CalibratedQuantizer(hidden, make_plan(decoder, options), profile)
    block = decoder.block(0, 64)
    result = quantizer.quantize_block(block)
    for name, weight in result.weights.items():
        torch.testing.assert_close(weight.dequantize(), block.linear(name).weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_stores_every_width_and_wider_codes_lose_less(
    bits: int, tiny_llama: Path, tmp_path: Path
) -> None:
    quantize(Checkpoint(tiny_llama), tmp_path, options_for(Method.GPTQ, bits=bits), lambda _: None)
    weight = Checkpoint(tmp_path).linear(LAYER)
    assert not isinstance(weight, torch.Tensor)
    original = Checkpoint(tiny_llama).linear(LAYER)
    assert isinstance(original, torch.Tensor)
    stored = weight.dequantize()
    scale = (stored * original).sum(0) / original.float().square().sum(0)
    error = float((stored / scale - original).norm() / original.float().norm())
    low, high = {2: (0.2, 0.8), 3: (0.08, 0.4), 4: (0.03, 0.2), 8: (0.0005, 0.02)}[bits]
    assert low < error < high


def test_awq_can_be_written_for_engines_that_read_compressed_tensors(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = Checkpoint(tiny_llama)
    options = options_for(Method.AWQ, output=OutputFormat.COMPRESSED_TENSORS)
    for name, chosen in (("a", options_for(Method.AWQ)), ("b", options)):
        (tmp_path / name).mkdir()
        quantize(source, tmp_path / name, chosen, lambda _: None)
    ours, theirs = (Checkpoint(tmp_path / name).linear(LAYER) for name in "ab")
    assert not isinstance(ours, torch.Tensor) and not isinstance(theirs, torch.Tensor)
    assert torch.equal(ours.dequantize(), theirs.dequantize())


@pytest.mark.parametrize("method", [Method.GPTQ, Method.NF4])
def test_feedback_loses_less_than_rounding_to_nearest(method: Method, tiny_llama: Path) -> None:
    decoder = Decoder(Checkpoint(tiny_llama))
    windows = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(1))
    errors = []
    for effort in (Effort.FAST, Effort.FULL):
        options = options_for(method, effort=effort)
        hidden = as_stored(decoder.embed(windows))
        plan = make_plan(decoder, options)
        quantizer = CalibratedQuantizer(hidden, plan, profile_of(options))
        result = quantizer.quantize_block(decoder.block(0, 64))
        errors.append(sum(layer.error for layer in result.layers))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", [*PUBLISHED, Method.INT8], ids=lambda method: method.value)
def test_methods_can_be_run_as_they_were_published(
    method: Method, tiny_llama: Path, tmp_path: Path
) -> None:
    options = options_for(method, effort=Effort.PLAIN)
    report = quantize(Checkpoint(tiny_llama), tmp_path, options, lambda _: None)
    assert Checkpoint(tmp_path).method == CHECKPOINTS[method]
    has_steps = method in PUBLISHED
    assert (report.calibration is not None) == has_steps
    roundings = {layer.rounding for layer in report.layers}
    assert roundings == {PUBLISHED[method].rounding.value if has_steps else "nearest"}


@pytest.mark.parametrize("effort", Effort, ids=lambda effort: effort.value)
def test_activation_order_is_stored_with_the_groups_of_its_inputs(
    effort: Effort, tiny_llama: Path, tmp_path: Path
) -> None:
    options = options_for(Method.GPTQ, group_size=32, effort=effort, activation_order=True)
    quantize(Checkpoint(tiny_llama), tmp_path, options, lambda _: None)
    written = Checkpoint(tmp_path)
    assert written.quantization_config is not None
    assert written.quantization_config["desc_act"] is True
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    orders = []
    for name in names:
        weight = written.linear(name)
        assert isinstance(weight, GroupedWeight) and weight.input_order is not None
        orders.append(weight.input_order.tolist())
        original = Checkpoint(tiny_llama).linear(name)
        assert isinstance(original, torch.Tensor)
        stored, original = weight.dequantize(), original.float()
        scale = (stored * original).sum(0) / original.square().sum(0)
        assert float((stored / scale - original).norm() / original.norm()) < 0.3
    assert orders[0] == orders[1] == orders[2] != sorted(orders[0])


def test_activation_order_needs_a_format_that_holds_it() -> None:
    with pytest.raises(OptionError, match="activation order: awq does not hold it"):
        profile_of(QuantizeOptions(activation_order=True))
    with pytest.raises(OptionError, match="activation order: rtn reads no text"):
        profile_of(QuantizeOptions(Method.RTN, output=OutputFormat.GPTQ_V2, activation_order=True))


@pytest.mark.parametrize(
    ("method", "settings"),
    [(Method.QOQ, {}), (Method.GPTQ, {"activation_order": True}), (Method.HQQ, {"bits": 3})],
    ids=["qoq", "activation-order", "hqq"],
)
def test_the_server_computes_with_what_is_written(
    method: Method, settings: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    quantize(Checkpoint(tiny_llama), tmp_path, options_for(method, **settings), lambda _: None)
    written = Checkpoint(tmp_path)
    activations = written.activations or Activations.FLOAT32
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    linear = WeightReader(written, activations).linear(*names, shape=(128, 64))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weights = [written.linear(name) for name in names]
    rounded = round_activations(x, activations)
    expected = torch.cat(
        [rounded @ w.dequantize().T for w in weights if isinstance(w, GroupedWeight)], dim=1
    )
    torch.testing.assert_close(linear(x, torch.empty(5, 128)), expected, rtol=1e-3, atol=1e-3)
