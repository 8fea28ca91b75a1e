"""QoQ's W4A8 weights (arXiv 2405.04532) in safetensors; this layout is ours, both directions.

Each weight is ``channel_scale[n] * scale[n, g] * (code - zero_point[n, g])``: 4-bit codes whose
groups have whole-number scales, so that they become int8 with integer arithmetic alone.

    weight_packed         int32   [N, K/8]  each row's codes along K, in order
    weight_scale          int8    [N, K/G]
    weight_zero_point     uint8   [N, K/G]
    weight_channel_scale  float32 [N]

OmniServe, which comes from the same authors, keeps pickled tensors in the order of its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import pack_words, unpack_words
from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.layer_format import (
    PackedLayer,
    QuantizedWeight,
    StoredTensor,
    check_scales,
    load,
    read_bits,
    read_group_size,
    refuse_shapes,
    require,
    text_of,
)
from qserve.quant.formats.writer import (
    Coding,
    LayerScheme,
    integer_weight,
    scheme_of,
    stated_group_sizes,
)

BITS = 4
CODES_PER_WORD = 8
LAYOUT = "rows"
MAX_SCALE = 127


@dataclass(frozen=True, slots=True)
class QoqFormat:
    """QoQ checkpoints. group_size: -1 for one group a row."""

    group_size: int
    name: str = "qoq"
    activations: Activations = Activations.INT8_TOKEN
    keys: tuple[str, ...] = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_channel_scale"),
    )

    @classmethod
    def from_config(cls, block: Mapping[str, Any]) -> QoqFormat:
        """The format that a ``quantization_config`` describes.

        Raises ``UnsupportedModelError`` for another width or layout.
        """
        read_bits("QoQ", block.get("bits"), (BITS,))
        if text_of(block, "layout") != LAYOUT:
            raise UnsupportedModelError(
                f"QoQ in the {block.get('layout')!r} layout: expected {LAYOUT!r}"
            )
        return cls(read_group_size("QoQ", block.get("group_size")))

    def describe(self, layer: str, stored: Mapping[str, StoredTensor]) -> PackedLayer | None:
        """See ``Format``."""
        if "weight_packed" not in stored:
            return None
        types = zip(self.keys, ("I32", "I8", "U8", "F32"), strict=True)
        require(layer, stored, {key: [dtype] for key, dtype in types})
        words, scales, zero_points, channel_scales = (stored[key].shape for key in self.keys)
        out_features, num_words = (*words, 0, 0)[:2]
        in_features = num_words * CODES_PER_WORD
        group_size = in_features if self.group_size == -1 else self.group_size
        num_groups, rest = divmod(in_features, group_size or 1)
        shape = (out_features, num_groups)
        if rest or (scales, zero_points, channel_scales) != (shape, shape, (out_features,)):
            raise refuse_shapes(layer, stored, f"groups of {group_size}")
        return PackedLayer(out_features, in_features, BITS, group_size)

    def read(self, layer: str, stored: Mapping[str, StoredTensor]) -> GroupedWeight:
        """See ``Format``."""
        packed = self.describe(layer, stored)
        assert packed is not None
        tensors = load(stored)
        return GroupedWeight(
            codes=unpack_words(tensors["weight_packed"], BITS, packed.in_features),
            scales=check_scales(layer, tensors["weight_scale"].float()),
            zero_points=tensors["weight_zero_point"],
            bits=BITS,
            group_size=packed.group_size,
            channel_scales=check_scales(layer, tensors["weight_channel_scale"]),
        )


@dataclass(frozen=True, slots=True)
class QoqWriter:
    """Writes QoQ."""

    side_file: None = None

    def refusal(self, scheme: LayerScheme) -> str | None:
        """See ``Writer``."""
        if scheme.coding is not Coding.INTEGER or scheme.bits != BITS or not scheme.outer_scales:
            return f"QoQ holds 4-bit codes with whole-number scales, got {scheme}"
        if scheme.activation_order or scheme.in_features % CODES_PER_WORD:
            return f"QoQ needs a multiple of {CODES_PER_WORD} inputs in their natural order"
        return None

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """See ``Writer``; scales that are not whole numbers of -127 to 127 raise too."""
        weight = integer_weight(weight, self.refusal(scheme_of(weight)))
        scales = weight.scales.float()
        assert weight.channel_scales is not None
        if bool((scales != scales.round().clamp(-MAX_SCALE, MAX_SCALE)).any()):
            raise ValueError(f"QoQ's group scales are whole numbers of -{MAX_SCALE} to {MAX_SCALE}")
        return {
            "weight_packed": pack_words(weight.codes, BITS),
            "weight_scale": scales.to(torch.int8),
            "weight_zero_point": weight.zero_points.contiguous(),
            "weight_channel_scale": weight.channel_scales.float(),
        }

    def config_block(
        self, layers: Mapping[str, LayerScheme], ignored: Sequence[str]
    ) -> dict[str, Any]:
        """See ``Writer``."""
        sizes = set(stated_group_sizes(layers).values())
        if len(sizes) != 1:
            raise ValueError(f"QoQ states one group size for all layers, got {sorted(sizes)}")
        return {
            "quant_method": "qoq",
            "bits": BITS,
            "group_size": sizes.pop(),
            "layout": LAYOUT,
            "ignore": list(ignored),
        }
