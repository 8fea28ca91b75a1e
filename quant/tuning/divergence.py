"""The divergence of next-token distributions from the float model's, and its gradient."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.quant.allocation import return_freed
from qserve.quant.decoder import Decoder, OutputHead

POSITIONS_AT_ONCE = 128
"""Positions whose logits are in memory at once: 25 MB for a vocabulary of 49152."""


class Divergence:
    """KL(float || tuned) in nats, by what the output heads of the two models receive.

    Hidden states are float32 ``[..., hidden_size]``, normed; means are over all positions. Heads
    are as large as many blocks, so they are in memory only while they are used.
    arithmetic: the type of products where a gradient is asked for.
    """

    def __init__(self, base: Decoder, tuned: Decoder, arithmetic: torch.dtype) -> None:
        self._decoders = base, tuned
        self._arithmetic = arithmetic

    def mean(self, target: torch.Tensor, hidden: torch.Tensor) -> float:
        """How far ``hidden`` is from the float model's ``target``."""
        return self._sum(target, hidden, None) / hidden[..., 0].numel()

    def gradient(
        self, target: torch.Tensor, hidden: torch.Tensor, counts: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """The same over positions that count, bool ``[...]``, and its gradient in ``hidden``."""
        rows = hidden[counts]
        found = torch.empty_like(rows)
        loss = self._sum(target[counts], rows, found) / len(rows)
        gradient = torch.zeros_like(hidden)
        gradient[counts] = found.div_(len(rows))
        return loss, gradient

    def _sum(
        self, target: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor | None
    ) -> float:
        """The sum over positions, whose gradient is written to ``gradient``."""
        float_head, head = self._heads(torch.float32 if gradient is None else self._arithmetic)
        targets, rows = target.flatten(0, -2), hidden.flatten(0, -2)
        total = 0.0
        for start in range(0, len(rows), POSITIONS_AT_ONCE):
            piece = slice(start, start + POSITIONS_AT_ONCE)
            expected = torch.log_softmax(float_head.logits(targets[piece]), -1)
            logits = head.logits(rows[piece])
            found = torch.log_softmax(logits, -1)
            probabilities = expected.exp()
            total += float(expected.sub_(found).mul_(probabilities).sum(1).double().sum())
            if gradient is not None:
                excess = found.exp_().sub_(probabilities)  # the gradient in the logits
                if head.soft_cap is not None:
                    excess *= 1 - (logits / head.soft_cap).square_()
                gradient.flatten(0, -2)[piece] = torch.mm(excess.to(head.weight.dtype), head.weight)
        return total

    def _heads(self, arithmetic: torch.dtype) -> list[OutputHead]:
        """Of the float model and of the tuned one, in memory that the blocks before have left."""
        return_freed()
        heads = []
        for decoder in self._decoders:
            head = decoder.head()
            heads.append(replace(head, weight=head.weight.to(arithmetic)))
            decoder.checkpoint.unmap()
        return heads
