"""Mixed precision: bits and groups for every stage, so that a size buys the least divergence.

Each stage has candidates: 16 bits, and every width and group size that the method, the format and
the overrides leave it. Each takes bytes and adds to the KL divergence, by the estimate of
``quant/sensitivity.py``; the estimates of different stages add up. To make the sum least within a
number of bytes is a knapsack: from the smallest candidates on, the step comes first that takes away
most divergence for its bytes (so each stage walks along the convex hull of its candidates), and
what is left over at the end goes to single steps that still fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qserve.quant.architecture import Stage
from qserve.quant.decoder import Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.layer_format import HEAD
from qserve.quant.methods import WHOLE_ROW
from qserve.quant.options import QuantizeOptions
from qserve.quant.output_head import LEVELS
from qserve.quant.overrides import FLOAT_BITS
from qserve.quant.plan import Plan, SkippedLayer, block_name
from qserve.quant.progress import ProgressCallback
from qserve.quant.sensitivity import StageKey, measure_sensitivity
from qserve.quant.stored_size import PackedSizes, bytes_beside, float_bytes
from qserve.quant.target import StageSpec, Target


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store the layers of a stage.

    spec: None for 16 bits. num_bytes: of their weights. kl: what it adds, in nats, by estimate.
    """

    spec: StageSpec | None
    num_bytes: int
    kl: float = 0.0

    def __str__(self) -> str:
        if self.spec is None:
            return "16 bits"
        return f"{self.spec.levels.bits} bits in groups of {self.spec.group_size}"


Choices = dict[StageKey, Candidate]

Estimates = Mapping[StageKey, tuple[float, ...]]
"""The divergence that each candidate of a stage adds that has codes, in their order."""


class Mixer:
    """Finds the plan for a limit on the size, and what there is to choose from."""

    def __init__(self, decoder: Decoder, options: QuantizeOptions, plan: Plan) -> None:
        """plan: what is done without a limit; what its overrides settle stays settled.

        Raises ``OptionError`` for a limit below the smallest that the format can hold.
        """
        self._decoder = decoder
        self._plan = plan
        self._stages = {stage.name: stage for stage in decoder.skeleton.stages}
        self._target = Target(options)
        self._sizes = PackedSizes(self._target.writer)
        self._widths = options.widths
        asked = options.group_size if options.is_limited else None
        self._group_sizes = self._target.group_sizes if asked is None else (asked,)
        self._candidates = {
            key: self._list(self._stages[key[1]], spec) for key, spec in plan.specs.items()
        }
        self._limit = self._find_limit(options) if options.is_limited else None

    def measure(self, token_ids: torch.Tensor, progress: ProgressCallback) -> Estimates:
        """What the candidates of each stage add, by calibration windows ``[S, T]``."""
        specs = {
            key: [one.spec for one in candidates if one.spec is not None]
            for key, candidates in self._candidates.items()
        }
        return measure_sensitivity(self._decoder, token_ids, specs, progress)

    def estimated(self, estimates: Estimates) -> dict[StageKey, list[Candidate]]:
        """The candidates of every stage with what they add."""
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
        """The full names of the layers of a stage."""
        return [block_name(key[0], name) for name in self._stages[key[1]].linears]

    def stated_size(self, spec: StageSpec) -> int:
        """The group size as options state it: -1 for one scale a row."""
        if spec.group_size in self._target.group_sizes:
            return spec.group_size
        return WHOLE_ROW

    def _list(self, stage: Stage, usual: StageSpec) -> list[Candidate]:
        """What a stage may become, from the smallest on."""
        if usual.reason:
            return [self._candidate(stage, usual)]
        layer = self._decoder.skeleton.linear(stage.linears[0])
        specs = [
            self._target.spec(layer, bits, size)
            for bits in self._target.widths
            if not self._widths or bits in self._widths
            for size in self._group_sizes
        ]
        fitting = [spec for spec in dict.fromkeys(specs) if self._fits(stage, spec, usual)]
        found = [self._candidate(stage, spec) for spec in fitting]
        if not self._widths or FLOAT_BITS in self._widths:
            found.append(self._candidate(stage, None))
        if not found:
            raise OptionError(f"widths {self._widths}: the format holds none of them")
        return sorted(found, key=lambda one: one.num_bytes)

    def _fits(self, stage: Stage, spec: StageSpec, usual: StageSpec) -> bool:
        """Whether the format holds it, also beside what other layers have without a limit."""
        layers = [self._decoder.skeleton.linear(name) for name in stage.linears]
        if any(self._target.refusal(layer, spec) is not None for layer in layers):
            return False
        pair = {"a": spec.scheme(layers[0]), "b": usual.scheme(layers[0])}
        return self._target.refuse_mixture(pair, []) is None

    def _candidate(self, stage: Stage, spec: StageSpec | None) -> Candidate:
        layers = [self._decoder.skeleton.linear(name) for name in stage.linears]
        if spec is None:
            return Candidate(None, sum(map(float_bytes, layers)))
        return Candidate(spec, sum(self._sizes.num_bytes(layer, spec) for layer in layers))

    def _find_limit(self, options: QuantizeOptions) -> int:
        """Bytes that the stages may take together."""
        skeleton = self._decoder.skeleton
        num_left = sum(
            skeleton.linear(layer.name.split(".", 3)[-1]).weight.numel()
            for layer in self._plan.skipped
        )
        num_weights = sum(
            skeleton.linear(name).weight.numel()
            for _, stage in self._candidates
            for name in self._stages[stage].linears
        )
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
                    f"{options.max_size} bytes: the smallest that the format holds for this model "
                    f"is {smallest + beside}, of which {beside} are beside the quantized layers"
                )
        return min(limits)

    def _packed(self) -> dict[str, int]:
        """What files have for each layer that may be packed, beside the codes of the blocks."""
        headers = {}
        for (index, stage), usual in self._plan.specs.items():
            for name in self._stages[stage].linears:
                full_name, layer = block_name(index, name), self._decoder.skeleton.linear(name)
                headers[full_name] = self._sizes.header_bytes(layer, usual, full_name)
        head = self._plan.head
        if head is not None:
            spec = StageSpec(LEVELS, head.group_size)
            layer = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
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
                names = [block_name(key[0], name) for name in self._stages[key[1]].linears]
                skipped |= {name: SkippedLayer(name, reason) for name in names}
        if not specs:
            return self._plan
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
        every = [
            block_name(index, name)
            for index in range(self._decoder.num_blocks)
            for stage in self._decoder.skeleton.stages
            for name in stage.linears
        ]
        kept = set(names)
        return [name for name in every if name in kept]


def choose_candidates(candidates: Mapping[StageKey, Sequence[Candidate]], limit: int) -> Choices:
    """One candidate of each stage, together at most ``limit`` bytes, for the least sum of KL.

    candidates: of each stage, the smallest of which fit together.
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
