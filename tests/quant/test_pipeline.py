"""Quantizing a checkpoint: what is in the folder afterwards, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.calibrated import CalibratedQuantizer
from qserve.quant.calibration import gather_calibration
from qserve.quant.decoder import Decoder
from qserve.quant.errors import CheckpointError, OptionError
from qserve.quant.evaluate import evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.methods import profile_of
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.plan import make_plan
from qserve.quant.progress import Phase, Progress, ignore_progress
from qserve.quant.report import FILE_NAME, QuantizationReport
from qserve.quant.storage import as_stored, to_storage

MakeLlama = Callable[..., Path]


def quantized(
    source: Path, out: Path, options: QuantizeOptions, **changes: Any
) -> QuantizationReport:
    """Quantize a folder into a new one."""
    out.mkdir()
    return quantize(Checkpoint(source), out, replace(options, **changes), ignore_progress)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    out: Path
    report: QuantizationReport
    progress: list[Progress]


@pytest.fixture(scope="module")
def result(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    """The tiny model after AWQ."""
    out = tmp_path_factory.mktemp("awq")
    seen: list[Progress] = []
    return Result(out, quantize(Checkpoint(tiny_llama), out, tiny_options, seen.append), seen)


def changed_tensors(
    source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """A copy of a checkpoint whose tensors went through ``change``."""
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_folder_holds_an_awq_checkpoint(tiny_llama: Path, result: Result) -> None:
    out = result.out
    config = json.loads((out / "config.json").read_text())
    source_config = json.loads((tiny_llama / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert config == source_config | {"dtype": "float16"}
    state = load_file(out / "model.safetensors")
    assert state["model.layers.1.mlp.down_proj.qweight"].shape == (128, 64 // 8)
    assert state["model.layers.1.mlp.down_proj.scales"].shape == (128 // 32, 64)
    linears = {n.removesuffix(".qweight") for n in state if n.endswith(".qweight")}
    assert len(linears) == 2 * 7
    assert not {f"{name}.weight" for name in linears} & set(state)
    floats = {n: t for n, t in state.items() if t.is_floating_point()}
    assert {tensor.dtype for tensor in floats.values()} == {torch.float16}
    source = load_file(tiny_llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(state[name], source[name].half()), name


def test_tokenizer_and_generation_files_are_copied_unchanged(
    tiny_llama: Path, result: Result
) -> None:
    out = result.out
    copied = {path.name for path in tiny_llama.iterdir()} - {"config.json", "model.safetensors"}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= copied
    for name in copied:
        assert (out / name).read_bytes() == (tiny_llama / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == copied | {
        "config.json",
        "model.safetensors",
        FILE_NAME,
    }


def test_packed_weights_are_those_the_model_was_calibrated_with_bit_for_bit(
    decoder: Decoder, tiny_options: QuantizeOptions, result: Result
) -> None:
    written = Decoder(Checkpoint(result.out))
    token_ids = gather_calibration(decoder, tiny_options).windows.token_ids
    hidden = as_stored(decoder.embed(token_ids))
    stored_hidden = written.embed(token_ids)
    plan, profile = make_plan(decoder, tiny_options), profile_of(tiny_options)
    quantizer = CalibratedQuantizer(hidden, plan, profile, exact=hidden.clone())
    for index in range(decoder.num_blocks):
        block = decoder.block(index, tiny_options.seq_len)
        quantizer.quantize_block(block)
        read = written.block(index, tiny_options.seq_len)
        for name, parameter in block.layer.named_parameters():
            assert torch.equal(read.layer.get_parameter(name), parameter), name
        read.run_(stored_hidden)
        torch.testing.assert_close(stored_hidden, hidden, rtol=1e-4, atol=1e-4)


def test_the_result_is_nearer_to_the_float_model_than_rounding_to_nearest(
    tiny_llama: Path,
    tiny_options: QuantizeOptions,
    result: Result,
    tmp_path: Path,
    text_file: Path,
) -> None:
    quantized(tiny_llama, tmp_path / "rtn", tiny_options, method=Method.RTN)
    base, text = Checkpoint(tiny_llama), text_file.read_text()[5000:]
    awq, rtn = (
        evaluate(Checkpoint(folder), base, text, 8, 64, ignore_progress)
        for folder in (result.out, tmp_path / "rtn")
    )
    assert awq.kl is not None and rtn.kl is not None
    assert 0 < awq.kl < 0.9 * rtn.kl


def test_the_same_run_writes_the_same_bytes(
    tiny_llama: Path, tiny_options: QuantizeOptions, result: Result, tmp_path: Path
) -> None:
    quantized(tiny_llama, tmp_path / "again", tiny_options)
    for name in ("model.safetensors", "config.json"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (result.out / name).read_bytes(), name


def test_a_tied_head_stays_tied(
    make_tiny_llama: MakeLlama, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    folder = make_tiny_llama(tie_word_embeddings=True)

    def untie(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    source = changed_tensors(folder, tmp_path / "source", untie)  # some exports write it anyway
    quantized(source, tmp_path / "out", tiny_options, method=Method.RTN)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_layers_left_in_16_bits_are_named_to_readers_and_in_the_report(
    make_tiny_llama: MakeLlama, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    source = make_tiny_llama(num_key_value_heads=1, num_hidden_layers=1)  # k and v: 16 outputs
    report = quantized(source, tmp_path / "out", tiny_options, ignore=("o_proj",))
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
    assert [layer.name for layer in report.skipped] == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == names
    state = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    for name in names:
        stored = state[f"{name}.weight"]
        assert torch.equal(stored, original[f"{name}.weight"].half())
    assert len(report.layers) == 3


def test_the_report_says_what_was_done(result: Result, text_file: Path) -> None:
    out, report = result.out, result.report
    assert json.loads((out / FILE_NAME).read_text()) == json.loads(json.dumps(report.to_dict()))
    assert (report.method, report.bits, report.group_size) == ("awq", 4, 32)
    assert report.architecture == "LlamaForCausalLM"
    assert report.calibration is not None
    assert report.calibration.source == text_file.name
    assert (report.calibration.num_windows, report.calibration.num_windows_asked) == (12, 12)
    assert len(report.layers) == 14 and len(report.block_errors) == 2
    for layer in report.layers:
        assert (layer.bits, layer.group_size) == (4, 32)
        assert 0 < layer.error < layer.rounded_error < 0.1, layer.name
        assert layer.scale is not None and layer.scale.smallest <= layer.scale.largest
    # Groups of 32: 4 bits, 16 bits of scale and 4 of zero point in 32 weights.
    assert report.sizes.bits_per_weight == 4 + 20 / 32
    tensors = load_file(out / "model.safetensors").values()
    assert report.sizes.quantized_bytes == sum(tensor.nbytes for tensor in tensors)
    assert report.peak_memory_bytes > 50_000_000
    assert report.seconds > 0
    assert {"qserve-llm", "torch", "transformers"} <= set(report.versions)


def test_rounding_to_nearest_reads_no_text(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    report = quantized(
        tiny_llama,
        tmp_path / "out",
        tiny_options,
        method=Method.RTN,
        calibration=tmp_path / "does-not-exist.txt",
    )
    assert report.calibration is None
    assert report.block_errors == ()
    state = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(tiny_llama / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(state[norm], source[norm].half())
    weight = Checkpoint(tmp_path / "out").linear("model.layers.0.mlp.up_proj")
    assert isinstance(weight, GroupedWeight)
    original = source["model.layers.0.mlp.up_proj.weight"].float()
    steps = weight.scales.float().repeat_interleave(32, 1)
    # Half a step, and what the zero point and the float16 scale move the ends of the range.
    assert bool(((weight.dequantize() - original).abs() <= 1.02 * steps).all())
    assert float(((weight.dequantize() - original).abs() / steps).mean()) < 0.3


def test_a_short_text_is_said_in_the_report(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path, text_file: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:300])
    report = quantized(tiny_llama, tmp_path / "out", tiny_options, calibration=short)
    assert report.calibration is not None
    assert report.calibration.num_windows < report.calibration.num_windows_asked == 12
    assert "windows (12 asked for)" in str(report.calibration)


def test_large_checkpoints_are_written_in_several_files(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    out = tmp_path / "several"
    rtn = replace(tiny_options, method=Method.RTN)
    quantized(tiny_llama, tmp_path / "one", rtn)
    quantized(tiny_llama, out, rtn, max_shard_bytes=70_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    several = Checkpoint(out)
    assert set(several) == set(one) == set(index["weight_map"])
    assert all(torch.equal(several.tensor(name), one[name]) for name in one)


def test_progress_tells_the_error_of_every_block_and_the_time_left(result: Result) -> None:
    seen = result.progress
    assert [(p.phase, p.done, p.total) for p in seen] == [
        (Phase.QUANTIZE, 1, 2),
        (Phase.QUANTIZE, 2, 2),
    ]
    assert tuple(p.error for p in seen) == result.report.block_errors
    assert seen[0].seconds_left > seen[1].seconds_left == 0


def test_values_that_float16_cannot_hold_stay_in_bfloat16(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    def enlarge(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"][3] = 1e5

    source = changed_tensors(tiny_llama, tmp_path / "source", enlarge)
    report = quantized(source, tmp_path / "out", tiny_options, method=Method.RTN)
    assert report.bfloat16_tensors == ("model.norm.weight",)
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(stored, load_file(source / "model.safetensors")["model.norm.weight"])


def test_integers_are_stored_as_they_are() -> None:
    values = torch.arange(5)
    assert torch.equal(to_storage(values), values)


def test_a_quantized_checkpoint_is_not_quantized_again(
    tiny_options: QuantizeOptions, result: Result, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"already quantized \(awq\)"):
        quantized(result.out, tmp_path / "out", tiny_options)


def test_a_weight_that_is_not_finite_is_named(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"

    def damage(state: dict[str, torch.Tensor]) -> None:
        state[name][0, 0] = torch.nan

    source = changed_tensors(tiny_llama, tmp_path / "source", damage)
    for method in (Method.AWQ, Method.RTN):
        with pytest.raises(CheckpointError, match=name):
            quantized(source, tmp_path / method.value, tiny_options, method=method)


def test_a_weight_too_large_for_float16_scales_is_named(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    def enlarge(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = 2e6

    source = changed_tensors(tiny_llama, tmp_path / "source", enlarge)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        quantized(source, tmp_path / "out", tiny_options, method=Method.RTN)


def test_a_group_size_that_does_not_fit_is_refused_before_any_work(
    make_tiny_llama: MakeLlama, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    wide = make_tiny_llama(hidden_size=96, num_attention_heads=6)
    with pytest.raises(OptionError, match="use a group size of 32"):
        quantized(wide, tmp_path / "out", tiny_options, group_size=64)
    assert list((tmp_path / "out").iterdir()) == []
