"""Models with experts in their feed-forward layers, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.kv_cache import KvFormat
from qserve.quant.errors import CheckpointError
from qserve.quant.formats import awq
from qserve.quant.formats.awq import AwqWriter
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.config import EngineConfig, HeadDtype
from qserve.serve.engine import Engine
from qserve.serve.model_runner import ModelRunner
from qserve.serve.models.mixture_config import read_mixtral_experts

NUM_TOKENS = 40
GROUP_SIZE = 32
TIE = 1e-3  # a smaller gap between the two best logits is decided by rounding
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
PROMPTS = [tuple(Random(n).choices(range(3, 128), k=n)) for n in (1, 5, 17, 40)]
EXACT = EngineConfig(
    max_model_len=128,
    kv_format=KvFormat.FLOAT32,
    activations=Activations.FLOAT32,
    head_dtype=HeadDtype.FLOAT,
)

Generate = Callable[..., list[tuple[int, ...]]]


def make_mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=5, **SIZES))


def make_qwen() -> PreTrainedModel:
    """With a shared expert, and a dense layer in between."""
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            num_experts=6,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            mlp_only_layers=[1],
            **SIZES,
        )
    )
    return randomize_routers(model)


def make_qwen3() -> PreTrainedModel:
    """Without a shared expert; heads are normed."""
    sizes = {**SIZES, "head_dim": 16, "num_experts": 6, "moe_intermediate_size": 32}
    config = Qwen3MoeConfig(norm_topk_prob=True, mlp_only_layers=[1], **sizes)
    return randomize_routers(Qwen3MoeForCausalLM(config))


def randomize_routers(model: Any) -> PreTrainedModel:
    """Routers are made of zeros, which send every token to the first experts."""
    for layer in (0, 2):
        torch.nn.init.normal_(model.model.layers[layer].mlp.gate.weight)
    found: PreTrainedModel = model
    return found


@pytest.fixture(
    scope="module",
    params=[make_mixtral, make_qwen, make_qwen3],
    ids=["mixtral", "qwen2-moe", "qwen3-moe"],
)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder: Path = tmp_path_factory.mktemp("moe")
    request.param().bfloat16().save_pretrained(folder)
    return folder


def expect_tokens_of_transformers(folder: Path, found: list[tuple[int, ...]]) -> None:
    """Fail unless each token is transformers' choice, or was within a tie of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(dim=1) - logits[range(len(tokens)), list(tokens)]
        assert float(behind.max()) < TIE, f"token {int(behind.argmax())} is {float(behind.max())}"


def round_experts(source: Path, out: Path, packed: bool) -> Path:
    """A copy whose experts have 4 bits in groups of 32: packed, or the floats they stand for."""
    checkpoint = Checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    for name in checkpoint:
        weight, module = checkpoint.tensor(name), name.removesuffix(".weight")
        if ".experts." not in name:
            tensors[name] = weight
            continue
        groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales).round().clamp(0, 15)
        codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        rounded = GroupedWeight(codes.flatten(1).byte(), scales, zeros.byte(), 4, GROUP_SIZE)
        if packed:
            tensors |= {
                f"{module}.{key}": part for key, part in AwqWriter().encode(rounded).items()
            }
        else:
            tensors[name] = rounded.dequantize()
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    if packed:
        config = json.loads((out / "config.json").read_text())
        ignored = ["self_attn", "gate", "shared_expert", "lm_head", "layers.1.mlp"]
        config["quantization_config"] = awq.config_block(GROUP_SIZE, ignored)
        (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_16_bit_model_gives_the_tokens_of_transformers(
    model_folder: Path, generate: Generate
) -> None:
    found = generate(Engine.from_checkpoint(model_folder, EXACT), PROMPTS, NUM_TOKENS)
    expect_tokens_of_transformers(model_folder, found)
    assert len(set(found)) == len(PROMPTS), "the model says the same whatever it is asked"


def test_quantized_experts_give_the_tokens_of_their_dequantized_weights(
    model_folder: Path, tmp_path: Path, generate: Generate
) -> None:
    packed = round_experts(model_folder, tmp_path / "packed", packed=True)
    found = generate(Engine.from_checkpoint(packed, EXACT), PROMPTS, NUM_TOKENS)
    expect_tokens_of_transformers(
        round_experts(model_folder, tmp_path / "plain", packed=False), found
    )


def test_a_prompt_alone_gives_the_tokens_it_gives_in_a_batch(
    model_folder: Path, tmp_path: Path, generate: Generate
) -> None:
    packed = round_experts(model_folder, tmp_path / "packed", packed=True)
    engine = Engine.from_checkpoint(packed, EngineConfig(max_model_len=128))
    together = generate(engine, PROMPTS, NUM_TOKENS)
    assert [generate(engine, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS] == together


def test_a_decode_step_of_mixtral_is_one_recorded_program(
    tmp_path: Path, generate: Generate
) -> None:
    make_mixtral().bfloat16().save_pretrained(tmp_path)
    engine = Engine.from_checkpoint(tmp_path, EXACT)
    generate(engine, PROMPTS, NUM_TOKENS)
    runner = engine._runner
    assert isinstance(runner, ModelRunner)
    assert runner._records_programs and list(runner._programs) == [(len(PROMPTS), "largest")]


def test_what_a_token_reads_is_counted_by_the_experts_it_goes_to(tmp_path: Path) -> None:
    make_mixtral().bfloat16().save_pretrained(tmp_path)
    runner = ModelRunner(Checkpoint(tmp_path), EXACT)
    attention, expert, router, head = 64 * (128 + 64), 3 * 64 * 96, 64 * 16, 128 * 64
    assert runner.weight_bytes == 2 * (3 * (attention + 2 * expert + router) + head)


def test_a_config_without_the_number_of_experts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="num_local_experts"):
        read_mixtral_experts({"num_experts_per_tok": 2})
