"""One op on one shape, ready to be timed, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qserve.kernels.backend import Backend
from qserve.kernels.cost import Cost

MORE_THAN_CACHES = 64 << 20
"""Bytes of operands that are gone through in turn: a model's weights come from memory, not from a
cache."""

MAX_COPIES = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: ``call(number)``, with the work that one call is.

    is_int8: the multiply-adds are those of bytes. backend: that of a weight, which may not be that
    of the op; None where the op decides.
    """

    call: Callable[[int], object]
    cost: Cost
    is_int8: bool = False
    backend: Backend | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """An op, a shape in words, and how to make its operands on a device."""

    op: str
    shape: str
    build: Callable[[torch.device], Workload]


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The sizes of a model whose layers are measured, and the rows of a step."""

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the linear layers of a block, by name."""
        return {
            "qkv": (self.qkv, self.hidden),
            "o": (self.hidden, self.num_heads * self.head_dim),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


SMOLLM2_135M = ModelShapes(576, 1536, 9, 3, 64, 49152, (1, 8, 512), (128, 1024))
LLAMA_8B = ModelShapes(4096, 14336, 32, 8, 128, 128256, (1, 16, 64, 1024), (1024, 8192))


def shapes_for(device: torch.device) -> ModelShapes:
    """The model that is typical of a device."""
    return LLAMA_8B if device.type == "cuda" else SMOLLM2_135M


def float_dtype(device: torch.device) -> torch.dtype:
    """What activations are on a device."""
    return torch.float16 if device.type == "cuda" else torch.float32


def randn(device: torch.device, *shape: int) -> torch.Tensor:
    """Activations of a shape."""
    return torch.randn(shape, device=device, dtype=float_dtype(device))


def num_copies(nbytes: int) -> int:
    """Operands of ``nbytes`` that together do not fit a cache, within reason."""
    return min(MAX_COPIES, max(1, -(-MORE_THAN_CACHES // nbytes)))
