"""A weight of integer codes, in the neutral form between the formats on disk and the layouts
that run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """Integer codes of a linear layer, with a scale and a zero point for each group of inputs.

    ``weight[n, order[k]] = (codes[n, k] - zero_points[n, k // G]) * scales[n, k // G] * outer[n]``
    where ``order`` is ``input_order`` and ``outer`` is ``channel_scales``; both may be absent.

    codes: uint8 ``[out_features, in_features]``, values in ``[0, 2**bits)``, bits in 2, 3, 4, 8.
    scales: float16, bfloat16 or float32 ``[out_features, in_features / group_size]``; may be
        negative, never zero. One scale a row is ``group_size == in_features``.
    zero_points: uint8, the shape of ``scales``; ``2**(bits - 1)`` everywhere for symmetric codes.
    input_order: int64 ``[in_features]``, a permutation: column ``k`` of ``codes`` belongs to input
        ``input_order[k]`` (GPTQ's activation order, sorted by group). None is the natural order.
    channel_scales: float32 ``[out_features]``, the outer scale of progressive groups (QoQ), whose
        ``scales`` are then integers in -127..127. None is 1 for each output.
    Raises ``ValueError`` when the shapes do not close.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    group_size: int
    input_order: torch.Tensor | None = None
    channel_scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        num_groups, rest = divmod(self.in_features, self.group_size)
        expected = (self.out_features, num_groups)
        if rest or self.scales.shape != expected or self.zero_points.shape != expected:
            raise ValueError(
                f"codes {tuple(self.codes.shape)}, scales {tuple(self.scales.shape)} and zero "
                f"points {tuple(self.zero_points.shape)} do not fit groups of {self.group_size}: "
                f"expected scales {expected}"
            )
        for name, vector, size in (
            ("input_order", self.input_order, self.in_features),
            ("channel_scales", self.channel_scales, self.out_features),
        ):
            if vector is not None and vector.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected ({size},)")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle code ``2**(bits - 1)``."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())

    def combined_scales(self) -> torch.Tensor:
        """The float32 scales of the groups, ``[out_features, groups]``, times the outer ones."""
        if self.channel_scales is None:
            return self.scales.float()
        return self.scales.float() * self.channel_scales[:, None].float()

    def dequantize(self) -> torch.Tensor:
        """The float32 weight ``[out_features, in_features]`` that the codes stand for, its columns
        in the order of the inputs."""
        groups = self.codes.reshape(*self.scales.shape, self.group_size).float()
        groups -= self.zero_points[..., None]
        dense = (groups * self.scales[..., None].float()).flatten(1)
        if self.channel_scales is not None:
            dense *= self.channel_scales[:, None]
        if self.input_order is None:
            return dense
        natural = torch.empty_like(dense)
        natural[:, self.input_order] = dense
        return natural


def concatenate_rows(weights: list[GroupedWeight]) -> GroupedWeight:
    """One weight for several linear layers of the same input: their outputs one after the other.

    Raises ``ValueError`` for layers that differ in bits, group size, input order or outer scales:
    see ``joinable``.
    """
    first = weights[0]
    if not joinable(weights):
        listed = ", ".join(f"{w.bits} bits in groups of {w.group_size}" for w in weights)
        raise ValueError(f"cannot join {listed}: layers of one input must agree")
    channels = [w.channel_scales for w in weights if w.channel_scales is not None]
    return GroupedWeight(
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zero_points=torch.cat([w.zero_points for w in weights]),
        bits=first.bits,
        group_size=first.group_size,
        input_order=first.input_order,
        channel_scales=torch.cat(channels) if channels else None,
    )


def joinable(weights: list[GroupedWeight]) -> bool:
    """Whether the weights can become one by ``concatenate_rows``."""
    first = weights[0]
    return all(
        (weight.bits, weight.group_size) == (first.bits, first.group_size)
        and (weight.channel_scales is None) == (first.channel_scales is None)
        and _same(weight.input_order, first.input_order)
        for weight in weights[1:]
    )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
