"""What rounding the layers of one stage alone does to the predictions of a model, by estimate.

To second order, a change d of the outputs of a stage moves the next-token distributions by

    ``KL = 1/2 d^T J^T F J d``

J being the derivative of the logits by those outputs and F the Fisher matrix of the distributions,
``diag(p) - p p^T`` at each position. One backward pass from random signs r gives
``g = J^T F^(1/2) r``, and the mean of ``(g^T d)^2`` over r is that quadratic form. Errors at
different tokens are taken as independent, so each token contributes a square of its own and a
thousand of them are enough. Both passes hold one block; what enters each block is kept between.

The rounding is to nearest in groups that span their weights: cheap, and what better methods make of
a layer is a similar share of it for most. (Second-order sensitivity: HAWQ, Dong et al. 2019,
arXiv 1905.03696, there of the weights.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qserve.quant.architecture import LayerSet
from qserve.quant.decoder import Block, Decoder, OutputHead
from qserve.quant.grid import grid_over_all, rounding_difference
from qserve.quant.progress import Pace, Phase, ProgressCallback
from qserve.quant.target import StageSpec
from qserve.quant.windows import Windows

NUM_WINDOWS, SEQ_LEN = 8, 128
"""Of the calibration windows, the beginnings of some: many texts say more than long ones."""

POSITIONS_AT_ONCE = 128

StageKey = tuple[int, str]
"""The index of a block and the name of a set of layers."""


@dataclass(frozen=True, slots=True)
class _Traced:
    """What the layers of a stage receive and how much their outputs matter, for all tokens.

    inputs: ``[T, K]``. gradients: g by the outputs of the layers, side by side, ``[T, N]``.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor


def measure_sensitivity(
    decoder: Decoder,
    windows: Windows,
    candidates: Mapping[StageKey, Sequence[StageSpec]],
    progress: ProgressCallback,
) -> dict[StageKey, tuple[float, ...]]:
    """The mean KL divergence in nats that each candidate of a stage adds when it alone is rounded.

    windows: of calibration; the mean is over the positions that count in some of them. The same
    input gives the same estimates.
    """
    some = _excerpts(windows)
    length, num_counted = some.token_ids.shape[1], int(some.counts.sum())
    pace = Pace(progress, Phase.MEASURE, 2 * decoder.num_blocks)
    hidden = decoder.embed(some.token_ids)
    entered = []
    for index in range(decoder.num_blocks):
        entered.append(hidden.bfloat16())  # half the memory; the estimate does not need more
        decoder.block(index, length).run_(hidden)
        pace.step()
    gradients = _leave(decoder, hidden, some.counts)
    found: dict[StageKey, tuple[float, ...]] = {}
    for index in reversed(range(decoder.num_blocks)):
        block = decoder.block(index, length)
        traced = _walk_back_(block, entered.pop().float(), gradients)
        for layer_set in block.layer_sets:
            specs = candidates.get((index, layer_set.name), ())
            if specs:
                sums = _increases(block, layer_set, traced, specs)
                found[index, layer_set.name] = tuple(total / num_counted / 2 for total in sums)
        pace.step()
    return found


def _excerpts(windows: Windows) -> Windows:
    """Of some windows the pieces in which most counts; the beginnings where everything does."""
    some = windows[:: max(1, len(windows) // NUM_WINDOWS)][:NUM_WINDOWS]
    length = min(SEQ_LEN, some.token_ids.shape[1])
    starts = [
        max(
            range(0, len(row) - length + 1, length), key=lambda at: int(row[at : at + length].sum())
        )
        for row in some.counts
    ]
    return Windows(
        *(
            torch.stack([row[at : at + length] for row, at in zip(rows, starts, strict=True)])
            for rows in (some.token_ids, some.counts)
        )
    )


def _leave(decoder: Decoder, hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """g by the hidden states ``[S, T, hidden_size]`` that leave the last block; 0 where they do not
    count."""
    norm, head = decoder.final_norm(), decoder.head()
    draw = torch.Generator().manual_seed(0)
    gradients = torch.empty_like(hidden)
    for rows, out in zip(
        hidden.flatten(0, 1).split(POSITIONS_AT_ONCE),
        gradients.flatten(0, 1).split(POSITIONS_AT_ONCE),
        strict=True,
    ):
        out.copy_(_leave_rows(norm, head, rows, draw))
    gradients[~counts] = 0
    return gradients


def _leave_rows(
    norm: nn.Module, head: OutputHead, rows: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """g by some rows: random signs through the root of the Fisher matrix of their distribution."""
    leaf = rows.clone().requires_grad_()
    logits = head.logits(norm(leaf))
    likely = logits.detach().softmax(-1)
    signs = torch.randint(0, 2, likely.shape, generator=draw).mul_(2).sub_(1)
    root = likely.sqrt() * signs
    root -= likely * root.sum(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(logits, leaf, root)
    return gradient


def _walk_back_(block: Block, hidden: torch.Tensor, gradients: torch.Tensor) -> dict[str, _Traced]:
    """What each stage receives, and g by its outputs; ``gradients`` become those by ``hidden``."""
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for window, gradient in zip(hidden, gradients, strict=True):
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        leaf = window.clone().requires_grad_()
        with block.watched(seen):
            output = block.output(leaf)
        outputs = [seen[name][1] for stage in block.stages for name in stage.linears]
        first, *others = torch.autograd.grad(output, [leaf, *outputs], gradient)
        gradient.copy_(first)
        for stage in block.stages:
            mine = [others.pop(0).flatten(0, -2) for _ in stage.linears]
            inputs = seen[stage.linears[0]][0].detach().flatten(0, -2)
            parts.setdefault(stage.name, []).append((inputs, torch.cat(mine, dim=1)))
    return {
        name: _Traced(*(torch.cat(side) for side in zip(*found, strict=True)))
        for name, found in parts.items()
    }


def _increases(
    block: Block, layer_set: LayerSet, traced: Mapping[str, _Traced], specs: Sequence[StageSpec]
) -> tuple[float, ...]:
    """The sum over tokens for each candidate; experts are taken as independent too."""
    totals = [0.0] * len(specs)
    for stage in layer_set.stages:
        weight = torch.cat([block.linear(name).weight for name in stage.linears])
        for i, spec in enumerate(specs):
            totals[i] += _moved(weight, traced[stage.name], spec)
    return tuple(totals)


def _moved(weight: torch.Tensor, traced: _Traced, spec: StageSpec) -> float:
    """The sum of ``(g^T d)^2`` over tokens."""
    groups = weight.unflatten(1, (-1, spec.width(weight.shape[1])))
    difference = rounding_difference(groups, grid_over_all(groups, spec.levels)).flatten(1)
    moved = (traced.inputs @ difference.T).mul_(traced.gradients).sum(1, dtype=torch.float64)
    return float(moved.square().sum())
