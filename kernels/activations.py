"""How a quantized matmul treats its activations: rounded to int8 on the way in, or exact."""

from __future__ import annotations

from enum import Enum

import torch

ACTIVATION_GROUP = 32
"""Neighbouring inputs of one row that share an int8 scale (the width llama.cpp's Q8_0 uses)."""

MAX_CODE = 127


class Activations(Enum):
    """Precision of the activations inside a quantized matmul.

    INT8: every row is rounded to int8 with a scale for each group of 32 inputs, and dot products
    are integer. FLOAT32: activations stay as they are and weights are dequantized in registers:
    exact up to summation order. INT8_TOKEN: rounded to int8 with one scale a row, which is what a
    checkpoint with int8 activations was made for. FLOAT8_TOKEN: rounded to float8 e4m3 with one
    scale a row, max(abs(row)) / 448.
    """

    INT8 = "int8"
    FLOAT32 = "float32"
    INT8_TOKEN = "int8-token"
    FLOAT8_TOKEN = "float8-token"


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 codes ``[M, K]`` and float32 scales ``[M, ceil(K / 32)]`` of rows ``x [M, K]``.

    ``scale = max(abs(group)) / 127`` and ``code = rint(x * (127 / max(abs(group))))``; a group of
    zeros has scale 0. This is the definition that the native kernels follow to the bit.
    """
    num_rows, width = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -width % ACTIVATION_GROUP))
    groups = padded.unflatten(1, (-1, ACTIVATION_GROUP))
    largest = groups.abs().amax(2)
    inverse = torch.where(largest > 0, MAX_CODE / largest, 0.0)
    codes = (groups * inverse[..., None]).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
    return codes.flatten(1)[:, :width].reshape(num_rows, width), largest / MAX_CODE


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """What is left of rows ``x [M, K]`` after rounding to int8 and back: float32 ``[M, K]``."""
    codes, scales = quantize_rows(x)
    return codes.float() * scales.repeat_interleave(ACTIVATION_GROUP, 1)[:, : x.shape[1]]
