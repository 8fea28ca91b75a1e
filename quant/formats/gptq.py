"""GPTQ's formats (owners: AutoGPTQ 0.7.1, GPTQModel 7.7.0).

Tensors of a linear layer with K inputs and N outputs, groups of G inputs, b bits:

    qweight  int32   [K b/32, N]    column n packs the codes of output n along K, in order
    qzeros   int32   [K/G, N b/32]  zero points along N, in order; v1 stores them less one
    scales   float16 [K/G, N]
    g_idx    int32   [K]            group of each input; may be absent without activation order

v1 with zero points of 0 is where tools disagree: the 0 became -1, which GPTQModel takes off the
whole word (the borrow travels on) and others off each field. So v1 is written for symmetric
weights alone, and read by who wrote it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import WORD_BITS, pack_words, unpack_words
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats.channel_order import group_index, order_by_group
from qserve.quant.formats.code_width import WIDTHS, widen
from qserve.quant.formats.gptq_dynamic import READ_BITS, Scheme, read_rules, write_rules
from qserve.quant.formats.layer_format import (
    FLOATS,
    HEAD,
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
    stated_group_sizes,
)

WRITTEN_BITS = (2, 3, 4, 8)
MULTIPLE = 32  # AutoGPTQ and GPTQModel round inputs and outputs down to it
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths of the planes of GPTQModel's planar codes, low bits first."""


