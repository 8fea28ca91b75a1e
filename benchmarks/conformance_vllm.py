"""What vLLM computes from a checkpoint on the CPU; runs in its environment."""

from __future__ import annotations

import gc
import os
from importlib import import_module
from typing import Any

import torch

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its errors are raised here, not in another process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def compute(folder: str, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 ``[S, T, vocab]``: of every token after each of a window."""
    os.environ.update(ENVIRONMENT)
    vllm: Any = import_module("vllm")
    length = token_ids.shape[1]
    engine = vllm.LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float16",  # of AWQ's and GPTQ's layers it has no float32
        enforce_eager=True,
        max_model_len=2 * length,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    try:
        wanted = vllm.SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in token_ids]
        return torch.stack([_stack(out) for out in engine.generate(prompts, wanted)])
    finally:
        del engine
        gc.collect()
        import_module("vllm.distributed").cleanup_dist_env_and_memory()


def _stack(output: Any) -> torch.Tensor:
    """``[T, vocab]``: the first token of a prompt is not predicted, the one after it is."""
    tables = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    return torch.tensor([[table[token].logprob for token in range(len(table))] for table in tables])
