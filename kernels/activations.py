"""How a quantized matmul treats its activations: rounded to 8 bits on the way in, or exact."""

from __future__ import annotations

from enum import Enum

import torch

ACTIVATION_GROUP = 32
"""Neighbouring inputs of one row that share an int8 scale (the width llama.cpp's Q8_0 uses)."""

MAX_CODE = 127

MAX_FLOAT8 = 448.0


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
    codes, scales = _round_to_int8(padded.unflatten(1, (-1, ACTIVATION_GROUP)))
    return codes.flatten(1)[:, :width].reshape(num_rows, width), scales


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 codes ``[M, K]`` and float32 scales ``[M]`` of rows ``x [M, K]``, as
    ``quantize_rows`` with the whole row for a group."""
    return _round_to_int8(x.float())


def quantize_tokens_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float8_e4m3fn values ``[M, K]`` and float32 scales ``[M]`` of rows ``x [M, K]``.

    ``scale = max(abs(row)) / 448`` and ``value`` is ``x * (448 / max(abs(row)))`` rounded to
    nearest even; a row of zeros has scale 0.
    """
    largest = x.float().abs().amax(1)
    inverse = torch.where(largest > 0, MAX_FLOAT8 / largest, 0.0)
    values = (x.float() * inverse[:, None]).clamp(-MAX_FLOAT8, MAX_FLOAT8)
    return values.to(torch.float8_e4m3fn), largest / MAX_FLOAT8


def round_activations(x: torch.Tensor, activations: Activations) -> torch.Tensor:
    """What a matmul makes of rows ``x [M, K]``: rounded and back, float32 ``[M, K]``."""
    if activations is Activations.INT8:
        codes, scales = quantize_rows(x)
        return codes.float() * scales.repeat_interleave(ACTIVATION_GROUP, 1)[:, : x.shape[1]]
    if activations is Activations.INT8_TOKEN:
        codes, scales = quantize_tokens(x)
        return codes.float() * scales[:, None]
    if activations is Activations.FLOAT8_TOKEN:
        values, scales = quantize_tokens_float8(x)
        return values.float() * scales[:, None]
    return x.float()


def _round_to_int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the shape of ``groups``, whose last axis shares a scale, and the scales."""
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest > 0, MAX_CODE / largest, 0.0)
    codes = (groups * inverse[..., None]).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
    return codes, largest / MAX_CODE
