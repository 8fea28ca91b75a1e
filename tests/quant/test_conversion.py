"""One checkpoint through every format: what stays to the last bit, and how far the rest moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qserve.kernels.activations import Activations
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.conversion import FLOATS, TARGETS, Conversion, ConversionReport
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.bitsandbytes import NF4
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.compressed_schemes import KvCacheScheme
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.registry import OutputFormat, make_writer
from qserve.quant.formats.writer import scheme_of

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


def nothing(done: int) -> None:
    """Progress that nobody watches."""


def integers(
    bits: int = 4,
    group_size: int = 64,
    *,
    symmetric: bool = False,
    order: bool = False,
    outer: bool = False,
) -> GroupedWeight:
    """64 outputs and 128 inputs, codes over their whole range."""
    draw = torch.Generator().manual_seed(bits)
    groups, high = (64, 128 // group_size), 1 << bits
    zero_points = torch.randint(high // 4, 3 * high // 4, groups, generator=draw).byte()
    return GroupedWeight(
        codes=torch.randint(0, high, (64, 128), generator=draw, dtype=torch.uint8),
        scales=torch.randint(1, 120, groups, generator=draw).float() / (1 if outer else 4096),
        zero_points=zero_points.fill_(high // 2) if symmetric else zero_points,
        bits=bits,
        group_size=group_size,
        input_order=torch.randperm(128, generator=draw) if order else None,
        channel_scales=torch.full((64,), 2.0**-12) if outer else None,
    )


def codebook() -> CodebookWeight:
    """The same shape in nf4."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 128), generator=draw, dtype=torch.uint8)
    return CodebookWeight(codes, NF4, torch.rand(128, generator=draw) + 0.5, 64)


def float8() -> Float8Weight:
    """The same shape in 8-bit floats, one scale a row."""
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    return Float8Weight(values.to(torch.float8_e4m3fn), torch.full((64, 1), 0.01), (1, 128))


def write(
    folder: Path,
    output: OutputFormat,
    weight: QuantizedWeight,
    activations: Activations | None = None,
) -> Checkpoint:
    """A model with two such layers, an embedding, a bias and a float layer."""
    folder.mkdir(exist_ok=True)
    kv_cache = KvCacheScheme() if activations is Activations.FLOAT8_TOKEN else None
    writer = make_writer(output, "test", activations=activations, kv_cache=kv_cache)
    tensors = {f"{n}.{key}": value for n in LAYERS for key, value in writer.encode(weight).items()}
    tensors["model.embed_tokens.weight"] = torch.randn(32, 64).half()
    tensors[f"{LAYERS[0]}.bias"] = torch.randn(64).half()
    tensors["model.router.weight"] = torch.randn(4, 64).half()
    if kv_cache is not None:
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5])
    apart = {name: value.clone() for name, value in tensors.items()}
    save_file(apart, folder / "model.safetensors")
    block = writer.config_block(dict.fromkeys(LAYERS, scheme_of(weight)), ["model.router"])
    config = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    (folder / "tokenizer.json").write_text("{}")
    return Checkpoint(folder)


def convert(checkpoint: Checkpoint, target: str, out: Path) -> tuple[Checkpoint, ConversionReport]:
    """The result and what was measured before."""
    out.mkdir()
    conversion = Conversion(checkpoint, target, "test:0")
    report = conversion.measure(nothing)
    conversion.write(out, report, nothing)
    return Checkpoint(out), report


LOSSLESS = {
    "AWQ to GPTQ v2": (OutputFormat.AWQ, integers(), "gptq-v2"),
    "AWQ to compressed-tensors": (OutputFormat.AWQ, integers(), "compressed-tensors"),
    "symmetric GPTQ to AWQ": (OutputFormat.GPTQ, integers(symmetric=True), "awq"),
    "GPTQ to compressed-tensors": (
        OutputFormat.GPTQ,
        integers(3, symmetric=True),
        "compressed-tensors",
    ),
    "GPTQ to GPTQ with activation order": (
        OutputFormat.GPTQ,
        integers(symmetric=True, order=True),
        "gptq",
    ),
    "a row to groups of 128": (OutputFormat.GPTQ, integers(4, 128, symmetric=True), "awq"),
    "8-bit floats": (OutputFormat.COMPRESSED_TENSORS, float8(), "compressed-tensors"),
    "nf4": (OutputFormat.BITSANDBYTES, codebook(), "bitsandbytes"),
    "QoQ to AWQ": (OutputFormat.QOQ, integers(outer=True), "awq"),
}


