"""bitsandbytes' formats (owner: bitsandbytes 0.50.2): nf4, fp4 and LLM.int8, written and read.

4 bits, the weight ``[N, K]`` flattened, in blocks of B elements:

    weight                uint8 [ceil(N K / 2), 1]  two codes a byte, the first in the high half
    weight.absmax         float32 [blocks], the largest magnitude; uint8 for double quantization
    weight.quant_map      float32 [16]              what the codes stand for
    weight.nested_absmax, weight.nested_quant_map   of double quantization: see ``NestedScales``
    weight.quant_state.bitsandbytes__nf4 (or fp4)   uint8, a JSON object: block size, shape, type

LLM.int8:

    weight         int8 [N, K]
    SCB            float32 [N]  the largest magnitude of each row, which 127 stands for
    weight_format  uint8, 0: rows one after the other
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats.layer_format import (
    HEAD,
    PackedLayer,
    QuantizedWeight,
    StoredTensor,
    check_scales,
    is_usable,
    refuse_shapes,
    require,
)
from qserve.quant.formats.nested_scales import NestedScales, NestedWeight
from qserve.quant.formats.writer import Coding, LayerScheme, integer_weight, scheme_of

BITS_4, BITS_8 = 4, 8
MAX_INT8 = 127
STATE = "weight.quant_state.bitsandbytes__"
STORAGE_TYPES = ("U8", "I8", "BF16", "F16", "F32")

NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""Quantiles of the normal distribution (arXiv 2305.14314), as bitsandbytes rounds them."""

FP4_MAGNITUDES = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
FP4 = torch.cat([FP4_MAGNITUDES, -FP4_MAGNITUDES])
"""bitsandbytes' own 4-bit floats: not E2M1."""

CODEBOOKS = {"nf4": NF4, "fp4": FP4}


@dataclass(frozen=True, slots=True)
class BitsAndBytesFormat:
    """Checkpoints of bitsandbytes. What a layer holds is told by its tensors alone."""

    name: str = "bitsandbytes"
    activations: None = None
    keys: tuple[str, ...] = (
        *("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map"),
        *(f"{STATE}{kind}" for kind in CODEBOOKS),
    )

    @classmethod
    def from_config(cls, block: Mapping[str, Any]) -> BitsAndBytesFormat:
        """The format; the block says nothing that the tensors do not."""
        return cls()

    def describe(self, layer: str, stored: Mapping[str, StoredTensor]) -> PackedLayer | None:
        """See ``Format``."""
        if "SCB" in stored:
            require(layer, stored, {"weight": ["I8"], "SCB": ["F32"]})
            shape = stored["weight"].shape
            if len(shape) != 2 or stored["SCB"].shape != shape[:1]:
                raise refuse_shapes(layer, stored, "one SCB for each row")
            return PackedLayer(shape[0], shape[1], BITS_8, shape[1])
        state_key = next((key for key in stored if key.startswith(STATE)), None)
        if state_key is None and "weight.absmax" not in stored:
            return None
        key = state_key or f"{STATE}nf4"
        require(
            layer,
            stored,
            {key: ["U8"], "weight": STORAGE_TYPES, "weight.absmax": ["F32", "U8"]},
        )
        return _describe_codes(layer, stored, _read_state(layer, stored[key].load()))

    def read(
        self, layer: str, stored: Mapping[str, StoredTensor]
    ) -> GroupedWeight | CodebookWeight:
        """See ``Format``."""
        packed = self.describe(layer, stored)
        assert packed is not None
        if packed.bits == BITS_8:
            return _read_int8(layer, stored)
        key = next(key for key in stored if key.startswith(STATE))
        state = _read_state(layer, stored[key].load())
        count = packed.out_features * packed.in_features
        stored_bytes = stored["weight"].load().reshape(-1).view(torch.uint8)
        codes = torch.stack([stored_bytes >> 4, stored_bytes & 15], 1).flatten()[:count]
        shape = (packed.out_features, packed.in_features)
        codebook = stored["weight.quant_map"].load().float()
        absmax = stored["weight.absmax"].load()
        if absmax.dtype is not torch.uint8:
            return CodebookWeight(codes.view(shape), codebook, absmax, packed.group_size)
        nested = NestedScales(
            codes=absmax,
            code_map=stored["weight.nested_quant_map"].load(),
            scales=stored["weight.nested_absmax"].load(),
            offset=float(state["nested_offset"]),
            block_size=int(state["nested_blocksize"]),
        )
        return NestedWeight(
            codes.view(shape), codebook, nested.dequantize(), packed.group_size, nested
        )


@dataclass(frozen=True, slots=True)
class BitsAndBytesWriter:
    """Writes nf4, fp4 and LLM.int8. dtype: that bitsandbytes dequantizes to."""

    dtype: str = "float16"
    side_file: None = None

    def refusal(self, scheme: LayerScheme) -> str | None:
        """See ``Writer``."""
        if scheme.coding is Coding.CODEBOOK:
            return None
        if scheme.coding is not Coding.INTEGER or scheme.bits != BITS_8 or not scheme.is_per_row:
            return f"bitsandbytes holds nf4, fp4 and 8 bits with one scale a row, got {scheme}"
        if not scheme.symmetric or scheme.activation_order or scheme.outer_scales:
            return "LLM.int8 holds symmetric codes, neither activation order nor outer scales"
        return None

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """See ``Writer``; a ``NestedWeight`` is double quantized."""
        refusal = self.refusal(scheme_of(weight))
        if isinstance(weight, CodebookWeight):
            return _encode_codebook(weight, self.dtype)
        return _encode_int8(integer_weight(weight, refusal))

    def config_block(
        self, layers: Mapping[str, LayerScheme], ignored: Sequence[str]
    ) -> dict[str, Any]:
        """See ``Writer``, with transformers' keys. It names nf4; the tensors say which it is."""
        codings = {scheme.coding for scheme in layers.values()}
        if len(codings) != 1:
            raise ValueError("bitsandbytes loads 4 bits or 8 bits, not both in one checkpoint")
        is_int8 = codings == {Coding.INTEGER}
        left = list(ignored) if HEAD in layers else [*ignored, HEAD]
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": not is_int8,
            "load_in_8bit": is_int8,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": any(scheme.nested for scheme in layers.values()),
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": left or None,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }


