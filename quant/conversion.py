"""A quantized checkpoint in another format: the same codes where that format holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qserve.quant.errors import CheckpointError
from qserve.quant.fitting import GROUP_SIZES, fit, split_groups
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.compressed_schemes import Kind, KvCacheScheme
from qserve.quant.formats.layer_format import HEAD, in_memory
from qserve.quant.formats.registry import OutputFormat, make_writer, read_format
from qserve.quant.formats.shard_writer import ShardWriter
from qserve.quant.formats.writer import LayerScheme, Writer, scheme_of
from qserve.quant.model_files import copy_files, write_config
from qserve.quant.options import DEFAULT_SHARD_BYTES

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Targets without codes."""

TARGETS = (*(one.value for one in OutputFormat if one is not OutputFormat.QOQ), *FLOATS)
ROWS_OF_TOKENS = "embed"  # a matrix of this name is looked up, not multiplied with

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """What becomes of one layer.

    scheme: that it is written with; None in 16 bits. energy: sum of the squared weights.
    squared_error: of what a reader of the result finds; 0.0 when it is the same to the last bit.
    """

    name: str
    scheme: LayerScheme | None
    energy: float
    squared_error: float

    @property
    def error(self) -> float:
        """Of the weight, relative to its norm."""
        return math.sqrt(self.squared_error / self.energy) if self.energy else 0.0


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion does to the weights, measured.

    source: the format before. drops_activations, drops_cache_scales: the source was made for
    quantized activations, has scales of keys and values, which the result does not state.
    """

    source: str
    target: str
    layers: tuple[ConvertedLayer, ...]
    drops_activations: bool
    drops_cache_scales: bool

    @property
    def num_changed(self) -> int:
        """Layers that do not stay what they are to the last bit."""
        return sum(layer.squared_error > 0 for layer in self.layers)

    @property
    def is_lossless(self) -> bool:
        return self.num_changed == 0

    @property
    def error(self) -> float:
        """Of all quantized weights together, relative to their norm."""
        energy = sum(layer.energy for layer in self.layers)
        error = sum(layer.squared_error for layer in self.layers)
        return math.sqrt(error / energy) if energy else 0.0


class Conversion:
    """One checkpoint on its way to another format, layer by layer.

    target: one of ``TARGETS``. program: name and version, for the formats that record it.
    Raises ``CheckpointError`` for a float checkpoint (unless the target is another float type) and
    for layers that the target cannot hold.
    """

    def __init__(self, checkpoint: Checkpoint, target: str, program: str) -> None:
        if checkpoint.format is None and target not in FLOATS:
            raise CheckpointError(
                f"{checkpoint.folder} is a float checkpoint: `qserve quantize` makes codes of it"
            )
        self._checkpoint = checkpoint
        self._target = target
        self._output = None if target in FLOATS else OutputFormat(target)
        self._writer = None if self._output is None else self._make_writer(self._output, program)

    @property
    def num_layers(self) -> int:
        """How many layers are quantized, which is what ``advance`` counts to."""
        return len(self._packed)

    def measure(self, advance: Advance) -> ConversionReport:
        """Convert every layer in memory and compare what a reader of it will find."""
        layers = []
        for number, name in enumerate(self._packed, 1):
            layers.append(self._measure(name))
            advance(number)
        states_all = self._output is OutputFormat.COMPRESSED_TENSORS
        return ConversionReport(
            source=self._checkpoint.method or self._dtype,
            target=self._target,
            layers=tuple(layers),
            drops_activations=self._checkpoint.activations is not None and not states_all,
            drops_cache_scales=bool(_cache_scales_in(self._checkpoint)) and not states_all,
        )

    def write(self, out: Path, report: ConversionReport, advance: Advance) -> None:
        """Write the checkpoint into the existing, empty folder ``out``. report: of ``measure``."""
        packed = {name: number for number, name in enumerate(self._packed, 1)}
        keys = () if self._checkpoint.format is None else self._checkpoint.format.keys
        dropped = set(_cache_scales_in(self._checkpoint) if report.drops_cache_scales else ())
        with ShardWriter(out, DEFAULT_SHARD_BYTES) as files:
            for module, ends in self._checkpoint.modules.items():
                if module in packed:
                    for key, tensor in self._convert(module)[0].items():
                        files.add(f"{module}.{key}", tensor)
                    advance(packed[module])
                for end in ends:
                    name = f"{module}.{end}".lstrip(".")
                    if name not in dropped and (module not in packed or end not in keys):
                        files.add(name, self._as_stored(self._checkpoint.tensor(name)))
            files.finish()
        block = self._config_block({layer.name: layer.scheme for layer in report.layers})
        side_file = None if self._writer is None else self._writer.side_file
        dtype = self._dtype
        write_config(out, self._checkpoint.config, block, dtype=dtype, side_file=side_file)
        copy_files(self._checkpoint.folder, out)

    @cached_property
    def _packed(self) -> list[str]:
        """The names of the quantized layers, in the order of the files."""
        return [name for name in self._checkpoint.modules if self._checkpoint.describe(name)]

    @cached_property
    def _dtype(self) -> str:
        """The type of what is not quantized, as ``config.json`` will state it."""
        if self._target in FLOATS:
            return str(FLOATS[self._target]).removeprefix("torch.")
        config = self._checkpoint.config
        return str(config.get("torch_dtype") or config.get("dtype") or "float16")

    @cached_property
    def _awq_group_size(self) -> int:
        """The one group size that AWQ states: the largest that divides those of all layers."""
        sizes = [
            found.group_size for name in self._packed if (found := self._checkpoint.describe(name))
        ]
        common = math.gcd(*sizes)
        size = next((size for size in GROUP_SIZES if common % size == 0), None)
        if size is None:
            raise CheckpointError(
                f"{self._checkpoint.folder} has groups of {sorted(set(sizes))}: AWQ wants one size "
                f"of {', '.join(map(str, GROUP_SIZES))} for all layers"
            )
        return size

    def _make_writer(self, output: OutputFormat, program: str) -> Writer:
        if output is not OutputFormat.COMPRESSED_TENSORS:
            return make_writer(output, program, dtype=self._dtype)
        activations, kv_cache = self._checkpoint.activations, _kv_cache_of(self._checkpoint)
        return make_writer(output, program, activations=activations, kv_cache=kv_cache)

    def _convert(self, name: str) -> tuple[dict[str, torch.Tensor], LayerScheme | None]:
        """The tensors of a layer in the new format, and its scheme."""
        weight = self._checkpoint.linear(name)
        assert not isinstance(weight, torch.Tensor)
        if self._writer is None or self._output is None:
            return {"weight": self._as_stored(weight.dequantize())}, None
        fitted = fit(name, weight, self._writer, self._output)
        if self._output is OutputFormat.AWQ:
            fitted = split_groups(fitted, self._awq_group_size)
        try:
            return self._writer.encode(fitted), scheme_of(fitted)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot become {self._target}: {error}") from None

    def _measure(self, name: str) -> ConvertedLayer:
        weight = self._checkpoint.linear(name)
        assert not isinstance(weight, torch.Tensor)
        dense = weight.dequantize()
        tensors, scheme = self._convert(name)
        if scheme is None:
            found = tensors["weight"].float()
        else:
            reader = read_format(self._config_block({name: scheme}) or {}, self._target)
            found = reader.read(name, in_memory(tensors)).dequantize()
        difference = found.sub_(dense).square_().sum(dtype=torch.float64)
        energy = dense.square_().sum(dtype=torch.float64)
        return ConvertedLayer(name, scheme, float(energy), float(difference))

    def _config_block(self, schemes: Mapping[str, LayerScheme | None]) -> dict[str, Any] | None:
        if self._writer is None:
            return None
        layers = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        try:
            return self._writer.config_block(layers, self._left_alone)
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.folder}: {error}") from None

    @cached_property
    def _left_alone(self) -> list[str]:
        """Linear layers in 16 bits, but for the output head, which readers leave alone anyway."""
        return [
            module
            for module, ends in self._checkpoint.modules.items()
            if "weight" in ends
            and module not in self._packed
            and module.rpartition(".")[2] != HEAD
            and ROWS_OF_TOKENS not in module
            and len(self._checkpoint.shape(f"{module}.weight")) == 2
        ]

    def _as_stored(self, values: torch.Tensor) -> torch.Tensor:
        if self._target not in FLOATS or not values.is_floating_point():
            return values
        stored = values.to(FLOATS[self._target])
        if not bool(torch.isfinite(stored).all()):
            raise CheckpointError(
                f"{self._checkpoint.folder} holds values beyond {self._dtype}: choose bf16"
            )
        return stored


def _cache_scales_in(checkpoint: Checkpoint) -> list[str]:
    """The tensors with scales of keys and values."""
    return [name for name in checkpoint if name.endswith((".k_scale", ".v_scale"))]


def _kv_cache_of(checkpoint: Checkpoint) -> KvCacheScheme | None:
    """The scheme of key-value scales that are stored beside the layers."""
    scales = _cache_scales_in(checkpoint)
    if not scales:
        return None
    stated = (checkpoint.quantization_config or {}).get("kv_cache_scheme") or {}
    per_head = math.prod(checkpoint.shape(scales[0])) > 1
    return KvCacheScheme(Kind(stated.get("type", Kind.FLOAT.value)), per_head)
