"""Runs in the environment of other tools: they load what we wrote, and write what we will load.

    python conformance_peers.py JOBS TOKENS

JOBS is a JSON list: a job names the tool (peer), a checkpoint folder and a file for the result; by
a kind the tool makes the checkpoint first, from the float model in source. What a tool raises is
written beside the result. Nothing of qserve is imported here.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

GROUP_SIZE = 64
FIRST_BLOCK = "model.layers.0."
GPTQ_KINDS: dict[str, dict[str, Any]] = {
    "gptq, 4 bits": {"bits": 4, "desc_act": False},
    "gptq, 8 bits": {"bits": 8, "desc_act": False},
    "gptq, 3 bits": {"bits": 3, "desc_act": False},
    "gptq, 2 bits": {"bits": 2, "desc_act": False},
    "gptq, activation order": {"bits": 4, "desc_act": True},
    "gptq, asymmetric": {"bits": 4, "desc_act": False, "sym": False},
}
"""Checkpoint -> how AutoGPTQ and GPTQModel make it."""
LLM_COMPRESSOR_PRESETS = {
    "awq": "W4A16_ASYM",
    "gptq": "W4A16",
    "int8": "W8A8",
    "float8": "FP8_DYNAMIC",
}
"""Checkpoint -> the preset by which llm-compressor makes it."""


def load_float(folder: str, **options: Any) -> Any:
    """A model by transformers, in float32 on the CPU."""
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32, **options)


def load_with_gptqmodel(folder: str) -> Any:
    """The model as transformers loads AWQ and GPTQ: with GPTQModel's layers in plain PyTorch."""
    block = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    if block["quant_method"] == "awq":
        backend = import_module("transformers.utils.quantization_config").AwqBackend.TORCH_AWQ
        return load_float(folder, quantization_config=transformers.AwqConfig(backend=backend))
    config = transformers.GPTQConfig(bits=block["bits"], backend="torch")
    return load_float(folder, quantization_config=config)


def load_with_autoawq(folder: str) -> Any:
    """The model as AutoAWQ loads it, kept from asking for Intel's extension or a GPU."""
    base: Any = import_module("awq.models.base")
    base.get_best_device = lambda: "none"
    gemm: Any = import_module("awq.modules.linear.gemm")
    gemm.TRITON_AVAILABLE = False
    loaded = import_module("awq").AutoAWQForCausalLM.from_quantized(
        folder, device_map={"": "cpu"}, fuse_layers=False
    )
    return _keep_scales_in_half(loaded.model)


def load_with_compressed_tensors(folder: str) -> Any:
    """The model with its weights dequantized; layers whose activations are rounded round them."""
    block = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    rounds = any(group["input_activations"] for group in block["config_groups"].values())
    config = transformers.CompressedTensorsConfig(dequantize=not rounds)
    model = load_float(folder, quantization_config=config)
    if rounds:
        model(torch.zeros(1, 1, dtype=torch.long))  # dequantizes what dequantize=True would have
    return model


def load_with_auto_gptq(folder: str) -> Any:
    """The model as AutoGPTQ loads it, with its layers in plain PyTorch, multiplying in float32."""
    loader: Any = import_module("auto_gptq").AutoGPTQForCausalLM
    loaded = loader.from_quantized(
        folder,
        device="cpu",
        disable_exllama=True,
        disable_exllamav2=True,
        torch_dtype=torch.float32,
    )
    return loaded.model.float()


def _keep_scales_in_half(model: Any) -> Any:
    model = model.float()
    for module in model.modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.half()  # AutoAWQ's layer multiplies in float16
    return model


def make_with_auto_gptq(kind: str, folder: str, out: str, token_ids: torch.Tensor) -> Any:
    """GPTQ by AutoGPTQ, kept from moving every block to a GPU and waiting for it."""
    cuda: Any = torch.cuda
    cuda.synchronize = lambda *_: None
    quantizer: Any = import_module("auto_gptq.modeling._base")
    quantizer.CUDA_0 = quantizer.CPU
    package: Any = import_module("auto_gptq")
    config = package.BaseQuantizeConfig(group_size=GROUP_SIZE, **GPTQ_KINDS[kind])
    wrapper: Any = import_module("auto_gptq.modeling.llama").LlamaGPTQForCausalLM
    float_model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model = wrapper(float_model, quantized=False, quantize_config=config)
    model.quantize(_as_examples(token_ids), use_triton=False, cache_examples_on_gpu=False)
    model.save_quantized(out, use_safetensors=True)
    return load_with_auto_gptq(out)


