"""What is compiled, and what its machine code has to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

TRITON_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
}
"""How Triton writes a dtype in the type of an argument."""


@dataclass(frozen=True, slots=True)
class Promises:
    """What must hold of the machine code; None where nothing is promised.

    No kernel may spill registers, and each must fit a core: that holds without being said.

    tensor_core: regular expression for the tensor core instructions of the hot loop.
    min_wide_share: share of the bytes loaded in the hot loop that comes 16 bytes a lane at a time.
    max_issue_share: instructions of the hot loop over those that can be issued while device memory
        delivers its bytes. Above 1 the kernel cannot run at the speed of the memory.
    min_warps: warps that must be resident on a core.
    no_conversions: no conversion between integers and floats in the hot loop (a slow pipe).
    """

    tensor_core: str | None = None
    min_wide_share: float | None = None
    max_issue_share: float | None = None
    min_warps: int | None = None
    no_conversions: bool = False


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel as it is launched for one problem on one target.

    name: the problem, alike for every target. tile: what the launch rule made of it there.
    kernel: the ``@triton.jit`` function.
    arguments: the type of each run-time argument as Triton writes it, with ``:16`` for a pointer
        aligned to 16 bytes or an integer that is a multiple of 16: ``*fp16:16``, ``i32``. At run
        time these facts come from the tensors; here they have to be said, or loads get narrow.
    constants: the compile-time arguments.
    stream_bytes: what a thread block takes from device memory in a trip of its hot loop.
    is_core: whether it is among the few that every test run compiles.
    """

    name: str
    tile: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    promises: Promises
    stream_bytes: int | None = None
    is_core: bool = False
