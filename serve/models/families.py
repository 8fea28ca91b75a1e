"""What each relative of Llama does otherwise, read from its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qserve.kernels.gated_activation import Gate
from qserve.quant.errors import CheckpointError
from qserve.serve.models.llama_config import LlamaConfig, positive, read_llama
from qserve.serve.models.mixture_config import read_mixtral_experts, read_qwen_experts

Config = Mapping[str, Any]
Windows = tuple[int | None, ...]

SLIDING = "sliding_attention"


def read_mistral(config: Config) -> LlamaConfig:
    """Mistral: a window, in every layer unless the config says in which."""
    return replace(read_llama(config), windows=_windows(config))


def read_mixtral(config: Config) -> LlamaConfig:
    """Mixtral: Mistral with experts."""
    return replace(read_mistral(config), mixture=read_mixtral_experts(config))


def read_qwen2(config: Config) -> LlamaConfig:
    """Qwen 2: biases, which a layer has or has not, and windows in late layers."""
    return replace(read_llama(config), windows=_windows(config))


def read_qwen2_moe(config: Config) -> LlamaConfig:
    """Qwen 2 with experts."""
    return replace(read_qwen2(config), mixture=read_qwen_experts(config))


def read_qwen3(config: Config) -> LlamaConfig:
    """Qwen 3: queries and keys are normed, each head on its own."""
    return replace(read_qwen2(config), has_head_norms=True)


def read_qwen3_moe(config: Config) -> LlamaConfig:
    """Qwen 3 with experts."""
    return replace(read_qwen3(config), mixture=read_qwen_experts(config))


def read_smollm3(config: Config) -> LlamaConfig:
    """SmolLM 3: layers without positions (in ``no_rope_layers``, those marked 0)."""
    llama = read_llama(config, tied=True)
    marks = config.get("no_rope_layers")
    if not isinstance(marks, list):
        interval = int(config.get("no_rope_layer_interval") or 4)
        marks = [(index + 1) % interval for index in range(llama.num_layers)]
    still = frozenset(index for index, mark in enumerate(marks) if not mark)
    return replace(llama, windows=_windows(config), unrotated_layers=still)


def read_phi3(config: Config) -> LlamaConfig:
    """Phi 3: projections that are one tensor, and a window."""
    return replace(read_llama(config), has_joined_tensors=True, windows=_windows(config))


def read_gemma(config: Config) -> LlamaConfig:
    """Gemma: norm weights are distances from 1, embeddings are scaled, the gate is a GELU."""
    llama = read_llama({**config, "hidden_act": "silu"}, tied=True)
    return replace(
        llama,
        gate=Gate.GELU_TANH,  # also where hidden_act says "gelu": it was never computed that way
        norm_offset=1.0,
        embedding_scale=math.sqrt(llama.hidden_size),
    )


def read_gemma2(config: Config) -> LlamaConfig:
    """Gemma 2: soft caps, a scale of its own, a window in every other layer from the first on."""
    gemma = read_gemma(config)
    kinds = [SLIDING, ""] * gemma.num_layers  # where the config does not say it
    scale = float(config.get("query_pre_attn_scalar") or gemma.head_dim) ** -0.5
    return replace(
        gemma,
        attention_scale=scale,
        attention_soft_cap=_soft_cap(config, "attn_logit_softcapping"),
        logit_soft_cap=_soft_cap(config, "final_logit_softcapping"),
        windows=_windows({"layer_types": kinds, **config}),
    )


def _windows(config: Config) -> Windows:
    """The window of each layer, None where it sees everything.

    ``layer_types`` says which layers have one, or before there was such a key ``max_window_layers``
    the first of them; without either all have it.
    """
    num_layers = positive(config, "num_hidden_layers")
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        return (None,) * num_layers
    window = positive(config, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers") or 0)
        kinds = ["" if index < first else SLIDING for index in range(num_layers)]
    if len(kinds) < num_layers:
        raise CheckpointError(
            f"config.json has {len(kinds)} layer_types for {num_layers} layers: expected one each"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds[:num_layers])


def _soft_cap(config: Config, key: str) -> float | None:
    value = config.get(key)
    return None if value is None else float(value)
