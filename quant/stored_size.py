"""How many bytes the tensors of a checkpoint will take, before anything is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from qserve.quant.decoder import HEAD, Decoder
from qserve.quant.formats.layer_format import COMPUTED
from qserve.quant.formats.writer import Writer
from qserve.quant.grid import LevelSet, Rounded, grid_over_all, nearest_levels
from qserve.quant.inspection import dtype_bits
from qserve.quant.target import StageSpec

FLOAT_BYTES = 2

SAMPLE_ROWS = 256
"""In every format, so many rows more take a whole number of bytes more, always the same."""

NESTED_SLACK = 64
"""Bytes that a layer of nested scales may take beyond that: numbers in JSON."""

HEADER_BYTES = 100
"""At most what a file's header has for each tensor beside its name: type, shape, offsets."""


class PackedSizes:
    """What packed layers take in one format: found by packing a few rows of ones."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._sampled: dict[tuple[LevelSet, int, int, int], dict[str, int]] = {}

    def num_bytes(self, layer: nn.Linear, spec: StageSpec) -> int:
        """Bytes of the tensors of a layer; at most so many for nested scales."""
        once = sum(self._sample(spec, layer.in_features, SAMPLE_ROWS).values())
        step = sum(self._sample(spec, layer.in_features, 2 * SAMPLE_ROWS).values()) - once
        more = math.ceil((layer.out_features - SAMPLE_ROWS) * step / SAMPLE_ROWS)
        return once + more + (NESTED_SLACK if spec.levels.nested else 0)

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


def float_bytes(layer: nn.Linear) -> int:
    """What the weight of a layer takes in 16 bits."""
    return FLOAT_BYTES * layer.weight.numel()


def is_written(decoder: Decoder, name: str) -> bool:
    """Whether a tensor of the float checkpoint is in the quantized one, packed or as it is."""
    is_tied_head = name == HEAD and decoder.is_tied
    return not is_tied_head and not name.endswith(COMPUTED)


def bytes_beside(decoder: Decoder, packed: Mapping[str, int]) -> int:
    """At most what files hold beside the codes of the blocks.

    packed: what is known of each packed layer, by its full name: its header, the output head's
    tensors too. Everything else is stored in 16 bits.
    """
    source, total = decoder.checkpoint, sum(packed.values())
    for name in source:
        if name.removesuffix(".weight") not in packed and is_written(decoder, name):
            dtype = source.dtype(name)
            width = FLOAT_BYTES if "F" in dtype else dtype_bits(dtype) // 8
            total += width * math.prod(source.shape(name)) + HEADER_BYTES + len(name)
    return total
