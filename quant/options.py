"""What a quantization run is asked to do, checked once when it is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qserve.quant.errors import OptionError

GROUP_SIZES = (128, 64, 32)
"""Group sizes that every reader of the AWQ format takes, coarsest first."""

DEFAULT_SHARD_BYTES = 5_000_000_000


class Method(Enum):
    """How weights become codes."""

    AWQ = "awq"
    """Activation-aware scales, searched ranges (Lin et al., 2023)."""

    RTN = "rtn"
    """Round to nearest, without looking at any text: the baseline."""


class CalibrationSource(Enum):
    """Calibration text that the user does not have to bring."""

    BUILT_IN = "built-in"
    """The texts that come with the package."""

    SELF = "self"
    """Text that the model itself writes, sampled at temperature 1."""


class Rounding(Enum):
    """How AWQ picks a code for each weight once scales and ranges are known."""

    NEAREST = "nearest"
    """The nearest one, as in the paper."""

    FEEDBACK = "feedback"
    """What rounding one input does wrong is made up for by the inputs after it, then codes and
    group scales are improved in turn (GPTQ, coordinate descent, refit): free at run time."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """One quantization run.

    group_size: inputs that share a scale; None takes the largest of 128, 64 and 32 that divides
        every layer.
    rounding: of AWQ; RTN rounds to nearest.
    calibration: a UTF-8 text file, or one of the sources that need no file. RTN reads none.
    num_samples, seq_len: calibration windows and their length in tokens.
    ignore: regular expressions; a linear layer stays in 16 bits when one is found in its full name
        (``model.layers.0.mlp.down_proj``), together with the layers that serving engines fuse
        it with.
    seed: of self-generated calibration text; nothing else is random.
    max_shard_bytes: a new safetensors file is begun beyond this size.

    Raises ``OptionError`` for values that no model could satisfy.
    """

    method: Method = Method.AWQ
    bits: int = 4
    group_size: int | None = None
    rounding: Rounding = Rounding.FEEDBACK
    calibration: Path | CalibrationSource = CalibrationSource.BUILT_IN
    num_samples: int = 32
    seq_len: int = 512
    ignore: tuple[str, ...] = ()
    seed: int = 0
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise OptionError(f"bits {self.bits}: the AWQ format holds 4-bit weights; use 4")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise OptionError(
                f"group size {self.group_size}: expected 128, 64 or 32, which every engine reads"
            )
        for name in ("num_samples", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} {getattr(self, name)}: expected a positive number")
        if self.seq_len < 2:
            raise OptionError(f"seq_len {self.seq_len}: expected at least 2 tokens")
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(
                    f"ignore {pattern!r} is not a regular expression ({error})"
                ) from None
