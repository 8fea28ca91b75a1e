"""Feed-forward layers of the Llama family and of its relatives with experts: Mixtral, Qwen MoE."""

from __future__ import annotations

from qserve.serve.layers.feed_forward import FeedForward, GatedFeedForward, Workspace
from qserve.serve.layers.mixture import ExpertLinear, Mixture, SharedExpert
from qserve.serve.models.llama_config import LlamaConfig
from qserve.serve.models.mixture_config import MixtureConfig
from qserve.serve.weights import WeightReader


def read_feed_forward(
    config: LlamaConfig, weights: WeightReader, layer: int, workspace: Workspace
) -> FeedForward:
    """The feed-forward part of a layer, counted from 0: dense, or experts where the config has
    them."""
    name = f"model.layers.{layer}"
    mixture = config.mixture
    if mixture is not None and mixture.has_experts(layer):
        return _read_mixture(config, mixture, weights, name, workspace)
    return _read_gated(config, weights, f"{name}.mlp", config.intermediate_size, workspace)


def _read_gated(
    config: LlamaConfig, weights: WeightReader, name: str, inner: int, workspace: Workspace
) -> GatedFeedForward:
    hidden = config.hidden_size
    parts = ("gate_up_proj",) if config.has_joined_tensors else ("gate_proj", "up_proj")
    gate_up = weights.linear(*(f"{name}.{part}" for part in parts), shape=(2 * inner, hidden))
    down = weights.linear(f"{name}.down_proj", shape=(hidden, inner))
    return GatedFeedForward(gate_up, down, config.gate, workspace)


def _read_mixture(
    config: LlamaConfig,
    mixture: MixtureConfig,
    weights: WeightReader,
    layer: str,
    workspace: Workspace,
) -> Mixture:
    hidden = config.hidden_size
    names, inner = mixture.names, mixture.intermediate_size
    block = f"{layer}.{names.block}"
    experts = [f"{block}.experts.{index}" for index in range(mixture.num_experts)]
    gate_up = [
        weights.linear(f"{name}.{names.gate}", f"{name}.{names.up}", shape=(2 * inner, hidden))
        for name in experts
    ]
    down = [weights.linear(f"{name}.{names.down}", shape=(hidden, inner)) for name in experts]
    shared = None
    if mixture.shared_size:
        shared = SharedExpert(
            _read_gated(config, weights, f"{block}.shared_expert", mixture.shared_size, workspace),
            weights.linear(f"{block}.shared_expert_gate", shape=(1, hidden)),
        )
    return Mixture(
        weights.linear(f"{block}.gate", shape=(mixture.num_experts, hidden)),
        ExpertLinear(gate_up),
        ExpertLinear(down),
        shared,
        top_k=mixture.top_k,
        renormalize=mixture.renormalize,
        workspace=workspace,
    )
