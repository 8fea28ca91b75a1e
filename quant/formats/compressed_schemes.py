"""Which scheme a layer has in a compressed-tensors checkpoint (owner: compressed-tensors 0.20.0).

``config_groups`` name their layers by ``targets``: a full name, ``re:`` and a pattern for its
start, or the class, of which ``Linear`` is the one that packs. A name counts before a class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qserve.kernels.activations import Activations
from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.layer_format import read_bits, read_group_size, text_of
from qserve.quant.formats.writer import Coding, LayerScheme, stated_group_sizes

LINEAR = "Linear"
PATTERN = "re:"
ATTENTION_HEAD = "attn_head"
SPARSE = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask")
UNREAD = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized")


class Kind(Enum):
    """``type`` of the weights."""

    INT = "int"
    FLOAT = "float"


class Strategy(Enum):
    """What shares a scale. Block: ``Scheme.block`` rows and columns."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the layers of one group are packed.

    group_size: inputs that share a scale, for ``Strategy.GROUP`` alone. activations: what they are
    multiplied with; None for weight-only.
    """

    kind: Kind
    bits: int
    strategy: Strategy
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None
    activations: Activations | None = None


@dataclass(frozen=True, slots=True)
class KvCacheScheme:
    """Key-value scales in a checkpoint. per_head: one for each head, not for a whole layer."""

    kind: Kind = Kind.FLOAT
    per_head: bool = False

    def __str__(self) -> str:
        kind = "fp8" if self.kind is Kind.FLOAT else "int8"
        return f"{kind}, a scale for each {'head' if self.per_head else 'layer'}"


@dataclass(frozen=True, slots=True)
class SchemeTable:
    """The schemes of a checkpoint by their targets, and what is left in 16 bits."""

    targets: tuple[tuple[str, Scheme], ...]
    ignored: tuple[str, ...]

    def scheme_of(self, layer: str) -> Scheme | None:
        """The scheme of a layer by its full name; None when it is not quantized."""
        if any(_names(entry, layer) for entry in self.ignored):
            return None
        by_name = (scheme for target, scheme in self.targets if _names(target, layer))
        by_class = (scheme for target, scheme in self.targets if target == LINEAR)
        return next(by_name, None) or next(by_class, None)

    @property
    def activations(self) -> Activations | None:
        """What all layers are multiplied with; None when nothing is said or they differ."""
        kinds = {scheme.activations for _, scheme in self.targets}
        return kinds.pop() if len(kinds) == 1 else None


def read_schemes(block: Mapping[str, Any]) -> SchemeTable:
    """The schemes of a ``quantization_config``.

    Raises ``UnsupportedModelError`` for sparse and 4-bit float formats and for odd values.
    """
    sparsity = block.get("sparsity_config")
    if isinstance(sparsity, dict) and text_of(sparsity, "format") not in (None, "dense"):
        raise _unread(f"sparse weights ({sparsity['format']})")
    groups = block.get("config_groups")
    if groups == {} and block.get("kv_cache_scheme"):
        return SchemeTable((), ())
    if not isinstance(groups, dict) or not groups:
        raise UnsupportedModelError("compressed-tensors without config_groups: nothing says how")
    targets: list[tuple[str, Scheme]] = []
    for group in groups.values():
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise UnsupportedModelError("compressed-tensors: a config group has no targets")
        packing = text_of(group, "format") or text_of(block, "format") or ""
        if packing in (*SPARSE, *UNREAD):
            raise _unread(packing)
        if group.get("weights") is not None:
            scheme = _read_scheme(group["weights"], group.get("input_activations"))
            targets += [(str(target), scheme) for target in group["targets"]]
    ignored = block.get("ignore") or []
    return SchemeTable(tuple(targets), tuple(map(str, ignored)))


def read_kv_cache(block: Mapping[str, Any]) -> KvCacheScheme | None:
    """The scheme of key-value scales that a ``quantization_config`` states.

    None when it states none, or one of other than 8 bits, which is left to the reader's choice.
    """
    stated = block.get("kv_cache_scheme")
    if not isinstance(stated, dict) or stated.get("num_bits", 8) != 8:
        return None
    kind = text_of(stated, "type") or Kind.FLOAT.value
    if kind not in (Kind.FLOAT.value, Kind.INT.value):
        return None
    return KvCacheScheme(Kind(kind), text_of(stated, "strategy") == ATTENTION_HEAD)


def write_schemes(
    layers: Mapping[str, LayerScheme],
    ignored: Sequence[str],
    activations: Activations | None,
    kv_cache: KvCacheScheme | None,
) -> dict[str, Any]:
    """The ``quantization_config`` for layers by their full names, with the owner's keys."""
    sizes = stated_group_sizes(layers)
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, scheme in layers.items():
        args = _weight_args(scheme, sizes[name])
        groups.setdefault(str(args), (args, []))[1].append(name)
    config_groups = {
        f"group_{number}": {
            "targets": [LINEAR] if len(groups) == 1 else names,
            "format": _packing(args, activations),
            "weights": args,
            "input_activations": None if activations is None else _activation_args(activations),
            "output_activations": None,
        }
        for number, (args, names) in enumerate(groups.values())
    }
    packings = {group["format"] for group in config_groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None if kv_cache is None else _kv_args(kv_cache),
        "ignore": list(ignored),
        "config_groups": config_groups,
    }