def make_with_gptqmodel(kind: str, folder: str, out: str, token_ids: torch.Tensor) -> Any:
    """GPTQ by GPTQModel."""
    package: Any = import_module("gptqmodel")
    config = package.QuantizeConfig(group_size=GROUP_SIZE, **GPTQ_KINDS[kind])
    model = package.GPTQModel.load(folder, config, device="cpu", dtype=torch.float32)
    model.quantize(_as_examples(token_ids), batch_size=1)
    model.save(out)
    return load_with_gptqmodel(out)


def _as_examples(token_ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in token_ids
    ]


def make_with_bitsandbytes(kind: str, folder: str, out: str, token_ids: torch.Tensor) -> Any:
    """nf4, fp4 (double quantization) or int8, as transformers quantizes while it loads."""
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    model = load_float(folder, quantization_config=transformers.BitsAndBytesConfig(**options))
    model.save_pretrained(out)
    return model


def make_with_autoawq(kind: str, folder: str, out: str, token_ids: torch.Tensor) -> Any:
    """AWQ's layers as AutoAWQ packs them, their range from the least to the greatest weight."""
    linear: Any = import_module(f"awq.modules.linear.{kind}")
    packer = {"gemm": "WQLinear_GEMM", "gemv": "WQLinear_GEMV"}[kind]
    linear.TRITON_AVAILABLE = False
    model = load_float(folder).half()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            groups = module.weight.float().unflatten(1, (-1, GROUP_SIZE))
            low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            scales = ((high - low) / 15).half().float()
            zeros = (-low / scales).round().clamp(0, 15)
            units = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
            module.weight.data = ((units - zeros[..., None]) * scales[..., None]).flatten(1).half()
            pack = getattr(linear, packer).from_linear
            arguments = (scales.T.contiguous(), zeros.T.contiguous())
            if kind == "gemv":
                arguments = (scales, zeros)
            packed = pack(module, 4, GROUP_SIZE, False, *arguments)
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.register_module(f"{name.rpartition('.')[2]}_packed", packed)
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, _, end = name.rpartition(".")
        if f"{module}_packed.qweight" not in model.state_dict():
            tensors[name.replace("_packed.", ".")] = tensor.contiguous()
    Path(out).mkdir()
    save_file(tensors, Path(out) / "model.safetensors")
    block = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "version": kind}
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(out) / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return model.float()


def make_with_compressed_tensors(kind: str, folder: str, out: str, token_ids: torch.Tensor) -> Any:
    """int4 in words, int8 or float8 beside token-wise activations; ranges by its own helper."""
    quantization: Any = import_module("compressed_tensors.quantization")
    helpers: Any = import_module("compressed_tensors.quantization.utils")
    compressor: Any = import_module("compressed_tensors.compressors").ModelCompressor
    presets = {"int4": "W4A16", "int8": "W8A8", "float8": "FP8_DYNAMIC"}
    scheme = quantization.preset_name_to_scheme(presets[kind], ["Linear"])
    if kind == "int4":
        scheme.weights.group_size = GROUP_SIZE
    model = load_float(folder)
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is not None:
            weight = module.weight.data
            groups = weight.unflatten(1, (-1, GROUP_SIZE)) if kind == "int4" else weight[:, None]
            scale, zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
            if getattr(module, "weight_zero_point", None) is not None:
                module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    packer = compressor.from_pretrained_model(model, quantization_format=None)
    packer.compress_model(model)
    model.save_pretrained(out)
    packer.update_config(out)
    return load_with_compressed_tensors(out)


