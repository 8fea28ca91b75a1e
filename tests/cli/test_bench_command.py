"""`qserve bench` measures, and prints tables for people and JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qserve.cli.errors import ExitCode
from qserve.serve.config import EngineConfig, KVDtype
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
    assert (config.num_threads, config.kv_dtype) == (2, KVDtype.BFLOAT16)


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
