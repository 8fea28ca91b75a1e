"""A weight of any kind in the layout of the backend that multiplies with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.rows import check_output, check_rows

NATIVE_NUMBERS = {activations: number for number, activations in enumerate(Activations)}
"""What the extension calls them: its enum has the same order."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """What ``prepare`` of a matmul makes of a weight and of the bias that its layer adds.

    nbytes: memory the layout takes, all of which a product reads. run: writes the product of its
    first argument to its second; both are checked by ``multiply`` before. native: the layout on a
    CPU. arrange: on a GPU, the ``TiledProduct`` with rows, which an op may launch in another way.
    """

    in_features: int
    out_features: int
    nbytes: int
    backend: Backend
    run: Callable[[torch.Tensor, torch.Tensor, Activations], None]
    native: NativeWeight | None = None
    arrange: Callable[[torch.Tensor, Activations], Any] | None = None


def from_native(native: NativeWeight) -> PackedWeight:
    """The weight that lies in a native layout, packed here or read."""
    out_features, in_features, *_ = native.sizes
    run = partial(_run_native, native)
    return PackedWeight(in_features, out_features, native.nbytes, Backend.CPU, run, native)


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    out: torch.Tensor | None = None,
    activations: Activations = Activations.FLOAT32,
) -> torch.Tensor:
    """``y = a @ weight.T + bias``, where ``a`` is what ``activations`` makes of ``x``.

    x: ``[M, K]`` with contiguous rows, float32 on a CPU. A float weight takes ``x`` as it is,
    whatever ``activations`` says. out: ``[M, N]``, written and returned; must not overlap ``x``. A
    row of the result does not depend on the other rows or on the number of threads, to the bit.
    Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit.
    """
    check_rows("x", x, weight.in_features)
    out = check_output(x, weight.out_features, out)
    weight.run(x, out, activations)
    return out


def check_bias(bias: torch.Tensor | None, out_features: int) -> None:
    """Raises ``ValueError`` unless ``bias`` is None or has shape ``[out_features]``."""
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"the bias has shape {tuple(bias.shape)}, expected ({out_features},)")


def _run_native(
    native: NativeWeight, x: torch.Tensor, out: torch.Tensor, activations: Activations
) -> None:
    native.run(
        x.data_ptr(),
        x.stride()[0],
        x.shape[0],
        out.data_ptr(),
        out.stride()[0],
        NATIVE_NUMBERS[activations],
    )
