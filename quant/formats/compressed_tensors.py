"""compressed-tensors (owner: vllm-project/compressed-tensors 0.20.0): codes in words, int8, float8.

pack-quantized, b bits, N outputs, K inputs in groups of G, no quantized activations:

    weight_packed      int32 [N, ceil(K b/32)]    each row's codes along K, one after the other
    weight_scale       float [N, K/G], [N, 1] or [1]
    weight_zero_point  int32 [ceil(N b/32), K/G]  codes along N; absent when symmetric
    weight_shape       int64 [2]                  N, K
    weight_g_idx       int32 [K]                  old files with activation order

int-quantized: ``weight`` int8 ``[N, K]``, less 2^(b-1), ``weight_zero_point`` int8 likewise.
float-quantized and naive-quantized: ``weight`` float8_e4m3fn ``[N, K]``.

Until version 0.17 a word of 3, 5, 6 or 7 bits held whole codes only, its top bits 0; since then
codes run on into the next word. Both are read, told apart by the number of words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import WORD_BITS, pack_words, unpack_words
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats import fp8
from qserve.quant.formats.channel_order import order_by_group
from qserve.quant.formats.code_width import WIDTHS, widen
from qserve.quant.formats.compressed_schemes import (
    Kind,
    KvCacheScheme,
    Scheme,
    SchemeTable,
    Strategy,
    read_schemes,
    write_schemes,
)
from qserve.quant.formats.layer_format import (
    FLOATS,
    HEAD,
    PackedLayer,
    QuantizedWeight,
    StoredTensor,
    check_scales,
    is_usable,
    load,
    refuse_shapes,
    require,
)
from qserve.quant.formats.writer import Coding, LayerScheme, integer_weight, scheme_of


@dataclass(frozen=True, slots=True)
class CompressedFormat:
    """Checkpoints of compressed-tensors."""

    schemes: SchemeTable
    name: str = "compressed-tensors"
    keys: tuple[str, ...] = (
        *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape"),
        *("weight_g_idx", "input_scale", "input_zero_point", "output_scale"),
    )

    @classmethod
    def from_config(cls, block: Mapping[str, Any]) -> CompressedFormat:
        """The format that a ``quantization_config`` describes. Raises like ``read_schemes``."""
        return cls(read_schemes(block))

    @property
    def activations(self) -> Activations | None:
        """See ``Format``."""
        return self.schemes.activations

    def describe(self, layer: str, stored: Mapping[str, StoredTensor]) -> PackedLayer | None:
        """See ``Format``."""
        if not {"weight_packed", "weight_scale"} & set(stored):
            return None
        scheme = self._scheme_of(layer)
        if "weight_packed" in stored:
            return _describe_packed(layer, stored, scheme)
        dtype = "F8_E4M3" if scheme.kind is Kind.FLOAT else "I8"
        require(layer, stored, {"weight": [dtype], "weight_scale": FLOATS})
        if scheme.kind is Kind.INT and not scheme.symmetric:
            require(layer, stored, {"weight_zero_point": ["I8"]})
        shape = stored["weight"].shape
        scales = stored["weight_scale"].shape
        share = fp8.share_of(scales, shape, _block_of(scheme)) if len(shape) == 2 else None
        if share is None or (scheme.kind is Kind.INT and share[0] not in (1, shape[0])):
            raise refuse_shapes(layer, stored, f"a scale for each {scheme.strategy.value}")
        return PackedLayer(shape[0], shape[1], scheme.bits, share[1])

    def read(self, layer: str, stored: Mapping[str, StoredTensor]) -> QuantizedWeight:
        """See ``Format``."""
        packed = self.describe(layer, stored)
        assert packed is not None
        tensors = load(stored)
        scheme = self._scheme_of(layer)
        if scheme.kind is Kind.FLOAT:
            weight, scales = tensors["weight"], tensors["weight_scale"]
            return fp8.float8_weight(layer, weight, scales, _block_of(scheme))
        is_packed = "weight_packed" in tensors
        codes = _packed_codes(tensors, packed) if is_packed else _biased(tensors["weight"], packed)
        scales = check_scales(layer, tensors["weight_scale"])
        scales = scales.reshape(-1, packed.in_features // packed.group_size)
        scales = scales.expand(packed.out_features, -1).contiguous()
        zero_points = torch.full(scales.shape, 1 << (packed.bits - 1), dtype=torch.uint8)
        if not scheme.symmetric:
            zero_points = _zero_points(tensors["weight_zero_point"], packed, is_packed)
        order = None
        if "weight_g_idx" in tensors and bool((tensors["weight_g_idx"] >= 0).all()):
            order = order_by_group(layer, tensors["weight_g_idx"], packed.group_size)
        codes, zero_points = widen(codes, zero_points, packed.bits)
        return GroupedWeight(
            codes=codes if order is None else codes[:, order],
            scales=scales,
            zero_points=zero_points,
            bits=WIDTHS[packed.bits],
            group_size=packed.group_size,
            input_order=order,
        )

    def _scheme_of(self, layer: str) -> Scheme:
        scheme = self.schemes.scheme_of(layer)
        if scheme is None:
            raise CheckpointError(
                f"{layer} is packed, but config.json ignores it or has no target for it: the file "
                "is mislabelled"
            )
        return scheme


@dataclass(frozen=True, slots=True)
class CompressedWriter:
    """Writes compressed-tensors, every layer in the packing that its owner would choose for it.

    activations: what the layers are multiplied with; None packs integers into words. kv_cache: the
    scheme of the key-value scales that are stored beside, None when there are none.
    """

    activations: Activations | None = None
    kv_cache: KvCacheScheme | None = None
    side_file: None = None

    def refusal(self, scheme: LayerScheme) -> str | None:
        """See ``Writer``."""
        if scheme.coding is Coding.CODEBOOK:
            return f"compressed-tensors holds integers and 8-bit floats, got {scheme}"
        if scheme.activation_order or scheme.outer_scales:
            return "compressed-tensors holds neither activation order nor outer scales"
        expected = {
            Coding.INTEGER: (None, Activations.INT8_TOKEN),
            Coding.FLOAT8: (None, Activations.FLOAT8_TOKEN),
        }
        if self.activations not in expected[scheme.coding]:
            return f"compressed-tensors: {scheme} do not go with {self.activations}"
        if scheme.coding is Coding.INTEGER and self.activations is None:
            step = WORD_BITS // math.gcd(scheme.bits, WORD_BITS)
            if scheme.in_features % step or (scheme.out_features % step and not scheme.symmetric):
                return f"compressed-tensors needs multiples of {step} inputs and outputs"
        return None

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """See ``Writer``."""
        refusal = self.refusal(scheme_of(weight))
        if isinstance(weight, Float8Weight) and refusal is None:
            return _encode_floats(weight)
        weight = integer_weight(weight, refusal)
        if not is_usable(weight.scales):
            raise ValueError("a scale is zero, infinite or NaN")
        if self.activations is None:
            return _encode_words(weight)
        return _encode_int8(weight)

    def config_block(
        self, layers: Mapping[str, LayerScheme], ignored: Sequence[str]
    ) -> dict[str, Any]:
        """See ``Writer``. Layers that differ are listed by name in the group of their scheme."""
        left = list(ignored) if HEAD in layers else [*ignored, HEAD]
        return write_schemes(layers, left, self.activations, self.kv_cache)


def _encode_words(weight: GroupedWeight) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack_words(weight.codes, weight.bits),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not weight.is_symmetric:
        by_output = pack_words(weight.zero_points.T.contiguous(), weight.bits)
        tensors["weight_zero_point"] = by_output.T.contiguous()
    return tensors


def _encode_int8(weight: GroupedWeight) -> dict[str, torch.Tensor]:
    middle = 1 << (weight.bits - 1)
    tensors = {
        "weight": (weight.codes.to(torch.int16) - middle).to(torch.int8),
        "weight_scale": weight.scales.contiguous(),
    }
    if not weight.is_symmetric:
        tensors["weight_zero_point"] = (weight.zero_points.to(torch.int16) - middle).to(torch.int8)
    return tensors


def _encode_floats(weight: Float8Weight) -> dict[str, torch.Tensor]:
    if not is_usable(weight.scales):
        raise ValueError("a scale is zero, infinite or NaN")
    whole = weight.block == (weight.out_features, weight.in_features)
    scales = weight.scales.flatten() if whole else weight.scales
    return {"weight": weight.values.contiguous(), "weight_scale": scales.contiguous()}


def _block_of(scheme: Scheme) -> tuple[int, int] | None:
    if scheme.strategy is Strategy.GROUP and scheme.group_size not in (None, -1):
        return 1, int(scheme.group_size or 0)
    return scheme.block if scheme.strategy is Strategy.BLOCK else None


def _describe_packed(layer: str, stored: Mapping[str, StoredTensor], scheme: Scheme) -> PackedLayer:
    if stored["weight_packed"].dtype == "U8" or scheme.kind is Kind.FLOAT:
        raise UnsupportedModelError(
            f"{layer}: compressed-tensors with 4-bit floats: integers and 8-bit floats can be read"
        )
    require(layer, stored, {"weight_packed": ["I32"], "weight_scale": FLOATS})
    if not scheme.symmetric:
        require(layer, stored, {"weight_zero_point": ["I32"]})
    out_features, num_words = (*stored["weight_packed"].shape, 0, 0)[:2]
    in_features = _count_inputs(layer, stored, scheme)
    shape = (out_features, in_features)
    share = fp8.share_of(stored["weight_scale"].shape, shape, _block_of(scheme))
    fits = share is not None and in_features % share[1] == 0 and share[0] in (1, out_features)
    if fits and not scheme.symmetric:
        assert share is not None
        words = _row_words(out_features, scheme.bits)
        zero_shape = stored["weight_zero_point"].shape
        fits = zero_shape in {(count, in_features // share[1]) for count in words}
    if share is None or not fits or num_words not in _row_words(in_features, scheme.bits):
        raise refuse_shapes(
            layer, stored, f"{scheme.bits} bits with a scale for each {scheme.strategy.value}"
        )
    return PackedLayer(out_features, in_features, scheme.bits, share[1])


def _count_inputs(layer: str, stored: Mapping[str, StoredTensor], scheme: Scheme) -> int:
    """K: as ``weight_shape`` says, else as many as groups or words hold."""
    if "weight_shape" in stored:
        shape = stored["weight_shape"].load().tolist()
        if len(shape) != 2 or shape[0] != stored["weight_packed"].shape[0]:
            raise refuse_shapes(layer, stored, f"weight_shape {shape}")
        return int(shape[1])
    scales = stored["weight_scale"].shape
    if scheme.strategy is Strategy.GROUP and len(scales) == 2 and scheme.group_size != -1:
        return scales[1] * int(scheme.group_size or 0)
    return int(stored["weight_packed"].shape[-1]) * WORD_BITS // scheme.bits


def _row_words(count: int, bits: int) -> tuple[int, int]:
    """Words for ``count`` codes: run on, and with whole codes in each word."""
    return -(-count * bits // WORD_BITS), -(-count // (WORD_BITS // bits))


def _unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    dense, padded = _row_words(count, bits)
    if words.shape[-1] == dense:
        return unpack_words(words, bits, count)
    assert words.shape[-1] == padded
    shifts = torch.arange(WORD_BITS // bits, dtype=torch.int32) * bits
    fields = words[..., None] >> shifts & (1 << bits) - 1
    return fields.to(torch.uint8).flatten(-2)[..., :count].contiguous()


def _packed_codes(tensors: Mapping[str, torch.Tensor], packed: PackedLayer) -> torch.Tensor:
    return _unpack(tensors["weight_packed"], packed.bits, packed.in_features)


def _biased(stored: torch.Tensor, packed: PackedLayer) -> torch.Tensor:
    return (stored.to(torch.int16) + (1 << (packed.bits - 1))).to(torch.uint8)


def _zero_points(stored: torch.Tensor, packed: PackedLayer, is_packed: bool) -> torch.Tensor:
    num_groups = packed.in_features // packed.group_size
    if is_packed:
        by_output = _unpack(stored.T.contiguous(), packed.bits, packed.out_features)
        return by_output.T.contiguous()
    biased = _biased(stored, packed).reshape(-1, num_groups)
    return biased.expand(packed.out_features, -1).contiguous()
