"""Mixed precision: bits and groups for every set of layers, so that a size buys most.

Each set has candidates: 16 bits, and every width and group size that the method, the format and
the overrides leave it. Each takes bytes and adds to the KL divergence, by the estimate of
``quant/sensitivity.py``; the estimates of different sets add up. To make the sum least within a
number of bytes is a knapsack: from the smallest candidates on, the step comes first that takes away
most divergence for its bytes (so each set walks along the convex hull of its candidates), and
what is left over at the end goes to single steps that still fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from qserve.quant.architecture import LayerSet
from qserve.quant.decoder import Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.layer_format import HEAD
from qserve.quant.methods import WHOLE_ROW
from qserve.quant.options import QuantizeOptions
from qserve.quant.overrides import FLOAT_BITS
from qserve.quant.plan import Plan, SkippedLayer, block_name
from qserve.quant.progress import ProgressCallback
from qserve.quant.sensitivity import StageKey, measure_sensitivity
from qserve.quant.stored_size import PackedSizes, bytes_beside, coded_head, float_bytes
from qserve.quant.target import StageSpec, Target
from qserve.quant.windows import Windows


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store the layers of a set.

    spec: None for 16 bits. num_bytes: of their weights. kl: what it adds, in nats, by estimate.
    """

    spec: StageSpec | None
    num_bytes: int
    kl: float = 0.0

    def __str__(self) -> str:
        if self.spec is None:
            return "16 bits"
        size = self.spec.group_size
        groups = "rows" if size == WHOLE_ROW else f"groups of {size}"
        return f"{self.spec.levels.bits} bits in {groups}"


Choices = dict[StageKey, Candidate]

Estimates = Mapping[StageKey, tuple[float, ...]]
"""The divergence that each candidate of a set adds that has codes, in their order."""


