"""The architectures that can be served: how their config is read and what their layers compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qserve.quant.errors import UnsupportedModelError
from qserve.serve.models import families
from qserve.serve.models.gemma2 import Gemma2Layer
from qserve.serve.models.llama import LayerMaker, LlamaLayer
from qserve.serve.models.llama_config import LlamaConfig, read_llama


@dataclass(frozen=True, slots=True)
class Architecture:
    """read_config: from the content of ``config.json``; raises ``CheckpointError`` for one that
    lacks a size, ``UnsupportedModelError`` for one that asks for what is not computed. layer: makes
    a layer of the model."""

    read_config: Callable[[Mapping[str, Any]], LlamaConfig]
    layer: LayerMaker = LlamaLayer


ARCHITECTURES: Mapping[str, Architecture] = {
    "Gemma2ForCausalLM": Architecture(families.read_gemma2, Gemma2Layer),
    "GemmaForCausalLM": Architecture(families.read_gemma),
    "LlamaForCausalLM": Architecture(read_llama),
    "MistralForCausalLM": Architecture(families.read_mistral),
    "MixtralForCausalLM": Architecture(families.read_mixtral),
    "Phi3ForCausalLM": Architecture(families.read_phi3),
    "Qwen2ForCausalLM": Architecture(families.read_qwen2),
    "Qwen2MoeForCausalLM": Architecture(families.read_qwen2_moe),
    "Qwen3ForCausalLM": Architecture(families.read_qwen3),
    "Qwen3MoeForCausalLM": Architecture(families.read_qwen3_moe),
    "SmolLM3ForCausalLM": Architecture(families.read_smollm3),
}


def find_architecture(name: str) -> Architecture:
    """The architecture that ``config.json`` calls ``name``.

    Raises ``UnsupportedModelError`` for one that is not served.
    """
    found = ARCHITECTURES.get(name)
    if found is None:
        raise UnsupportedModelError(
            f"{name} cannot be served: expected one of {', '.join(ARCHITECTURES)}"
        )
    return found
