"""All methods on models with outlier channels, of three other families than the demo model's: the
order of their quality is the one that the documentation claims."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM, Qwen2ForCausalLM, Qwen2MoeForCausalLM

from qserve.quant.evaluate import evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import Effort, Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.progress import ignore_progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MakeLlama = Callable[..., Path]
SEQ_LEN, NUM_WINDOWS, NUM_SAMPLES = 128, 24, 24
OUTLIERS = 4
"""Channels of each norm that are 20 times as large as the others."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_class": Qwen2ForCausalLM, "rms_norm_eps": 1e-6},
    "gemma2": {"model_class": Gemma2ForCausalLM, "query_pre_attn_scalar": 32},
    "experts": {
        "model_class": Qwen2MoeForCausalLM,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
}
NORMS = {
    "qwen2": ("input_layernorm.weight",),
    "gemma2": ("input_layernorm.weight", "feedforward_layernorm.weight"),
    "experts": ("input_layernorm.weight", "post_attention_layernorm.weight"),
}
FOUR_BITS = (Method.AWQ, Method.GPTQ, Method.INT4, Method.NF4, Method.FP4, Method.HQQ, Method.RTN)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, make_tiny_llama: MakeLlama) -> Path:
    """A random model whose norms have outlier channels, and whose biases are not zero."""
    made = make_tiny_llama(
        hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3,
        initializer_range=0.08, tie_word_embeddings=True, **FAMILIES[request.param],
    )  # fmt: skip
    state = load_file(made / "model.safetensors")
    draw = torch.Generator().manual_seed(5)
    offset = float(request.param == "gemma2")
    for name, tensor in state.items():
        if name.endswith("bias"):
            state[name] = 0.5 * torch.randn(tensor.shape, generator=draw).bfloat16()
        elif name.endswith(NORMS[request.param]):
            factor = (0.5 * torch.randn(tensor.shape, generator=draw)).exp() / 2
            factor[torch.randperm(len(factor), generator=draw)[:OUTLIERS]] *= 20
            state[name] = (factor - offset).bfloat16()
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    return made


def divergence(source: Checkpoint, out: Path, text: Path, **options: Any) -> float:
    """KL from the float model after quantizing it into groups of 64."""
    out.mkdir()
    chosen = QuantizeOptions(calibration=text, num_samples=NUM_SAMPLES, seq_len=SEQ_LEN, **options)
    quantize(source, out, chosen, ignore_progress)
    judged = text.read_text()[::-1]  # other tokens than calibration saw
    found = evaluate(Checkpoint(out), source, judged, NUM_WINDOWS, SEQ_LEN, ignore_progress)
    assert found.kl is not None
    return found.kl


def test_every_method_runs_and_keeps_its_place(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    source = Checkpoint(folder)
    found = {
        method: divergence(source, tmp_path / method.value, text_file, method=method)
        for method in Method
    }
    four_bits = sorted(FOUR_BITS, key=lambda method: found[method])
    assert set(four_bits[:2]) <= {Method.AWQ, Method.GPTQ, Method.INT4, Method.NF4}
    assert max(found[Method.AWQ], found[Method.GPTQ]) < 0.7 * found[Method.RTN]
    assert found[Method.AWQ] < 0.7 * found[Method.HQQ]
    eight_bits = (Method.INT8, Method.LLM_INT8, Method.SMOOTHQUANT)
    assert max(found[method] for method in eight_bits) < 0.2 * found[four_bits[0]]
    assert min(found, key=found.__getitem__) is Method.INT8


def test_more_effort_loses_less(folder: Path, text_file: Path, tmp_path: Path) -> None:
    source = Checkpoint(folder)
    found = {
        (method, effort): divergence(
            source, tmp_path / f"{method.value}-{effort.value}", text_file,
            method=method, effort=effort, group_size=64,
        )
        for method in (Method.AWQ, Method.GPTQ)
        for effort in Effort
    }  # fmt: skip
    for method in (Method.AWQ, Method.GPTQ):
        assert found[method, Effort.FULL] < 0.9 * found[method, Effort.PLAIN]
        assert found[method, Effort.FULL] < 0.9 * found[method, Effort.FAST]
