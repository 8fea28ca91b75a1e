"""What the tests of ops share: instruction sets, thread counts, random weights, error bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.grouped_weight import GroupedWeight

MakeWeight = Callable[..., GroupedWeight]
Bound = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(params=native.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn; the native kernels use it during the test."""
    best = native.isa()
    native.select_isa(request.param)
    yield request.param
    native.select_isa(best)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = native.num_threads()
    yield
    native.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def make_weight(generator: torch.Generator) -> MakeWeight:
    """Makes a random 4-bit weight; scales of either sign, float16 if not told otherwise."""

    def make(
        out_features: int, in_features: int, group_size: int, dtype: torch.dtype = torch.float16
    ) -> GroupedWeight:
        """A weight of this shape; dtype: of its scales."""
        groups = (out_features, in_features // group_size)
        return GroupedWeight(
            codes=torch.randint(
                0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8
            ),
            scales=(torch.randn(groups, generator=generator) * 0.02 + 0.001).to(dtype),
            zero_points=torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8),
            bits=4,
            group_size=group_size,
        )

    return make


@pytest.fixture
def product_bound() -> Bound:
    """How far two float32 ways to compute ``a @ w.T`` may lie apart.

    A sum of K products, each with a relative error of a few units of 2^-24, in any order, errs by
    at most (K + c) * 2^-24 * sum |a| |w| (Higham, Accuracy and Stability, section 3.1); both ways
    err.
    """

    def bound(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        terms = weight.shape[1] + 8
        return 2 * terms * 2.0**-24 * (a.abs() @ weight.abs().T)

    return bound
