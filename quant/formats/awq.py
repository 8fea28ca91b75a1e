"""AutoAWQ's formats (owner: AutoAWQ 0.2.9, `awq/modules/linear/`): "gemm" is written and read.

Tensors of a linear layer with K inputs and N outputs, groups of G inputs:

    qweight  int32   [K, N/8]    row k packs the codes of outputs 8c .. 8c+7, fields in AWQ order
    qzeros   int32   [K/G, N/8]  zero points, packed the same way, no offset
    scales   float16 [K/G, N]
    bias     as in the float checkpoint

The other layouts, in ``awq_gemv.py``, are only read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import pack_awq, unpack_awq
from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats import awq_gemv
from qserve.quant.formats.fused_sets import expert_modules
from qserve.quant.formats.layer_format import (
    FLOATS,
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
    half_scales,
    integer_weight,
    scheme_of,
)

BITS = 4
CODES_PER_WORD = 8
KEYS = ("qweight", "qzeros", "scales")
OUT_FEATURES_MULTIPLE = 32  # AutoAWQ's packer sizes its words as N // 32 * 4


class Layout(Enum):
    """How the codes lie: ``version`` of the configuration."""

    GEMM = "gemm"
    GEMV = "gemv"
    GEMV_FAST = "gemv_fast"
    LLM_AWQ = "llm-awq"


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """AWQ checkpoints of one layout. group_size: -1 for one group a row."""

    group_size: int
    layout: Layout = Layout.GEMM
    name: str = "awq"
    activations: None = None
    keys: tuple[str, ...] = (*KEYS, "scaled_zeros")

    @classmethod
    def from_config(cls, block: Mapping[str, Any]) -> AwqFormat:
        """The format that a ``quantization_config`` describes, in any of its spellings.

        Raises ``UnsupportedModelError`` unless it has 4 bits in a layout that is read.
        """
        read_bits("AWQ", block.get("bits", block.get("w_bit")), (BITS,))
        version = text_of(block, "version", "checkpoint_format", "format") or Layout.GEMM.value
        if version not in [layout.value for layout in Layout]:
            listed = ", ".join(layout.value for layout in Layout)
            raise UnsupportedModelError(
                f"AWQ in the {version!r} layout, which is made for one kernel: expected one of "
                f"{listed}; quantize the float checkpoint again"
            )
        group_size = read_group_size("AWQ", block.get("group_size", block.get("q_group_size")))
        return cls(group_size, Layout(version))

    def describe(self, layer: str, stored: Mapping[str, StoredTensor]) -> PackedLayer | None:
        """See ``Format``."""
        if "qweight" not in stored:
            return None
        if self.layout is Layout.GEMV:
            return awq_gemv.describe_gemv(layer, stored, self.group_size)
        if self.layout is not Layout.GEMM:
            return awq_gemv.describe_fast(layer, stored, self.group_size)
        require(layer, stored, {"qweight": ["I32"], "qzeros": ["I32"], "scales": FLOATS})
        qweight, qzeros, scales = (stored[key].shape for key in KEYS)
        in_features, num_words = qweight if len(qweight) == 2 else (0, 0)
        group_size = in_features if self.group_size == -1 else self.group_size
        num_groups, rest = divmod(in_features, group_size) if group_size else (0, 0)
        out_features = num_words * CODES_PER_WORD
        closes = qzeros == (num_groups, num_words) and scales == (num_groups, out_features)
        if rest or not num_groups or not closes:
            raise refuse_shapes(
                layer,
                {key: stored[key] for key in KEYS},
                f"groups of {self.group_size}: expected [inputs, outputs/8], "
                f"[inputs/{self.group_size}, outputs/8] and [inputs/{self.group_size}, outputs]",
            )
        return PackedLayer(out_features, in_features, BITS, group_size)

    def read(self, layer: str, stored: Mapping[str, StoredTensor]) -> GroupedWeight:
        """See ``Format``."""
        packed = self.describe(layer, stored)
        assert packed is not None
        tensors = load(stored)
        if self.layout is Layout.GEMV:
            return awq_gemv.read_gemv(layer, tensors, packed)
        if self.layout is not Layout.GEMM:
            return awq_gemv.read_fast(layer, tensors, packed)
        check_scales(layer, tensors["scales"])
        return GroupedWeight(
            codes=unpack_awq(tensors["qweight"]).T.contiguous(),
            scales=tensors["scales"].T.contiguous(),
            zero_points=unpack_awq(tensors["qzeros"]).T.contiguous(),
            bits=BITS,
            group_size=packed.group_size,
        )


@dataclass(frozen=True, slots=True)
class AwqWriter:
    """Writes the gemm layout."""

    side_file: None = None

    def refusal(self, scheme: LayerScheme) -> str | None:
        """See ``Writer``."""
        if scheme.coding is not Coding.INTEGER or scheme.bits != BITS:
            return f"AWQ gemm holds 4-bit integer codes, got {scheme}"
        if scheme.activation_order or scheme.outer_scales:
            return "AWQ gemm holds neither activation order nor outer scales"
        if scheme.out_features % OUT_FEATURES_MULTIPLE:
            return (
                f"AWQ gemm needs a multiple of {OUT_FEATURES_MULTIPLE} outputs, "
                f"got {scheme.out_features}"
            )
        return None

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """See ``Writer``: ``qweight``, ``qzeros`` and ``scales``."""
        weight = integer_weight(weight, self.refusal(scheme_of(weight)))
        return {
            "qweight": pack_awq(weight.codes.T.contiguous()),
            "qzeros": pack_awq(weight.zero_points.T.contiguous()),
            "scales": half_scales(weight, "AWQ"),
        }

    def config_block(
        self, layers: Mapping[str, LayerScheme], ignored: Sequence[str]
    ) -> dict[str, Any]:
        """See ``Writer``."""
        sizes = {scheme.group_size for scheme in layers.values()}
        if len(sizes) != 1:
            raise ValueError(f"AWQ states one group size for all layers, got {sorted(sizes)}")
        return config_block(sizes.pop(), ignored)


def config_block(group_size: int, ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``, with AutoAWQ's keys.

    ignored: full names of the linear modules left in 16 bits. Readers match them in different
        ways (substring, anchored pattern, ending); full names fit all of them. vLLM asks for the
        module that holds the experts of a block, which is named beside them.
    """
    left = [*ignored, *expert_modules(ignored)]
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left or None,
    }
