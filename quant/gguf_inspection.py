"""What a GGUF file holds, learned from its header (owner of the format: ggml)."""

from __future__ import annotations

import math
from pathlib import Path

import gguf

from qserve.quant.errors import CheckpointError
from qserve.quant.inspection import KV_BYTES, Inspection, Layer, most_bytes


def inspect_gguf(path: Path) -> Inspection:
    """The layers of a GGUF file under its own names, such as ``blk.0.attn_q``.

    Raises ``CheckpointError`` for a file that is not GGUF or that is truncated.
    """
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the parser checks little itself: anything may come out of it
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({type(error).__name__}: {error}): the file is "
            "truncated or damaged"
        ) from None
    layers = tuple(map(_describe, reader.tensors))
    quantized = [layer for layer in layers if layer.is_quantized]
    return Inspection(
        path=path,
        architecture=str(_value(reader, "general.architecture")),
        format=most_bytes(quantized or layers),
        kv_cache=None,
        kv_bytes_per_token=_kv_bytes_per_token(reader),
        layers=layers,
    )


def _describe(tensor: gguf.ReaderTensor) -> Layer:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    shape = tuple(int(size) for size in reversed(tensor.shape))  # ggml counts from the fastest
    return Layer(
        name=tensor.name.removesuffix(".weight"),
        shape=shape,
        format=tensor.tensor_type.name,
        bits=8 * block_bytes / block_size,
        group_size=block_size if block_size > 1 else None,
        num_parameters=math.prod(shape),
        num_bytes=int(tensor.n_bytes),
    )


def _value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _kv_bytes_per_token(reader: gguf.GGUFReader) -> int | None:
    keys = ("block_count", "attention.head_count", "embedding_length")
    prefix = _value(reader, "general.architecture")
    num_layers, num_heads, hidden_size = (_value(reader, f"{prefix}.{key}") for key in keys)
    num_kv_heads = _value(reader, f"{prefix}.attention.head_count_kv") or num_heads
    head_dim = _value(reader, f"{prefix}.attention.key_length")
    if head_dim is None and isinstance(hidden_size, int) and isinstance(num_heads, int):
        head_dim = hidden_size // num_heads
    if not (
        isinstance(num_layers, int) and isinstance(num_kv_heads, int) and isinstance(head_dim, int)
    ):
        return None
    return 2 * num_layers * num_kv_heads * head_dim * KV_BYTES