def _weight_args(scheme: LayerScheme, group_size: int) -> dict[str, Any]:
    """Only keys that all versions take, and no null: readers refuse others."""
    kind = Kind.FLOAT if scheme.coding is Coding.FLOAT8 else Kind.INT
    args: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": kind.value,
        "symmetric": scheme.symmetric,
        "dynamic": False,
    }
    if scheme.block_rows == scheme.out_features and scheme.group_size == scheme.in_features:
        return args | {"strategy": Strategy.TENSOR.value}
    if scheme.block_rows > 1:
        shape = [scheme.block_rows, scheme.group_size]
        return args | {"strategy": Strategy.BLOCK.value, "block_structure": shape}
    if group_size == -1:
        return args | {"strategy": Strategy.CHANNEL.value}
    return args | {"strategy": Strategy.GROUP.value, "group_size": group_size}


def _packing(args: Mapping[str, Any], activations: Activations | None) -> str:
    """As the owner chooses it for the weights and activations of a group."""
    if args["type"] == Kind.FLOAT.value:
        return "naive-quantized" if activations is None else "float-quantized"
    return "pack-quantized" if activations is None else "int-quantized"


def _activation_args(activations: Activations) -> dict[str, Any]:
    """8 bits with one scale a token, found while it runs."""
    kind = Kind.FLOAT if activations is Activations.FLOAT8_TOKEN else Kind.INT
    return {
        "num_bits": 8,
        "type": kind.value,
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


def _kv_args(kv_cache: KvCacheScheme) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": kv_cache.kind.value,
        "symmetric": True,
        "strategy": ATTENTION_HEAD if kv_cache.per_head else Strategy.TENSOR.value,
        "dynamic": False,
    }


def _read_scheme(weights: Any, inputs: Any) -> Scheme:
    if not isinstance(weights, dict):
        raise UnsupportedModelError(f"compressed-tensors weights {weights!r}: expected an object")
    kind = text_of(weights, "type") or Kind.INT.value
    if kind not in (Kind.INT.value, Kind.FLOAT.value):
        raise _unread(f"weights of type {kind!r}")
    widths = range(1, 9) if kind == Kind.INT.value else (8,)
    group_size = weights.get("group_size")
    strategy = text_of(weights, "strategy") or _strategy_for(group_size)
    if strategy not in [one.value for one in Strategy]:
        raise _unread(f"weights with a scale for each {strategy!r}")
    block = weights.get("block_structure") if strategy == Strategy.BLOCK.value else None
    if strategy == Strategy.BLOCK.value and not (isinstance(block, list) and len(block) == 2):
        raise _unread(f"weights in blocks of {block!r}")
    return Scheme(
        kind=Kind(kind),
        bits=read_bits("compressed-tensors", weights.get("num_bits", 8), widths),
        strategy=Strategy(strategy),
        symmetric=weights.get("symmetric", True) is not False,
        group_size=read_group_size("compressed-tensors", group_size)
        if strategy == Strategy.GROUP.value
        else None,
        block=(int(block[0]), int(block[1])) if block else None,
        activations=_read_activations(inputs),
    )


def _strategy_for(group_size: object) -> str:
    if group_size is None:
        return Strategy.TENSOR.value
    return Strategy.CHANNEL.value if group_size == -1 else Strategy.GROUP.value


def _read_activations(inputs: Any) -> Activations | None:
    """Static scales count as one a row too: it is at least as exact, and needs no calibration."""
    if inputs is None:
        return None
    kinds = {Kind.INT.value: Activations.INT8_TOKEN, Kind.FLOAT.value: Activations.FLOAT8_TOKEN}
    kind = text_of(inputs, "type") if isinstance(inputs, dict) else None
    if kind not in kinds or inputs.get("num_bits", 8) != 8:
        raise _unread("activations that are not 8 bits wide")
    return kinds[kind]


def _names(entry: str, layer: str) -> bool:
    if entry.startswith(PATTERN):
        try:
            return re.match(entry.removeprefix(PATTERN), layer) is not None
        except re.error as error:
            raise UnsupportedModelError(
                f"compressed-tensors: {entry!r} is no pattern: {error}"
            ) from None
    return entry == layer


def _unread(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"compressed-tensors with {what}: integers of 1 to 8 bits and 8-bit floats can be read; "
        "quantize the float checkpoint again"
    )
