"""The linear layers that serving engines run as one, which therefore must be packed alike."""

from __future__ import annotations

import re
from collections.abc import Iterable

FUSED_SETS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Last parts of names: vLLM's for the whole, and those of the layers that it is made of."""

OF_AN_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.[^.]+")
"""A layer of an expert; engines run all of a block as one module of the name ``experts``."""


def expert_modules(names: Iterable[str]) -> list[str]:
    """The modules that engines make of the experts among some layers, by full names."""
    found = (match["experts"] for match in map(OF_AN_EXPERT.fullmatch, names) if match)
    return list(dict.fromkeys(found))


def fused_name(last: str) -> str | None:
    """The last part of the name of the layer that this one is run in; None when it runs alone."""
    return next((whole for whole, members in FUSED_SETS.items() if last in members), None)
