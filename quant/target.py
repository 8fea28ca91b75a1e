"""What the format that a method writes can express: of one layer, and of layers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from qserve.quant.errors import OptionError
from qserve.quant.formats.registry import make_writer
from qserve.quant.formats.writer import LayerScheme
from qserve.quant.grid import LevelSet
from qserve.quant.methods import WHOLE_ROW, profile_of
from qserve.quant.options import QuantizeOptions
from qserve.quant.overrides import CODE_BITS


@dataclass(frozen=True, slots=True)
class StageSpec:
    """How the layers of a stage are coded.

    group_size: inputs that share a scale; -1 for one scale a row. reason: why they differ from
    others; '' when they do not.
    """

    levels: LevelSet
    group_size: int
    reason: str = ""

    def width(self, in_features: int) -> int:
        """How many inputs share a scale in a layer that has so many."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def scheme(self, layer: nn.Linear) -> LayerScheme:
        """How a layer is coded by it."""
        return LayerScheme(
            layer.out_features,
            layer.in_features,
            self.levels.coding,
            self.levels.bits,
            self.width(layer.in_features),
            symmetric=self.levels.is_symmetric,
            nested=self.levels.nested,
            outer_scales=self.levels.progressive,
        )


class Target:
    """The levels and group sizes of a method within the format that it is written in.

    levels: the method's own. widths: of codes, those that it may have. group_sizes: likewise.
    writer: of the format.
    """

    def __init__(self, options: QuantizeOptions) -> None:
        """Raises ``OptionError`` for options that the format cannot state."""
        profile = profile_of(options)
        self.levels = profile.levels
        self.group_sizes = profile.group_sizes
        has_one_width = profile.activations is not None or profile.levels.codebook is not None
        self.widths = (self.levels.bits,) if has_one_width else CODE_BITS
        self.writer = make_writer(
            profile.output,
            "",
            activations=profile.activations,
            kv_cache=None if options.kv_cache is None else options.kv_cache.scheme,
        )

    def spec(self, bits: int, group_size: int) -> StageSpec:
        """Codes of another width. group_size: -1 for one scale a row.

        Raises ``OptionError`` when the method has one width.
        """
        if bits not in self.widths:
            raise OptionError(
                f"{bits} bits: this method has codes of {self.levels.bits} bits alone"
            )
        return StageSpec(replace(self.levels, bits=bits), group_size)

    def refusal(self, layer: nn.Linear, spec: StageSpec) -> str | None:
        """Why the format cannot hold a layer; None when it can."""
        if not divides(spec.group_size, layer.in_features):
            return f"{layer.in_features} inputs, the format needs a multiple of {spec.group_size}"
        return self.refuse_scheme(spec.scheme(layer))

    def refuse_scheme(self, scheme: LayerScheme) -> str | None:
        """Why the format cannot hold a layer that is coded so; None when it can."""
        return self.writer.refusal(scheme)

    def misfit(self, layer: nn.Linear) -> str | None:
        """Why the format cannot hold a layer at the method's own width, in any group size."""
        fitting = [size for size in self.group_sizes if divides(size, layer.in_features)]
        if not fitting:
            smallest = min(self.group_sizes)
            return f"{layer.in_features} inputs, the format needs a multiple of {smallest}"
        specs = [self.spec(self.levels.bits, size) for size in fitting]
        refusals = [self.refuse_scheme(spec.scheme(layer)) for spec in specs]
        return None if None in refusals else refusals[-1]

    def refuse_mixture(
        self, schemes: Mapping[str, LayerScheme], ignored: Sequence[str]
    ) -> str | None:
        """Why the format cannot hold these layers in one checkpoint; None when it can.

        schemes: by full name. ignored: the layers left in 16 bits.
        """
        try:
            self.writer.config_block(schemes, ignored)
        except ValueError as error:
            return str(error)
        return None


def divides(group_size: int, width: int) -> bool:
    """Whether groups of this size fill rows of ``width`` inputs; -1 always does."""
    return group_size == WHOLE_ROW or width % group_size == 0
