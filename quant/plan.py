"""Which linear layers are quantized, in groups of what size, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qserve.quant.architecture import Stage
from qserve.quant.decoder import Block, Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.registry import make_writer
from qserve.quant.formats.writer import Writer
from qserve.quant.grid import LevelSet
from qserve.quant.methods import WHOLE_ROW, Profile, profile_of
from qserve.quant.options import QuantizeOptions


@dataclass(frozen=True, slots=True)
class SkippedLayer:
    """A linear layer that stays in 16 bits, by its full name, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class StageSpec:
    """How the layers of a stage are coded.

    group_size: inputs that share a scale; as many as there are for one scale a row.
    """

    levels: LevelSet
    group_size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to each linear layer of the blocks.

    group_size: of the layers for which nothing else is said, -1 for one scale a row.
    specs: of every quantized stage, by the index of its block and its name.
    skipped: the other linear layers of the blocks, in the order of the model.
    """

    group_size: int
    specs: Mapping[tuple[int, str], StageSpec]
    skipped: tuple[SkippedLayer, ...]

    def spec(self, block: Block, stage: Stage) -> StageSpec | None:
        """How the layers of this stage are coded; None when they stay in 16 bits."""
        return self.specs.get((block.index, stage.name))

    def names_in(self, block: Block) -> tuple[str, ...]:
        """The quantized linear layers of a block, by their names inside it."""
        stages = [stage for stage in block.stages if self.spec(block, stage) is not None]
        return tuple(name for stage in stages for name in stage.linears)


def make_plan(decoder: Decoder, options: QuantizeOptions) -> Plan:
    """The plan for a model.

    The layers of a stage stay together: serving engines run them as one and need one format. A
    layer is left in 16 bits when it is ignored or when the format cannot hold its shape.
    Raises ``OptionError`` for a group size that does not divide the inputs of a layer, for an
    ``ignore`` that matches nothing, and when nothing is left to quantize.
    """
    block, profile = decoder.skeleton, profile_of(options)
    writer = make_writer(profile.output, "", activations=profile.activations)
    patterns = [re.compile(pattern) for pattern in options.ignore]
    used: set[re.Pattern[str]] = set()
    skipped: list[SkippedLayer] = []
    included: list[tuple[int, Stage]] = []
    for index in range(decoder.num_blocks):
        for stage in block.stages:
            names = {name: f"model.layers.{index}.{name}" for name in stage.linears}
            matches = {n: p for n, full in names.items() for p in patterns if p.search(full)}
            used.update(p for full in names.values() for p in patterns if p.search(full))
            reasons = {n: f"matches {p.pattern!r}" for n, p in matches.items()}
            reasons = reasons or _misfits(block, stage, profile, writer)
            if not reasons:
                included.append((index, stage))
            skipped += [
                SkippedLayer(full, reasons.get(name) or _follows(reasons))
                for name, full in names.items()
                if reasons
            ]
    for pattern in patterns:
        if pattern not in used:
            raise OptionError(
                f"ignore {pattern.pattern!r} matches no linear layer: names look like "
                f"{block.full_name(block.stages[0].linears[0])}"
            )
    if not included:
        raise OptionError(
            f"no linear layer is left to quantize: {skipped[0].name}: {skipped[0].reason}"
        )
    widths = {name: block.linear(name).in_features for _, s in included for name in s.linears}
    group_size = _group_size(options.group_size, widths, profile.group_sizes)
    specs = {
        (index, stage.name): StageSpec(
            profile.levels, widths[stage.linears[0]] if group_size == WHOLE_ROW else group_size
        )
        for index, stage in included
    }
    return Plan(group_size, specs, tuple(skipped))


def _misfits(block: Block, stage: Stage, profile: Profile, writer: Writer) -> dict[str, str]:
    """The layers of a stage that the format cannot hold in any group size, with the reason."""
    reasons = {}
    for name in stage.linears:
        layer = block.linear(name)
        shape = (layer.out_features, layer.in_features)
        fitting = [size for size in profile.group_sizes if _divides(size, layer.in_features)]
        refusals = [writer.refusal(profile.scheme(*shape, size)) for size in fitting]
        if not fitting:
            reasons[name] = (
                f"{layer.in_features} inputs, the format needs a multiple of "
                f"{min(profile.group_sizes)}"
            )
        elif refusals[-1] is not None:
            reasons[name] = refusals[-1]
    return reasons


def _divides(group_size: int, width: int) -> bool:
    return group_size == WHOLE_ROW or width % group_size == 0


def _follows(reasons: dict[str, str]) -> str:
    return f"runs fused with {', '.join(reasons)}, which stays in 16 bits"


def _group_size(asked: int | None, widths: dict[str, int], sizes: tuple[int, ...]) -> int:
    """The group size for layers with these numbers of inputs: one of ``sizes``."""
    fitting = [size for size in sizes if all(_divides(size, w) for w in widths.values())]
    if asked is None:
        return fitting[0]
    if asked not in sizes:
        raise OptionError(
            f"group size {asked}: this method takes {_listed(sizes)}, which every engine reads"
        )
    if asked not in fitting:
        misfits = [f"{name} ({width})" for name, width in widths.items() if width % asked]
        raise OptionError(
            f"groups of {asked} do not divide the inputs of {', '.join(misfits)}: use a group size "
            f"of {_listed(fitting)}"
        )
    return asked


def _listed(sizes: Sequence[int]) -> str:
    return " or ".join("-1 (a whole row)" if size == WHOLE_ROW else str(size) for size in sizes)
