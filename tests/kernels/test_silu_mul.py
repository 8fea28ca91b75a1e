"""The gated activation: native kernels of every instruction set against the definition."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.silu_mul import silu_mul


@pytest.mark.parametrize("shape", [(1, 1), (1, 1536), (3, 33), (40, 1000)], ids=str)
@pytest.mark.usefixtures("isa")
def test_the_gate_opens_the_other_half(shape: tuple[int, int], generator: torch.Generator) -> None:
    num_rows, width = shape
    gate_up = torch.randn(num_rows, 2 * width, generator=generator) * 4
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = gate / (1 + torch.exp(-gate)) * up
    # An exponential good to 2e-7 and three roundings.
    assert ((silu_mul(gate_up) - expected).abs() <= 1e-6 * expected.abs()).all()


@pytest.mark.usefixtures("isa")
def test_far_from_zero_the_gate_is_open_or_shut() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -87.0, 87.0, 88.0, 200.0, 1e30])
    y = silu_mul(torch.cat([gate, torch.ones(8)])[None])[0]
    assert (y[:4].abs() < 1e-6 * gate[:4].abs().clamp(max=1e3)).all()
    assert torch.equal(y[4:], gate[4:])


@pytest.mark.usefixtures("isa")
def test_nan_stays_nan() -> None:
    y = silu_mul(torch.tensor([[torch.nan, 1.0, 2.0, 3.0]]))
    assert y[0, 0].isnan() and y[0, 1].isfinite()


@pytest.mark.usefixtures("isa")
def test_a_row_alone_and_in_a_batch_has_the_same_bits(generator: torch.Generator) -> None:
    gate_up = torch.randn(50, 600, generator=generator)
    together = silu_mul(gate_up)
    for row in range(50):
        assert torch.equal(silu_mul(gate_up[row : row + 1])[0], together[row])


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        silu_mul(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="expected"):
        silu_mul(torch.zeros(2, 8), out=torch.zeros(2, 8))
    with pytest.raises(TypeError, match="float32"):
        silu_mul(torch.zeros(2, 8, dtype=torch.bfloat16))
