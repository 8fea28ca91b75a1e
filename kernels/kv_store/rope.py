"""Tables of rotary angles, after Su et al. (RoFormer, section 3.2), with the scalings that
checkpoints ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by ``factor``, high ones kept, a ramp between, as Llama 3.1's release
    defines it.

    A wavelength above ``original_max_positions / low_freq_factor`` is low, one below
    ``original_max_positions / high_freq_factor`` is high.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


RopeScaling = LinearScaling | Llama3Scaling


def rope_table(
    head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Cosines and sines: float32 ``[max_positions, head_dim]``, first half cosines, second half
    sines.

    Column ``i`` of either half turns by ``position * theta ** (-2 i / head_dim)``. Raises
    ``ValueError`` for an odd ``head_dim``.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, expected an even number: halves are rotated")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / torch.pow(torch.tensor(theta, dtype=torch.float32), exponents)
    if scaling is not None:
        frequencies = _scale(frequencies, scaling)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _scale(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    ratio = scaling.original_max_positions / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((ratio - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
