"""The gated activations: native kernels of every instruction set against the definition."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.gated_activation import Gate, gated_activation, reference


def by_definition(gate: torch.Tensor, activation: Gate) -> torch.Tensor:
    if activation is Gate.SILU:
        return gate / (1 + torch.exp(-gate))
    if activation is Gate.GELU:
        return gate * torch.erfc(-gate * 0.5**0.5) / 2
    return gate / (1 + torch.exp(-((8 / torch.pi) ** 0.5) * (gate + 0.044715 * gate**3)))


@pytest.mark.parametrize("activation", Gate)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1536), (3, 33), (40, 1000)], ids=str)
@pytest.mark.usefixtures("isa")
def test_the_gate_opens_the_other_half(
    shape: tuple[int, int], activation: Gate, generator: torch.Generator
) -> None:
    num_rows, width = shape
    gate_up = torch.randn(num_rows, 2 * width, generator=generator) * 2
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = by_definition(gate, activation) * up
    # An exponential good to 2e-7, a fit good to 4e-8 and some roundings; the argument of the
    # exponential is itself rounded, which costs the tails of GELU up to an ulp of gate ** 2.
    tail = 1 if activation is Gate.SILU else 1 + gate**2 / 4
    error = (gated_activation(gate_up, activation) - expected).abs()
    assert (error <= 1e-6 * tail * expected.abs()).all()


@pytest.mark.parametrize("activation", Gate)
def test_one_step_of_a_bfloat16_gate_exceeds_the_tolerance(activation: Gate) -> None:
    gate_up = torch.tensor([[1.5, 3.0]], dtype=torch.bfloat16)
    right = gated_activation(gate_up.float(), activation)
    gate_up.view(torch.int16)[0, 0] += 1
    wrong = gated_activation(gate_up.float(), activation)
    assert (wrong - right).abs() > 1e-3 * right.abs()


@pytest.mark.parametrize("activation", Gate)
@pytest.mark.usefixtures("isa")
def test_far_from_zero_the_gate_is_open_or_shut(activation: Gate) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -87.0, 87.0, 88.0, 200.0, 1e30])
    y = gated_activation(torch.cat([gate, torch.ones(8)])[None], activation)[0]
    assert (y[:4].abs() < 1e-6 * gate[:4].abs().clamp(max=1e3)).all()
    assert torch.equal(y[4:], gate[4:])


@pytest.mark.parametrize("activation", Gate)
@pytest.mark.usefixtures("isa")
def test_nan_stays_nan(activation: Gate) -> None:
    y = gated_activation(torch.tensor([[torch.nan, 1.0, 2.0, 3.0]]), activation)
    assert y[0, 0].isnan() and y[0, 1].isfinite()


@pytest.mark.usefixtures("isa")
def test_a_row_alone_and_in_a_batch_has_the_same_bits(generator: torch.Generator) -> None:
    gate_up = torch.randn(50, 600, generator=generator)
    for activation in Gate:
        together = gated_activation(gate_up, activation)
        for row in range(50):
            alone = gated_activation(gate_up[row : row + 1], activation)
            assert torch.equal(alone[0], together[row])


def test_the_reference_computes_the_definition(generator: torch.Generator) -> None:
    gate_up = torch.randn(3, 80, generator=generator)
    gate, up = gate_up.chunk(2, dim=1)
    out = torch.empty(3, 40)
    for activation in Gate:
        reference.gated_activation(gate_up, activation, out)
        assert torch.allclose(out, by_definition(gate, activation) * up, rtol=1e-5, atol=1e-7)


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        gated_activation(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="expected"):
        gated_activation(torch.zeros(2, 8), out=torch.zeros(2, 8))
    with pytest.raises(TypeError, match="float32"):
        gated_activation(torch.zeros(2, 8, dtype=torch.bfloat16))
