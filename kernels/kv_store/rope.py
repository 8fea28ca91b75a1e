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


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies that turn less than ``beta_slow`` times in ``original_max_positions`` divided by
    ``factor``, those that turn more than ``beta_fast`` times kept, a ramp between (YaRN, Peng et
    al. 2023, section 3.2).

    attention_factor: what cosines and sines are multiplied by (section 3.4); None derives it from
    ``factor``, or from the ratio of DeepSeek's ``mscale`` and ``mscale_all_dim`` where both are
    given. truncate: whether the ramp begins and ends at whole columns.
    """

    factor: float
    original_max_positions: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """Each frequency divided by a factor of its own (LongRoPE, Ding et al. 2024), as Phi 3 uses it.

    short_factors: for tables of up to ``original_max_positions``; long_factors: for longer ones.
    attention_factor: what cosines and sines are multiplied by.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


def rope_table(
    rotary_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Cosines and sines: float32 ``[max_positions, rotary_dim]``, first half cosines, second half
    sines.

    rotary_dim: elements of a head that are rotated, ``head_dim`` or less. Column ``i`` of either
    half turns by ``position * theta ** (-2 i / rotary_dim)``. Raises ``ValueError`` for an odd
    ``rotary_dim``, or one that the factors of a ``LongRopeScaling`` do not fit.
    """
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}, expected an even number: pairs are rotated")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / torch.pow(torch.tensor(theta, dtype=torch.float32), exponents)
    if isinstance(scaling, LongRopeScaling):
        frequencies = frequencies / _choose_factors(scaling, max_positions, rotary_dim)
    elif scaling is not None:
        frequencies = _scale(frequencies, theta, scaling)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    if isinstance(scaling, LongRopeScaling):
        return table * scaling.attention_factor
    return table * scaling.magnitude if isinstance(scaling, YarnScaling) else table


def _choose_factors(scaling: LongRopeScaling, max_positions: int, rotary_dim: int) -> torch.Tensor:
    is_long = max_positions > scaling.original_max_positions
    factors = torch.tensor(scaling.long_factors if is_long else scaling.short_factors)
    if factors.shape != (rotary_dim // 2,):
        raise ValueError(
            f"LongRoPE has {factors.numel()} factors for {rotary_dim} rotated elements, expected "
            f"{rotary_dim // 2}"
        )
    return factors


def _scale(
    frequencies: torch.Tensor, theta: float, scaling: LinearScaling | Llama3Scaling | YarnScaling
) -> torch.Tensor:
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, YarnScaling):
        kept = _kept_by_yarn(frequencies.numel(), theta, scaling)
    else:
        wavelengths = 2 * math.pi / frequencies
        ratio = scaling.original_max_positions / wavelengths
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = ((ratio - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _kept_by_yarn(num_frequencies: int, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """1 where a frequency is kept, 0 where it is divided."""

    def column_that_turns(times: float) -> float:
        turns = scaling.original_max_positions / (2 * math.pi * times)
        return num_frequencies * math.log(turns) / math.log(theta)

    first, last = column_that_turns(scaling.beta_fast), column_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_frequencies - 1)
    span = max(last - first, 1e-3)  # a ramp of no width is a step
    return 1 - ((torch.arange(num_frequencies) - first) / span).clamp(0.0, 1.0)
