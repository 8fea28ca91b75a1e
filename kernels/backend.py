"""Which of the three ways to run an op is taken on a device, and why the others were not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from qserve.kernels import native

OPS = (
    "codebook_matmul",
    "dense_matmul",
    "expert_matmul",
    "float8_matmul",
    "gated_activation",
    "head_norm",
    "int4_matmul",
    "int8_matmul",
    "kv_store",
    "layer_norm",
    "output_head",
    "paged_attention",
    "rms_norm",
    "rms_norm_int8",
    "sample",
    "soft_cap",
)


class Backend(Enum):
    """A way to run an op: plain PyTorch, our native CPU kernels, or Triton."""

    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend taken for an op, the reason, and for every other backend why it was rejected."""

    backend: Backend
    reason: str
    rejected: tuple[tuple[Backend, str], ...]


_SLOW_REFERENCE = (Backend.REFERENCE, "it defines the op, and is slow")


@cache
def choose(op: str, device: torch.device) -> Choice:
    """The backend that runs ``op`` on tensors of ``device``; decided once and remembered.

    Raises ``ValueError`` for an op that is not in ``OPS``.
    """
    if op not in OPS:
        raise ValueError(f"no op is named {op!r}: expected one of {', '.join(OPS)}")
    obstacles = {
        Backend.CPU: _obstacle_to_cpu(device),
        Backend.TRITON: _obstacle_to_triton(op, device),
    }
    rejected = tuple((backend, why) for backend, why in obstacles.items() if why is not None)
    for backend, why in obstacles.items():
        if why is None:
            return Choice(backend, _describe(backend), (*rejected, _SLOW_REFERENCE))
    return Choice(Backend.REFERENCE, "PyTorch runs everywhere", rejected)


@cache
def load_kernel(op: str) -> Any:
    """The module with the Triton kernel of ``op``; imported here alone, since triton may be
    missing."""
    return import_module(f"qserve.kernels.{op}.kernel")


def _describe(backend: Backend) -> str:
    if backend is Backend.CPU:
        return f"native kernels for {native.isa()} on {native.num_threads()} threads"
    return "Triton kernel"


def _obstacle_to_cpu(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    return native.failure()


def _obstacle_to_triton(op: str, device: torch.device) -> str | None:
    if device.type != "cuda":  # ROCm devices are called cuda by PyTorch as well
        return f"the tensors are on {device.type}, Triton kernels run on a GPU"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if find_spec(f"qserve.kernels.{op}.kernel") is None:
        return "this op has no Triton kernel"
    return None
