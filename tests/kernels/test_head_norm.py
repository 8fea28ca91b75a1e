"""The norm of heads: native kernels of every instruction set against the definition."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.head_norm import head_norm, reference
from qserve.kernels.rms_norm import rms_norm

EPS = 1e-6
RELATIVE_ERROR = 1e-6  # of float32: a few roundings


@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 64), (3, 5, 16), (40, 9, 128)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.usefixtures("isa")
def test_every_head_is_normed_by_itself(
    rows: int, heads: int, width: int, offset: float, generator: torch.Generator
) -> None:
    x = torch.randn(rows, heads * width, generator=generator)
    weight = torch.randn(width, generator=generator)
    expected = torch.empty_like(x)
    reference.head_norm(x, weight, EPS, offset, expected)
    found = head_norm(x, weight, EPS, weight_offset=offset)
    assert ((found - expected).abs() <= RELATIVE_ERROR * expected.abs()).all()
    one = rms_norm(x[:, :width], weight, EPS, weight_offset=offset)
    assert torch.equal(found[:, :width], one)


@pytest.mark.usefixtures("isa")
def test_a_slice_of_wider_rows_is_normed_in_place(generator: torch.Generator) -> None:
    wide = torch.randn(6, 100, generator=generator)
    weight, before = torch.randn(16, generator=generator), wide.clone()
    heads = wide[:, 8:56]
    assert head_norm(heads, weight, EPS, out=heads) is heads
    assert torch.equal(heads, head_norm(before[:, 8:56].contiguous(), weight, EPS))
    assert torch.equal(wide[:, :8], before[:, :8])
    assert torch.equal(wide[:, 56:], before[:, 56:])


@pytest.mark.usefixtures("isa")
def test_an_element_that_is_off_shows(generator: torch.Generator) -> None:
    x, weight = torch.randn(2, 48, generator=generator), torch.ones(16)
    found = head_norm(x, weight, EPS)
    x[1, 20] += 0.01
    changed = (head_norm(x, weight, EPS) != found).unflatten(1, (3, 16)).any(2)
    assert changed.tolist() == [[False, False, False], [False, True, False]]


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(2, 48)
    with pytest.raises(ValueError, match="width of a head"):
        head_norm(x, torch.ones(20), EPS)
    with pytest.raises(ValueError, match="width of a head"):
        head_norm(x, torch.ones(1, 16), EPS)
    with pytest.raises(TypeError, match="float32"):
        head_norm(x, torch.ones(16).half(), EPS)
    with pytest.raises(ValueError, match="out has shape"):
        head_norm(x, torch.ones(16), EPS, out=torch.ones(2, 47))
