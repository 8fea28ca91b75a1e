"""Planar4: the memory layout of 4-bit weights that the Triton kernel reads without a shuffle.

Inputs come in blocks of 128. A block of one output row is 32 containers of 16 bits; container ``r``
holds the codes of inputs ``r``, ``32 + r``, ``64 + r`` and ``96 + r``, from its low bits up: four
planes of 32 neighbouring inputs. Two neighbouring containers are one 32-bit register, and one mask
takes out of it the two neighbouring codes of a plane: the pair that a tensor core operand wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.tiled_matmul.launch import BLOCK
from qserve.kernels.tiled_matmul.parameters import pack_parameters, to_half

PLANE = 32
"""Inputs to a plane; no group of inputs may be smaller."""

_CODE_BITS = 4
_NUM_PLANES = BLOCK // PLANE


@dataclass(frozen=True, slots=True)
class Planar4Weight:
    """A 4-bit weight ``[out_features, in_features]`` on a GPU, in planar4.

    words: int16 ``[out_features, ceil(in_features / 128) * 32]``, read as unsigned containers.
    parameters: int32 ``[num_groups, out_features]``: bits 0-15 the scale, bits 16-19 the zero
        point. One word, since an asynchronous copy moves 4 bytes at least; groups are rows, since
        a thread block reads one group of many outputs at a time.
    scale_dtype: what bits 0-15 are, float16 or bfloat16.
    group_size: 32, 64 or a multiple of 128.
    """

    words: torch.Tensor
    parameters: torch.Tensor
    scale_dtype: torch.dtype
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.parameters.nbytes


def pack_planar4(weight: GroupedWeight) -> Planar4Weight:
    """``weight`` in planar4, on the device that holds it.

    Groups that are neither 32, 64 nor a multiple of 128 are written as several smaller ones with
    the same scale. Scales stay bfloat16 if they are, and are rounded to float16 otherwise.
    Narrower codes are 4-bit codes that use fewer values. The order of inputs and outer scales are
    the caller's. Raises ``ValueError`` for wider codes, for groups that are no multiple of 32, and
    for scales outside the range of float16.
    """
    if weight.bits > 4:
        raise ValueError(f"planar4 holds 4-bit codes, the weight has {weight.bits} bits")
    group_size = gcd(weight.group_size, BLOCK)
    if group_size < PLANE:
        raise ValueError(
            f"groups of {weight.group_size} inputs do not suit planar4: expected a multiple of "
            f"{PLANE}; quantize with groups of 32, 64 or 128"
        )
    if group_size == BLOCK:
        group_size = weight.group_size
    repeats = weight.group_size // group_size
    scales = to_half(weight.scales)
    parameters = pack_parameters(scales, weight.zero_points).repeat_interleave(repeats, dim=0)
    padding = -weight.in_features % BLOCK
    parameters = torch.nn.functional.pad(parameters, (0, 0, 0, padding // group_size))
    return Planar4Weight(
        words=pack_codes(weight.codes),
        parameters=parameters,
        scale_dtype=scales.dtype,
        in_features=weight.in_features,
        group_size=group_size,
    )


def unpack_planar4(packed: Planar4Weight) -> GroupedWeight:
    """The weight that ``packed`` holds: undoes ``pack_planar4`` up to the split of groups."""
    containers = packed.words.to(torch.int32).unflatten(1, (-1, PLANE))
    planes = [containers >> (4 * plane) & 15 for plane in range(_NUM_PLANES)]
    codes = torch.stack(planes, dim=2).flatten(1).to(torch.uint8)
    num_groups = packed.in_features // packed.group_size
    parameters = packed.parameters[:num_groups].T
    return GroupedWeight(
        codes=codes[:, : packed.in_features].contiguous(),
        scales=parameters.to(torch.int16).view(packed.scale_dtype),
        zero_points=(parameters >> 16).to(torch.uint8),
        bits=4,
        group_size=packed.group_size,
    )


def is_progressive(weight: GroupedWeight) -> bool:
    """Whether integer scales may multiply the codes before an int8 product (QoQ, 2405.04532, 4.1).

    So it is when there are outer scales, scales are integers whose products with a code fit a byte,
    and all products ``(code - zero_point) * scale`` fit an int8.
    """
    if weight.channel_scales is None:
        return False
    scales = weight.scales.float()
    if bool((scales != scales.round()).any()) or not float(scales.min()) > 0:
        return False
    groups = weight.codes.reshape(*scales.shape, weight.group_size)
    low, high = (x.to(torch.int32) - weight.zero_points for x in groups.aminmax(dim=2))
    fits = bool((low * scales >= -128).all()) and bool((high * scales <= 127).all())
    return fits and float(scales.max()) * ((1 << _CODE_BITS) - 1) <= 255


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """The words of 4-bit codes uint8 ``[out_features, in_features]``: see ``Planar4Weight``."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK))
    planes = padded.to(torch.int32).unflatten(1, (-1, _NUM_PLANES, PLANE)).unbind(2)
    containers = planes[0]
    for plane in range(1, _NUM_PLANES):
        containers = containers | planes[plane] << (4 * plane)
    words: torch.Tensor = containers.to(torch.int16).flatten(1)  # keeps the low 16 bits
    return words
