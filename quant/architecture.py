"""The architectures that can be quantized: which layers share an input, what a scale folds into.

A new architecture whose blocks are norm, attention, add; norm, gated MLP, add is a row of
``ARCHITECTURES``; one whose MLP may be a mixture of experts names their tensors too.
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
from transformers.models.mixtral import modeling_mixtral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
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
    """Linear layers of a block that read the same rows.

    linears: names inside the block. previous: the module that the inverse scale is folded into;
    behind one norm all stages share their scale. run_with: the name of its ``LayerSet``, None for
    one of its own. is_router: its layers decide where tokens go, and are not quantized.
    """

    name: str
    linears: tuple[str, ...]
    previous: str
    fold: Fold
    run_with: str | None = None
    is_router: bool = False

    @property
    def layer_set(self) -> str:
        """The name of the ``LayerSet`` that it belongs to."""
        return self.run_with or self.name


@dataclass(frozen=True, slots=True)
class LayerSet:
    """Stages that serving engines run as one, and that are therefore coded alike."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names inside the block."""
        return tuple(name for stage in self.stages for name in stage.linears)

    @property
    def is_router(self) -> bool:
        """See ``Stage``."""
        return self.stages[0].is_router


def layer_sets(stages: tuple[Stage, ...]) -> tuple[LayerSet, ...]:
    """The sets that the stages of a block form, in their order."""
    sets: dict[str, list[Stage]] = {}
    for stage in stages:
        sets.setdefault(stage.layer_set, []).append(stage)
    return tuple(LayerSet(name, tuple(members)) for name, members in sets.items())


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What checkpoints call a mixture of experts and its parts.

    mixture: in place of the MLP. gate, up, down: of an expert. size: the key of the configuration
    that holds the inner width of an expert.
    """

    mixture: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    size: str = "moe_intermediate_size"

    def router(self) -> str:
        return f"{self.mixture}.gate"

    def shared_gate(self) -> str:
        return f"{self.mixture}.shared_expert_gate"

    def expert(self, index: int) -> str:
        return f"{self.mixture}.experts.{index}"

    def shared_expert(self) -> str:
        return f"{self.mixture}.shared_expert"


MLP_NORM = "post_attention_layernorm"
ATTENTION_OUTPUT, MLP_OUTPUT = "attention output", "mlp output"
EXPERTS = "experts"
"""The name of the set that all experts of a block are in but the shared one."""

SHARED_INPUT, SHARED_OUTPUT = "shared expert input", "shared expert output"


def gated_stages(
    into_attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    into_mlp: tuple[str, ...] = ("gate_proj", "up_proj"),
    mlp_norm: str = MLP_NORM,
) -> tuple[Stage, ...]:
    """The four stages of a block in order of execution.

    into_attention, into_mlp: the linear layers, the one that makes values (the factors of the
    gate) last; a layer may be several in one. mlp_norm: what is before the MLP.
    """
    attention = tuple(f"self_attn.{name}" for name in into_attention)
    mlp = tuple(f"mlp.{name}" for name in into_mlp)
    return (
        Stage("attention input", attention, "input_layernorm", Fold.NORM),
        Stage(ATTENTION_OUTPUT, ("self_attn.o_proj",), attention[-1], Fold.VALUE_ROWS),
        Stage("mlp input", mlp, mlp_norm, Fold.NORM),
        Stage(MLP_OUTPUT, ("mlp.down_proj",), mlp[-1], Fold.ROWS),
    )


def mixture_stages(names: ExpertNames, num_experts: int, has_shared: bool) -> tuple[Stage, ...]:
    """The stages of a block with experts: attention, the router, then one expert after the other.

    Engines run all experts of a block as one layer, the shared one, which comes last, on its own.
    """
    attention = gated_stages()[:2]
    routers = (names.router(), names.shared_gate()) if has_shared else (names.router(),)
    stages = [*attention, Stage("router", routers, MLP_NORM, Fold.NORM, is_router=True)]
    for index in range(num_experts):
        expert = names.expert(index)
        gate, up = f"{expert}.{names.gate}", f"{expert}.{names.up}"
        down = (f"{expert}.{names.down}",)
        stages += [
            Stage(f"expert {index} input", (gate, up), MLP_NORM, Fold.NORM, EXPERTS),
            Stage(f"expert {index} output", down, up, Fold.ROWS, EXPERTS),
        ]
    if has_shared:
        shared = names.shared_expert()
        gate, up = f"{shared}.gate_proj", f"{shared}.up_proj"
        stages += [
            Stage(SHARED_INPUT, (gate, up), MLP_NORM, Fold.NORM),
            Stage(SHARED_OUTPUT, (f"{shared}.down_proj",), up, Fold.ROWS),
        ]
    return tuple(stages)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The modules of transformers that compute a model, and the stages of its blocks in order.

    norm_offset: what a norm adds to its weight before it multiplies. scales_embedding: whether
    embeddings are multiplied by the square root of their width. attention_norm, mlp_norm: what
    norms the outputs of attention and MLP before they are added, by its name inside the block.
    experts: of the blocks that have a mixture of them in place of the MLP.
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
    experts: ExpertNames | None = None
    dtype: str = "float16"

    def experts_of(self, config: Any, index: int) -> ExpertNames | None:
        """The names of the experts of block ``index``; None where it has a plain MLP."""
        if self.experts is None or index in (getattr(config, "mlp_only_layers", None) or ()):
            return None
        step = getattr(config, "decoder_sparse_step", 1)
        return self.experts if (index + 1) % step == 0 else None

    def stages_of(self, config: Any, index: int) -> tuple[Stage, ...]:
        """The stages of block ``index`` of a model with this configuration of transformers."""
        names = self.experts_of(config, index)
        if names is None:
            return self.stages
        return mixture_stages(names, config.num_experts, shared_size(config) > 0)


def shared_size(config: Any) -> int:
    """The inner width of the expert that all tokens go to; 0 where there is none."""
    return int(getattr(config, "shared_expert_intermediate_size", 0))


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
    "MixtralForCausalLM": Architecture(
        modeling_mixtral.MixtralDecoderLayer,
        modeling_mixtral.MixtralRMSNorm,
        modeling_mixtral.MixtralRotaryEmbedding,
        experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2", "intermediate_size"),
    ),
    "Qwen2ForCausalLM": Architecture(
        modeling_qwen2.Qwen2DecoderLayer,
        modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen2.Qwen2RotaryEmbedding,
    ),
    "Qwen2MoeForCausalLM": Architecture(
        modeling_qwen2_moe.Qwen2MoeDecoderLayer,
        modeling_qwen2_moe.Qwen2MoeRMSNorm,
        modeling_qwen2_moe.Qwen2MoeRotaryEmbedding,
        experts=ExpertNames(),
    ),
    "Qwen3ForCausalLM": Architecture(
        modeling_qwen3.Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
    "Qwen3MoeForCausalLM": Architecture(
        modeling_qwen3_moe.Qwen3MoeDecoderLayer,
        modeling_qwen3_moe.Qwen3MoeRMSNorm,
        modeling_qwen3_moe.Qwen3MoeRotaryEmbedding,
        experts=ExpertNames(),
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
            kind = ", a mixture of experts of another kind than those"
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
