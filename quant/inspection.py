"""What a checkpoint holds, learned from its headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint

KV_BYTES = 2  # of one element of a 16-bit key-value cache
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of the model: its weight, and what is stored beside it.

    shape: of the weight, ``(out_features, in_features)`` for a linear layer.
    format: what packs it, such as ``awq``, or the dtype, such as ``bfloat16``; for GGUF its own
        name, such as ``Q4_1``.
    bits: stored bits for each element of the weight, scales and zero points included.
    group_size: inputs that share a scale; None where nothing does.
    num_parameters, num_bytes: of all its tensors, a bias included.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    group_size: int | None
    num_parameters: int
    num_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.group_size is not None


@dataclass(frozen=True, slots=True)
class Inspection:
    """A whole model.

    format: what its quantized layers are in, or the dtype that most of its bytes have.
    kv_cache: the scales of keys and values that it has, in words; None without any.
    kv_bytes_per_token: keys and values of one token in all layers, at 16 bits; None when the
        config does not say (another architecture than the Llama family).
    """

    path: Path
    architecture: str
    format: str
    kv_cache: str | None
    kv_bytes_per_token: int | None
    layers: tuple[Layer, ...]

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def bits_per_parameter(self) -> float:
        """Of the whole model."""
        return 8 * self.num_bytes / max(self.num_parameters, 1)

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Of the quantized layers, scales and zero points included; None when there is none."""
        quantized = [layer for layer in self.layers if layer.is_quantized]
        if not quantized:
            return None
        num_weights = [math.prod(layer.shape) for layer in quantized]
        bits = sum(layer.bits * n for layer, n in zip(quantized, num_weights, strict=True))
        return bits / sum(num_weights)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """What a checkpoint folder holds. Reads config.json and the headers of the tensor files.

    Raises ``CheckpointError`` when these are damaged or contradict each other.
    """
    layers = tuple(
        _describe(checkpoint, name) for name in sorted(checkpoint.modules, key=_natural_order)
    )
    return Inspection(
        path=checkpoint.folder,
        architecture=checkpoint.architecture,
        format=checkpoint.method or most_bytes(layers),
        kv_cache=None if checkpoint.kv_cache is None else str(checkpoint.kv_cache),
        kv_bytes_per_token=kv_bytes_per_token(checkpoint.config),
        layers=layers,
    )


def _describe(checkpoint: Checkpoint, module: str) -> Layer:
    names = {key: f"{module}.{key}".lstrip(".") for key in checkpoint.modules[module]}
    shapes = {key: checkpoint.shape(name) for key, name in names.items()}
    dtypes = {key: checkpoint.dtype(name) for key, name in names.items()}
    num_bytes = {key: math.prod(shapes[key]) * dtype_bits(dtypes[key]) // 8 for key in names}
    main = "weight" if "weight" in names else next(iter(names))
    packed = checkpoint.describe(module)
    stored: tuple[str, ...] = (main,)
    shape = shapes[main]
    if packed is not None and checkpoint.format is not None:
        stored = tuple(key for key in names if key in checkpoint.format.keys)
        shape = (packed.out_features, packed.in_features)
    num_weights = math.prod(shape)
    others = [key for key in names if key not in stored]
    return Layer(
        name=module or main,
        shape=shape,
        format=str(checkpoint.method)
        if packed
        else DTYPE_NAMES.get(dtypes[main], dtypes[main].lower()),
        bits=8 * sum(num_bytes[key] for key in stored) / max(num_weights, 1),
        group_size=packed.group_size if packed else None,
        num_parameters=num_weights + sum(math.prod(shapes[key]) for key in others),
        num_bytes=sum(num_bytes.values()),
    )


def dtype_bits(dtype: str) -> int:
    """The width of a safetensors dtype: the first number in its name, 8 for ``BOOL``."""
    if dtype == "BOOL":
        return 8
    found = re.search(r"\d+", dtype)
    if found is None:
        raise CheckpointError(f"dtype {dtype}: expected one of safetensors', such as BF16")
    return int(found[0])


def most_bytes(layers: Iterable[Layer]) -> str:
    """The format that most bytes of the model are in."""
    total: dict[str, int] = {}
    for layer in layers:
        total[layer.format] = total.get(layer.format, 0) + layer.num_bytes
    if not total:
        raise CheckpointError("the tensor files hold no tensor: the checkpoint is empty")
    return max(total, key=lambda name: total[name])


def kv_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes that one token takes in a 16-bit key-value cache, over all layers.

    ``2 * num_hidden_layers * num_key_value_heads * head_dim * 2`` by the keys of ``config.json``.
    """
    num_layers = _count(config.get("num_hidden_layers"))
    num_heads = _count(config.get("num_attention_heads"))
    num_kv_heads = _count(config.get("num_key_value_heads")) or num_heads
    head_dim = _count(config.get("head_dim"))
    if head_dim is None and num_heads and (hidden_size := _count(config.get("hidden_size"))):
        head_dim = hidden_size // num_heads
    if not num_layers or not num_kv_heads or not head_dim:
        return None
    return 2 * num_layers * num_kv_heads * head_dim * KV_BYTES


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
