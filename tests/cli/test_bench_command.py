"""`qserve bench` measures, and prints tables for people and JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qserve.cli.errors import ExitCode
from qserve.kernels import native
from qserve.kernels.kv_cache import KvFormat
from qserve.serve.config import EngineConfig
from qserve.serve.engine_benchmark import EngineFigures

FIGURES = EngineFigures(
    load_s=0.51234,
    first_token_s=0.6,
    prefill512_tok_s=1825.55,
    decode_b1_tok_s=320.6,
    decode_b4_tok_s=876.2,
    decode_b8_tok_s=1074.7,
    decode_b16_tok_s=1239.8,
    decode_b1_at512_tok_s=222.4,
    decode_b1_at1024_tok_s=180.0,
    peak_rss_mib=617,
    weight_bytes=87_493_632,
    read_gb_s=40.0,
    decode_b1_read_share=0.7012,
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command asks to be measured; the answer is ``FIGURES``."""
    calls: list[Any] = []

    def measure(folder: Path, config: EngineConfig, num_rounds: int) -> EngineFigures:
        calls.append((folder, config, num_rounds))
        return FIGURES

    monkeypatch.setattr("qserve.serve.engine_benchmark.measure_engine", measure)
    return calls


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that take no time, and are wrong."""
    monkeypatch.setattr("qserve.kernels.machine_bounds.PROBE_BYTES", 1 << 20)
    monkeypatch.setattr("qserve.kernels.machine_bounds.PROBE_STEPS", 4)
    monkeypatch.setattr("qserve.kernels.machine_bounds.SECONDS", 0.0)


def test_the_figures_of_the_engine_come_as_json(
    qserve: Callable[..., Any], asked: list[Any], tmp_path: Path
) -> None:
    options = ("--json", "--repeat", "5", "--threads", "2", "--kv-cache-dtype", "bf16")
    done = qserve("bench", "engine", tmp_path, *options)
    assert done.code == ExitCode.OK
    found = json.loads(done.out)
    assert list(found) == [field.name for field in fields(EngineFigures)]
    assert (found["load_s"], found["prefill512_tok_s"]) == (0.512, 1825.5)
    ((folder, config, num_rounds),) = asked
    assert (folder, num_rounds) == (tmp_path, 5)
    assert (config.num_threads, config.kv_format) == (2, KvFormat.BFLOAT16)


def test_the_table_says_what_share_of_the_memorys_rate_is_used(
    qserve: Callable[..., Any], asked: list[Any], tmp_path: Path
) -> None:
    done = qserve("bench", "engine", tmp_path)
    text = " ".join(done.out.split())
    for part in ("decode_b8_tok_s 1074.7", "87.5 MB", "70% of 40.0 GB/s", "peak_rss_mib 617"):
        assert part in text


def test_a_model_whose_context_is_too_short_is_refused(
    qserve: Callable[..., Any], tiny_llama: Path
) -> None:
    error = qserve("bench", "engine", tiny_llama).error
    assert "1089" in error and "512" in error


def test_kernels_are_measured_beside_the_bounds_of_the_machine(
    qserve: Callable[..., Any], small_probe: None
) -> None:
    options = ("--op", "rms_norm", "--shape", "1 rows", "--seconds", "0", "--json")
    done = qserve("bench", "kernels", *options)
    assert done.code == ExitCode.OK
    found = json.loads(done.out)
    assert found["machine"]["isa"] in native.supported_isas()
    assert set(found["bounds"]) == {"read_gb_s", "int8_gmac_s", "float_gmac_s"}
    (row,) = found["rows"]
    assert (row["op"], row["shape"]) == ("rms_norm", "hidden 576, 1 rows")
    assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]


def test_the_table_of_kernels_has_the_chosen_instruction_set(
    qserve: Callable[..., Any], small_probe: None
) -> None:
    before = native.isa()
    options = ("--op", "rms_norm", "--op", "layer_norm", "--shape", "8 rows", "--seconds", "0")
    try:
        done = qserve("bench", "kernels", *options, "--isa", "portable")
    finally:
        native.select_isa(before)
    assert "isa portable" in done.out
    for word in ("layer_norm", "rms_norm", "GB/s read", "share"):
        assert word in done.out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--op", "matmul"), "int4_matmul"),
        (("--shape", "no such shape"), "'no such shape'"),
        (("--isa", "mmx"), "portable"),
        (("--device", "cuda"), "qserve doctor"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    qserve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, options: Any, part: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert part in qserve("bench", "kernels", *options).error
