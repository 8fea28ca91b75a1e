"""AWQ on whole blocks: what it stores is what later layers were calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qserve.quant import rtn
from qserve.quant.block_result import BlockResult
from qserve.quant.calibrated import CalibratedQuantizer
from qserve.quant.decoder import Block, Decoder
from qserve.quant.errors import CheckpointError
from qserve.quant.methods import profile_of
from qserve.quant.options import Effort, Method, QuantizeOptions
from qserve.quant.plan import Plan, make_plan

HiddenStates = Callable[[Decoder], torch.Tensor]

OPTIONS = QuantizeOptions(group_size=32, effort=Effort.FAST)


@pytest.fixture
def plan(decoder: Decoder) -> Plan:
    return make_plan(decoder, OPTIONS)


def quantized_block(
    decoder: Decoder, plan: Plan, hidden: torch.Tensor, index: int = 0
) -> tuple[Block, BlockResult]:
    """A block after AWQ, and its codes. ``hidden`` becomes its output."""
    block = decoder.block(index, hidden.shape[1])
    return block, CalibratedQuantizer(hidden, plan, profile_of(OPTIONS)).quantize_block(block)


def test_the_codes_stand_for_the_weights_that_later_layers_saw(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    again = hidden.clone()
    block, result = quantized_block(decoder, plan, hidden)
    assert set(result.weights) == {name for stage in block.stages for name in stage.linears}
    for name, weight in result.weights.items():
        assert torch.equal(weight.dequantize(), block.linear(name).weight), name
    block.run_(again)  # with the parameters as they are stored
    torch.testing.assert_close(hidden, again, rtol=1e-5, atol=1e-5)


def test_every_layer_and_the_block_are_better_than_rounding_to_nearest(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    entered = hidden.clone()
    float_output, rounded_output = hidden.clone(), hidden.clone()
    decoder.block(0, hidden.shape[1]).run_(float_output)
    rounded = decoder.block(0, hidden.shape[1])
    for name, weight in rtn.quantize_block(rounded, plan).weights.items():
        rounded.linear(name).weight.copy_(weight.dequantize())
    rounded.run_(rounded_output)

    _, result = quantized_block(decoder, plan, hidden)
    for layer in result.layers:
        assert layer.error < 0.9 * layer.rounded_error, layer.name
        assert 0 <= layer.clipped_share < 0.1
    energy = (float_output - entered).square().sum()
    error = float((hidden - float_output).square().sum() / energy)
    assert result.error == pytest.approx(error, rel=1e-3)
    assert error < 0.9 * float((rounded_output - float_output).square().sum() / energy)


def test_reported_errors_are_those_of_the_layers_outputs(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    original = decoder.block(0, hidden.shape[1])
    inputs = original.module("input_layernorm")(hidden).flatten(0, 1)
    block, result = quantized_block(decoder, plan, hidden.clone())
    scaled_inputs = block.module("input_layernorm")(hidden).flatten(0, 1)
    rounded = rtn.quantize_block(original, plan).weights
    for layer in result.layers[:2]:  # the rows of the third one carry a scale of the next stage
        name = layer.name.removeprefix("model.layers.0.")
        expected = inputs @ original.linear(name).weight.T
        energy = expected.square().sum()
        found = scaled_inputs @ block.linear(name).weight.T
        error = float((found - expected).square().sum() / energy)
        assert layer.error == pytest.approx(error, rel=1e-3)
        nearest = inputs @ rounded[name].dequantize().T
        error = float((nearest - expected).square().sum() / energy)
        assert layer.rounded_error == pytest.approx(error, rel=1e-3)


def test_later_blocks_are_calibrated_on_what_earlier_ones_became(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    chained = hidden.clone()
    quantizer = CalibratedQuantizer(chained, plan, profile_of(OPTIONS))
    first = decoder.block(0, hidden.shape[1])
    quantizer.quantize_block(first)
    second = quantizer.quantize_block(decoder.block(1, hidden.shape[1]))
    first.run_(hidden)
    torch.testing.assert_close(
        quantized_block(decoder, plan, hidden, index=1)[1].layers[0].error,
        second.layers[0].error,
        rtol=1e-4,
        atol=0,
    )


def test_query_heads_share_the_scale_that_their_value_head_absorbs(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    _, result = quantized_block(decoder, plan, hidden)
    reports = {layer.name.rpartition(".")[2]: layer.scale for layer in result.layers}
    assert all(report is not None for report in reports.values())
    output = reports["o_proj"]
    assert output is not None and output.largest > output.smallest  # scaled, not skipped


def test_layers_outside_the_plan_are_stored_in_16_bits(
    decoder: Decoder, hidden_states: HiddenStates
) -> None:
    plan = make_plan(decoder, QuantizeOptions(group_size=32, ignore=("down_proj", "v_proj")))
    block, result = quantized_block(decoder, plan, hidden_states(decoder))
    assert set(result.weights) == {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"}
    for name in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        weight = block.linear(name).weight
        assert torch.equal(weight, weight.half().float()), name


def test_a_model_that_overflows_is_refused_with_the_layer(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    block = decoder.block(0, hidden.shape[1])
    block.linear("self_attn.o_proj").weight.fill_(1e38)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.gate_proj receives infinite"):
        CalibratedQuantizer(hidden, plan, profile_of(OPTIONS)).quantize_block(block)


def test_errors_are_fed_back_where_the_text_is_long_enough(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)  # 288 tokens; 64 inputs need 256 of them, 128 need 512
    nearest = quantized_block(decoder, plan, hidden.clone())[1]
    block = decoder.block(0, hidden.shape[1])
    options = replace(OPTIONS, effort=Effort.FULL)
    feedback = CalibratedQuantizer(hidden, plan, profile_of(options)).quantize_block(block)
    for layer, alone in zip(feedback.layers, nearest.layers, strict=True):
        assert alone.rounding == "nearest"
        if layer.in_features == 64:
            assert layer.rounding == "feedback"
            assert layer.error < 0.95 * alone.error, layer.name
        else:
            assert layer.rounding == "nearest", layer.name
    assert feedback.error is not None and nearest.error is not None
    assert feedback.error < nearest.error


@pytest.mark.parametrize("method", [Method.AWQ, Method.SMOOTHQUANT])
@pytest.mark.parametrize("effort", [Effort.FULL, Effort.PLAIN])
def test_positions_that_do_not_count_decide_nothing(
    decoder: Decoder, hidden_states: HiddenStates, method: Method, effort: Effort
) -> None:
    options = QuantizeOptions(method=method, effort=effort)
    plan = make_plan(decoder, options)
    hidden = hidden_states(decoder)
    counts = torch.arange(hidden.shape[1]).expand(len(hidden), -1) < 40
    noisy = torch.where(counts[..., None], hidden, 7 * hidden.flip(2))
    ways = ((hidden, counts), (noisy, counts), (noisy, None))
    found = []
    for entered, some in ways:
        states = entered.clone(), entered.clone(), some
        quantizer = CalibratedQuantizer(states[0], plan, profile_of(options), *states[1:])
        found.append(quantizer.quantize_block(decoder.block(0, hidden.shape[1])))
    first, second, all_counted = found
    assert first.error == second.error != all_counted.error
    assert first.layers == second.layers != all_counted.layers
    for name, weight in first.weights.items():
        assert torch.equal(weight.dequantize(), second.weights[name].dequantize()), name


def test_text_is_too_short_when_too_little_of_it_counts(
    decoder: Decoder, plan: Plan, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    counts = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    counts[:, :40] = True  # 240 positions, where 64 inputs need 256
    profile = profile_of(replace(OPTIONS, effort=Effort.FULL))
    quantizer = CalibratedQuantizer(hidden, plan, profile, None, counts)
    result = quantizer.quantize_block(decoder.block(0, hidden.shape[1]))
    assert {layer.rounding for layer in result.layers} == {"nearest"}
