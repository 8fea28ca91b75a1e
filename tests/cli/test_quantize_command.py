"""`qserve quantize`: what it writes and says, and how it refuses what it cannot do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from qserve.cli.errors import ExitCode
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.formats.checkpoint import Checkpoint

LAYER = "model.layers.1.mlp.down_proj"
FEW = ("--samples", "2", "--seq-len", "16", "--threads", "1")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the result is to appear: the only thing in its folder."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


def test_rounding_writes_a_checkpoint_and_says_what_it_cost(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("quantize", tiny_llama, "--rtn", "-o", out)
    assert done.code == ExitCode.OK
    assert done.err.startswith("groups of 64: the coarsest that the method has")
    text = "".join(done.out.split())  # without the table's line breaks
    for part in ("sizebefore", "sizeafter", "4.312", "peakmemory", "quantization_report.json"):
        assert part in text
    original = Checkpoint(tiny_llama).tensor(f"{LAYER}.weight").float()
    packed = Checkpoint(out).linear(LAYER)
    assert isinstance(packed, GroupedWeight)
    worst = (packed.dequantize() - original).abs()
    # Half a step, and what storing the scale in float16 adds over 15 steps.
    limit = packed.scales.float().repeat_interleave(64, 1) * (0.5 + 15 * 2**-11)
    assert bool((worst <= limit).all())
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_json_is_all_there_is_on_stdout(
    tiny_llama: Path, out: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("The harbour wakes before the town does. " * 40)
    done = qserve("quantize", tiny_llama, "-o", out, "--calibration", text, *FEW, "--json")
    summary = json.loads(done.out)
    assert summary["output"] == str(out)
    assert summary["method"] == "awq"
    assert summary["group_size"] == 64
    assert summary["calibration"]["source"] == "calibration.txt"
    assert summary["num_quantized_layers"] == 14
    assert summary["sizes"]["bits_per_weight"] == 4.3125
    report = json.loads(Path(summary["report"]).read_text())
    assert {layer["name"] for layer in report["layers"]} >= {LAYER}


def test_self_written_calibration_is_possible(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("quantize", tiny_llama, "-o", out, "--calibration", "self", *FEW, "--json")
    assert json.loads(done.out)["calibration"]["source"] == "self"
    groups, time = done.err.splitlines()  # and nothing from transformers
    assert groups.startswith("groups of 64")
    assert time.startswith("quantizing: ")


def test_every_effort_gives_other_codes(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    enough = ("--samples", "8", "--seq-len", "128")  # less text than inputs allows no feedback
    codes = []
    for effort in (("--fast",), ("--plain",), ()):
        folder = out / "".join(effort or ("full",))
        done = qserve("quantize", tiny_llama, "-o", folder, *effort, *enough)
        assert done.code == ExitCode.OK
        weight = Checkpoint(folder).linear(LAYER)
        assert isinstance(weight, GroupedWeight)
        codes.append(weight.codes)
    assert not any(torch.equal(a, b) for a, b in combinations(codes, 2))


def test_ignored_layers_stay_in_16_bits(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve(
        "quantize", tiny_llama, "--rtn", "-o", out, "--ignore", r"\.1\.mlp\.down", "--json"
    )
    assert json.loads(done.out)["num_skipped_layers"] == 1
    assert isinstance(Checkpoint(out).linear(LAYER), torch.Tensor)


def test_single_layers_get_what_an_override_says(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    overrides = ("--override", "down=bits:8,group:32", "--override", "q_proj=16")
    done = qserve(
        *("quantize", tiny_llama, "--rtn", "--format", "compressed-tensors", "-o", out),
        *overrides,
    )
    assert done.code == ExitCode.OK, done.err
    assert "self_attn.k_proj, self_attn.v_proj stay in 16 bits like self_attn.q_proj" in done.err
    assert "2 by a choice of their own" in " ".join(done.out.replace("│", " ").split())
    weight = Checkpoint(out).linear(LAYER)
    assert isinstance(weight, GroupedWeight)
    assert (weight.bits, weight.group_size) == (8, 32)


def test_bits_are_chosen_for_a_size(
    tiny_llama: Path, out: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("The harbour wakes before the town does. " * 40)
    options = ("--max-size", "175kB", "--widths", "3,4,8", "--calibration", text, *FEW, "--json")
    done = qserve("quantize", tiny_llama, "--method", "hqq", "-o", out, "--force", *options)
    assert done.code == ExitCode.USAGE  # AWQ states one width
    assert "the smallest that the format holds for this model is" in done.error
    more = ("--format", "compressed-tensors")
    done = qserve("quantize", tiny_llama, "--method", "hqq", *more, "-o", out, *options)
    assert done.code == ExitCode.OK, done.err
    assert "groups of" not in done.err
    report = json.loads((out / "quantization_report.json").read_text())
    assert len({layer["bits"] for layer in report["layers"]}) > 1
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) <= 175_000


def test_a_limit_on_the_divergence_is_kept_or_nothing_is_written(
    tiny_llama: Path, out: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("The harbour wakes before the town does. " * 40)
    command = ("quantize", tiny_llama, "--method", "hqq", "-o", out, "--calibration", text, *FEW)
    refused = qserve(*command, "--max-kl", "1e-12")
    assert refused.code == ExitCode.GATE
    assert re.search(r"the KL from the float model is 0\.\d+, above 1e-12", refused.error)
    assert list(out.parent.iterdir()) == []
    done = qserve(*command, "--max-kl", "9", "--json")
    assert done.code == ExitCode.OK
    summary = json.loads(done.out)
    assert 0 < summary["kl"] < 9 and summary["retries"] == []


def test_force_replaces_an_older_result(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "stale.bin").touch()
    refused = qserve("quantize", tiny_llama, "--rtn", "-o", out)
    assert refused.code == ExitCode.OUTPUT
    assert qserve("quantize", tiny_llama, "--rtn", "-o", out, "--force").code == ExitCode.OK
    assert not (out / "stale.bin").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


OPTIONS = {
    "no model": ((), ExitCode.USAGE, "Missing argument 'MODEL'"),
    "bits": (("--bits", "3"), ExitCode.USAGE, "bits 3"),
    "bits type": (("--bits", "four"), ExitCode.USAGE, "'four' is not a valid integer"),
    "group size": (("--group-size", "48"), ExitCode.USAGE, "group size 48"),
    "group size that does not divide": (
        ("--group-size", "128"),
        ExitCode.USAGE,
        r"inputs of self_attn.q_proj \(64\), .*mlp.up_proj \(64\): use a group size of 64 or 32",
    ),
    "samples": (("--samples", "0"), ExitCode.USAGE, "0 is not in the range x>=1"),
    "seq len": (("--seq-len", "1"), ExitCode.USAGE, "1 is not in the range x>=2"),
    "threads": (("--threads", "-1"), ExitCode.USAGE, "-1 is not in the range"),
    "too many threads": (("--threads", "9" * 20), ExitCode.USAGE, "not in the range 1<=x<=256"),
    "large seed": (("--seed", "9" * 20), ExitCode.USAGE, "a whole number of 64 bits"),
    "seed": (("--seed", "x"), ExitCode.USAGE, "'x' is not a valid integer"),
    "regex": (("--ignore", "["), ExitCode.USAGE, r"'\[' is not a regular expression"),
    "regex matches nothing": (("--ignore", "conv"), ExitCode.USAGE, "'conv' matches no linear"),
    "regex matches all": (("--ignore", "proj"), ExitCode.USAGE, "no linear layer is left"),
    "override": (("--override", "proj"), ExitCode.USAGE, "expected REGEX=bits:8,group:32"),
    "override matches nothing": (("--override", "conv=16"), ExitCode.USAGE, "'conv' matches no"),
    "override of another format": (
        ("--override", "o_proj=8"),
        ExitCode.USAGE,
        r"self_attn.o_proj \(matches 'o_proj'\): AWQ gemm holds 4-bit integer codes",
    ),
    "two efforts": (("--plain", "--fast"), ExitCode.USAGE, "contradict each other"),
    "damping": (("--damping", "0"), ExitCode.USAGE, "0 is not in the range"),
    "order": (("--awq", "--act-order"), ExitCode.USAGE, "awq does not hold it"),
    "head": (("--awq", "--head", "int8"), ExitCode.USAGE, "head in 8 bits: AWQ gemm holds 4-bit"),
    "size": (("--max-size", "big"), ExitCode.USAGE, "'big' is no size"),
    "average": (("--avg-bits", "0"), ExitCode.USAGE, "0.0 is not in the range x>0"),
    "average above all": (("--avg-bits", "16"), ExitCode.USAGE, "leaves every layer its 16 bits"),
    "average below all": (("--avg-bits", "4"), ExitCode.USAGE, r"smallest .* is 4\.3"),
    "widths": (("--widths", "four"), ExitCode.USAGE, "expected widths such as 4,8,16"),
    "widths alone": (("--widths", "4"), ExitCode.USAGE, "give avg_bits or max_size"),
    "unknown option": (("--ggml",), ExitCode.USAGE, "--ggml"),
    "two methods": (("--gptq", "--method", "awq"), ExitCode.USAGE, "contradict each other"),
    "two flags": (("--awq", "--nf4"), ExitCode.USAGE, "--awq and --nf4 contradict each other"),
    "bits of the method": (("--gptq", "--bits", "5"), ExitCode.USAGE, "in 2, 3, 4, 8 bits"),
    "format of the method": (
        ("--nf4", "--format", "gptq"),
        ExitCode.USAGE,
        "no linear layer is left to quantize: .*GPTQ holds integer codes",
    ),
    "windows beyond the context": (("--seq-len", "513"), ExitCode.CALIBRATION, "513 tokens"),
    "no such text": (("--calibration", "no.txt"), ExitCode.CALIBRATION, "no.txt cannot be read"),
    "text is a folder": (("--calibration", "folder"), ExitCode.CALIBRATION, "cannot be read"),
    "text is short": (("--calibration", "short.txt"), ExitCode.CALIBRATION, "a longer text"),
    "text is empty": (("--calibration", "empty.txt"), ExitCode.CALIBRATION, "0 tokens"),
    "text is binary": (("--calibration", "binary.txt"), ExitCode.CALIBRATION, "not UTF-8"),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_wrong_options_are_refused(
    case: tuple[tuple[str, ...], ExitCode, str],
    tiny_llama: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qserve: Callable[..., Any],
) -> None:
    options, code, message = case
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00" * 9000)
    models = (tiny_llama,) if options else ()
    done = qserve("quantize", *models, "-o", out, *options)
    assert done.code == code
    assert re.search(message, done.error), done.error
    assert list(out.parent.iterdir()) == []


def test_tuning_is_reported_and_asks_for_text_of_its_own(
    tiny_llama: Path, out: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("The harbour wakes before the town does. " * 40)
    learning = ("--calibration", text, "--tune", "10", "--tune-steps", "1")
    refused = qserve("quantize", tiny_llama, "-o", out, *FEW, *learning, "--samples", "100")
    assert refused.code == ExitCode.CALIBRATION
    assert "0 windows to tune on: give a longer text" in refused.err
    assert not out.exists()
    done = qserve("quantize", tiny_llama, "-o", out, *FEW, *learning)
    assert done.code == ExitCode.OK
    assert "tuning: " in done.err
    assert "on held-back text" in done.out
    tuning = json.loads((out / "quantization_report.json").read_text())["tuning"]
    assert tuning["steps"] == 1
    assert tuning["kl_after"] <= tuning["kl_before"]
