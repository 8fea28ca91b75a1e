"""Which linear layers are quantized, with what width and groups, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

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

Linears = Mapping[str, nn.Linear]
"""The layers of a set, by their names inside the block, on the meta device."""

ROUTER = "decides which experts a token goes to: routers are not quantized"

MOST_LISTED = 7
"""Layers that a message names: as many as a block without experts has."""


@dataclass(frozen=True, slots=True)
class SkippedLayer:
    """A linear layer that stays in 16 bits, by its full name, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to each linear layer of the blocks.

    bits, group_size: of most layers; -1 for one scale a row.
    specs: of every quantized set of layers, by the index of its block and its name.
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
        return self.specs.get((block.index, stage.layer_set))

    def names_in(self, block: Block) -> tuple[str, ...]:
        """The quantized linear layers of a block, by their names inside it."""
        stages = [stage for stage in block.stages if self.spec(block, stage) is not None]
        return tuple(name for stage in stages for name in stage.linears)


def make_plan(decoder: Decoder, options: QuantizeOptions) -> Plan:
    """The plan for a model.

    The layers of a set stay together: serving engines run them as one and need one format, so
    what is asked for one of them is done to all. A layer is left in 16 bits when that is asked for,
    when the format cannot hold its shape, and when it is a router.
    Raises ``OptionError`` for a group size that does not divide the inputs of a layer, for an
    override that the format cannot hold, for a pattern that matches nothing, and when nothing is
    left to quantize.
    """
    target, overrides = Target(options), Overrides(options.all_overrides)
    skipped: list[SkippedLayer] = []
    wishes: dict[tuple[int, str], tuple[Linears, Wish]] = {}
    notes: dict[str, None] = {}
    for index in range(decoder.num_blocks):
        block = decoder.skeleton(index)
        for layer_set in block.layer_sets:
            linears = {name: block.linear(name) for name in layer_set.linears}
            wish = overrides.wish([block_name(index, name) for name in linears])
            left = _left_out(index, linears, layer_set.is_router, wish, target)
            skipped += left
            if not left:
                wishes[index, layer_set.name] = linears, wish
            notes |= dict.fromkeys(_notes(linears, wish, layer_set.is_router))
    if options.head is Head.FLOAT:
        overrides.grant(HEAD)
    if overrides.unused:
        like = block_name(0, decoder.skeleton(0).stages[0].linears[0])
        raise OptionError(
            f"{overrides.unused[0]!r} matches no linear layer of a block: names look like {like} "
            f"(bits of {HEAD} are the option head's)"
        )
    if not wishes:
        raise OptionError(
            f"no linear layer is left to quantize: {skipped[0].name}: {skipped[0].reason}"
        )
    group_size = _group_size(options.group_size, list(wishes.values()), target)
    specs = {
        key: _spec(linears, wish, group_size, target) for key, (linears, wish) in wishes.items()
    }
    schemes = {
        block_name(index, name): specs[index, layer_set].scheme(layer)
        for (index, layer_set), (linears, _) in wishes.items()
        for name, layer in linears.items()
    }
    head = _head(decoder, target) if options.head is Head.INT8 else None
    plan = Plan(target.levels.bits, group_size, specs, tuple(skipped), tuple(notes), head)
    _check_mixture(plan, schemes, target)
    return plan


def block_name(index: int, name: str) -> str:
    """The full name of a module inside block ``index``."""
    return f"model.layers.{index}.{name}"


def _left_out(
    index: int, linears: Linears, is_router: bool, wish: Wish, target: Target
) -> list[SkippedLayer]:
    """The layers of a set, when they stay in 16 bits, each with its reason."""
    if is_router:
        reasons = {block_name(index, name): ROUTER for name in linears}
    elif wish.bits == FLOAT_BITS:
        reasons = dict(wish.named)
    else:
        misfits = {name: target.misfit(layer) for name, layer in linears.items()}
        reasons = {block_name(index, name): why for name, why in misfits.items() if why is not None}
    if not reasons:
        return []
    short = _listed_layers([name.split(".", 3)[-1] for name in reasons])
    follows = f"runs fused with {short}, which stays in 16 bits"
    names = [block_name(index, name) for name in linears]
    return [SkippedLayer(name, reasons.get(name, follows)) for name in names]


def _notes(linears: Linears, wish: Wish, is_router: bool) -> list[str]:
    """What is done to layers otherwise than asked for: that nobody named, because they run as one
    with some that were; that are routers."""
    named = {name.split(".", 3)[-1] for name in wish.named}
    others = [name for name in linears if name not in named]
    if is_router and named and wish.bits != FLOAT_BITS:
        return [f"{_listed_layers(list(linears))} stay in 16 bits: routers are not quantized"]
    if is_router or not named or not others:
        return []
    what = "stay in 16 bits" if wish.bits == FLOAT_BITS else "are coded"
    like = _listed_layers(sorted(named))
    return [f"{_listed_layers(others)} {what} like {like}: engines run them as one"]


def _listed_layers(names: Sequence[str]) -> str:
    """Some names; the experts of a block are too many."""
    if len(names) <= MOST_LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_LISTED])} and {len(names) - MOST_LISTED} more"


def _spec(linears: Linears, wish: Wish, group_size: int, target: Target) -> StageSpec:
    """What a wish comes to. Raises ``OptionError`` when the format cannot hold it."""
    size = group_size if wish.group_size is None else wish.group_size
    spec = target.spec(wish.bits or target.levels.bits, size)
    for name, layer in linears.items():
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


def _check_mixture(plan: Plan, schemes: dict[str, LayerScheme], target: Target) -> None:
    """Raise ``OptionError`` when the format cannot hold the layers of a plan side by side.

    schemes: of the layers in the blocks, by full name.
    """
    head = {} if plan.head is None else {HEAD: plan.head}
    refusal = target.refuse_mixture(schemes | head, [layer.name for layer in plan.skipped])
    if refusal is not None:
        raise OptionError(f"{refusal}: override with 16 bits alone, or choose another format")


def _group_size(asked: int | None, wishes: Sequence[tuple[Linears, Wish]], target: Target) -> int:
    """The group size of the layers that wish for none: one that the method has."""
    sizes = target.group_sizes
    for size in [asked, *(wish.group_size for _, wish in wishes)]:
        if size is not None and size not in sizes:
            raise OptionError(
                f"group size {size}: this method takes {_listed(sizes)}, which every engine reads"
            )
    widths = {
        name: layer.in_features
        for linears, wish in wishes
        if wish.group_size is None
        for name, layer in linears.items()
    }
    fitting = [size for size in sizes if all(divides(size, w) for w in widths.values())]
    if asked is None:
        return fitting[0]
    if asked not in fitting:
        misfits = [f"{name} ({width})" for name, width in widths.items() if width % asked]
        raise OptionError(
            f"groups of {asked} do not divide the inputs of {_listed_layers(misfits)}: use a group "
            f"size of {_listed(fitting)}"
        )
    return asked


def _listed(sizes: Sequence[int]) -> str:
    return " or ".join("-1 (a whole row)" if size == WHOLE_ROW else str(size) for size in sizes)
