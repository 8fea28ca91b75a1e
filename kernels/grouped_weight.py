"""A quantized weight in the neutral form between the formats on disk and the layouts that run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """Integer codes of a linear layer, with a scale and a zero point for each group of inputs.

    ``weight[n, k] = (codes[n, k] - zero_points[n, k // group_size]) * scales[n, k // group_size]``

    codes: uint8 ``[out_features, in_features]``, values in ``[0, 2**bits)``.
    scales: float16, bfloat16 or float32 ``[out_features, in_features / group_size]``; may be
        negative, never zero.
    zero_points: uint8, the shape of ``scales``.
    Raises ``ValueError`` when the shapes do not close.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        num_groups, rest = divmod(self.in_features, self.group_size)
        expected = (self.out_features, num_groups)
        if rest or self.scales.shape != expected or self.zero_points.shape != expected:
            raise ValueError(
                f"codes {tuple(self.codes.shape)}, scales {tuple(self.scales.shape)} and zero "
                f"points {tuple(self.zero_points.shape)} do not fit groups of {self.group_size}: "
                f"expected scales {expected}"
            )

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The float32 weight ``[out_features, in_features]`` that the codes stand for."""
        groups = self.codes.reshape(*self.scales.shape, self.group_size).float()
        groups = groups - self.zero_points[..., None].float()
        return (groups * self.scales[..., None].float()).flatten(1)


def concatenate_rows(weights: list[GroupedWeight]) -> GroupedWeight:
    """One weight for several linear layers of the same input: their outputs one after the other."""
    first = weights[0]
    for weight in weights[1:]:
        if (weight.bits, weight.group_size) != (first.bits, first.group_size):
            raise ValueError(
                f"cannot join {weight.bits} bits in groups of {weight.group_size} to {first.bits} "
                f"bits in groups of {first.group_size}: layers of one input must agree"
            )
    return GroupedWeight(
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zero_points=torch.cat([w.zero_points for w in weights]),
        bits=first.bits,
        group_size=first.group_size,
    )
