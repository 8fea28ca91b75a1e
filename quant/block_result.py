"""What quantizing one decoder block gives."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.report import LayerReport


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The codes of a block, by the layers' names inside it, and what they cost.

    The parameters that stay in 16 bits are in the block itself, as they will be stored.
    error: squared difference of the block's output, relative to what the block adds; None without
    calibration.
    """

    weights: dict[str, QuantizedWeight]
    layers: tuple[LayerReport, ...]
    error: float | None
