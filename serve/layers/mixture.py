"""A mixture of experts in place of a feed-forward layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qserve.kernels.expert_matmul import (
    combine_experts,
    expert_matmul,
    group_experts,
    route_tokens,
)
from qserve.kernels.gated_activation import gated_activation
from qserve.serve.layers.feed_forward import FeedForward, Workspace
from qserve.serve.layers.linear import Linear


class ExpertLinear:
    """One linear layer of every expert; rows say which expert they go to."""

    def __init__(self, experts: Sequence[Linear]) -> None:
        """experts: of one shape, made of the same number of parts."""
        parts = zip(*(expert.weights for expert in experts), strict=True)
        self._parts = [group_experts(weights) for weights in parts]
        self._activations = experts[0].activations
        self.num_experts = len(experts)
        self.in_features = experts[0].in_features
        self.out_features = experts[0].out_features
        self.nbytes = sum(part.nbytes for part in self._parts)

    def __call__(self, x: torch.Tensor, expert_ids: torch.Tensor, out: torch.Tensor) -> None:
        """x: ``[num_tokens, in_features]``, or ``[num_tokens, top_k, in_features]``. out:
        ``[num_tokens, top_k, out_features]``, written."""
        start = 0
        for part in self._parts:
            columns = out[..., start : start + part.out_features]
            expert_matmul(x, part, expert_ids, out=columns, activations=self._activations)
            start += part.out_features


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert that every token goes to, weighed by the sigmoid of ``gate``'s only output."""

    feed_forward: FeedForward
    gate: Linear


class Mixture:
    """The sum of what the ``top_k`` most likely experts of a token make of it, each weighed by its
    likelihood.

    renormalize: the weights of the chosen experts sum to 1 (Mixtral), see ``route_tokens``.
    """

    def __init__(
        self,
        router: Linear,
        gate_up: ExpertLinear,
        down: ExpertLinear,
        shared: SharedExpert | None,
        *,
        top_k: int,
        renormalize: bool,
        workspace: Workspace,
    ) -> None:
        all_experts = gate_up.nbytes + down.nbytes
        self.nbytes = router.nbytes + all_experts * top_k // gate_up.num_experts
        if shared is not None:
            self.nbytes += shared.feed_forward.nbytes + shared.gate.nbytes
        self._router = router
        self._gate_up = gate_up
        self._down = down
        self._shared = shared
        self._renormalize = renormalize
        inner, hidden = down.in_features, down.out_features
        self._logits = workspace.get("router's logits", router.out_features)
        self._ids = workspace.get("experts", top_k, dtype=torch.int32)
        self._weights = workspace.get("weights of experts", top_k)
        self._halves = workspace.get("gate and up of experts", top_k, 2 * inner)
        self._activated = workspace.get("activated experts", top_k, inner)
        self._outputs = workspace.get("outputs of experts", top_k, hidden)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See ``FeedForward``."""
        n = x.size(0)
        ids, weights, halves = self._ids[:n], self._weights[:n], self._halves[:n]
        activated, outputs = self._activated[:n], self._outputs[:n]
        logits = self._router(x, self._logits[:n])
        route_tokens(logits, ids.size(1), renormalize=self._renormalize, out=(ids, weights))
        self._gate_up(x, ids, halves)
        gated_activation(halves.flatten(0, 1), out=activated.flatten(0, 1))
        self._down(activated, ids, outputs)
        combine_experts(outputs, weights, out=out)
        if self._shared is not None:
            common = torch.empty_like(out)
            self._shared.feed_forward(x, common)
            gate = self._shared.gate(x, x.new_empty(n, 1))
            out += gate.sigmoid() * common
