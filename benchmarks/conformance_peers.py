"""Runs in the environment of the other engines: their logits for a checkpoint of ours.

    python conformance_peers.py gptqmodel|autoawq CHECKPOINT TOKENS RESULT

TOKENS and RESULT are safetensors files; of qserve nothing is imported here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig
from transformers.utils.quantization_config import AwqBackend

FIRST_BLOCK = "model.layers.0."


def load_with_gptqmodel(folder: str) -> Any:
    """The model as transformers loads AWQ: with GPTQModel's layers, here those in plain PyTorch."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        device_map={"": "cpu"},
        dtype=torch.float32,
        quantization_config=AwqConfig(backend=AwqBackend.TORCH_AWQ),  # others compile C++
    )


def load_with_autoawq(folder: str) -> Any:
    """The model as AutoAWQ loads it, kept from asking for Intel's extension or a GPU."""
    base: Any = import_module("awq.models.base")
    gemm: Any = import_module("awq.modules.linear.gemm")
    base.get_best_device = lambda: "none"
    gemm.TRITON_AVAILABLE = False
    loaded = import_module("awq").AutoAWQForCausalLM.from_quantized(
        folder, device_map={"": "cpu"}, fuse_layers=False
    )
    model = loaded.model.float()
    for module in model.modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.half()  # the layer multiplies in float16
    return model


PEERS: dict[str, Callable[[str], Any]] = {
    "gptqmodel": load_with_gptqmodel,
    "autoawq": load_with_autoawq,
}


def unpack_first_block(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the first block in float32, unpacked by AutoAWQ's own function."""
    unpack = import_module("awq.utils.packing_utils").dequantize_gemm
    weights = {}
    for name, module in model.named_modules():
        if name.startswith(FIRST_BLOCK) and hasattr(module, "qweight"):
            scales = module.scales.float()
            unpacked = unpack(module.qweight, module.qzeros, scales, 4, module.group_size)
            weights[f"{name}.weight"] = unpacked.T.contiguous()
    return weights


def main(peer: str, checkpoint: str, tokens: str, result: str) -> None:
    """Write ``logits`` float32 ``[S, T, vocab]`` and, from AutoAWQ, the first block's weights."""
    warnings.simplefilter("ignore")
    token_ids = load_file(Path(tokens))["token_ids"]
    model = PEERS[peer](checkpoint).eval()
    with torch.inference_mode():
        logits = torch.cat([model(window[None], use_cache=False).logits for window in token_ids])
    found = {"logits": logits.float()}
    if peer == "autoawq":
        found |= unpack_first_block(model)
    save_file(found, Path(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
