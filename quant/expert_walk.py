"""The experts of a block, one after the other: what each receives, of the tokens that it is shown.

An expert is shown the tokens that the quantized model sends to it. Where they are too few to choose
codes by, it is shown those that came nearest to it too. Every row is multiplied by what the output
of the expert is multiplied by for that token, since so is every error that is made on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qserve.quant.architecture import Stage
from qserve.quant.decoder import Block
from qserve.quant.experts import Expert, ExpertMixture, Routing
from qserve.quant.seen import Seen

TOKENS_AT_ONCE = 512

BORROWED_SHARE = 0.5
"""The weight of a token that does not go to an expert, relative to the mean of those that do. So
four such tokens count as one: they tell what else may come, and do not outvote what has come."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """The tokens ``[n]`` that an expert is shown, their weights ``[n, 1]``, which it borrows."""

    tokens: torch.Tensor
    weights: torch.Tensor
    is_borrowed: torch.Tensor

    def pieces(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, int]]:
        """Their place among the pieces, tokens, weights and the number of borrowed ones."""
        parts = (self.tokens, self.weights, self.is_borrowed)
        pieces = zip(*(part.split(TOKENS_AT_ONCE) for part in parts), strict=True)
        for index, (tokens, weights, is_borrowed) in enumerate(pieces):
            yield index, tokens, weights, int(is_borrowed.sum())


class _Stream:
    """One of the two models: hidden states ``[T, hidden_size]`` behind attention, which become what
    leaves the block."""

    def __init__(self, mixture: ExpertMixture, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        self._hidden = hidden
        self.normed = normed
        self.routing: Routing = mixture.route(normed)

    def add_(self, expert: Expert, index: int) -> None:
        """Add what an expert makes of the tokens that go to it."""
        for tokens in self.routing.tokens_of(index).split(TOKENS_AT_ONCE):
            weights = self.routing.weights[tokens, index, None]
            self._hidden.index_add_(0, tokens, weights * expert(self.normed[tokens]))

    def shown_to(self, index: int, at_least: int, counts: torch.Tensor) -> _Shown:
        """The tokens for an expert: all that go to it, and others until there are so many; none but
        those that count, bool ``[T]``."""
        own = self.routing.chosen[:, index] & counts
        weights = self.routing.weights[:, index]
        tokens = own.nonzero()[:, 0]
        usual = float(weights[tokens].mean()) if len(tokens) else 1.0
        num_missing = min(at_least, int(counts.sum())) - len(tokens)
        if num_missing > 0:
            nearest = weights.masked_fill(own | ~counts, -1.0).topk(num_missing).indices
            tokens = torch.cat([tokens, nearest]).sort().values
        is_own = own[tokens]
        shown = torch.where(is_own, weights[tokens], BORROWED_SHARE * usual)
        return _Shown(tokens, shown[:, None], ~is_own)


class ExpertWalk:
    """The part of a walk behind attention.

    hidden, exact: ``[S, T, hidden_size]``, see ``walk_``. memory: room for ``numbers_needed``.
    counts: bool ``[S, T]``, the positions that are shown.
    """

    def __init__(
        self,
        block: Block,
        hidden: torch.Tensor,
        exact: torch.Tensor | None,
        memory: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        assert block.mixture is not None
        self._block = block
        self._mixture = block.mixture
        self._stages = block.stages[2:]
        norm = block.module(self._stages[0].previous)
        self._shape = hidden.shape
        self._counts = counts
        streams = []
        for states in (hidden, exact):
            if states is not None:
                rows = states.view(-1, states.shape[-1])
                normed, memory = memory[: rows.numel()].view_as(rows), memory[rows.numel() :]
                for window, out in zip(states, normed.view_as(states), strict=True):
                    out.copy_(norm(window))
                streams.append(_Stream(self._mixture, rows, normed))
        self._quantized, self._float = streams[0], streams[1] if exact is not None else None
        self._kept = memory

    @staticmethod
    def numbers_needed(block: Block, hidden: torch.Tensor, exact: torch.Tensor | None) -> int:
        """How many numbers the memory of a walk has to hold."""
        assert block.mixture is not None
        if exact is None:
            return hidden.numel()
        widest = max(expert.inner_features for expert in block.mixture.members)
        return 2 * hidden.numel() + widest * (hidden.numel() // hidden.shape[-1])

    def stages_(self, least_per_input: int) -> Iterator[tuple[Stage, Iterator[Seen]]]:
        """The router and two stages of each expert, see ``walk_``.

        least_per_input: tokens for each input of its layers that an expert is shown.
        """
        router, *stages = self._stages
        yield router, self._see_normed()
        for index, (into, out) in enumerate(zip(stages[::2], stages[1::2], strict=True)):
            expert = self._mixture.members[index]
            width = max(expert.in_features, expert.inner_features)
            shown = self._quantized.shown_to(index, least_per_input * width, self._counts.flatten())
            for stage, windows in (
                (into, self._see_inputs(index, expert, shown)),
                (out, self._see_inner(expert, shown)),
            ):
                yield stage, windows
                for _ in windows:
                    pass  # what the caller did not look at is computed all the same
            self._quantized.add_(expert, index)

    def _see_normed(self) -> Iterator[Seen]:
        windows = self._quantized.normed.view(self._shape)
        for index, window in enumerate(windows):
            beside = None if self._float is None else self._float.normed.view(self._shape)[index]
            yield Seen(index, window, beside).at(self._counts[index])

    def _see_inputs(self, index: int, expert: Expert, shown: _Shown) -> Iterator[Seen]:
        """What the first layers receive; the float model goes on by this expert."""
        kept = self._kept_rows(expert)
        for place, tokens, weights, num_borrowed in shown.pieces():
            received = self._quantized.normed[tokens].mul_(weights)
            if self._float is None:
                yield Seen(place, received, num_borrowed=num_borrowed)
                continue
            beside = self._float.normed[tokens]
            yield Seen(place, received, beside * weights, num_borrowed=num_borrowed)
            with self._block.unrounded():
                rows = kept[place * TOKENS_AT_ONCE :][: len(tokens)]
                torch.mul(expert.inner(beside), weights, out=rows)
        if self._float is not None:
            with self._block.unrounded():
                self._float.add_(expert, index)

    def _see_inner(self, expert: Expert, shown: _Shown) -> Iterator[Seen]:
        """What the last layer receives."""
        kept = self._kept_rows(expert)
        for place, tokens, weights, num_borrowed in shown.pieces():
            received = expert.inner(self._quantized.normed[tokens]).mul_(weights)
            beside = None
            if self._float is not None:
                beside = kept[place * TOKENS_AT_ONCE :][: len(tokens)]
            yield Seen(place, received, beside, num_borrowed=num_borrowed)

    def _kept_rows(self, expert: Expert) -> torch.Tensor:
        """Room for what the float model gives the last layer of an expert, ``[T, K]``."""
        num_rows = self._shape[0] * self._shape[1] if self._float is not None else 0
        return self._kept[: num_rows * expert.inner_features].view(num_rows, expert.inner_features)
