"""The architectures that can be quantized: which layers share an input, what a scale folds into.

A new architecture of the Llama family is a row of ``ARCHITECTURES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.checkpoint import Checkpoint


class Fold(Enum):
    """What absorbs the inverse of a scale on the inputs of a stage."""

    NORM = "norm"
    """The weight of the norm before it, one value an input."""

    ROWS = "rows"
    """The rows of the linear layer before it, one row an input."""

    VALUE_ROWS = "value rows"
    """The rows of the value projection; query heads that share a key/value head share a scale."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Linear layers of a block that read the same input, and that serving engines run as one.

    linears: names inside the block. previous: the module that the inverse scale is folded into.
    """

    name: str
    linears: tuple[str, ...]
    previous: str
    fold: Fold


LLAMA_STAGES = (
    Stage(
        "attention input",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "input_layernorm",
        Fold.NORM,
    ),
    Stage("attention output", ("self_attn.o_proj",), "self_attn.v_proj", Fold.VALUE_ROWS),
    Stage(
        "mlp input",
        ("mlp.gate_proj", "mlp.up_proj"),
        "post_attention_layernorm",
        Fold.NORM,
    ),
    Stage("mlp output", ("mlp.down_proj",), "mlp.up_proj", Fold.ROWS),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The modules of transformers that compute a model, and the stages of its blocks in order.

    The block is the Llama one: norm, attention, add; norm, gated MLP, add.
    """

    layer: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]
    stages: tuple[Stage, ...] = LLAMA_STAGES


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
}

ROPE_TYPES = ("default", "linear", "llama3")
"""Rotary embeddings whose angles depend on the position alone."""


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The row for a checkpoint. Raises ``UnsupportedModelError`` when there is none."""
    name = checkpoint.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{checkpoint.folder} is a {name}: expected one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def check_attention(config: Any, folder: str) -> None:
    """Raise ``UnsupportedModelError`` for attention other than to all earlier positions.

    config: transformers' configuration of the model in ``folder``.
    """
    if getattr(config, "sliding_window", None) is not None:
        raise UnsupportedModelError(
            f"{folder} uses sliding-window attention ({config.sliding_window} tokens): only full "
            "attention is handled; if your prompts are shorter than the window, set sliding_window "
            "to null in config.json"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{folder} uses rotary embeddings of type {rope_type!r}: expected one of "
            f"{', '.join(ROPE_TYPES)}"
        )
