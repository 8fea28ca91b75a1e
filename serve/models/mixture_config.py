"""What a config says about a mixture of experts, and how its tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qserve.quant.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class MixtureNames:
    """Names of tensors: ``<layer>.<block>.gate``, ``<layer>.<block>.experts.0.<up>``, ..."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """Experts of the layers that have them.

    top_k: experts of a token. intermediate_size, shared_size: inner width of an expert, and of the
    one that all tokens share, 0 where there is none. renormalize: see ``Mixture``. sparse_step,
    dense_layers: every ``sparse_step``-th layer has experts, if it is not one of these.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    names: MixtureNames
    shared_size: int = 0
    sparse_step: int = 1
    dense_layers: frozenset[int] = frozenset()

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is a mixture."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


MIXTRAL_NAMES = MixtureNames("block_sparse_moe", "w1", "w3", "w2")
QWEN_NAMES = MixtureNames("mlp", "gate_proj", "up_proj", "down_proj")


def read_mixtral_experts(config: Mapping[str, Any]) -> MixtureConfig:
    """Mixtral's experts. Raises ``CheckpointError`` for a config that lacks a size."""
    return MixtureConfig(
        num_experts=_size(config, "num_local_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        intermediate_size=_size(config, "intermediate_size"),
        renormalize=True,
        names=MIXTRAL_NAMES,
    )


def read_qwen_experts(config: Mapping[str, Any]) -> MixtureConfig:
    """Qwen's experts; Qwen 2 has a shared one. Raises ``CheckpointError`` for a config that lacks a
    size."""
    shared = "shared_expert_intermediate_size"
    count = "num_experts" if "num_experts" in config else "num_local_experts"  # transformers 5
    return MixtureConfig(
        num_experts=_size(config, count),
        top_k=_size(config, "num_experts_per_tok"),
        intermediate_size=_size(config, "moe_intermediate_size"),
        renormalize=bool(config.get("norm_topk_prob", False)),
        names=QWEN_NAMES,
        shared_size=_size(config, shared) if shared in config else 0,
        sparse_step=_size({"decoder_sparse_step": 1, **config}, "decoder_sparse_step"),
        dense_layers=frozenset(config.get("mlp_only_layers") or ()),
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has {key} {value!r}: expected a positive number")
    return value
