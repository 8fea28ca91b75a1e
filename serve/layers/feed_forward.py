"""The feed-forward part of a layer: a gated pair of linear layers, and one back."""

from __future__ import annotations

from typing import Protocol

import torch

from qserve.kernels.gated_activation import Gate, gated_activation
from qserve.serve.layers.linear import Linear


class FeedForward(Protocol):
    """What stands between the second norm of a layer and the residual stream.

    nbytes: memory of the weights that one token reads.
    """

    nbytes: int

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x: ``[num_tokens, hidden_size]``, normed. out: of that shape, written."""


class Workspace:
    """Memory for what the layers of a model compute in between; each uses it in turn.

    num_tokens: rows of a step at most. Two things of one name are one memory.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._memory: dict[str, torch.Tensor] = {}

    def get(self, name: str, *row: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[num_tokens, *row]``, the same for the same name."""
        shape = (self._num_tokens, *row)
        if name not in self._memory:
            self._memory[name] = torch.empty(shape, dtype=dtype)
        found = self._memory[name]
        assert found.shape == shape and found.dtype is dtype, name
        return found


class GatedFeedForward:
    """``down(f(gate(x)) * up(x))``, f the ``activation``; gate and up are the outputs of one layer,
    side by side."""

    def __init__(
        self, gate_up: Linear, down: Linear, activation: Gate, workspace: Workspace
    ) -> None:
        self.nbytes = gate_up.nbytes + down.nbytes
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        inner = down.in_features
        self._halves = workspace.get(f"gate and up of {inner}", 2 * inner)
        self._activated = workspace.get(f"activated {inner}", inner)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See ``FeedForward``."""
        halves, activated = self._halves[: x.size(0)], self._activated[: x.size(0)]
        self._gate_up(x, halves)
        gated_activation(halves, self._activation, out=activated)
        self._down(activated, out)
