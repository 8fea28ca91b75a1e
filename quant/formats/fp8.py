"""8-bit float releases (owners: DeepSeek, transformers' FineGrainedFP8 and FbgemmFp8), read only.

weight            float8_e4m3fn [N, K]
weight_scale_inv  float32 [ceil(N/128), ceil(K/128)]   a factor of the weight, despite its name
weight_scale      the same for one scale a tensor ([] or [1]) or a row ([N] or [N, 1])
input_scale       of static activations; not read, since activations are scaled by their row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.float8_weight import Float8Weight
from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.layer_format import (
    PackedLayer,
    StoredTensor,
    check_scales,
    refuse_shapes,
    require,
)

BITS = 8
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Float8Format:
    """8-bit float checkpoints. block: rows and columns that share a scale, None for other kinds."""

    name: str
    block: tuple[int, int] | None
    activations: Activations = Activations.FLOAT8_TOKEN
    keys: tuple[str, ...] = ("weight", "weight_scale_inv", "weight_scale", "input_scale")

    @classmethod
    def from_config(cls, block: Mapping[str, Any]) -> Float8Format:
        """The format that a ``quantization_config`` describes.

        Raises ``UnsupportedModelError`` for block sizes that are not two positive numbers.
        """
        size = block.get("weight_block_size")
        name = str(block.get("quant_method"))
        if size is None:
            return cls(name, None)
        if not isinstance(size, list) or len(size) != 2 or not all(_is_size(n) for n in size):
            raise UnsupportedModelError(
                f"{name} weight_block_size {size!r}: expected two numbers such as [128, 128]"
            )
        return cls(name, (size[0], size[1]))

    def describe(self, layer: str, stored: Mapping[str, StoredTensor]) -> PackedLayer | None:
        """See ``Format``."""
        key = _scale_key(stored)
        if key is None:
            return None
        require(layer, stored, {"weight": ["F8_E4M3"], key: SCALE_TYPES})
        shape = stored["weight"].shape
        if len(shape) != 2 or share_of(stored[key].shape, shape, self.block) is None:
            raise refuse_shapes(layer, stored, f"one scale a tensor, a row or {self.block}")
        _, columns = share_of(stored[key].shape, shape, self.block) or shape
        return PackedLayer(shape[0], shape[1], BITS, columns)

    def read(self, layer: str, stored: Mapping[str, StoredTensor]) -> Float8Weight:
        """See ``Format``."""
        self.describe(layer, stored)
        key = _scale_key(stored)
        assert key is not None
        return float8_weight(layer, stored["weight"].load(), stored[key].load(), self.block)


def float8_weight(
    layer: str, values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None
) -> Float8Weight:
    """The neutral form of 8-bit floats whose scales have any of the shapes of ``share_of``."""
    share = share_of(tuple(scales.shape), tuple(values.shape), block)
    assert share is not None
    rows, columns = share
    shape = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
    return Float8Weight(values, check_scales(layer, scales.float()).reshape(shape), share)


def share_of(
    scales: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The rows and columns of a weight ``[N, K]`` that share a scale, by the shape of the scales.

    None when neither ``block``, nor one a tensor, nor one a row fits.
    """
    if block is not None:
        rows, columns = block
        fits = scales == (-(-weight[0] // rows), -(-weight[1] // columns))
        return block if fits else None
    if scales in ((), (1,), (1, 1)):
        return weight[0], weight[1]
    return (1, weight[1]) if scales in ((weight[0],), (weight[0], 1)) else None


def _scale_key(stored: Mapping[str, StoredTensor]) -> str | None:
    keys = ("weight_scale_inv", "weight_scale")
    return next((key for key in keys if key in stored), None)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
