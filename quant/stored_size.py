"""How many bytes the tensors of a checkpoint will take, before anything is quantized."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import nn

from qserve.quant.decoder import HEAD, Decoder
from qserve.quant.formats.layer_format import COMPUTED
from qserve.quant.formats.writer import LayerScheme, Writer
from qserve.quant.grid import LevelSet, Rounded, grid_over_all, nearest_levels
from qserve.quant.inspection import dtype_bits
from qserve.quant.output_head import LEVELS
from qserve.quant.target import StageSpec

STORED_BYTES = 2
"""Of a number that is no code: floats are written in 16 bits."""

SAMPLE_ROWS = 256
"""In every format, so many rows more take a whole number of bytes more, always the same."""

NESTED_SLACK = 64
"""Bytes that a layer of nested scales may take beyond what was found: numbers in JSON."""

HEADER_BYTES = 100
"""At most what a file's header has for each tensor beside its name: type, shape, offsets."""


class PackedSizes:
    """What packed layers take in one format: found by packing a few rows of ones.

    Layers may be on the meta device.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._sampled: dict[tuple[LevelSet, int, int, int], dict[str, int]] = {}

    def num_bytes(self, layer: nn.Linear, spec: StageSpec) -> int:
        """Bytes of the tensors of a layer; of nested scales it may take a few more or less."""
        once = sum(self._sample(spec, layer.in_features, SAMPLE_ROWS).values())
        step = sum(self._sample(spec, layer.in_features, 2 * SAMPLE_ROWS).values()) - once
        more = math.ceil((layer.out_features - SAMPLE_ROWS) * step / SAMPLE_ROWS)
        return once + more

    def most_bytes(self, layer: nn.Linear, spec: StageSpec) -> int:
        """At most what the tensors of a layer take."""
        return self.num_bytes(layer, spec) + (NESTED_SLACK if spec.levels.nested else 0)

    def header_bytes(self, layer: nn.Linear, spec: StageSpec, name: str) -> int:
        """At most what the header of a file has for a layer of this full name."""
        suffixes = self._sample(spec, layer.in_features, SAMPLE_ROWS)
        return sum(HEADER_BYTES + len(name) + 1 + len(suffix) for suffix in suffixes)

    def _sample(self, spec: StageSpec, in_features: int, rows: int) -> dict[str, int]:
        """Bytes of the tensors of a weight with so many rows."""
        width = spec.width(in_features)
        key = spec.levels, width, in_features, rows
        if key not in self._sampled:
            groups = torch.ones(rows, in_features // width, width)
            grid = grid_over_all(groups, spec.levels).settled()
            weight = Rounded(nearest_levels(groups, grid), grid).pack()
            packed = self._writer.encode(weight)
            self._sampled[key] = {suffix: tensor.nbytes for suffix, tensor in packed.items()}
        return self._sampled[key]


def coded_head(scheme: LayerScheme) -> tuple[nn.Linear, StageSpec]:
    """An output head in 8 bits, as ``PackedSizes`` takes a layer."""
    layer = nn.Linear(scheme.in_features, scheme.out_features, bias=False, device="meta")
    return layer, StageSpec(LEVELS, scheme.group_size)


def float_bytes(layer: nn.Linear) -> int:
    """What the weight of a layer takes in 16 bits."""
    return STORED_BYTES * layer.weight.numel()


def is_written(decoder: Decoder, name: str) -> bool:
    """Whether a tensor of the float checkpoint is in the quantized one, packed or as it is."""
    is_tied_head = name == HEAD and decoder.is_tied
    return not is_tied_head and not name.endswith(COMPUTED)


def bytes_beside(decoder: Decoder, packed: Mapping[str, int]) -> int:
    """At most what files hold beside the codes of the blocks.

    packed: what is known of each packed layer, by its full name: its header, the output head's
    tensors too. Everything else is stored in 16 bits.
    """
    left = unpacked_bytes(decoder, packed)
    headers = sum(HEADER_BYTES + len(name) for name in left)
    return sum(packed.values()) + sum(left.values()) + headers


def unpacked_bytes(decoder: Decoder, packed: Collection[str]) -> dict[str, int]:
    """Bytes of every tensor that stays as it is, by its full name: floats take 16 bits.

    packed: the layers that do not, by full name.
    """
    source, found = decoder.checkpoint, {}
    for name in source:
        if name.removesuffix(".weight") not in packed and is_written(decoder, name):
            dtype = source.dtype(name)
            width = STORED_BYTES if "F" in dtype else dtype_bits(dtype) // 8
            found[name] = width * math.prod(source.shape(name))
    return found
