"""What each method is made of: its levels, its groups, and which steps choose the codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from qserve.kernels.activations import Activations
from qserve.quant.grid import LevelSet, Zero
from qserve.quant.options import GROUP_SIZES, Method, QuantizeOptions, Rounding

WHOLE_ROW = -1
"""The group size of one scale for each output."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Levels of equal probability under a normal distribution (QLoRA, Dettmers et al. 2023), as
bitsandbytes stores them."""

FP4 = tuple(
    sign * value / 12
    for sign, values in ((-1, (12, 8, 6, 4, 3, 2, 0.0625)), (1, (0, 0, 0.0625, 2, 3, 4, 6, 8, 12)))
    for value in values
)
"""The levels of bitsandbytes' fp4 in ascending order; both signs of zero are the same level."""


class Transform(Enum):
    """What is done to the inputs of a stage, and undone in the layer before it."""

    NONE = "none"

    SCALE = "scale"
    """Scales that make the weights easier to round."""

    SMOOTH = "smooth"
    """Scales that share the difficulty of rounding between weights and activations."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A method, taken apart.

    group_sizes: what may be chosen from, coarsest first. calibrated: whether text is read; without
    it every group spans its weights and each weight is rounded alone. multiple: of outputs, and of
    inputs, that the format packs at once.
    activations: what the result is run with, None for 16 bits.
    """

    levels: LevelSet
    group_sizes: tuple[int, ...]
    calibrated: bool = True
    transform: Transform = Transform.SCALE
    rounding: Rounding = Rounding.FEEDBACK
    activations: Activations | None = None
    multiple: int = 32


def profile_of(options: QuantizeOptions) -> Profile:
    """The profile that the options ask for."""
    method, bits = options.method, options.code_bits
    rows = (WHOLE_ROW,)
    int8 = LevelSet(8, Zero.CENTERED, scale_dtype=torch.float32)
    if method is Method.GPTQ:
        sizes = (*GROUP_SIZES, WHOLE_ROW)
        return Profile(LevelSet(bits, Zero.MIDDLE), sizes, rounding=options.rounding)
    if method is Method.INT8:
        return Profile(int8, (*rows, *GROUP_SIZES), transform=Transform.NONE, multiple=1)
    if method is Method.LLM_INT8:
        return Profile(int8, rows, calibrated=False, multiple=1)
    if method is Method.SMOOTHQUANT:
        token = Activations.INT8_TOKEN
        return Profile(int8, rows, transform=Transform.SMOOTH, activations=token, multiple=1)
    if method in (Method.NF4, Method.FP4):
        table = NF4 if method is Method.NF4 else FP4
        levels = LevelSet(codebook=table, scale_dtype=torch.float32)
        return Profile(levels, (64,), rounding=options.rounding)
    calibrated = method is Method.AWQ
    return Profile(LevelSet(bits), GROUP_SIZES, calibrated, rounding=options.rounding)
