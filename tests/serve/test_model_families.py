"""Every architecture that is served gives the tokens of transformers, in recorded steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers

from qserve.kernels.kv_cache import KvFormat
from qserve.quant.errors import UnsupportedModelError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.block_manager import BlockManager
from qserve.serve.config import EngineConfig
from qserve.serve.engine import Engine
from qserve.serve.model_runner import ModelRunner
from qserve.serve.models.registry import ARCHITECTURES, find_architecture
from qserve.serve.scheduler import Scheduler

VOCAB_SIZE = 256
NUM_TOKENS = 24
TIE = 1e-3  # a smaller gap between the two best logits is decided by rounding
PROMPTS = [tuple(Random(n).choices(range(3, VOCAB_SIZE), k=n)) for n in (1, 5, 17, 40)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 12}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}

# Architecture, what its config says beside the sizes, what qserve must have read of it.
CASES = [
    ("LlamaForCausalLM", {"sliding_window": 4}, {"windows": (None,) * 3}),
    ("MistralForCausalLM", WINDOW, {"windows": (12,) * 3}),
    ("MixtralForCausalLM", {**EXPERTS, "num_local_experts": 4}, {}),
    ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, {"windows": (None,) * 3}),
    (
        "Qwen2ForCausalLM",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
        {"windows": (None, 12, 12)},
    ),
    (
        "Qwen2MoeForCausalLM",
        {
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 32,
        },
        {},
    ),
    ("Qwen3ForCausalLM", {"tie_word_embeddings": True}, {"has_head_norms": True}),
    (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True},
        {"has_head_norms": True},
    ),
    ("Phi3ForCausalLM", {**WINDOW, "rope_parameters": None}, {"windows": (12,) * 3}),
    (
        "Phi3ForCausalLM",
        {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        {"rotary_share": 0.5, "has_joined_tensors": True},
    ),
    (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 128,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0 + i / 4 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
            },
        },
        {"max_positions": 512},
    ),
    (
        "SmolLM3ForCausalLM",
        {"no_rope_layers": [1, 0, 1]},
        {"unrotated_layers": frozenset({1}), "tie_embeddings": True},
    ),
    ("GemmaForCausalLM", {}, {"norm_offset": 1.0, "embedding_scale": 8.0}),
    (
        "Gemma2ForCausalLM",
        {
            **WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 30,
        },
        {"windows": (12, None, 12), "attention_soft_cap": 2.0, "logit_soft_cap": 3.0},
    ),
]
NATIVE = [case for case in CASES if case[0] != "Qwen2MoeForCausalLM"]

Generate = Callable[..., list[tuple[int, ...]]]


def write_model(folder: Path, architecture: str, changes: dict[str, Any]) -> Any:
    """A random model of the architecture, as transformers writes it; returned in float32."""
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**(SIZES | changes))
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                parameter += 0.3 * torch.randn_like(parameter)
            elif "norm" in name:
                raise AssertionError(name)
    model.bfloat16().save_pretrained(folder)
    return model_class.from_pretrained(folder, dtype=torch.float32)


def load(folder: Path) -> tuple[Engine, ModelRunner]:
    config = EngineConfig(max_model_len=128, max_num_seqs=4, kv_format=KvFormat.FLOAT32)
    runner = ModelRunner(Checkpoint(folder), config)
    blocks = BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    return Engine(runner, Scheduler(runner.limits, blocks), frozenset()), runner


def name_of(case: tuple[str, dict[str, Any], dict[str, Any]]) -> str:
    return "-".join([case[0].removesuffix("ForCausalLM"), *list(case[1])[:2]])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_random_model_gives_the_tokens_of_transformers(
    case: tuple[str, dict[str, Any], dict[str, Any]], tmp_path: Path, generate: Generate
) -> None:
    architecture, changes, read = case
    model = write_model(tmp_path, architecture, changes)
    config = find_architecture(architecture).read_config(Checkpoint(tmp_path).config)
    assert {name: getattr(config, name) for name in read} == read
    engine, runner = load(tmp_path)
    found = generate(engine, PROMPTS, NUM_TOKENS)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(dim=1) - logits[range(len(tokens)), list(tokens)]
        assert float(behind.max()) < TIE, f"token {int(behind.argmax())} is {float(behind.max())}"
    assert len(set(found)) == len(PROMPTS), "the model says the same whatever it is asked"
    assert bool(runner._programs) == (case in NATIVE), "decode steps are recorded"


def test_every_architecture_is_tried() -> None:
    assert {case[0] for case in CASES} == set(ARCHITECTURES)


def test_an_unknown_architecture_is_told_with_those_that_are_served() -> None:
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM cannot be served") as error:
        find_architecture("MambaForCausalLM")
    assert all(name in str(error.value) for name in ARCHITECTURES)
