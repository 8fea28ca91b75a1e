"""Quantized mixtures of experts: what the server and transformers make of them is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from qserve.kernels.activations import Activations
from qserve.quant.checking import check_checkpoint
from qserve.quant.conversion import Conversion
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.windows import python_topics
from qserve.serve.block_manager import BlockManager
from qserve.serve.config import EngineConfig, HeadDtype
from qserve.serve.messages import SamplingParams
from qserve.serve.model_runner import ModelRunner
from qserve.serve.scheduler import Scheduler
from qserve.serve.sequence import Sequence

PROMPT = tuple(range(40, 80))
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_class": MixtralForCausalLM, "num_local_experts": 4},
    "qwen2": {
        "model_class": Qwen2MoeForCausalLM,
        "shared_expert_intermediate_size": 64,
        **EXPERTS,
    },
    "qwen3": {"model_class": Qwen3MoeForCausalLM, "norm_topk_prob": True, **EXPERTS},
}
CASES = [
    ("mixtral", Method.AWQ),
    ("mixtral", Method.NF4),
    ("qwen2", Method.GPTQ),
    ("qwen2", Method.INT8),
    ("qwen3", Method.INT4),
    ("qwen3", Method.FLOAT8_WEIGHT),
]


def served_logits(checkpoint: Checkpoint) -> np.ndarray:
    """The next token's after ``PROMPT``, by our engine without rounded activations."""
    exact = EngineConfig(
        max_model_len=128, activations=Activations.FLOAT32, head_dtype=HeadDtype.FLOAT
    )
    runner = ModelRunner(checkpoint, exact)
    blocks = BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    scheduler = Scheduler(runner.limits, blocks)
    scheduler.add(Sequence("0", PROMPT, SamplingParams(max_tokens=1)))
    return np.asarray(runner.run(scheduler.schedule())[0])


@pytest.mark.parametrize(("family", "method"), CASES, ids=lambda value: str(value))
def test_a_quantized_mixture_is_served_as_transformers_computes_it(
    family: str, method: Method, make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = Checkpoint(make_tiny_llama(num_hidden_layers=1, **FAMILIES[family]))
    text, packed, dense = tmp_path / "text", tmp_path / "packed", tmp_path / "dense"
    text.write_text(python_topics()[:8_000], encoding="utf-8")
    for folder in (packed, dense):
        folder.mkdir()
    options = QuantizeOptions(method=method, calibration=text, num_samples=4, seq_len=48)
    quantize(source, packed, options, lambda _: None)
    checkpoint = Checkpoint(packed)
    assert check_checkpoint(packed)[1] == []

    conversion = Conversion(checkpoint, "fp16", "test:0")
    conversion.write(dense, conversion.measure(lambda _: None), lambda _: None)
    assert set(Checkpoint(dense)) == set(source)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].numpy()
    found = served_logits(checkpoint)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3 * np.abs(expected).max())
    assert found.argmax() == expected.argmax()
