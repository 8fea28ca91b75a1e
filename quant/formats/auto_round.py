"""AutoRound's checkpoints (owner: AutoRound 0.16.1): the tensors of GPTQ or AWQ under its own name.

``packing_format`` says which: ``auto_round:auto_gptq`` (v1 zero points), ``auto_round`` (GPTQ's
tensors with zero points as they are) or ``auto_round:auto_awq`` (gemm). ``extra_config`` has what
differs for a layer, named in full or by a pattern; 16 bits there is a layer left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.awq import AwqFormat
from qserve.quant.formats.gptq import GptqFormat, ZeroPoints
from qserve.quant.formats.gptq_dynamic import READ_BITS, Scheme
from qserve.quant.formats.layer_format import read_bits, read_group_size, text_of

NAME = "auto-round"
UNQUANTIZED_BITS = 16
ZERO_POINTS = {"auto_round": ZeroPoints.PLAIN, "auto_round:auto_gptq": ZeroPoints.LESS_ONE}
AWQ_PACKING = "auto_round:auto_awq"


def from_config(block: Mapping[str, Any]) -> GptqFormat | AwqFormat:
    """The format that a ``quantization_config`` of AutoRound describes.

    Raises ``UnsupportedModelError`` for a packing that is not one of the three.
    """
    packing = text_of(block, "packing_format") or "auto_round"
    if packing == AWQ_PACKING:
        return replace(AwqFormat.from_config({**block, "version": "gemm"}), name=NAME)
    if packing not in ZERO_POINTS or block.get("data_type", "int") != "int":
        raise UnsupportedModelError(
            f"AutoRound packed as {packing!r} with data type {block.get('data_type', 'int')!r}: "
            f"expected integers in {', '.join([*ZERO_POINTS, AWQ_PACKING])}"
        )
    scheme = _read_scheme(block, Scheme(4, 128, None))
    return GptqFormat(
        scheme=scheme,
        zero_points=ZERO_POINTS[packing],
        overrides=_read_overrides(block.get("extra_config"), scheme),
        name=NAME,
    )


def _read_scheme(block: Mapping[str, Any], default: Scheme) -> Scheme:
    symmetric = block.get("sym", default.symmetric)
    return Scheme(
        bits=read_bits("AutoRound", block.get("bits", default.bits), READ_BITS),
        group_size=read_group_size("AutoRound", block.get("group_size", default.group_size)),
        symmetric=symmetric if isinstance(symmetric, bool) else None,
    )


def _read_overrides(layers: object, default: Scheme) -> tuple[tuple[re.Pattern[str], Scheme], ...]:
    if layers is None:
        return ()
    if not isinstance(layers, dict) or not all(isinstance(one, dict) for one in layers.values()):
        raise UnsupportedModelError("AutoRound extra_config: expected an object of objects")
    overrides = []
    for name, changes in layers.items():
        if changes.get("bits") == UNQUANTIZED_BITS:
            continue
        try:
            pattern = re.compile(f"(?:{name})$")
        except re.error:
            pattern = re.compile(f"{re.escape(name)}$")
        overrides.append((pattern, _read_scheme(changes, default)))
    return tuple(overrides)
