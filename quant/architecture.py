"""The architectures that can be quantized: which layers share an input, what a scale folds into.

A new architecture whose blocks are norm, attention, add; norm, gated MLP, add is a row of
``ARCHITECTURES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3

from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.checkpoint import Checkpoint


class Fold(Enum):
    """What absorbs the inverse of a scale on the inputs of a stage."""

    NORM = "norm"
    """The norm before it, one value an input."""

    ROWS = "rows"
    """The last rows of the linear layer before it, one row an input."""

    VALUE_ROWS = "value rows"
    """Its last rows, which compute values; query heads that share a key/value head share a scale.
    """


@dataclass(frozen=True, slots=True)
class Stage:
    """Linear layers of a block that read the same input, and that serving engines run as one.

    linears: names inside the block. previous: the module that the inverse scale is folded into.
    """

    name: str
    linears: tuple[str, ...]
    previous: str
    fold: Fold


def gated_stages(
    into_attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    into_mlp: tuple[str, ...] = ("gate_proj", "up_proj"),
    mlp_norm: str = "post_attention_layernorm",
) -> tuple[Stage, ...]:
    """The four stages of a block in order of execution.

    into_attention, into_mlp: the linear layers, the one that makes values (the factors of the
    gate) last; a layer may be several in one. mlp_norm: what is before the MLP.
    """
    attention = tuple(f"self_attn.{name}" for name in into_attention)
    mlp = tuple(f"mlp.{name}" for name in into_mlp)
    return (
        Stage("attention input", attention, "input_layernorm", Fold.NORM),
        Stage("attention output", ("self_attn.o_proj",), attention[-1], Fold.VALUE_ROWS),
        Stage("mlp input", mlp, mlp_norm, Fold.NORM),
        Stage("mlp output", ("mlp.down_proj",), mlp[-1], Fold.ROWS),
    )


@dataclass(frozen=True, slots=True)
class Architecture:
    """The modules of transformers that compute a model, and the stages of its blocks in order.

    norm_offset: what a norm adds to its weight before it multiplies. scales_embedding: whether
    embeddings are multiplied by the square root of their width. attention_norm, mlp_norm: what
    norms the outputs of attention and MLP before they are added, by its name inside the block.
    dtype: the 16-bit type to run it in; hidden states of Gemma 2 leave the range of float16.
    """

    layer: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]
    stages: tuple[Stage, ...] = gated_stages()
    norm_offset: float = 0.0
    scales_embedding: bool = False
    attention_norm: str | None = None
    mlp_norm: str | None = None
    dtype: str = "float16"


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaRotaryEmbedding,
    ),
    "MistralForCausalLM": Architecture(
        modeling_mistral.MistralDecoderLayer,
        modeling_mistral.MistralRMSNorm,
        modeling_mistral.MistralRotaryEmbedding,
    ),
    "Qwen2ForCausalLM": Architecture(
        modeling_qwen2.Qwen2DecoderLayer,
        modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen2.Qwen2RotaryEmbedding,
    ),
    "Qwen3ForCausalLM": Architecture(
        modeling_qwen3.Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
    "SmolLM3ForCausalLM": Architecture(
        modeling_smollm3.SmolLM3DecoderLayer,
        modeling_smollm3.SmolLM3RMSNorm,
        modeling_smollm3.SmolLM3RotaryEmbedding,
    ),
    "Phi3ForCausalLM": Architecture(
        modeling_phi3.Phi3DecoderLayer,
        modeling_phi3.Phi3RMSNorm,
        modeling_phi3.Phi3RotaryEmbedding,
        gated_stages(into_attention=("qkv_proj",), into_mlp=("gate_up_proj",)),
    ),
    "GemmaForCausalLM": Architecture(
        modeling_gemma.GemmaDecoderLayer,
        modeling_gemma.GemmaRMSNorm,
        modeling_gemma.GemmaRotaryEmbedding,
        norm_offset=1.0,
        scales_embedding=True,
    ),
    "Gemma2ForCausalLM": Architecture(
        modeling_gemma2.Gemma2DecoderLayer,
        modeling_gemma2.Gemma2RMSNorm,
        modeling_gemma2.Gemma2RotaryEmbedding,
        gated_stages(mlp_norm="pre_feedforward_layernorm"),
        norm_offset=1.0,
        scales_embedding=True,
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        dtype="bfloat16",
    ),
}

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary embeddings whose angles depend on positions and on the length of a window alone."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of ``config.json`` that only mixtures of experts have."""


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The row for a checkpoint. Raises ``UnsupportedModelError`` when there is none."""
    name = checkpoint.architecture
    if name not in ARCHITECTURES:
        kind = ""
        if any(checkpoint.config.get(key) for key in EXPERT_COUNTS):
            kind = ", a mixture of experts, and these are not quantized"
        raise UnsupportedModelError(
            f"{checkpoint.folder} is a {name}{kind}: expected one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def check_rotary(config: Any, folder: str) -> None:
    """Raise ``UnsupportedModelError`` for a rotary embedding that is not in ``ROPE_TYPES``.

    config: transformers' configuration of the model in ``folder``.
    """
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{folder} uses rotary embeddings of type {rope_type!r}: expected one of "
            f"{', '.join(ROPE_TYPES)}"
        )


def attention_implementation(config: Any) -> str:
    """The one of transformers' implementations that computes the attention of a model."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if capped else "sdpa"


def attention_mask(config: Any, index: int, length: int) -> torch.Tensor | None:
    """What the attention of block ``index`` adds to its scores: ``[1, 1, length, length]``.

    None where the implementation hides later positions itself and no window hides earlier ones.
    """
    window = _window_of(config, index)
    if window is not None and window >= length:
        window = None
    if window is None and attention_implementation(config) == "sdpa":
        return None
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(1, 1, length, length).masked_fill_(hidden, -torch.inf)


def _window_of(config: Any, index: int) -> int | None:
    """How many positions, its own included, a position of block ``index`` sees; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window
