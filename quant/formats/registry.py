"""All checkpoint formats: which reader a configuration asks for, and what writes which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from qserve.kernels.activations import Activations
from qserve.quant.errors import OptionError, UnsupportedModelError
from qserve.quant.formats import auto_round
from qserve.quant.formats.awq import AwqFormat, AwqWriter
from qserve.quant.formats.bitsandbytes import BitsAndBytesFormat, BitsAndBytesWriter
from qserve.quant.formats.compressed_schemes import KvCacheScheme
from qserve.quant.formats.compressed_tensors import CompressedFormat, CompressedWriter
from qserve.quant.formats.fp8 import Float8Format
from qserve.quant.formats.gptq import GptqFormat, GptqWriter
from qserve.quant.formats.layer_format import Format, text_of
from qserve.quant.formats.qoq import QoqFormat, QoqWriter
from qserve.quant.formats.writer import Writer

READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "awq": AwqFormat.from_config,
    "gptq": GptqFormat.from_config,
    "compressed-tensors": CompressedFormat.from_config,
    "bitsandbytes": BitsAndBytesFormat.from_config,
    "fp8": Float8Format.from_config,
    "fbgemm_fp8": Float8Format.from_config,
    "auto-round": auto_round.from_config,
    "qoq": QoqFormat.from_config,
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


class OutputFormat(Enum):
    """The formats that are written."""

    AWQ = "awq"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq-v2"
    COMPRESSED_TENSORS = "compressed-tensors"
    BITSANDBYTES = "bitsandbytes"
    QOQ = "qoq"


def make_writer(
    output: OutputFormat,
    program: str,
    *,
    activations: Activations | None = None,
    kv_cache: KvCacheScheme | None = None,
    dtype: str = "float16",
) -> Writer:
    """The writer of a format.

    program: name and version, for the formats that record it. activations: what the layers are
    made for. kv_cache: the scheme of stored key-value scales. dtype: of the tensors left in 16
    bits. Raises ``OptionError`` for activations or key-value scales that the format cannot state.
    """
    if output is OutputFormat.COMPRESSED_TENSORS:
        return CompressedWriter(activations, kv_cache)
    if output is OutputFormat.QOQ:
        activations = None  # it is made for int8 activations and states no others
    if activations is not None or kv_cache is not None:
        what = "quantized activations" if activations is not None else "key-value scales"
        raise OptionError(
            f"{output.value} cannot state {what}: choose {OutputFormat.COMPRESSED_TENSORS.value}"
        )
    writers: dict[OutputFormat, Writer] = {
        OutputFormat.AWQ: AwqWriter(),
        OutputFormat.GPTQ: GptqWriter(program),
        OutputFormat.GPTQ_V2: GptqWriter(program, version_2=True),
        OutputFormat.BITSANDBYTES: BitsAndBytesWriter(dtype),
        OutputFormat.QOQ: QoqWriter(),
    }
    return writers[output]
