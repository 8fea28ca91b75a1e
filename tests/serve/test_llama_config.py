"""What is read from config.json, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from qserve.kernels.gated_activation import Gate
from qserve.kernels.kv_store import LinearScaling, Llama3Scaling, YarnScaling
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.serve.models.llama_config import LlamaConfig
from qserve.serve.models.registry import find_architecture

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def read(architecture: str = "LlamaForCausalLM", **changes: Any) -> LlamaConfig:
    return find_architecture(architecture).read_config(BASE | changes)


def test_sizes_that_are_not_given_follow_from_the_others() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not config.tie_embeddings


def test_sizes_that_are_given_are_taken() -> None:
    config = read(num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (2, 32, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2}},
    ],
)
def test_scaling_is_read_in_the_old_form_and_the_new(changes: dict[str, Any]) -> None:
    config = read(**changes)
    assert (config.rope_theta, config.rope_scaling) == (5000.0, LinearScaling(2.0))


def test_the_scaling_of_llama3_is_read() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert read(rope_scaling=scaling).rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, YarnScaling(4.0, 8192)),
        (
            {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False},
            YarnScaling(4.0, 8192, 1.5, 16.0, 2.0, truncate=False),
        ),
        (
            {"mscale": 1, "mscale_all_dim": 0.5, "beta_fast": None},
            YarnScaling(4.0, 8192, mscale=1.0, mscale_all_dim=0.5),
        ),
    ],
    ids=["defaults", "all", "mscale"],
)
def test_the_scaling_of_yarn_is_read(changes: dict[str, Any], expected: YarnScaling) -> None:
    scaling = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192}
    assert read(rope_scaling=scaling | changes).rope_scaling == expected


def test_every_layer_of_a_mistral_has_its_window() -> None:
    assert read("MistralForCausalLM", sliding_window=64).windows == (64, 64)
    assert read("MistralForCausalLM", sliding_window=None).windows == (None, None)
    assert read("LlamaForCausalLM", sliding_window=64).windows == (None, None)
    kinds = ["full_attention", "sliding_attention"]
    mixed = {"sliding_window": 64, "layer_types": kinds}
    assert read("MistralForCausalLM", **mixed).windows == (None, 64)
    assert read("MistralForCausalLM", use_sliding_window=False, **mixed).windows == (None, None)
    late: dict[str, Any] = {"sliding_window": 9, "max_window_layers": 1}
    assert read("Qwen2ForCausalLM", **late).windows == (None, 9)
    with pytest.raises(CheckpointError, match="1 layer_types for 2 layers"):
        read("MistralForCausalLM", sliding_window=9, layer_types=["full_attention"])
    with pytest.raises(CheckpointError, match="sliding_window 0"):
        read("MistralForCausalLM", sliding_window=0)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("GPT2LMHeadModel", {}, "GPT2LMHeadModel"),
        ("LlamaForCausalLM", {"hidden_act": "relu"}, "relu"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic"}}, "dynamic"),
    ],
)
def test_what_is_not_computed_is_refused(
    architecture: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(architecture, **changes)


def test_what_only_some_relatives_do_is_read_of_them_alone() -> None:
    changes: dict[str, Any] = {
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 50.0,
        "no_rope_layers": [0],
    }
    llama = read(**changes)
    assert llama == read()
    assert (llama.rotary_share, llama.gate, llama.norm_offset) == (1.0, Gate.SILU, 0.0)
    gemma = read("Gemma2ForCausalLM", hidden_act="gelu", sliding_window=8, **changes)
    assert (gemma.attention_scale, gemma.attention_soft_cap) == (0.125, 50.0)
    assert (gemma.gate, gemma.embedding_scale, gemma.tie_embeddings) == (Gate.GELU_TANH, 8.0, True)
    assert (gemma.windows, gemma.logit_soft_cap) == ((8, None), None)
    smol = read("SmolLM3ForCausalLM", num_hidden_layers=8)
    assert smol.unrotated_layers == {3, 7}
    assert read(partial_rotary_factor=0.5).rotary_share == 0.5


@pytest.mark.parametrize("value", [None, 0, -1, "64", 1.5])
def test_a_size_that_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="hidden_size"):
        read(hidden_size=value)


def test_a_rope_factor_that_is_missing_is_refused() -> None:
    with pytest.raises(CheckpointError, match="factor"):
        read(rope_scaling={"rope_type": "linear"})
