"""Quantize a model with another tool, from the calibration tokens that qserve would take.

    python benchmarks/quality_peers.py TOOL MODEL OUT --text FILE

Runs in an environment that has the tool (``make conformance`` builds them) and imports nothing of
qserve. Prints one line of JSON: seconds of the quantizing call, CPU seconds, peak memory. Judge the
result with ``benchmarks/quality.py --judge NAME=OUT``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

Windows = list[list[int]]
Save = Callable[[], None]


def read_windows(model: str, text: Path, num_windows: int, length: int) -> Windows:
    """Windows evenly spread over the text, tokenized once without special tokens."""
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    starts = [i * (len(ids) - length) // max(num_windows - 1, 1) for i in range(num_windows)]
    return [ids[start : start + length] for start in starts]


def quantize_with_autoawq(args: argparse.Namespace, windows: Windows) -> tuple[Save, Save]:
    """AutoAWQ, its search kept from forgetting the weights that it wants to put back."""
    torch = import_module("torch")
    auto = import_module("awq").AutoAWQForCausalLM
    options = {"device_map": "cpu", "torch_dtype": torch.float32, "use_cache": False}
    model = auto.from_pretrained(args.model, **options)
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(args.model)
    config = {"zero_point": True, "q_group_size": args.group_size, "w_bit": 4, "version": "GEMM"}

    def quantize() -> None:
        """The timed part."""
        with _copying_to_cpu(torch):
            model.quantize(
                tokenizer,
                quant_config=config,
                calib_data=windows,
                max_calib_samples=len(windows),
                max_calib_seq_len=len(windows[0]),
            )

    def save() -> None:
        model.save_quantized(args.out)
        tokenizer.save_pretrained(args.out)

    return quantize, save


@contextmanager
def _copying_to_cpu(torch: Any) -> Any:
    """AutoAWQ 0.2.9 keeps weights as ``w.cpu()``: on a CPU no copy, and its search ruins them."""
    search_class = import_module("awq.quantize.quantizer").AwqQuantizer
    search, cpu = search_class._compute_best_scale, torch.Tensor.cpu

    def search_on_copies(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.Tensor.cpu = lambda tensor, *_, **__: tensor.detach().clone()
        try:
            return search(self, *args, **kwargs)
        finally:
            torch.Tensor.cpu = cpu

    search_class._compute_best_scale = search_on_copies
    try:
        yield
    finally:
        search_class._compute_best_scale = search


def quantize_with_gptqmodel(args: argparse.Namespace, windows: Windows) -> tuple[Save, Save]:
    """GPTQModel, symmetric codes, its usual settings."""
    torch = import_module("torch")
    gptqmodel = import_module("gptqmodel")
    config = gptqmodel.QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=True)
    model = gptqmodel.GPTQModel.load(args.model, config, device="cpu", dtype=torch.float32)
    rows = [
        {"input_ids": torch.tensor([window]), "attention_mask": torch.ones(1, len(window)).long()}
        for window in windows
    ]
    return lambda: model.quantize(rows, batch_size=1), lambda: model.save(args.out)


def quantize_with_bitsandbytes(args: argparse.Namespace, _: Windows) -> tuple[Save, Save]:
    """bitsandbytes' nf4 with double quantization, which reads no text."""
    torch, transformers = import_module("torch"), import_module("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded: list[Any] = []

    def quantize() -> None:
        loader = transformers.AutoModelForCausalLM.from_pretrained
        options = {"device_map": {"": "cpu"}, "dtype": torch.float32}
        loaded.append(loader(args.model, quantization_config=config, **options))

    return quantize, lambda: loaded[0].save_pretrained(args.out)


def quantize_with_llm_compressor(args: argparse.Namespace, windows: Windows) -> tuple[Save, Save]:
    """llm-compressor into compressed-tensors: AWQ with zero points, or symmetric GPTQ."""
    torch, transformers = import_module("torch"), import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    columns = {"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]}
    dataset = import_module("datasets").Dataset.from_dict(columns)
    recipe = _recipe_of_llm_compressor(args)

    def quantize() -> None:
        """The timed part."""
        import_module("llmcompressor").oneshot(
            model=model,
            processor=tokenizer,
            dataset=dataset,
            recipe=recipe,
            max_seq_length=len(windows[0]),
            num_calibration_samples=len(windows),
        )

    def save() -> None:
        model.save_pretrained(args.out, save_compressed=True)
        tokenizer.save_pretrained(args.out)

    return quantize, save


def _recipe_of_llm_compressor(args: argparse.Namespace) -> list[Any]:
    is_awq = args.tool.endswith("awq")
    weights = {
        "num_bits": args.bits,
        "type": "int",
        "symmetric": not is_awq,
        "strategy": "group",
        "group_size": args.group_size,
        "dynamic": False,
    }
    quantization = import_module("llmcompressor.modifiers.quantization")
    if not is_awq:
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return [quantization.GPTQModifier(ignore=["lm_head"], config_groups=groups)]
    # AWQ of 0.14 pins memory, which a machine without an accelerator cannot.
    import_module("torch").Tensor.pin_memory = lambda tensor, *_, **__: tensor
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"observer": "mse"}}}
    scales = import_module("llmcompressor.modifiers.transform.awq").AWQModifier(duo_scaling="both")
    return [scales, quantization.QuantizationModifier(ignore=["lm_head"], config_groups=groups)]


TOOLS = {
    "autoawq": quantize_with_autoawq,
    "gptqmodel": quantize_with_gptqmodel,
    "llm-compressor-awq": quantize_with_llm_compressor,
    "llm-compressor-gptq": quantize_with_llm_compressor,
    "bitsandbytes": quantize_with_bitsandbytes,
}


def main() -> None:
    """Parse the command line, quantize, save, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    # On two cores GPTQModel refuses to be imported unless it is told how many workers to use, and
    # with fewer than two it refuses to load a model. How many threads a product takes is torch's.
    workers = str(max(args.threads, 2))
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", GPTQMODEL_CPU_WORKERS=workers)
    import_module("torch").set_num_threads(args.threads)
    windows = read_windows(args.model, args.text, args.samples, args.seq_len)
    quantize, save = TOOLS[args.tool](args, windows)
    started, used = time.perf_counter(), time.process_time()
    quantize()
    row = {
        "tool": args.tool,
        "bits": args.bits,
        "group_size": args.group_size,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time() - used, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    save()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
