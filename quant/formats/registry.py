"""All checkpoint formats: which reader a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats import auto_round
from qserve.quant.formats.awq import AwqFormat
from qserve.quant.formats.bitsandbytes import BitsAndBytesFormat
from qserve.quant.formats.compressed_tensors import CompressedFormat
from qserve.quant.formats.fp8 import Float8Format
from qserve.quant.formats.gptq import GptqFormat
from qserve.quant.formats.layer_format import Format, text_of

READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "awq": AwqFormat.from_config,
    "gptq": GptqFormat.from_config,
    "compressed-tensors": CompressedFormat.from_config,
    "bitsandbytes": BitsAndBytesFormat.from_config,
    "fp8": Float8Format.from_config,
    "fbgemm_fp8": Float8Format.from_config,
    "auto-round": auto_round.from_config,
}
"""``quant_method`` -> what reads the rest of the block."""

SPELLINGS = {"compressed_tensors": "compressed-tensors", "intel/auto-round": "auto-round"}


def read_format(block: Mapping[str, Any], where: str) -> Format:
    """The format that a ``quantization_config`` describes. where: the model, for the message.

    Raises ``UnsupportedModelError`` for a method that is not in ``READERS`` and for a layout of one
    that is not read.
    """
    method = text_of(block, "quant_method", "method")
    if method is None and ("load_in_4bit" in block or "load_in_8bit" in block):
        method = "bitsandbytes"  # before transformers 4.31 it did not say so
    method = SPELLINGS.get(method or "", method)
    if method not in READERS:
        raise UnsupportedModelError(
            f"{where} is quantized with {method!r}: float checkpoints and {', '.join(READERS)} can "
            "be read; quantize the float checkpoint instead"
        )
    return READERS[method](block)
