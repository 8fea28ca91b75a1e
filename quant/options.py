"""What a quantization run is asked to do, checked once when it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qserve.quant.errors import OptionError
from qserve.quant.formats.compressed_schemes import Kind, KvCacheScheme
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.hub_data import PREFIX, HubDataset, parse_dataset
from qserve.quant.overrides import FLOAT_BITS, Override, check_bits
from qserve.quant.steps import DEFAULT_DAMPING

GROUP_SIZES = (128, 64, 32)
"""Group sizes that every reader of the AWQ format takes, coarsest first."""

DEFAULT_SHARD_BYTES = 5_000_000_000


class Method(Enum):
    """How weights become codes."""

    AWQ = "awq"
    """Activation-aware scales, searched ranges (Lin et al., 2023)."""

    GPTQ = "gptq"
    """The same steps on symmetric codes of 2, 3, 4 or 8 bits, stored as GPTQ (Frantar et al.,
    2022)."""

    INT4 = "int4"
    """The same symmetric codes of 4 bits, stored as compressed-tensors."""

    INT8 = "int8"
    """8-bit weights, one scale a row or a group; activations stay in 16 bits."""

    SMOOTHQUANT = "smoothquant"
    """8-bit weights and activations, with scales that move outliers from the activations to the
    weights (Xiao et al., 2022)."""

    NF4 = "nf4"
    """4-bit levels that are dense where weights are, stored as bitsandbytes does (Dettmers et al.,
    2023)."""

    FP4 = "fp4"
    """4-bit floats, stored as bitsandbytes does."""

    FLOAT8 = "fp8"
    """8-bit floats (e4m3) with one scale a row; activations too, one scale a token."""

    FLOAT8_WEIGHT = "fp8-weight"
    """8-bit float weights; activations stay in 16 bits."""

    LLM_INT8 = "llm-int8"
    """8-bit weights as bitsandbytes' LLM.int8() stores them; reads no text (Dettmers et al.,
    2022)."""

    QOQ = "qoq"
    """4-bit weights that become int8 by integer arithmetic, and 8-bit activations (Lin et al.,
    2024)."""

    HQQ = "hqq"
    """Ranges that a few outliers do not widen, found without looking at any text (Badri & Shaji,
    2023)."""

    RTN = "rtn"
    """Round to nearest, without looking at any text, stored as AWQ: the baseline."""


BITS = {method: (4,) for method in Method} | {
    Method.GPTQ: (4, 3, 2, 8),
    Method.HQQ: (4, 3, 2, 8),
    Method.INT8: (8,),
    Method.SMOOTHQUANT: (8,),
    Method.FLOAT8: (8,),
    Method.FLOAT8_WEIGHT: (8,),
    Method.LLM_INT8: (8,),
}
"""Widths of codes that a method can store, its default first."""


class CalibrationSource(Enum):
    """Calibration text that the user does not have to bring."""

    BUILT_IN = "built-in"
    """The texts that come with the package."""

    SELF = "self"
    """Text that the model itself writes, sampled at temperature 1."""


SOURCES = {"builtin": CalibrationSource.BUILT_IN, "self": CalibrationSource.SELF}
"""By the names that users give."""


def read_source(text: str, folder: Path) -> Path | HubDataset | CalibrationSource:
    """The calibration text that a user names: ``builtin``, ``self``, ``hub:…``, or a file.

    folder: what a relative path starts from. Raises ``OptionError``.
    """
    if text.startswith(PREFIX):
        return parse_dataset(text)
    return SOURCES.get(text) or folder / text


class Effort(Enum):
    """How much is done for the quality of the methods that read text."""

    FULL = "full"
    """Every step that loses less."""

    FAST = "fast"
    """Scales and ranges are searched, codes are the nearest."""

    PLAIN = "plain"
    """The method as it was published and as other tools run it, to compare with; for those that
    other tools run without text, rounding to nearest."""


class Head(Enum):
    """How the output head is stored."""

    FLOAT = "16"
    """As it is, in 16 bits."""

    INT8 = "int8"
    """In 8 bits, one scale a row, beside the embedding that it may have been tied to."""


class KvCache(Enum):
    """What keys and values are to be stored as, with scales from the calibration text."""

    FLOAT8 = "fp8"
    INT8 = "int8"

    @property
    def scheme(self) -> KvCacheScheme:
        """As the checkpoint states it: one scale a head."""
        return KvCacheScheme(Kind.FLOAT if self is KvCache.FLOAT8 else Kind.INT, per_head=True)


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How long to tune at most: minutes, steps of the optimizer, or whichever comes first.

    The same number of steps gives the same result again. Raises ``OptionError`` for no limit and
    for one that is not positive.
    """

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise OptionError("tuning without an end: give minutes or steps")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise OptionError(f"tuning for {self.minutes} minutes: expected a positive number")
        if self.steps is not None and self.steps < 1:
            raise OptionError(f"tuning for {self.steps} steps: expected at least 1")


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """One quantization run.

    bits: of a code; None takes what the method usually stores.
    group_size: inputs that share a scale, -1 for all of a row; None takes the coarsest that the
        method's format has and that divides every layer.
    output: the format to write; None takes the method's own.
    effort: of the methods that read text.
    damping: share of its mean diagonal that error feedback adds to the Gram matrix of the inputs
        of a layer; ten times as much as often as that is needed.
    activation_order: groups collect inputs by falling importance, as GPTQ's ``desc_act``; only for
        GPTQ's formats, where it costs speed at run time.
    head: how the output head is stored; 8 bits in the formats that hold them beside the codes of
        the method.
    calibration: a file, a data set of the hub, or one of the sources that need neither. RTN reads
        none.
    assistant_only: of conversations only the assistant's messages count, the rest is context.
    num_samples, seq_len: calibration windows and their length in tokens.
    overrides: what single layers get instead of ``bits`` and ``group_size``; layers that serving
        engines run as one get the same, and of two settings for a layer the later counts.
    avg_bits: bits a weight that the linear layers of the blocks may have on average, with scales
        and zero points; bits and groups are then chosen for each layer.
    max_size: bytes that the weight files may have together; likewise.
    widths: bits to choose from, 16 for layers that stay as they are; none for all that the format
        holds.
    max_kl: divergence that ``quantize_within`` does not stop above.
    ignore: regular expressions; a linear layer stays in 16 bits when one is found in its full name
        (``model.layers.0.mlp.down_proj``), together with the layers that serving engines fuse
        it with.
    seed: of self-generated calibration text; nothing else is random.
    kv_cache: what scales of keys and values are found for; None finds none.
    tune: how long scales and norms learn after packing; None does not.
    max_shard_bytes: a new safetensors file is begun beyond this size.

    Raises ``OptionError`` for values that no model could satisfy.
    """

    method: Method = Method.AWQ
    bits: int | None = None
    group_size: int | None = None
    output: OutputFormat | None = None
    effort: Effort = Effort.FULL
    damping: float = DEFAULT_DAMPING
    activation_order: bool = False
    head: Head = Head.FLOAT
    calibration: Path | HubDataset | CalibrationSource = CalibrationSource.BUILT_IN
    assistant_only: bool = False
    num_samples: int = 32
    seq_len: int = 512
    overrides: tuple[Override, ...] = ()
    avg_bits: float | None = None
    max_size: int | None = None
    widths: tuple[int, ...] = ()
    max_kl: float | None = None
    ignore: tuple[str, ...] = ()
    seed: int = 0
    kv_cache: KvCache | None = None
    tune: TuneOptions | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in BITS[self.method]:
            listed = ", ".join(map(str, sorted(BITS[self.method])))
            raise OptionError(
                f"bits {self.bits}: {self.method.value} stores weights in {listed} bits"
            )
        for name in ("num_samples", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} {getattr(self, name)}: expected a positive number")
        if not 0 < self.damping <= 1:
            raise OptionError(f"damping {self.damping}: expected a share above 0 and up to 1")
        if not -(2**63) <= self.seed < 2**63:
            raise OptionError(f"seed {self.seed}: expected a whole number of 64 bits")
        if self.seq_len < 2:
            raise OptionError(f"seq_len {self.seq_len}: expected at least 2 tokens")
        if self.assistant_only and isinstance(self.calibration, CalibrationSource):
            raise OptionError(
                f"assistant_only: the text {self.calibration.value} has no conversations: give a "
                "file or a data set with `messages`"
            )
        if self.tune is not None and self.calibration is CalibrationSource.SELF:
            raise OptionError(
                "tuning needs more text than the model writes itself: give a text file"
            )
        self._check_limits()
        for pattern in self.ignore:
            Override(pattern, FLOAT_BITS)

    def _check_limits(self) -> None:
        for name in ("avg_bits", "max_size", "max_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name} {value}: expected a positive number")
        if self.is_limited and self.bits is not None:
            raise OptionError(
                f"bits {self.bits} and a limit on the size: give one; widths says what to choose "
                "from"
            )
        if self.is_limited and self.max_kl is not None:
            raise OptionError("max_kl may need more than a limit on the size leaves: give one")
        if self.widths and not self.is_limited:
            raise OptionError("widths are chosen from under a limit: give avg_bits or max_size")
        for width in self.widths:
            check_bits("widths", width)

    @property
    def calibration_name(self) -> str:
        """What reports call the text."""
        if isinstance(self.calibration, Path):
            return self.calibration.name
        if isinstance(self.calibration, CalibrationSource):
            return self.calibration.value
        return str(self.calibration)

    @property
    def is_limited(self) -> bool:
        """Whether bits and groups are chosen for a size."""
        return self.avg_bits is not None or self.max_size is not None

    @property
    def all_overrides(self) -> tuple[Override, ...]:
        """The overrides, and 16 bits for what is ignored."""
        return (*self.overrides, *(Override(pattern, FLOAT_BITS) for pattern in self.ignore))

    @property
    def code_bits(self) -> int:
        """The width of a code."""
        return BITS[self.method][0] if self.bits is None else self.bits
