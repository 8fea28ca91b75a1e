"""Rotary angles, compared with those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qserve.kernels.kv_store import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    rope_table,
)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONG_FACTORS = tuple(1.0 + i for i in range(32))
SHORT_FACTORS = tuple(1.0 + i / 8 for i in range(32))
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        ({"rope_type": "llama3", **LLAMA3}, Llama3Scaling(8.0, 1.0, 4.0, 256)),
        ({**YARN, "factor": 4.0}, YarnScaling(4.0, 512)),
        ({**YARN, "factor": 1.0}, YarnScaling(1.0, 512)),
        ({**YARN, "factor": 8.0, "attention_factor": 0.75}, YarnScaling(8.0, 512, 0.75)),
        (
            {**YARN, "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
            YarnScaling(4.0, 512, beta_fast=16.0, beta_slow=2.0, truncate=False),
        ),
        (
            {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
            YarnScaling(40.0, 512, mscale=1.0, mscale_all_dim=0.7),
        ),
        (
            {**YARN, "factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
            YarnScaling(4.0, 512, beta_fast=1.0, beta_slow=1.0, truncate=False),
        ),
        (
            {**LONGROPE, "original_max_position_embeddings": 512, "attention_factor": 1.25},
            LongRopeScaling(SHORT_FACTORS, LONG_FACTORS, 512, 1.25),
        ),
        (
            {**LONGROPE, "original_max_position_embeddings": 700, "attention_factor": 1.0},
            LongRopeScaling(SHORT_FACTORS, LONG_FACTORS, 700, 1.0),
        ),
    ],
    ids=["default", "linear", "llama3", "yarn", "1", "attention factor", "betas", "mscale", "step"]
    + ["long", "short"],
)
def test_the_table_has_the_angles_of_transformers(
    parameters: dict[str, Any], scaling: RopeScaling | None
) -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(700)[None])
    table = rope_table(64, 700, 10000.0, scaling)
    # Angles reach 700, where float32 numbers lie 6e-5 apart.
    assert torch.allclose(table[:, :32], cos[0, :, :32], rtol=0, atol=1e-4)
    assert torch.allclose(table[:, 32:], sin[0, :, :32], rtol=0, atol=1e-4)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        rope_table(33, 10, 10000.0)
    with pytest.raises(ValueError, match="32 factors for 32 rotated elements"):
        rope_table(32, 10, 10000.0, LongRopeScaling(SHORT_FACTORS, LONG_FACTORS, 512, 1.0))
