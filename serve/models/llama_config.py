"""The sizes and constants of a Llama or a relative, read from its ``config.json`` and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qserve.kernels.gated_activation import Gate
from qserve.kernels.kv_store import RopeScaling
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.serve.models.mixture_config import MixtureConfig
from qserve.serve.models.rope_config import read_rope

GATES = {
    "silu": Gate.SILU,
    "swish": Gate.SILU,
    "gelu": Gate.GELU,
    "gelu_new": Gate.GELU_TANH,
    "gelu_pytorch_tanh": Gate.GELU_TANH,
}
"""Activations of the feed-forward gate, by transformers' names."""


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What the forward pass needs to know; names as in transformers, where they agree with ours.

    windows: of each layer, the positions that a row sees, its own included; None is all before it.
    What follows has the values of a Llama, see serve/models/families.py for the others.
    rotary_share: the part of each head that is rotated. unrotated_layers: those without positions.
    has_head_norms: queries and keys are normed, each head on its own. has_joined_tensors: the
    checkpoint holds q, k and v, and gate and up, as one tensor. norm_offset: see ``rms_norm``.
    embedding_scale: what embeddings are multiplied by. attention_scale: of the dot products; None
    is ``head_dim ** -0.5``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    gate: Gate = Gate.SILU
    mixture: MixtureConfig | None = None
    rotary_share: float = 1.0
    unrotated_layers: frozenset[int] = frozenset()
    has_head_norms: bool = False
    has_joined_tensors: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    @property
    def q_size(self) -> int:
        """Elements of the queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of the keys, or the values, of a token."""
        return self.num_kv_heads * self.head_dim


def read_llama(config: Mapping[str, Any], tied: bool = False) -> LlamaConfig:
    """A Llama: no windows, whatever its config says.

    tied: whether the output head is the embedding where the config does not say it. Raises
    ``UnsupportedModelError`` for what is not computed, ``CheckpointError`` for a config that lacks
    a size.
    """
    heads, hidden = positive(config, "num_attention_heads"), positive(config, "hidden_size")
    num_layers = positive(config, "num_hidden_layers")
    rope = read_rope(config)
    return LlamaConfig(
        vocab_size=positive(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=positive(config, "max_position_embeddings"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rotary_share=rope.share,
        tie_embeddings=bool(config.get("tie_word_embeddings", tied)),
        windows=(None,) * num_layers,
        gate=_gate(config.get("hidden_act", "silu")),
    )


def positive(config: Mapping[str, Any], key: str) -> int:
    """The size ``key``. Raises ``CheckpointError`` unless it is a positive whole number."""
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has {key} {value!r}: expected a positive number")
    return value


def _gate(name: object) -> Gate:
    if name not in GATES:
        raise UnsupportedModelError(
            f"a model with hidden_act {name!r} cannot be served: expected one of {', '.join(GATES)}"
        )
    return GATES[str(name)]
