"""`qserve plan` and `qserve quantize --smoke`: what they say, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralForCausalLM

from qserve.cli.errors import ExitCode

Qserve = Callable[..., Any]


def test_a_plan_says_size_time_memory_and_engines(qserve: Qserve, tiny_llama: Path) -> None:
    done = qserve("plan", tiny_llama, "--gptq", "--threads", "1")
    assert done.code == ExitCode.OK, done.err
    for part in ("size after", "time, about", "peak memory", "disk", "vllm", "transformers"):
        assert part in done.out
    found = json.loads(qserve("plan", tiny_llama, "--threads", "1", "--json").out)
    assert found["method"] == "awq" and found["num_quantized_layers"] == 14
    assert found["refused_group_sizes"]["128"]


def test_routers_and_experts_left_in_16_bits_are_listed_by_their_kind(
    qserve: Qserve, make_tiny_llama: Callable[..., Path]
) -> None:
    folder = make_tiny_llama(
        model_class=MixtralForCausalLM, num_local_experts=5, intermediate_size=96
    )
    found = qserve("plan", folder, "--threads", "1", "--ignore", "experts.*w1").out
    assert "experts.*.w1 (10 times)" in found
    assert "experts.*.w2" in found.partition("group sizes that do not fit")[2]
    few = qserve("plan", folder, "--threads", "1").out
    assert "model.layers.1.block_sparse_moe.gate" in few


def test_a_recipe_can_be_planned(qserve: Qserve, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tiny_llama}\nquantize: {{method: nf4}}\noutput: {{folder: out}}\n")
    found = json.loads(qserve("plan", "--recipe", recipe, "--json").out)
    assert (found["method"], found["format"]) == ("nf4", "bitsandbytes")
    assert "leave out bits" in qserve("plan", "--recipe", recipe, "--bits", 4).error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), ExitCode.USAGE, "give MODEL, or --recipe"),
        (("no-such-model",), ExitCode.MODEL, "does not exist"),
        (("{model}", "--group-size", "128"), ExitCode.USAGE, "use a group size of 64 or 32"),
        (("{model}", "-o", "{model}"), ExitCode.OUTPUT, "is what is being read"),
        (("{model}", "--kv-cache", "fp8"), ExitCode.USAGE, "awq cannot state key-value scales"),
        (("{model}", "--calibration", "no.txt"), ExitCode.CALIBRATION, "no.txt cannot be read"),
        (("{model}", "--seq-len", "513"), ExitCode.CALIBRATION, "513 tokens, the model was made"),
        (("{model}", "--avg-bits", "2"), ExitCode.USAGE, "the smallest that the format holds"),
        (("{model}", "--avg-bits", "16"), ExitCode.USAGE, "leaves every layer its 16 bits"),
    ],
)
def test_what_cannot_work_is_refused(
    qserve: Qserve, tiny_llama: Path, arguments: tuple[str, ...], code: ExitCode, message: str
) -> None:
    done = qserve("plan", *(a.format(model=tiny_llama) for a in arguments))
    assert done.code == code and message in done.error


def test_a_smoke_test_says_what_was_compared(qserve: Qserve, tiny_llama: Path) -> None:
    done = qserve("quantize", tiny_llama, "--smoke", "--rtn", "--threads", "1")
    assert done.code == ExitCode.OK, done.err
    assert "same bits" in done.out and "saved, read again and run by the kernels" in done.err
    found = json.loads(qserve("quantize", tiny_llama, "--smoke", "--rtn", "--json").out)
    assert len(found["checks"]) == 7


def test_without_smoke_an_output_is_needed(qserve: Qserve, tiny_llama: Path) -> None:
    assert "Missing option '-o' / '--output'" in qserve("quantize", tiny_llama).error
