"""What every format that is written does: say what it holds, write a layer, write the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.formats.layer_format import QuantizedWeight, is_usable
from qserve.quant.formats.nested_scales import NestedWeight


class Coding(Enum):
    """What codes stand for."""

    INTEGER = "integer"
    CODEBOOK = "codebook"
    FLOAT8 = "float8"


@dataclass(frozen=True, slots=True)
class LayerScheme:
    """How the weight of one layer is coded: enough to plan a checkpoint and to write its config.

    group_size: inputs of an output that share a scale; elements, for a codebook. block_rows:
    outputs that share one. activation_order: groups do not follow the order of the inputs.
    outer_scales: scales of groups are integers times a scale of the row. nested: scales are
    quantized themselves.
    """

    out_features: int
    in_features: int
    coding: Coding
    bits: int
    group_size: int
    block_rows: int = 1
    symmetric: bool = True
    activation_order: bool = False
    outer_scales: bool = False
    nested: bool = False

    @property
    def is_per_row(self) -> bool:
        """Whether each output has one scale."""
        return self.group_size == self.in_features and self.block_rows == 1

    def __str__(self) -> str:
        kind = f"{self.bits}-bit {'' if self.symmetric else 'asymmetric '}{self.coding.value}"
        return f"{kind} codes in groups of {self.group_size}"


def scheme_of(weight: QuantizedWeight) -> LayerScheme:
    """The scheme of a weight. Zero points tell whether it is symmetric."""
    shape = (weight.out_features, weight.in_features)
    if isinstance(weight, CodebookWeight):
        nested = isinstance(weight, NestedWeight)
        return LayerScheme(*shape, Coding.CODEBOOK, 4, weight.block_size, nested=nested)
    if isinstance(weight, Float8Weight):
        return LayerScheme(*shape, Coding.FLOAT8, 8, weight.block[1], weight.block[0])
    return LayerScheme(
        *shape,
        Coding.INTEGER,
        weight.bits,
        weight.group_size,
        symmetric=weight.is_symmetric,
        activation_order=weight.input_order is not None,
        outer_scales=weight.channel_scales is not None,
    )


class Writer(Protocol):
    """Writes the linear layers of a checkpoint in one format.

    side_file: another file than ``config.json`` that holds the block too, for older readers.
    """

    @property
    def side_file(self) -> str | None: ...

    def refusal(self, scheme: LayerScheme) -> str | None:
        """Why the format cannot hold a layer of this scheme; None when it can."""

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors of a layer, by what follows its name and a dot.

        Raises ``ValueError`` for a weight whose scheme is refused, and for scales that the format
        would store as zero or not finite.
        """

    def config_block(
        self, layers: Mapping[str, LayerScheme], ignored: Sequence[str]
    ) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``.

        layers: every layer written, by full name. ignored: full names of the linear layers left in
        16 bits; the output head need not be named. Raises ``ValueError`` for layers that differ in
        what the format states once.
        """


def integer_weight(weight: QuantizedWeight, refusal: str | None) -> GroupedWeight:
    """The weight, which has integer codes. Raises ``ValueError`` with the refusal if there is one.

    A format that refuses everything but integers calls this before it packs.
    """
    if refusal is not None:
        raise ValueError(refusal)
    assert isinstance(weight, GroupedWeight)
    return weight


def half_scales(weight: GroupedWeight, format_name: str) -> torch.Tensor:
    """Scales as AWQ and GPTQ store them: float16 ``[K/G, N]``.

    Raises ``ValueError`` when one is zero or not finite in float16.
    """
    scales = weight.scales.T.contiguous().to(torch.float16)
    if not is_usable(scales):
        raise ValueError(
            f"a scale is zero, infinite or NaN in float16, which is what {format_name} stores: "
            "expected magnitudes of 6e-8 to 65504"
        )
    return scales


def stated_group_sizes(layers: Mapping[str, LayerScheme]) -> dict[str, int]:
    """The group size of each layer as a configuration states it: -1 for one group a row.

    A layer as wide as the groups of others counts as one of theirs.
    """
    sizes = {scheme.group_size for scheme in layers.values() if not scheme.is_per_row}
    return {
        name: -1 if scheme.is_per_row and scheme.group_size not in sizes else scheme.group_size
        for name, scheme in layers.items()
    }
