"""`qserve eval`: figures, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qserve.cli.errors import ExitCode

FEW = ("--windows", "2", "--seq-len", "32", "--threads", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Enough text for a few short windows."""
    path = tmp_path / "text.txt"
    path.write_text("The harbour wakes before the town does; a child counts the lamps. " * 9)
    return path


def test_float_model_against_itself_is_no_distance(
    tiny_llama: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("eval", tiny_llama, "--against", tiny_llama, *FEW, "--json")
    assert done.code == ExitCode.OK
    figures = json.loads(done.out)
    assert figures["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["top1"] == 1.0
    assert figures["perplexity"] == figures["base_perplexity"]
    assert (figures["num_windows"], figures["seq_len"]) == (2, 32)
    assert figures["text"] == "Python's help topics"


def test_rounded_model_is_some_distance_away(
    tiny_llama: Path, rtn_llama: Path, text: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("eval", rtn_llama, "--against", tiny_llama, "--text", text, *FEW, "--json")
    figures = json.loads(done.out)
    assert 1e-4 < figures["kl"] < 1
    assert figures["kl_standard_error"] > 0
    assert figures["model"] == str(rtn_llama)
    assert figures["against"] == str(tiny_llama)


def test_table_has_the_same_figures(
    tiny_llama: Path, rtn_llama: Path, text: Path, qserve: Callable[..., Any]
) -> None:
    options = ("--against", tiny_llama, "--text", text, *FEW)
    figures = json.loads(qserve("eval", rtn_llama, *options, "--json").out)
    done = qserve("eval", rtn_llama, *options)
    assert f"{figures['perplexity']:.3f}" in done.out
    assert f"{figures['kl']:.4f} ± {figures['kl_standard_error']:.4f}" in done.out
    assert f"{100 * figures['top1']:.2f} ±" in done.out


def test_quantized_activations_are_told(
    tiny_llama: Path, text: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    few = ("--samples", "2", "--seq-len", "32", "--threads", "1")
    assert qserve("quantize", tiny_llama, "-o", out, "--fp8", *few).code == ExitCode.OK
    done = qserve("eval", out, "--text", text, *FEW)
    assert re.search(r"activations rounded to\s+float8-token", done.out)
    done = qserve("eval", tiny_llama, "--text", text, *FEW)
    assert "activations rounded" not in done.out


def test_stored_scales_of_keys_and_values_are_told(
    tiny_llama: Path, text: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    asked = ("--int4", "--kv-cache", "fp8", "--samples", "2", "--seq-len", "32", "--threads", "1")
    assert qserve("quantize", tiny_llama, "-o", out, *asked).code == ExitCode.OK
    done = qserve("eval", out, "--text", text, *FEW)
    assert re.search(r"keys and values rounded to\s+fp8, a scale for each head", done.out)


def test_without_a_base_there_is_a_perplexity_only(
    tiny_llama: Path, text: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("eval", tiny_llama, "--text", text, *FEW)
    assert "perplexity" in done.out
    assert "KL" not in done.out
    figures = json.loads(qserve("eval", tiny_llama, "--text", text, *FEW, "--json").out)
    assert figures["kl"] is None
    assert 1 < figures["perplexity"] < math.inf


def test_text_shorter_than_asked_for_is_told(
    tiny_llama: Path, text: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("eval", tiny_llama, "--text", text, "--seq-len", "32", "--json")
    figures = json.loads(done.out)
    assert figures["num_windows"] < 48
    assert f"{figures['num_windows']} windows, 48 asked for" in done.err


def test_one_window_has_no_standard_error_and_the_json_is_valid(
    tiny_llama: Path, text: Path, qserve: Callable[..., Any]
) -> None:
    options = ("--against", tiny_llama, "--text", text, "--windows", "1", "--seq-len", "16")
    figures = json.loads(qserve("eval", tiny_llama, *options, "--json").out, parse_constant=float)
    assert figures["kl_standard_error"] is None
    assert "±" not in qserve("eval", tiny_llama, *options).out


WRONG = {
    "windows": (("--windows", "0"), ExitCode.USAGE, "0 is not in the range x>=1"),
    "seq len": (("--seq-len", "1"), ExitCode.USAGE, "1 is not in the range x>=2"),
    "seq len type": (("--seq-len", "long"), ExitCode.USAGE, "'long' is not a valid integer"),
    "beyond the context": (("--seq-len", "513"), ExitCode.CALIBRATION, "513 tokens"),
    "no text": (("--text", "missing.txt"), ExitCode.CALIBRATION, "missing.txt cannot be read"),
    "binary text": (("--text", "binary.txt"), ExitCode.CALIBRATION, "not UTF-8"),
    "short text": (("--text", "short.txt"), ExitCode.CALIBRATION, "a longer text"),
    "no base": (("--against", "missing"), ExitCode.MODEL, "missing does not exist"),
    "base is no model": (("--against", "."), ExitCode.MODEL, "no config.json"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused(
    case: tuple[tuple[str, ...], ExitCode, str],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qserve: Callable[..., Any],
) -> None:
    options, code, message = case
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00" * 9000)
    done = qserve("eval", tiny_llama, *options)
    assert done.code == code
    assert re.search(message, done.error), done.error


def test_base_with_another_vocabulary_is_refused(
    tiny_llama: Path, make_tiny_llama: Callable[..., Path], qserve: Callable[..., Any]
) -> None:
    other = make_tiny_llama(vocab_size=600)
    done = qserve("eval", tiny_llama, "--against", other, *FEW)
    assert done.code == ExitCode.MODEL
    assert "vocabularies" in done.error


def test_damaged_checkpoint_is_refused(
    rtn_llama: Path, text: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    shutil.copytree(rtn_llama, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = qserve("eval", tmp_path / "copy", "--text", text, *FEW)
    assert done.code == ExitCode.MODEL
    assert "truncated or damaged" in done.error
