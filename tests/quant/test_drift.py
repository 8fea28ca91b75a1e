"""Weights that make up for what was lost before: exact when nothing was, better when much was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.quant.calibrated import CalibratedQuantizer
from qserve.quant.decoder import Decoder
from qserve.quant.drift import DAMPING, SHARE, HiddenPair, LackingInputs, LackingOutputs, aim_
from qserve.quant.methods import profile_of
from qserve.quant.objective import GramMatrix
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.plan import make_plan

HiddenStates = Callable[[Decoder], torch.Tensor]

NUM_WINDOWS, LENGTH, INPUTS, OUTPUTS = 4, 64, 32, 24


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    gram = GramMatrix(inputs.shape[-1])
    gram.add(inputs)
    return gram.mean()


def aim(
    weight: torch.Tensor, received: torch.Tensor, exact: torch.Tensor, hidden: HiddenPair | None
) -> torch.Tensor:
    """The weights to aim at, for windows of inputs X and F, and of R and S or none."""
    lack = LackingInputs(INPUTS) if hidden is None else LackingOutputs(weight)
    for index, (rows, others) in enumerate(zip(received, exact, strict=True)):
        pair = None if hidden is None else (hidden[0][index], hidden[1][index])
        lack.add(rows, others, pair)
    found = weight.clone()
    aim_([found[:8], found[8:]], gram_of(received), lack)
    return found


@pytest.fixture
def inputs() -> torch.Tensor:
    mixing = torch.eye(INPUTS) + 0.05 * torch.randn(INPUTS, INPUTS)
    return torch.randn(NUM_WINDOWS, LENGTH, INPUTS) @ mixing


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_without_drift_the_aim_is_the_weight_itself(
    inputs: torch.Tensor, weight: torch.Tensor
) -> None:
    hidden = torch.randn(NUM_WINDOWS, LENGTH, OUTPUTS)
    for pair in (None, (hidden, hidden)):
        assert torch.equal(aim(weight, inputs, inputs, pair), weight)


def test_what_the_inputs_have_lost_is_made_up_for_by_half(
    inputs: torch.Tensor, weight: torch.Tensor
) -> None:
    shrinking = 0.9  # the inputs came out too small: larger weights put that right
    found = aim(weight, shrinking * inputs, inputs, None)
    left = (shrinking * inputs @ found.T - inputs @ weight.T).square().sum()
    before = (shrinking * inputs @ weight.T - inputs @ weight.T).square().sum()
    share = SHARE / (1 + DAMPING)
    assert left / before == pytest.approx((1 - share) ** 2, abs=0.02)


def test_what_the_hidden_states_have_lost_is_made_up_for_by_the_output(
    inputs: torch.Tensor, weight: torch.Tensor
) -> None:
    lost = inputs @ torch.randn(INPUTS, OUTPUTS)
    hidden = torch.randn(NUM_WINDOWS, LENGTH, OUTPUTS)
    found = aim(weight, inputs, inputs, (hidden, hidden + lost))
    left = (inputs @ (found - weight).T - lost).square().sum()
    share = SHARE / (1 + DAMPING)
    assert left / lost.square().sum() == pytest.approx((1 - share) ** 2, abs=0.02)


def quantized_output(
    decoder: Decoder, options: QuantizeOptions, hidden: torch.Tensor, exact: torch.Tensor | None
) -> torch.Tensor:
    """What two quantized blocks make of ``hidden``; ``exact`` becomes what the float ones do."""
    plan = make_plan(decoder, options)
    quantizer = CalibratedQuantizer(hidden, plan, profile_of(options), exact)
    for index in range(decoder.num_blocks):
        quantizer.quantize_block(decoder.block(index, hidden.shape[1]))
    return hidden


@pytest.mark.parametrize("method", [Method.GPTQ, Method.SMOOTHQUANT])
def test_the_float_model_beside_brings_the_quantized_one_nearer_to_it(
    decoder: Decoder, hidden_states: HiddenStates, method: Method
) -> None:
    bits = 3 if method is Method.GPTQ else None
    options = QuantizeOptions(method=method, bits=bits)
    entered = hidden_states(decoder)
    exact = entered.clone()
    followed = quantized_output(decoder, options, entered.clone(), exact)
    alone = quantized_output(decoder, options, entered.clone(), None)
    wanted = entered.clone()
    for index in range(decoder.num_blocks):
        decoder.block(index, entered.shape[1]).run_(wanted)
    torch.testing.assert_close(exact, wanted, rtol=1e-2, atol=1e-3)  # norms are stored in bfloat16
    assert (followed - wanted).square().sum() < 0.97 * (alone - wanted).square().sum()
