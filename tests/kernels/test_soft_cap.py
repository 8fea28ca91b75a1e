"""The soft cap: native kernels of every instruction set against the definition."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.soft_cap import reference, soft_cap

ABSOLUTE_ERROR = 2e-7  # of the cap: what is close to 0 is the difference of numbers close to 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 4096)], ids=str)
@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.usefixtures("isa")
def test_numbers_are_limited_smoothly(
    shape: tuple[int, int], cap: float, generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator) * 3 * cap
    found = soft_cap(x, cap)
    expected = cap * (x.double() / cap).tanh()
    assert float((found - expected).abs().max()) <= ABSOLUTE_ERROR * cap
    plain = torch.empty_like(x)
    reference.soft_cap(x, cap, plain)
    assert float((plain - expected).abs().max()) <= ABSOLUTE_ERROR * cap


@pytest.mark.usefixtures("isa")
def test_far_out_it_is_the_cap_and_a_nan_stays_one() -> None:
    x = torch.tensor([[1e30, -1e30, float("inf"), -float("inf"), 0.0, float("nan")]])
    found = soft_cap(x, 30.0)
    assert found[0, :5].tolist() == [30.0, -30.0, 30.0, -30.0, 0.0]
    assert found[0, 5].isnan()


@pytest.mark.usefixtures("isa")
def test_rows_may_lie_apart_and_be_written_in_place(generator: torch.Generator) -> None:
    wide = torch.randn(4, 50, generator=generator)
    part = wide[:, 3:40]
    expected = soft_cap(part.contiguous(), 0.7)
    assert soft_cap(part, 0.7, out=part) is part
    assert torch.equal(part, expected)
    assert not torch.equal(soft_cap(part + 1e-3, 0.7), soft_cap(part, 0.7))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="cap is 0"):
        soft_cap(torch.ones(1, 4), 0.0)
    with pytest.raises(TypeError, match="float32"):
        soft_cap(torch.ones(1, 4).half(), 1.0)