def _encode_codebook(weight: CodebookWeight, dtype: str) -> dict[str, torch.Tensor]:
    kinds = [kind for kind, table in CODEBOOKS.items() if _same_values(table, weight.codebook)]
    if not kinds:
        raise ValueError("bitsandbytes holds the codebooks nf4 and fp4, and this is another")
    if not bool(torch.isfinite(weight.block_scales).all()):
        raise ValueError("a scale is infinite or NaN")
    table = CODEBOOKS[kinds[0]]
    codes = weight.codes.flatten()
    if not torch.equal(table, weight.codebook):
        places = (weight.codebook[:, None] == table).int().argmax(1).to(torch.uint8)
        codes = places[codes.long()]
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    state: dict[str, Any] = {
        "quant_type": kinds[0],
        "blocksize": weight.block_size,
        "dtype": dtype,
        "shape": [weight.out_features, weight.in_features],
    }
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": weight.block_scales,
        "weight.quant_map": table.clone(),
    }
    if isinstance(weight, NestedWeight):
        nested = weight.nested
        tensors["weight.absmax"] = nested.codes
        tensors["weight.nested_absmax"] = nested.scales
        tensors["weight.nested_quant_map"] = nested.code_map.clone()
        state |= {
            "nested_blocksize": nested.block_size,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
    text = json.dumps(state).encode()
    tensors[f"{STATE}{kinds[0]}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def _same_values(table: torch.Tensor, codebook: torch.Tensor) -> bool:
    """Whether a codebook has the values of a table, in any order."""
    return torch.equal(table.sort().values, codebook.sort().values)


def _encode_int8(weight: GroupedWeight) -> dict[str, torch.Tensor]:
    codes = weight.codes.to(torch.int16) - 128
    if int(codes.min()) < -MAX_INT8:
        raise ValueError(f"LLM.int8 holds codes of -{MAX_INT8} to {MAX_INT8}")
    if not is_usable(weight.scales) or bool((weight.scales < 0).any()):
        raise ValueError("LLM.int8 holds positive finite scales")
    return {
        "weight": codes.to(torch.int8),
        "SCB": weight.scales.float().flatten() * MAX_INT8,
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }


def _describe_codes(
    layer: str, stored: Mapping[str, StoredTensor], state: Mapping[str, Any]
) -> PackedLayer:
    expected = {"weight.quant_map": ["F32"]}
    if stored["weight.absmax"].dtype == "U8":
        expected |= {"weight.nested_absmax": ["F32"], "weight.nested_quant_map": ["F32"]}
        if not {"nested_blocksize", "nested_offset"} <= set(state):
            raise CheckpointError(f"{layer}: quant_state lacks the nested block size or offset")
    require(layer, stored, expected)
    out_features, in_features = state["shape"]
    block_size = state["blocksize"]
    count = out_features * in_features
    num_blocks = -(-count // block_size)
    width = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}[stored["weight"].dtype]
    num_bytes = torch.Size(stored["weight"].shape).numel() * width
    closes = (
        stored["weight.absmax"].shape == (num_blocks,)
        and stored["weight.quant_map"].shape == (16,)
        and 0 <= num_bytes - -(-count // 2) < width
    )
    if not closes:
        raise refuse_shapes(
            layer, stored, f"a weight {out_features} x {in_features} in blocks of {block_size}"
        )
    return PackedLayer(out_features, in_features, BITS_4, block_size)


def _read_state(layer: str, content: torch.Tensor) -> dict[str, Any]:
    """The JSON object of ``quant_state``, when it says what is needed."""
    try:
        state = json.loads(bytes(content.tolist()))
        shape, block_size = state["shape"], state["blocksize"]
        sizes = [*shape, block_size]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{layer}: quant_state is not the JSON object that bitsandbytes writes "
            f"({type(error).__name__}: {error}): the file is damaged"
        ) from None
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise UnsupportedModelError(
            f"{layer}: quant_state says shape {shape} and block size {block_size!r}, expected a "
            "matrix and a positive number"
        )
    return dict(state)


def _read_int8(layer: str, stored: Mapping[str, StoredTensor]) -> GroupedWeight:
    values = stored["weight"].load()
    largest = stored["SCB"].load()
    largest = torch.where(largest == 0, 1.0, largest)  # of a row of zeros, whose codes are zero too
    scales = check_scales(layer, largest)[:, None] / MAX_INT8
    return GroupedWeight(
        codes=(values.to(torch.int16) + 128).to(torch.uint8),
        scales=scales,
        zero_points=torch.full(scales.shape, 128, dtype=torch.uint8),
        bits=BITS_8,
        group_size=values.shape[1],
    )
