"""Which linear layers are quantized, with what width and groups, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qserve.quant.architecture import Stage
from qserve.quant.decoder import Block, Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.layer_format import HEAD
from qserve.quant.formats.writer import LayerScheme
from qserve.quant.methods import WHOLE_ROW
from qserve.quant.options import Head, QuantizeOptions
from qserve.quant.output_head import head_scheme
from qserve.quant.overrides import FLOAT_BITS, Overrides, Wish
from qserve.quant.target import StageSpec, Target, divides


@dataclass(frozen=True, slots=True)
class SkippedLayer:
    """A linear layer that stays in 16 bits, by its full name, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to each linear layer of the blocks.

    bits, group_size: of most layers; -1 for one scale a row.
    specs: of every quantized stage, by the index of its block and its name.
    skipped: the other linear layers of the blocks, in the order of the model.
    head: how the output head is coded; None when it stays in 16 bits.
    notes: what a person who asked for something else than the whole should know.
    """

    bits: int
    group_size: int
    specs: Mapping[tuple[int, str], StageSpec]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...] = ()
    head: LayerScheme | None = None

    def spec(self, block: Block, stage: Stage) -> StageSpec | None:
        """How the layers of this stage are coded; None when they stay in 16 bits."""
        return self.specs.get((block.index, stage.name))

    def names_in(self, block: Block) -> tuple[str, ...]:
        """The quantized linear layers of a block, by their names inside it."""
        stages = [stage for stage in block.stages if self.spec(block, stage) is not None]
        return tuple(name for stage in stages for name in stage.linears)


def make_plan(decoder: Decoder, options: QuantizeOptions) -> Plan:
    """The plan for a model.

    The layers of a stage stay together: serving engines run them as one and need one format, so
    what is asked for one of them is done to all. A layer is left in 16 bits when that is asked for,
    or when the format cannot hold its shape.
    Raises ``OptionError`` for a group size that does not divide the inputs of a layer, for an
    override that the format cannot hold, for a pattern that matches nothing, and when nothing is
    left to quantize.
    """
    block, target = decoder.skeleton, Target(options)
    overrides = Overrides(options.all_overrides)
    skipped: list[SkippedLayer] = []
    wishes: dict[tuple[int, str], tuple[Stage, Wish]] = {}
    notes: dict[str, None] = {}
    for index in range(decoder.num_blocks):
        for stage in block.stages:
            wish = overrides.wish([block_name(index, name) for name in stage.linears])
            left = _left_out(index, block, stage, wish, target)
            skipped += left
            if not left:
                wishes[index, stage.name] = stage, wish
            notes |= dict.fromkeys(_notes(stage, wish))
    if overrides.unused:
        raise OptionError(
            f"{overrides.unused[0]!r} matches no linear layer: names look like "
            f"{block.full_name(block.stages[0].linears[0])}"
        )
    if not wishes:
        raise OptionError(
            f"no linear layer is left to quantize: {skipped[0].name}: {skipped[0].reason}"
        )
    group_size = _group_size(options.group_size, block, list(wishes.values()), target)
    specs = {
        key: _spec(block, stage, wish, group_size, target) for key, (stage, wish) in wishes.items()
    }
    head = _head(decoder, target) if options.head is Head.INT8 else None
    plan = Plan(target.levels.bits, group_size, specs, tuple(skipped), tuple(notes), head)
    _check_mixture(plan, block, target)
    return plan


def block_name(index: int, name: str) -> str:
    """The full name of a module inside block ``index``."""
    return f"model.layers.{index}.{name}"


def _left_out(
    index: int, block: Block, stage: Stage, wish: Wish, target: Target
) -> list[SkippedLayer]:
    """The layers of a stage, when they stay in 16 bits, each with its reason."""
    if wish.bits == FLOAT_BITS:
        reasons = dict(wish.named)
    else:
        misfits = {name: target.misfit(block.linear(name)) for name in stage.linears}
        reasons = {block_name(index, name): why for name, why in misfits.items() if why is not None}
    if not reasons:
        return []
    short = ", ".join(name.split(".", 3)[-1] for name in reasons)
    follows = f"runs fused with {short}, which stays in 16 bits"
    names = [block_name(index, name) for name in stage.linears]
    return [SkippedLayer(name, reasons.get(name, follows)) for name in names]


def _notes(stage: Stage, wish: Wish) -> list[str]:
    """What is done to layers that nobody named, because they run as one with some that were."""
    named = {name.split(".", 3)[-1] for name in wish.named}
    others = [name for name in stage.linears if name not in named]
    if not named or not others:
        return []
    what = "stay in 16 bits" if wish.bits == FLOAT_BITS else "are coded"
    return [f"{', '.join(others)} {what} like {', '.join(sorted(named))}: engines run them as one"]


def _spec(block: Block, stage: Stage, wish: Wish, group_size: int, target: Target) -> StageSpec:
    """What a wish comes to. Raises ``OptionError`` when the format cannot hold it."""
    size = group_size if wish.group_size is None else wish.group_size
    for name in stage.linears:
        layer = block.linear(name)
        spec = target.spec(layer, wish.bits or target.levels.bits, size)
        refusal = target.refusal(layer, spec)
        if refusal is not None:
            raise OptionError(f"{name} ({wish.reason}): {refusal}")
    return replace(spec, reason=wish.reason)


def _head(decoder: Decoder, target: Target) -> LayerScheme:
    """The scheme of a head in 8 bits. Raises ``OptionError`` when the format cannot hold it."""
    scheme = head_scheme(decoder.config.vocab_size, decoder.config.hidden_size)
    refusal = target.refuse_scheme(scheme)
    if refusal is not None:
        raise OptionError(
            f"an output head in 8 bits: {refusal}; leave it in 16 bits, or choose another format, "
            "such as compressed-tensors"
        )
    return scheme


def _check_mixture(plan: Plan, block: Block, target: Target) -> None:
    """Raise ``OptionError`` when the format cannot hold the layers of a plan side by side."""
    linears = {stage.name: stage.linears for stage in block.stages}
    schemes = {
        block_name(index, name): spec.scheme(block.linear(name))
        for (index, stage), spec in plan.specs.items()
        for name in linears[stage]
    }
    if plan.head is not None:
        schemes[HEAD] = plan.head
    refusal = target.refuse_mixture(schemes, [layer.name for layer in plan.skipped])
    if refusal is not None:
        raise OptionError(f"{refusal}: override with 16 bits alone, or choose another format")


def _group_size(
    asked: int | None, block: Block, wishes: Sequence[tuple[Stage, Wish]], target: Target
) -> int:
    """The group size of the layers that wish for none: one that the method has."""
    sizes = target.group_sizes
    for size in [asked, *(wish.group_size for _, wish in wishes)]:
        if size is not None and size not in sizes:
            raise OptionError(
                f"group size {size}: this method takes {_listed(sizes)}, which every engine reads"
            )
    widths = {
        name: block.linear(name).in_features
        for stage, wish in wishes
        if wish.group_size is None
        for name in stage.linears
    }
    fitting = [size for size in sizes if all(divides(size, w) for w in widths.values())]
    if asked is None:
        return fitting[0]
    if asked not in fitting:
        misfits = [f"{name} ({width})" for name, width in widths.items() if width % asked]
        raise OptionError(
            f"groups of {asked} do not divide the inputs of {', '.join(misfits)}: use a group size "
            f"of {_listed(fitting)}"
        )
    return asked


def _listed(sizes: Sequence[int]) -> str:
    return " or ".join("-1 (a whole row)" if size == WHOLE_ROW else str(size) for size in sizes)
