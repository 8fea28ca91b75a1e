"""What a config says about rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qserve.kernels.kv_store import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)
from qserve.quant.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. share: the part of each head that is rotated."""

    theta: float
    share: float
    scaling: RopeScaling | None


def read_rope(config: Mapping[str, Any]) -> Rope:
    """From ``rope_parameters`` or the keys that transformers 4 wrote.

    Raises ``CheckpointError`` for a scaling that lacks a number, ``UnsupportedModelError`` for one
    that is not computed.
    """
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(block.get("rope_theta") or config.get("rope_theta") or 10000.0)
    share = block.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    lengths = {
        key: config[key]
        for key in ("max_position_embeddings", "original_max_position_embeddings")
        if key in config
    }
    return Rope(theta, float(share), _read_scaling({**lengths, **block}))


def _read_scaling(block: Mapping[str, Any]) -> RopeScaling | None:
    kind = block.get("rope_type") or block.get("type") or "default"
    if kind == "default":
        return None
    try:
        if kind == "linear":
            return LinearScaling(float(block["factor"]))
        if kind == "llama3":
            return Llama3Scaling(
                factor=float(block["factor"]),
                low_freq_factor=float(block["low_freq_factor"]),
                high_freq_factor=float(block["high_freq_factor"]),
                original_max_positions=int(block["original_max_position_embeddings"]),
            )
        if kind == "yarn":
            return _read_yarn(block)
        if kind in ("longrope", "su"):
            return _read_longrope(block)
    except KeyError as error:
        raise CheckpointError(
            f"config.json asks for {kind} scaling of rotary embeddings without {error}"
        ) from None
    raise UnsupportedModelError(
        f"rotary embeddings of type {kind!r} are not computed: expected default, linear, "
        "llama3, yarn or longrope"
    )


def _read_yarn(block: Mapping[str, Any]) -> YarnScaling:
    """Absent and null settings have transformers' values."""
    given = {
        "attention_factor": block.get("attention_factor"),
        "beta_fast": block.get("beta_fast") or None,
        "beta_slow": block.get("beta_slow") or None,
        "mscale": block.get("mscale"),
        "mscale_all_dim": block.get("mscale_all_dim"),
    }
    return YarnScaling(
        factor=float(block["factor"]),
        original_max_positions=int(block["original_max_position_embeddings"]),
        truncate=bool(block.get("truncate", True)),
        **{name: float(value) for name, value in given.items() if value is not None},
    )


def _read_longrope(block: Mapping[str, Any]) -> LongRopeScaling:
    """The attention factor that is not given is the paper's, as transformers computes it."""
    original = int(block["original_max_position_embeddings"])
    attention_factor = block.get("attention_factor")
    if attention_factor is None:
        stretch = float(block.get("factor") or block["max_position_embeddings"] / original)
        attention_factor = math.sqrt(1 + math.log(max(stretch, 1.0)) / math.log(original))
    return LongRopeScaling(
        short_factors=tuple(map(float, block["short_factor"])),
        long_factors=tuple(map(float, block["long_factor"])),
        original_max_positions=original,
        attention_factor=float(attention_factor),
    )
