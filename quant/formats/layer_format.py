"""What every checkpoint format does: say which layers it packs, and read and write one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError, UnsupportedModelError

QuantizedWeight = GroupedWeight | CodebookWeight | Float8Weight
"""The neutral forms that a packed layer is read into."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is known by its safetensors header until it is asked for.

    dtype: the header's name for it, such as ``I32``.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """What the stored of a packed layer and the configuration say together.

    bits: of a code. group_size: inputs of one output that share a scale; for blocks of several rows
    or of the flattened weight, their width or length.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int


class Format(Protocol):
    """How one checkpoint packs its linear layers, learned from its ``quantization_config``.

    name: what the block calls it. keys: the ends of the tensor names that belong to a packed layer,
    after the layer's name and a dot. activations: what the checkpoint was made for, None when it
    says nothing about them.
    """

    @property
    def name(self) -> str: ...

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def activations(self) -> Activations | None: ...

    def describe(self, layer: str, stored: Mapping[str, StoredTensor]) -> PackedLayer | None:
        """The layer ``layer`` by the headers of its tensors; None when it is not packed.

        stored: what there is of ``keys``. Of the values only small ones are loaded.
        Raises ``CheckpointError`` when a tensor is missing, has a wrong type or when shapes do not
        close, ``UnsupportedModelError`` for a packing that is not read.
        """

    def read(self, layer: str, stored: Mapping[str, StoredTensor]) -> QuantizedWeight:
        """The weight of a packed layer. Raises like ``describe``, and for damaged values."""


def read_group_size(method: str, value: object) -> int:
    """A group size that a configuration states; -1 is one group a row.

    Raises ``UnsupportedModelError`` for anything but a positive whole number or -1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or (value <= 0 and value != -1):
        raise UnsupportedModelError(
            f"{method} group_size {value!r}: expected a positive number such as 32, 64 or 128, or "
            "-1 for one group a row"
        )
    return value


def read_bits(method: str, value: object, allowed: Sequence[int]) -> int:
    """The width of a code that a configuration states.

    Raises ``UnsupportedModelError`` unless it is one of ``allowed``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise UnsupportedModelError(f"{method} with {value!r} bits: expected one of {listed}")
    return value


def load(stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """All tensors of a layer, under the same keys."""
    return {key: tensor.load() for key, tensor in stored.items()}


def in_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """Tensors as if they were stored: what a reader will find when they are written."""
    return {
        key: StoredTensor(tuple(tensor.shape), DTYPES[tensor.dtype], partial(_same, tensor))
        for key, tensor in tensors.items()
    }


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors headers call the types."""

HEAD = "lm_head"
"""The output head, which stays in 16 bits unless a checkpoint says otherwise."""

COMPUTED = ".rotary_emb.inv_freq"
"""The end of the names of tensors that old checkpoints hold and the configuration implies."""

FLOATS = ("F16", "BF16", "F32")
"""Types of scales."""


def require(
    layer: str, stored: Mapping[str, StoredTensor], expected: Mapping[str, Sequence[str]]
) -> None:
    """Check that tensors are there and have one of the types given for them.

    Raises ``CheckpointError`` with all that is missing or wrong.
    """
    missing = [key for key in expected if key not in stored]
    if missing:
        raise CheckpointError(
            f"{layer}: {', '.join(missing)} missing: the checkpoint is incomplete"
        )
    wrong = [key for key, dtypes in expected.items() if stored[key].dtype not in dtypes]
    if wrong:
        found = ", ".join(f"{key} {stored[key].dtype}" for key in wrong)
        wanted = ", ".join(f"{key} {' or '.join(expected[key])}" for key in wrong)
        raise CheckpointError(f"{layer}: {found}: expected {wanted}; the file is mislabelled")


def refuse_shapes(layer: str, stored: Mapping[str, StoredTensor], expected: str) -> CheckpointError:
    """The error for shapes that do not close. expected: what would, in words."""
    found = ", ".join(f"{key} {header.shape}" for key, header in stored.items())
    return CheckpointError(
        f"{layer}: {found} do not fit {expected}; config.json and the tensors disagree"
    )


def check_scales(layer: str, scales: torch.Tensor) -> torch.Tensor:
    """The scales, when they are finite and not zero. Raises ``CheckpointError`` otherwise."""
    if not is_usable(scales):
        raise CheckpointError(
            f"{layer}: scales hold zero, infinite or NaN values: the file is damaged; "
            "`qserve inspect --check` tells where"
        )
    return scales


def is_usable(scales: torch.Tensor) -> bool:
    """Whether scales are finite and not zero; they may be negative."""
    return bool(torch.isfinite(scales).all()) and not bool((scales == 0).any())


def text_of(block: Mapping[str, Any], *keys: str) -> str | None:
    """The first of ``keys`` that a configuration has a text for, in lower case."""
    for key in keys:
        if isinstance(value := block.get(key), str):
            return value.lower()
    return None
