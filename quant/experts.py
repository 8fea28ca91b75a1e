"""Blocks with a mixture of experts, as modules that have the layers and names of checkpoints.

transformers keeps the experts of a block in two tensors. What is quantized here is one linear layer
at a time, and what is stored has a tensor for each: so here every expert has linear layers of its
own. They compute what transformers computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from qserve.quant.architecture import MLP_NORM, ExpertNames, shared_size


@dataclass(frozen=True, slots=True)
class Routing:
    """Where tokens go.

    weights: what the output of each expert is multiplied by, or would be, ``[T, E]``. chosen: which
    of them a token goes to, bool ``[T, E]``. An expert that all tokens share is the last one.
    """

    weights: torch.Tensor
    chosen: torch.Tensor

    def tokens_of(self, expert: int) -> torch.Tensor:
        """The tokens that go to an expert, in their order: int64 ``[n]``."""
        return self.chosen[:, expert].nonzero()[:, 0]


class Expert(nn.Module):
    """A gated MLP: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, inner_size: int, names: ExpertNames, act: str) -> None:
        super().__init__()
        self.in_features, self.inner_features = hidden_size, inner_size
        self._names = names
        self._activation = ACT2FN[act]
        self.add_module(names.gate, nn.Linear(hidden_size, inner_size, bias=False))
        self.add_module(names.up, nn.Linear(hidden_size, inner_size, bias=False))
        self.add_module(names.down, nn.Linear(inner_size, hidden_size, bias=False))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What the last layer receives: ``[T, inner_size]`` of ``[T, hidden_size]``."""
        gate, up = self.get_submodule(self._names.gate), self.get_submodule(self._names.up)
        inner: torch.Tensor = self._activation(gate(x)) * up(x)
        return inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, hidden_size]`` of the same."""
        output: torch.Tensor = self.get_submodule(self._names.down)(self.inner(x))
        return output


class ExpertMixture(nn.Module):
    """The weighted sum of what its experts make of each token.

    config: of transformers.
    """

    def __init__(self, config: Any, names: ExpertNames) -> None:
        super().__init__()
        hidden_size, act = config.hidden_size, config.hidden_act
        inner_size = getattr(config, names.size)
        self.top_k = config.num_experts_per_tok
        self._renormalizes = getattr(config, "norm_topk_prob", True)  # Mixtral always does
        self.gate = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(hidden_size, inner_size, names, act) for _ in range(config.num_experts)
        )
        self.shared_expert: Expert | None = None
        if shared_size(config):
            self.shared_expert = Expert(hidden_size, shared_size(config), ExpertNames(), act)
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    @property
    def members(self) -> list[Expert]:
        """All experts, the shared one last."""
        experts = [expert for expert in self.experts if isinstance(expert, Expert)]
        return experts if self.shared_expert is None else [*experts, self.shared_expert]

    def route(self, x: torch.Tensor) -> Routing:
        """Where the tokens ``[T, hidden_size]`` go, by arithmetic in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self._route(x.float())

    def _route(self, x: torch.Tensor) -> Routing:
        weights = self.gate(x).softmax(-1)
        best, ids = weights.topk(self.top_k, dim=-1)
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, ids, True)
        if self._renormalizes:
            weights = weights / best.sum(-1, keepdim=True)
        if self.shared_expert is None:
            return Routing(weights, chosen)
        shared = self.shared_expert_gate(x).sigmoid()
        everyone = torch.ones_like(shared, dtype=torch.bool)
        return Routing(torch.cat([weights, shared], 1), torch.cat([chosen, everyone], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` of the same."""
        rows = x.flatten(0, -2)
        routing = self.route(rows)
        output = torch.zeros_like(rows)
        for index, expert in enumerate(self.members):
            tokens = routing.tokens_of(index)
            weighted = routing.weights[tokens, index, None] * expert(rows[tokens])
            output = output.index_add(0, tokens, weighted)
        return output.view_as(x)


class MixtureLayer(nn.Module):
    """A decoder block with experts: norm, attention, add; norm, mixture, add.

    layer: transformers' own, of which attention and norms are taken.
    """

    def __init__(self, layer: Any, config: Any, names: ExpertNames) -> None:
        super().__init__()
        self._mixture = names.mixture
        self.self_attn: nn.Module = layer.self_attn
        self.add_module(names.mixture, ExpertMixture(config, names))
        self.input_layernorm: nn.Module = layer.input_layernorm
        self.add_module(MLP_NORM, layer.post_attention_layernorm)

    def forward(self, hidden: torch.Tensor, **context: Any) -> torch.Tensor:
        """What leaves the block for hidden states ``[S, T, hidden_size]``."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **context)[0]
        normed = self.get_submodule(MLP_NORM)(hidden)
        output: torch.Tensor = hidden + self.get_submodule(self._mixture)(normed)
        return output