class Mixer:
    """Finds the plan for a limit on the size, and what there is to choose from."""

    def __init__(self, decoder: Decoder, options: QuantizeOptions, plan: Plan) -> None:
        """plan: what is done without a limit; what its overrides settle stays settled.

        Raises ``OptionError`` for a limit below the smallest that the format can hold.
        """
        self._decoder = decoder
        self._plan = plan
        self._layers = {
            (index, layer_set.name): _layers_of(decoder, index, layer_set)
            for index in range(decoder.num_blocks)
            for layer_set in decoder.skeleton(index).layer_sets
        }
        self._target = Target(options)
        self._sizes = PackedSizes(self._target.writer)
        self._widths = options.widths
        asked = options.group_size if options.is_limited else None
        self._group_sizes = self._target.group_sizes if asked is None else (asked,)
        self._candidates = {
            key: self._list(list(self._layers[key].values()), spec)
            for key, spec in plan.specs.items()
        }
        self._limit = self._find_limit(options) if options.is_limited else None

    def measure(self, windows: Windows, progress: ProgressCallback) -> Estimates:
        """What the candidates of each set add, by calibration windows."""
        specs = {
            key: [one.spec for one in candidates if one.spec is not None]
            for key, candidates in self._candidates.items()
        }
        return measure_sensitivity(self._decoder, windows, specs, progress)

    def estimated(self, estimates: Estimates) -> dict[StageKey, list[Candidate]]:
        """The candidates of every set with what they add."""
        found: dict[StageKey, list[Candidate]] = {}
        for key, candidates in self._candidates.items():
            values = iter(estimates[key])
            found[key] = [
                one if one.spec is None else replace(one, kl=next(values)) for one in candidates
            ]
        return found

    def plan(self, estimates: Estimates) -> Plan:
        """The plan that suits what was measured."""
        assert self._limit is not None, "there is no limit to make a plan for"
        found = self.estimated(estimates)
        return self._plan_of(choose_candidates(found, self._limit), found)

    def usual(self, candidates: Mapping[StageKey, Sequence[Candidate]]) -> Choices:
        """Of the candidates, those that the plan without a limit has."""
        return {
            key: next(one for one in some if one.spec == self._plan.specs[key])
            for key, some in candidates.items()
        }

    def names(self, key: StageKey) -> list[str]:
        """The full names of the layers of a set."""
        return list(self._layers[key])

    def _list(self, layers: Sequence[nn.Linear], usual: StageSpec) -> list[Candidate]:
        """What a set may become, from the smallest on."""
        if usual.reason:
            return [self._candidate(layers, usual)]
        specs = [
            self._target.spec(bits, size)
            for bits in self._target.widths
            if not self._widths or bits in self._widths
            for size in self._group_sizes
        ]
        # A row of 64 inputs is a group of 64: such two are one, the usual one if it is among them.
        fitting = {
            tuple(map(spec.scheme, layers)): spec
            for spec in [*specs, *(spec for spec in specs if spec == usual)]
            if self._fits(layers, spec, usual)
        }
        found = [self._candidate(layers, spec) for spec in fitting.values()]
        if not self._widths or FLOAT_BITS in self._widths:
            found.append(self._candidate(layers, None))
        if not found:
            raise OptionError(f"widths {self._widths}: the format holds none of them")
        return sorted(found, key=lambda one: one.num_bytes)

    def _fits(self, layers: Sequence[nn.Linear], spec: StageSpec, usual: StageSpec) -> bool:
        """Whether the format holds it, also beside what other layers have without a limit."""
        if any(self._target.refusal(layer, spec) is not None for layer in layers):
            return False
        pair = {"a": spec.scheme(layers[0]), "b": usual.scheme(layers[0])}
        return self._target.refuse_mixture(pair, []) is None

    def _candidate(self, layers: Sequence[nn.Linear], spec: StageSpec | None) -> Candidate:
        if spec is None:
            return Candidate(None, sum(map(float_bytes, layers)))
        return Candidate(spec, sum(self._sizes.most_bytes(layer, spec) for layer in layers))

    def _find_limit(self, options: QuantizeOptions) -> int:
        """Bytes that the sets may take together.

        Raises ``OptionError`` for fewer than they need, and for as many as 16 bits take.
        """
        num_every, num_weights = (
            sum(layer.weight.numel() for key in keys for layer in self._layers[key].values())
            for keys in (self._layers, self._candidates)
        )
        num_left = num_every - num_weights
        smallest = sum(options_of[0].num_bytes for options_of in self._candidates.values())
        limits = []
        if options.avg_bits is not None:
            bits = options.avg_bits * (num_weights + num_left) - FLOAT_BITS * num_left
            limits.append(int(bits // 8))
            if limits[-1] < smallest:
                least = (8 * smallest + FLOAT_BITS * num_left) / (num_weights + num_left)
                raise OptionError(
                    f"{options.avg_bits} bits a weight: the smallest that the format holds for "
                    f"this model is {least:.3f}, scales and layers left in 16 bits included"
                )
        if options.max_size is not None:
            beside = bytes_beside(self._decoder, self._packed())
            limits.append(options.max_size - beside)
            if limits[-1] < smallest:
                raise OptionError(
                    f"{options.max_size:,} bytes: the smallest that the format holds for this "
                    f"model is {smallest + beside:,}, of which {beside:,} are beside the quantized "
                    "layers"
                )
        limit = min(limits)
        largest = [some[-1] for some in self._candidates.values()]
        if all(one.spec is None for one in largest) and limit >= sum(
            one.num_bytes for one in largest
        ):
            raise OptionError(
                "the limit on the size leaves every layer its 16 bits: give a smaller one, or "
                "leave 16 out of the widths"
            )
        return limit

    def _packed(self) -> dict[str, int]:
        """What files have for each layer that may be packed, beside the codes of the blocks."""
        headers = {}
        for key, usual in self._plan.specs.items():
            for name, layer in self._layers[key].items():
                headers[name] = self._sizes.header_bytes(layer, usual, name)
        head = self._plan.head
        if head is not None:
            layer, spec = coded_head(head)
            size = self._sizes.num_bytes(layer, spec)
            headers[HEAD] = size + self._sizes.header_bytes(layer, spec, HEAD)
        return headers

    def _plan_of(self, chosen: Choices, candidates: Mapping[StageKey, list[Candidate]]) -> Plan:
        specs: dict[StageKey, StageSpec] = {}
        skipped = {layer.name: layer for layer in self._plan.skipped}
        for key, choice in chosen.items():
            reason = explain(choice, candidates[key])
            if choice.spec is not None:
                specs[key] = replace(choice.spec, reason=choice.spec.reason or reason)
            else:
                skipped |= {name: SkippedLayer(name, reason) for name in self._layers[key]}
        settings = Counter((spec.levels.bits, spec.group_size) for spec in specs.values())
        bits, group_size = settings.most_common(1)[0][0]
        return replace(
            self._plan,
            bits=bits,
            group_size=group_size,
            specs=specs,
            skipped=tuple(skipped[name] for name in self._in_order(skipped)),
        )

    def _in_order(self, names: Iterable[str]) -> list[str]:
        kept = set(names)
        return [name for layers in self._layers.values() for name in layers if name in kept]


def _layers_of(decoder: Decoder, index: int, layer_set: LayerSet) -> dict[str, nn.Linear]:
    """The layers of a set by their full names, on the meta device."""
    block = decoder.skeleton(index)
    return {block_name(index, name): block.linear(name) for name in layer_set.linears}


def choose_candidates(candidates: Mapping[StageKey, Sequence[Candidate]], limit: int) -> Choices:
    """One candidate of each set, together at most ``limit`` bytes, for the least sum of KL.

    candidates: of each set, the smallest of which fit together.
    """
    chosen = {key: min(some, key=lambda one: one.num_bytes) for key, some in candidates.items()}
    left = limit - sum(one.num_bytes for one in chosen.values())
    assert left >= 0, "the smallest candidates exceed the limit"
    return take_steps(chosen, candidates, aim=0.0, left=left)


def take_steps(
    chosen: Choices,
    candidates: Mapping[StageKey, Sequence[Candidate]],
    aim: float,
    left: float = math.inf,
) -> Choices:
    """``chosen`` after the steps to other candidates that take most divergence away a byte.

    They end when the sum of KL is down to ``aim``, or when no other takes any away within ``left``
    more bytes.
    """
    chosen = dict(chosen)
    while sum(one.kl for one in chosen.values()) > aim:
        steps = [
            (_gain(chosen[key], one), key, one)
            for key, some in candidates.items()
            for one in some
            if one.num_bytes - chosen[key].num_bytes <= left and one.kl < chosen[key].kl
        ]
        if not steps:
            break
        _, key, one = max(steps, key=lambda step: (step[0], -step[2].num_bytes))
        left -= one.num_bytes - chosen[key].num_bytes
        chosen[key] = one
    return chosen


def _gain(now: Candidate, then: Candidate) -> float:
    """Divergence that a step takes away for each byte it costs."""
    more = then.num_bytes - now.num_bytes
    return (now.kl - then.kl) / more if more > 0 else float("inf")


def explain(choice: Candidate, candidates: Sequence[Candidate]) -> str:
    """Why a candidate was taken, in words: what it adds, and what the next smaller would."""
    smaller = [one for one in candidates if one.num_bytes < choice.num_bytes]
    found = f"adds {choice.kl:.2e} to the KL by estimate"
    if not smaller:
        return found
    next_one = min(smaller, key=lambda one: one.kl)
    saved = choice.num_bytes - next_one.num_bytes
    return f"{found}; {next_one} would add {next_one.kl:.2e} and save {saved} bytes"