def make_with_llm_compressor(kind: str, folder: str, out: str, token_ids: torch.Tensor) -> Any:
    """AWQ, or its GPTQ for integers, or rounding to float8, as llm-compressor's presets say."""
    modifiers: Any = import_module("llmcompressor.modifiers.quantization")
    preset = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": LLM_COMPRESSOR_PRESETS[kind]}
    if kind == "awq":
        # Its AWQ pins memory, which a machine without an accelerator cannot.
        tensors: Any = torch.Tensor
        tensors.pin_memory = lambda tensor, *_, **__: tensor
        scales: Any = import_module("llmcompressor.modifiers.transform.awq").AWQModifier()
        recipe = [scales, modifiers.QuantizationModifier(**preset)]
    elif kind == "float8":
        recipe = [modifiers.QuantizationModifier(**preset)]
    else:
        recipe = [modifiers.GPTQModifier(**preset)]
    model = load_float(folder)
    rows = {"input_ids": token_ids.tolist(), "attention_mask": [[1] * len(i) for i in token_ids]}
    import_module("llmcompressor").oneshot(
        model=model,
        dataset=import_module("datasets").Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=token_ids.shape[1],
        num_calibration_samples=len(token_ids),
    )
    model.save_pretrained(out, save_compressed=True)
    return load_with_compressed_tensors(out)


def first_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the first block by each tool's own dequantization, in float32."""
    weights = {}
    for name, module in model.named_modules():
        if name.startswith(FIRST_BLOCK) and (found := _unpack(module)) is not None:
            weights[f"{name.removesuffix('_packed')}.weight"] = found.detach().float().contiguous()
    return weights


def _unpack(module: Any) -> torch.Tensor | None:
    kind = type(module).__name__
    if kind == "WQLinear_GEMM":
        unpack = import_module("awq.utils.packing_utils").dequantize_gemm
        found = unpack(module.qweight, module.qzeros, module.scales.float(), 4, module.group_size).T
    elif hasattr(module, "autogptq_cuda_available"):
        found = module(torch.eye(module.infeatures)).T
    elif hasattr(module, "dequantize_weight"):  # GPTQModel's layers
        found = module.dequantize_weight().T
    elif kind == "Linear4bit":
        state = module.weight.quant_state
        found = import_module("bitsandbytes.functional").dequantize_4bit(module.weight, state)
    elif kind == "Linear8bitLt":
        found = module.weight.CB.float() * module.weight.SCB[:, None] / 127
    elif kind in ("Linear", "CompressedLinear") and "norm" not in kind:
        found = module.weight
    else:
        return None
    result: torch.Tensor = found
    return result


LOADERS: dict[str, Callable[[str], Any]] = {
    "gptqmodel": load_with_gptqmodel,
    "autoawq": load_with_autoawq,
    "auto-gptq": load_with_auto_gptq,
    "compressed-tensors": load_with_compressed_tensors,
    "bitsandbytes": load_float,
}
MAKERS: dict[str, Callable[[str, str, str, torch.Tensor], Any]] = {
    "autoawq": make_with_autoawq,
    "gptqmodel": make_with_gptqmodel,
    "auto-gptq": make_with_auto_gptq,
    "compressed-tensors": make_with_compressed_tensors,
    "llm-compressor": make_with_llm_compressor,
    "bitsandbytes": make_with_bitsandbytes,
}


def compute(job: dict[str, str], token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """``logits`` float32 ``[S, T, vocab]`` and the first block's weights, as one tool has them.

    vLLM: ``log_probabilities`` alone.
    """
    if job["peer"] == "vllm":
        found: torch.Tensor = import_module("conformance_vllm").compute(job["folder"], token_ids)
        return {"log_probabilities": found}
    if job["kind"]:
        model = MAKERS[job["peer"]](job["kind"], job["source"], job["folder"], token_ids)
    else:
        model = LOADERS[job["peer"]](job["folder"])
    tensors = {name: tensor.clone() for name, tensor in first_weights(model).items()}
    with torch.inference_mode():  # afterwards, since bitsandbytes repacks what it runs
        parts = [model.eval()(ids[None], use_cache=False).logits for ids in token_ids]
    return tensors | {"logits": torch.cat(parts).float().contiguous()}


def main(jobs: str, tokens: str) -> None:
    """For each job write what the tool computed, or in a file beside it what it raised."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    token_ids = load_file(Path(tokens))["token_ids"]
    for job in json.loads(Path(jobs).read_text()):
        result = Path(job["result"])
        try:
            save_file(compute(job, token_ids), result)
        except Exception as error:  # whatever a tool raises is its answer
            traceback.print_exc()
            result.with_suffix(".cause").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
