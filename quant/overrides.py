"""Settings of single layers that differ from those of the model, chosen by patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qserve.quant.errors import OptionError

FLOAT_BITS = 16
"""The width that leaves a layer as it is."""

CODE_BITS = (2, 3, 4, 8)
"""Widths of integer codes that kernels have, and formats for any of them."""

SYNTAX = "expected REGEX=bits:8,group:32, or REGEX=16 to leave layers in 16 bits"


@dataclass(frozen=True, slots=True)
class Override:
    """What layers get for which a regular expression is found in the full name.

    bits: of a code, 16 for layers that stay as they are. group_size: inputs that share a scale, -1
    for a row. None: as the others. why: in words for the report, '' to name the pattern.
    Raises ``OptionError`` for a pattern that is none, and when there is nothing to set.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    why: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise OptionError(f"{self.pattern!r} is not a regular expression ({error})") from None
        if self.bits is None and self.group_size is None:
            raise OptionError(f"override {self.pattern!r} sets neither bits nor a group size")
        if self.bits is not None:
            check_bits(f"override {self.pattern!r}", self.bits)

    @property
    def reason(self) -> str:
        """Why a layer has its settings, in words."""
        return self.why or f"matches {self.pattern!r}"

    def matches(self, name: str) -> bool:
        """Whether it is for the layer of this full name."""
        return re.search(self.pattern, name) is not None


def check_bits(what: str, bits: int) -> None:
    """Raise ``OptionError`` for a width that is neither of a code nor 16. what: for the message."""
    expected = (*CODE_BITS, FLOAT_BITS)
    if bits not in expected:
        raise OptionError(f"{what}: {bits} bits: expected {', '.join(map(str, expected))}")


def parse_override(text: str) -> Override:
    """The override that ``REGEX=bits:8,group:32`` or ``REGEX=16`` stands for.

    Raises ``OptionError`` for any other text.
    """
    pattern, equals, settings = text.rpartition("=")
    found: dict[str, int] = {}
    for setting in settings.split(","):
        key, colon, value = setting.strip().rpartition(":")
        name = {"": "bits", "bits": "bits", "group": "group_size"}.get(key)
        if not equals or name is None or name in found or not re.fullmatch(r"-?\d+", value):
            raise OptionError(f"override {text!r}: {SYNTAX}")
        found[name] = int(value)
    return Override(pattern, found.get("bits"), found.get("group_size"))


@dataclass(frozen=True, slots=True)
class Wish:
    """What overrides say of layers that run as one.

    bits, group_size: None where nothing is said. named: the layers that a pattern matched, with
    the reason of the last one that did.
    """

    bits: int | None
    group_size: int | None
    named: Mapping[str, str]

    @property
    def reason(self) -> str:
        """Whose wish it is, in words; '' when there is none."""
        return " and ".join(dict.fromkeys(self.named.values()))


class Overrides:
    """Overrides in the order in which they were given; the later of two counts."""

    def __init__(self, overrides: Iterable[Override]) -> None:
        self._overrides = tuple(overrides)
        self._used: set[Override] = set()

    def wish(self, names: Sequence[str]) -> Wish:
        """What is said of the layers ``names``, which run as one: what one gets, all get."""
        matching = [one for one in self._overrides if any(map(one.matches, names))]
        self._used.update(matching)
        bits = [one.bits for one in matching if one.bits is not None]
        group_sizes = [one.group_size for one in matching if one.group_size is not None]
        named = {name: one.reason for one in matching for name in names if one.matches(name)}
        return Wish(bits[-1] if bits else None, group_sizes[-1] if group_sizes else None, named)

    def grant(self, name: str) -> None:
        """Count patterns as used that ask for 16 bits for this layer, which has them anyway."""
        asking = (one for one in self._overrides if one.bits == FLOAT_BITS)
        self._used.update(one for one in asking if one.matches(name))

    @property
    def unused(self) -> list[str]:
        """The patterns that matched nothing so far."""
        return [one.pattern for one in self._overrides if one not in self._used]