@pytest.mark.parametrize(("output", "weight", "target"), LOSSLESS.values(), ids=LOSSLESS)
def test_codes_move_over_unchanged(
    tmp_path: Path, output: OutputFormat, weight: QuantizedWeight, target: str
) -> None:
    source = write(tmp_path / "in", output, weight)
    found, report = convert(source, target, tmp_path / "out")
    assert report.is_lossless
    assert report.error == 0.0
    for name in LAYERS:
        assert torch.equal(found.linear(name).dequantize(), source.linear(name).dequantize())
    before, after = (load_file(one.folder / "model.safetensors") for one in (source, found))
    for name in ("model.embed_tokens.weight", "model.router.weight", f"{LAYERS[0]}.bias"):
        assert torch.equal(before[name], after[name])
    assert (found.folder / "tokenizer.json").is_file()
    assert (found.folder / "quantize_config.json").is_file() is target.startswith("gptq")


LOSSY = {
    "asymmetric to GPTQ v1": (OutputFormat.AWQ, integers(), "gptq", 0.12),
    "8 bits to AWQ": (OutputFormat.GPTQ, integers(8, symmetric=True), "awq", 0.08),
    "activation order to AWQ": (
        OutputFormat.GPTQ,
        integers(symmetric=True, order=True),
        "awq",
        0.12,
    ),
    "nf4 to GPTQ": (OutputFormat.BITSANDBYTES, codebook(), "gptq", 0.12),
    "4 bits to nf4": (OutputFormat.AWQ, integers(), "bitsandbytes", 0.12),
    "8 bits to LLM.int8": (OutputFormat.GPTQ, integers(8, symmetric=True), "bitsandbytes", 0.01),
    "8-bit floats to GPTQ": (OutputFormat.COMPRESSED_TENSORS, float8(), "gptq", 0.02),
}


@pytest.mark.parametrize(("output", "weight", "target", "limit"), LOSSY.values(), ids=LOSSY)
def test_what_cannot_be_held_is_rounded_again_and_measured(
    tmp_path: Path, output: OutputFormat, weight: QuantizedWeight, target: str, limit: float
) -> None:
    source = write(tmp_path / "in", output, weight)
    found, report = convert(source, target, tmp_path / "out")
    assert not report.is_lossless
    assert report.num_changed == 2
    assert 1e-4 < report.error < limit
    read = found.linear(LAYERS[0])
    assert not isinstance(read, torch.Tensor)
    dense = weight.dequantize()
    measured = (read.dequantize() - dense).norm() / dense.norm()
    assert report.layers[0].error == pytest.approx(float(measured), rel=1e-3)


@pytest.mark.parametrize("target", FLOATS)
def test_codes_become_floats(tmp_path: Path, target: str) -> None:
    source = write(tmp_path / "in", OutputFormat.AWQ, integers())
    found, report = convert(source, target, tmp_path / "out")
    assert found.method is None
    assert found.config["torch_dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[target]
    dense = source.linear(LAYERS[1]).dequantize()
    assert torch.equal(found.tensor(f"{LAYERS[1]}.weight"), dense.to(FLOATS[target]))
    assert found.dtype("model.embed_tokens.weight") == target.upper().replace("FP", "F")
    assert report.error < 3e-3


def test_activations_and_key_value_scales_stay_where_they_can_be_stated(tmp_path: Path) -> None:
    fp8 = Activations.FLOAT8_TOKEN
    source = write(tmp_path / "in", OutputFormat.COMPRESSED_TENSORS, float8(), fp8)
    found, report = convert(source, "compressed-tensors", tmp_path / "kept")
    assert not report.drops_activations
    assert found.activations is fp8
    block = found.quantization_config
    assert block is not None
    assert block["kv_cache_scheme"]["type"] == "float"
    assert block["ignore"] == ["model.router", "lm_head"]
    assert found.tensor("model.layers.0.self_attn.k_scale").item() == 0.5
    assert not report.drops_cache_scales
    for target in ("gptq", "bf16"):
        other, report = convert(source, target, tmp_path / target)
        assert report.drops_activations and report.drops_cache_scales
        assert [name for name in other if "_scale" in name] == []


def test_what_has_no_codes_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match="is a float checkpoint: `qserve quantize`"):
        Conversion(Checkpoint(tiny_llama), "awq", "test")
    found, report = convert(Checkpoint(tiny_llama), "fp16", tmp_path / "out")
    assert report.layers == ()
    assert found.dtype("lm_head.weight") == "F16"


def test_layers_that_no_group_fits_are_refused(tmp_path: Path) -> None:
    weight = integers(4, 16)
    source = write(tmp_path / "in", OutputFormat.COMPRESSED_TENSORS, weight)
    with pytest.raises(CheckpointError, match=r"groups of \[16\]: AWQ wants one size"):
        Conversion(source, "awq", "test").measure(nothing)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", OutputFormat.AWQ, integers())
    tensors = load_file(source.folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.full((32, 64), 1e6)
    save_file(tensors, source.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="values beyond float16: choose bf16"):
        convert(Checkpoint(source.folder), "fp16", tmp_path / "out")


def test_every_target_has_a_name() -> None:
    assert set(TARGETS) == {one.value for one in OutputFormat} - {"qoq"} | set(FLOATS)