class ZeroPoints(Enum):
    """What ``qzeros`` hold."""

    PLAIN = "gptq_v2"
    LESS_ONE = "gptq"
    WORD_LESS_ONE = "gptq, one taken off each word with borrow"


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """GPTQ checkpoints of one kind.

    planar_bits: widths whose codes are split in planes. overrides: patterns for the start of a
    layer's name, and the scheme of the layers that match; the first counts.
    """

    scheme: Scheme
    zero_points: ZeroPoints
    activation_order: bool = False
    planar_bits: tuple[int, ...] = ()
    overrides: tuple[tuple[re.Pattern[str], Scheme], ...] = ()
    name: str = "gptq"
    activations: None = None
    keys: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def from_config(cls, block: Mapping[str, Any]) -> GptqFormat:
        """The format that a ``quantization_config`` describes.

        Raises ``UnsupportedModelError`` for layouts made for one kernel and for odd values.
        """
        version = text_of(block, "checkpoint_format", "format") or "gptq"
        if block.get("is_marlin_format") or version not in ("gptq", "gptq_v2", "gptq_p"):
            shown = "marlin" if block.get("is_marlin_format") else version
            raise UnsupportedModelError(
                f"GPTQ in the {shown!r} layout, which is made for one kernel: expected gptq, "
                "gptq_v2 or gptq_p; get the checkpoint in one of these"
            )
        symmetric = block.get("sym")
        scheme = Scheme(
            bits=read_bits("GPTQ", block.get("bits"), READ_BITS),
            group_size=read_group_size("GPTQ", block.get("group_size", -1)),
            symmetric=symmetric if isinstance(symmetric, bool) else None,
        )
        plain = ZeroPoints.LESS_ONE if version == "gptq" else ZeroPoints.PLAIN
        return cls(
            scheme=scheme,
            zero_points=ZeroPoints.WORD_LESS_ONE if _borrows(block, plain) else plain,
            activation_order=bool(block.get("desc_act")),
            planar_bits=(3, 5, 6, 7) if version == "gptq_p" else (5, 6, 7),
            overrides=read_rules(block.get("dynamic"), scheme),
        )

    def scheme_of(self, layer: str) -> Scheme:
        """The scheme of a layer, by its full name."""
        found = (scheme for pattern, scheme in self.overrides if pattern.match(layer))
        return next(found, self.scheme)

    def describe(self, layer: str, stored: Mapping[str, StoredTensor]) -> PackedLayer | None:
        """See ``Format``."""
        if "qweight" not in stored:
            return None
        scheme = self.scheme_of(layer)
        expected = {"qweight": ["I32"], "qzeros": ["I32"], "scales": FLOATS}
        if self.activation_order and scheme.group_size != -1:
            expected["g_idx"] = ["I32", "I64"]
        require(layer, stored, expected)
        num_words, out_features = (*stored["qweight"].shape, 0, 0)[:2]
        in_features = num_words * WORD_BITS // scheme.bits
        group_size = in_features if scheme.group_size == -1 else scheme.group_size
        num_groups, rest = divmod(in_features, group_size or 1)
        closes = (
            stored["scales"].shape == (num_groups, out_features)
            and stored["qzeros"].shape == (num_groups, out_features * scheme.bits // WORD_BITS)
            and ("g_idx" not in stored or stored["g_idx"].shape == (in_features,))
        )
        if rest or not num_groups or not closes:
            ragged = " (a shorter last group is not read)" if rest else ""
            raise refuse_shapes(
                layer, stored, f"{scheme.bits} bits in groups of {group_size}{ragged}"
            )
        return PackedLayer(out_features, in_features, scheme.bits, group_size)

    def read(self, layer: str, stored: Mapping[str, StoredTensor]) -> GroupedWeight:
        """See ``Format``."""
        packed = self.describe(layer, stored)
        assert packed is not None
        tensors = load(stored)
        check_scales(layer, tensors["scales"])
        zero_points = self.read_zero_points(tensors["qzeros"], packed)
        if self.scheme_of(layer).symmetric:
            _check_symmetric(layer, zero_points, packed.bits)
        order = None
        if "g_idx" in tensors:
            order = order_by_group(layer, tensors["g_idx"], packed.group_size)
        words = tensors["qweight"].T.contiguous()
        codes = self._unpack(words, packed.bits, packed.in_features)
        codes, zero_points = widen(codes, zero_points, packed.bits)
        return GroupedWeight(
            codes=codes if order is None else codes[:, order],
            scales=tensors["scales"].T.contiguous(),
            zero_points=zero_points.T.contiguous(),
            bits=WIDTHS[packed.bits],
            group_size=packed.group_size,
            input_order=order,
        )

    def read_zero_points(self, words: torch.Tensor, packed: PackedLayer) -> torch.Tensor:
        """The zero points that ``qzeros`` hold: uint8 ``[K/G, N]``."""
        bits = packed.bits
        by_word = self.zero_points is ZeroPoints.WORD_LESS_ONE and WORD_BITS % bits == 0
        if by_word:
            words = _add_one_to_each_field(words, bits)
        fields = self._unpack(words, bits, packed.out_features)
        if self.zero_points is ZeroPoints.PLAIN or by_word:
            return fields
        return fields + 1 & (1 << bits) - 1

    def _unpack(self, words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        if bits not in self.planar_bits:
            return unpack_words(words, bits, count)
        return unpack_planes(words, bits, count)


def unpack_planes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes of GPTQModel's planar layout along the last axis: uint8 ``[..., count]``.

    Each run of 32 codes takes ``bits`` words: first its low bits, then the next plane.
    """
    runs = words.unflatten(-1, (-1, bits))
    codes = torch.zeros(*runs.shape[:-1], WORD_BITS, dtype=torch.uint8)
    start = 0
    for width in PLANES[bits]:
        plane = runs[..., start : start + width].contiguous()
        codes |= unpack_words(plane, width, WORD_BITS) << start
        start += width
    return codes.flatten(-2)[..., :count]


@dataclass(frozen=True, slots=True)
class GptqWriter:
    """Writes v1, or v2 for zero points other than the middle. program: name and version."""

    program: str
    version_2: bool = False
    side_file: str = "quantize_config.json"

    def refusal(self, scheme: LayerScheme) -> str | None:
        """See ``Writer``."""
        if scheme.coding is not Coding.INTEGER or scheme.bits not in WRITTEN_BITS:
            return f"GPTQ holds integer codes of 2, 3, 4 or 8 bits, got {scheme}"
        if scheme.outer_scales:
            return "GPTQ holds no outer scales"
        if scheme.in_features % MULTIPLE or scheme.out_features % MULTIPLE:
            return (
                f"GPTQ needs multiples of {MULTIPLE} inputs and outputs, got {scheme.in_features} "
                f"and {scheme.out_features}"
            )
        if not self.version_2 and not scheme.symmetric:
            return "GPTQ v1 holds symmetric codes alone safely: take gptq-v2"
        return None

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """See ``Writer``: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
        weight = integer_weight(weight, self.refusal(scheme_of(weight)))
        order = weight.input_order
        codes = weight.codes
        if order is not None:
            codes = torch.empty_like(codes)
            codes[:, order] = weight.codes
        zero_points = weight.zero_points.T.contiguous()
        return {
            "qweight": pack_words(codes, weight.bits).T.contiguous(),
            "qzeros": pack_words(zero_points - (0 if self.version_2 else 1), weight.bits),
            "scales": half_scales(weight, "GPTQ"),
            "g_idx": group_index(weight.in_features, weight.group_size, order),
        }

    def config_block(
        self, layers: Mapping[str, LayerScheme], ignored: Sequence[str]
    ) -> dict[str, Any]:
        """See ``Writer``, with GPTQModel's keys: what most layers have, others in ``dynamic``."""
        sizes = stated_group_sizes(layers)
        schemes = {name: (one.bits, sizes[name]) for name, one in layers.items()}
        bits, group_size = Counter(schemes.values()).most_common(1)[0][0]
        others = {name: own for name, own in schemes.items() if own != (bits, group_size)}
        rules = write_rules(others, ignored)
        version = "gptq_v2" if self.version_2 else "gptq"
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": all(one.symmetric for one in layers.values()),
            "desc_act": any(one.activation_order for one in layers.values()),
            "checkpoint_format": version,
            "format": version,
            "lm_head": HEAD in layers,
            "pack_dtype": "int32",
            **({"dynamic": rules} if rules else {}),
            "meta": {"quantizer": [self.program]},
        }


def _borrows(block: Mapping[str, Any], zero_points: ZeroPoints) -> bool:
    """Whether v1 zero points were written by GPTQModel, which takes one off whole words."""
    meta = block.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    return zero_points is ZeroPoints.LESS_ONE and "gptqmodel" in str(quantizer).lower()


def _add_one_to_each_field(words: torch.Tensor, bits: int) -> torch.Tensor:
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
    total = (words.long() + ones) & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def _check_symmetric(layer: str, zero_points: torch.Tensor, bits: int) -> None:
    middle = 1 << (bits - 1)
    if bool((zero_points == middle).all()):
        return
    values = zero_points.unique().tolist()
    shift = {middle + 1: "gptq_v2", middle - 1: "gptq"}.get(values[0]) if len(values) == 1 else None
    reason = (
        f"as checkpoint_format {shift!r} would have them"
        if shift
        else f"{len(values)} different ones, as with sym false"
    )
    raise CheckpointError(
        f"{layer}: sym is true, but the zero points are not all {middle}: {reason}; the file is "
        "mislabelled, `qserve inspect --check` explains and --repair mends it"
    )
