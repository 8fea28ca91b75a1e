"""GPTQModel's `dynamic` (owner: GPTQModel 7.7.0): settings of single layers, by patterns.

A key is ``-:`` and a pattern for layers in 16 bits, or ``+:`` and a pattern for layers with other
settings than the block states. A pattern is matched from the start of a full name, and the first
that matches counts. vLLM matches the names of its fused layers (``qkv_proj``, ``experts``) too, so
a rule for a layer names the one that it is fused into beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.fused_sets import FUSED_SETS, expert_modules, fused_name
from qserve.quant.formats.layer_format import read_bits, read_group_size

READ_BITS = (2, 3, 4, 5, 6, 7, 8)
BLOCK_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one layer is packed. symmetric: None when the configuration does not say."""

    bits: int
    group_size: int
    symmetric: bool | None


def read_rules(rules: object, scheme: Scheme) -> tuple[tuple[re.Pattern[str], Scheme], ...]:
    """The patterns of ``dynamic`` with the schemes of what they match; ``scheme``: of the others.

    A rule that leaves a layer out needs no scheme: it has no codes.
    Raises ``UnsupportedModelError`` for what is no rule.
    """
    if rules is None:
        return ()
    if not isinstance(rules, dict):
        raise UnsupportedModelError(f"GPTQ dynamic {rules!r}: expected an object of patterns")
    found = []
    for key, changes in rules.items():
        if key.startswith("-:"):
            continue
        try:
            pattern = re.compile(key.removeprefix("+:"))
        except re.error as error:
            raise UnsupportedModelError(f"GPTQ dynamic {key!r} is no pattern: {error}") from None
        if not isinstance(changes, dict):
            raise UnsupportedModelError(f"GPTQ dynamic {key!r}: expected an object of settings")
        symmetric = changes.get("sym", scheme.symmetric)
        own = replace(
            scheme,
            bits=read_bits("GPTQ", changes.get("bits", scheme.bits), READ_BITS),
            group_size=read_group_size("GPTQ", changes.get("group_size", scheme.group_size)),
            symmetric=symmetric if isinstance(symmetric, bool) else None,
        )
        found.append((pattern, own))
    return tuple(found)


def write_rules(
    others: Mapping[str, tuple[int, int]], ignored: Sequence[str]
) -> dict[str, dict[str, int]]:
    """``dynamic`` for layers by their full names.

    others: bits and group size of those that have not what the block states. ignored: those left
    in 16 bits.
    """
    rules: dict[str, dict[str, int]] = {f"-:{pattern}": {} for pattern in _patterns(ignored)}
    for settings in dict.fromkeys(others.values()):
        names = [name for name, own in others.items() if own == settings]
        for pattern in _patterns(names):
            rules[f"+:{pattern}"] = {"bits": settings[0], "group_size": settings[1]}
    return rules


def _patterns(names: Sequence[str]) -> list[str]:
    """Patterns for exactly these layers: one for all that differ in the number of their block."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name in (*names, *expert_modules(names)):
        parent, dot, last = name.rpartition(".")
        sets.setdefault((parent + dot, fused_name(last) or last), []).append(last)
    numbers: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (parent, whole), lasts in sets.items():
        is_whole = set(lasts) == set(FUSED_SETS.get(whole, ()))
        before, number, after = (*BLOCK_NUMBER.split(parent, maxsplit=1), "", "")[:3]
        ends = (*lasts, whole) if is_whole else tuple(lasts)
        numbers.setdefault((before, after, ends), []).append(number)
    return [
        f"^{re.escape(before)}{_one_of(found)}{re.escape(after)}{_one_of(ends)}$"
        for (before, after, ends), found in numbers.items()
    ]


def _one_of(texts: Sequence[str]) -> str:
    choices = "|".join(map(re.escape, texts))
    return choices if len(texts) == 1 else f"(?:{choices})"
