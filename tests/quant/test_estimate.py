"""What is foretold of a quantization, beside what it comes to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qserve.quant.decoder import Decoder
from qserve.quant.engine_rules import VERSIONS, judge_for
from qserve.quant.errors import CheckpointError, OptionError
from qserve.quant.estimate import Estimate, estimate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import Head, KvCache, Method, QuantizeOptions, TuneOptions
from qserve.quant.pipeline import quantize
from qserve.quant.progress import ignore_progress
from qserve.quant.tuning.costs import TuningCosts

MakeLlama = Callable[..., Path]


RUNS: dict[str, dict[str, Any]] = {
    "rtn": {"method": Method.RTN},
    "gptq": {"method": Method.GPTQ},
    "int8": {"method": Method.INT8},
    "nf4": {"method": Method.NF4},
    "fp8": {"method": Method.FLOAT8},
    "a head": {"method": Method.GPTQ, "head": Head.INT8},
    "scales of the cache": {"method": Method.INT4, "kv_cache": KvCache.INT8},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_size_is_exact_to_one_percent_and_the_engines_are_those_of_the_result(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path, run: dict[str, Any]
) -> None:
    options = replace(tiny_options, group_size=None, num_samples=2, **run)
    source = Checkpoint(tiny_llama)
    foretold = estimate(Decoder(source), options)
    report = quantize(source, tmp_path, options, ignore_progress)
    assert foretold.quantized_bytes == pytest.approx(report.sizes.quantized_bytes, rel=0.01)
    assert foretold.bits_per_weight == pytest.approx(report.sizes.bits_per_weight, rel=0.01)
    assert foretold.num_quantized_layers == len(report.layers)
    assert list(foretold.engines) == judge_for(Checkpoint(tmp_path), VERSIONS)
    assert foretold.memory_bytes > 0 and foretold.seconds > 0
    assert foretold.disk_bytes > 2 * report.sizes.quantized_bytes - 1000


def test_layers_that_a_group_size_does_not_divide_are_named(
    make_tiny_llama: MakeLlama, tiny_options: QuantizeOptions
) -> None:
    decoder = Decoder(Checkpoint(make_tiny_llama(intermediate_size=96)))
    foretold = estimate(decoder, tiny_options)
    assert foretold.refused_group_sizes[64] == ("mlp.down_proj",)
    assert "mlp.up_proj" in foretold.refused_group_sizes[128]
    with pytest.raises(OptionError, match=r"do not divide the inputs of mlp.down_proj \(96\)"):
        estimate(decoder, replace(tiny_options, group_size=64))


def test_tuning_is_foretold_with_the_rest(
    tiny_llama: Path, tiny_options: QuantizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foretell(tune: TuneOptions | None) -> Estimate:
        return estimate(Decoder(Checkpoint(tiny_llama)), replace(tiny_options, tune=tune))

    alone = foretell(None)
    timed = foretell(TuneOptions(minutes=20))
    assert 1200 < timed.seconds < 1200 + 10 * alone.seconds
    few, many = (foretell(TuneOptions(minutes=20, steps=steps)) for steps in (10, 1000))
    assert few.seconds < many.seconds < timed.seconds
    assert foretell(TuneOptions(minutes=20, steps=10**9)).seconds > 1200
    monkeypatch.setattr(TuningCosts, "memory_bytes", 10**12)
    assert alone.memory_bytes < 10**12 < foretell(TuneOptions(steps=1)).memory_bytes


def test_tuning_takes_memory_for_scales_tables_and_hidden_states(tiny_llama: Path) -> None:
    def memory(length: int, num_scales: int) -> int:
        return TuningCosts(decoder, length, num_scales, (1000, 2000)).memory_bytes

    decoder = Decoder(Checkpoint(tiny_llama))
    table = decoder.config.vocab_size * decoder.config.hidden_size
    assert memory(64, 0) > 2 * 4 * table
    assert memory(64, 1000) == memory(64, 0) + 28_000
    assert memory(1024, 0) > memory(64, 0)


def test_a_long_text_takes_memory_while_it_is_tokenized(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    with text.open("wb") as file:
        file.truncate(2**30)
    decoder = Decoder(Checkpoint(tiny_llama))
    assert estimate(decoder, replace(tiny_options, calibration=text)).memory_bytes > 50 * 2**30


def test_a_model_of_which_only_headers_are_there_can_be_planned(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    size = weights.stat().st_size
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as file:  # a hole takes the place of the tensors
        file.truncate(header)
        file.truncate(size)
    assert estimate(Decoder(Checkpoint(tmp_path)), tiny_options) is not None


def test_what_cannot_work_is_refused_from_the_headers(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(CheckpointError, match=r"has shape \(128, 64\), config.json implies"):
        estimate(Decoder(Checkpoint(tmp_path)), tiny_options)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"no tensor model.layers.2"):
        estimate(Decoder(Checkpoint(tmp_path)), tiny_options)
