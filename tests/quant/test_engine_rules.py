"""Which engines load what: every rule seen to apply and not to apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.engine_rules import RULES, VERSIONS, Facts, judge, judge_for
from qserve.quant.errors import OptionError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.layer_format import PackedLayer
from qserve.quant.formats.registry import OutputFormat, make_writer
from qserve.quant.formats.writer import scheme_of


def write(
    folder: Path, output: OutputFormat, bits: int = 4, group_size: int = 32, **changes: Any
) -> Checkpoint:
    """A checkpoint of one layer; ``changes`` to its quantization_config."""
    symmetric = changes.pop("symmetric", True)
    groups = (64, 128 // group_size)
    weight = GroupedWeight(
        codes=torch.ones(64, 128, dtype=torch.uint8),
        scales=torch.ones(groups).half(),
        zero_points=torch.full(groups, (1 << (bits - 1)) - (not symmetric), dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
    )
    writer = make_writer(output, "test:0")
    save_file(
        {f"up.{k}": v for k, v in writer.encode(weight).items()}, folder / "model.safetensors"
    )
    block = writer.config_block({"up": scheme_of(weight)}, []) | changes
    kept = {key: value for key, value in block.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({"quantization_config": kept}))
    return Checkpoint(folder)


AWQ, GPTQ, V2 = OutputFormat.AWQ, OutputFormat.GPTQ, OutputFormat.GPTQ_V2
PACKED, BNB = OutputFormat.COMPRESSED_TENSORS, OutputFormat.BITSANDBYTES

ORDERED = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "actorder": "group",
        },
    }
}


@pytest.mark.parametrize(
    ("engine", "arguments", "refusals", "notes"),
    [
        ("vllm", (AWQ, 4, 128), [], []),
        ("vllm", (AWQ, 4, 16), ["groups of 32, 64 or 128"], []),
        ("vllm", (GPTQ,), [], []),
        ("vllm", (GPTQ, 8, 128), [], []),
        ("vllm", (GPTQ, 4, 16), ["GPTQ wants groups of 32, 64"], []),
        ("vllm", (GPTQ, 3), ["4 and 8 bits"], []),
        ("vllm", (PACKED,), [], []),
        ("vllm", (PACKED, 3), [], ["3-bit words"]),
        ("vllm", (BNB, 8, 128), ["vllm-bnb-plugin"], []),
        ("sglang", (GPTQ, 2), ["4 and 8 bits"], []),
        ("transformers", (AWQ,), [], ["gptqmodel must be"]),
        ("transformers", (PACKED,), [], ["compressed-tensors must be"]),
        ("transformers", (BNB, 8, 128), [], ["bitsandbytes 0.46.1"]),
    ],
)
def test_rules_apply_to_what_they_are_about(
    tmp_path: Path, engine: str, arguments: tuple[Any, ...], refusals: list[str], notes: list[str]
) -> None:
    (verdict,) = judge_for(write(tmp_path, *arguments), [engine])
    assert len(verdict.refusals) == len(refusals)
    assert len(verdict.notes) == len(notes)
    for part, said in zip([*refusals, *notes], [*verdict.refusals, *verdict.notes], strict=True):
        assert part in said


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        (GPTQ, {"desc_act": True}, "desc_act true"),
        (V2, {"symmetric": False}, "sym false"),
        (GPTQ, {"sym": ...}, "wants bits, group_size"),
        (AWQ, {"zero_point": ...}, "AWQ wants bits, group_size and zero_point"),
        (PACKED, {"config_groups": ORDERED}, "ordered by activation"),
        (PACKED, {"kv_cache_scheme": {"type": "int"}}, "key-value scales"),
    ],
)
def test_blocks_that_vllm_refuses(
    tmp_path: Path, output: OutputFormat, changes: dict[str, Any], message: str
) -> None:
    (verdict,) = judge_for(write(tmp_path, output, **changes), ["vllm"])
    assert any(message in said for said in verdict.refusals)


def test_asymmetric_words_are_noted_for_transformers(tmp_path: Path) -> None:
    (verdict,) = judge_for(write(tmp_path, PACKED, symmetric=False), [" transformers"])
    assert verdict.refusals == []
    assert "dequantize=True" in verdict.notes[0]


def test_every_rule_is_about_an_engine_that_has_a_version() -> None:
    assert {engine for rule in RULES for engine in rule.engines} <= set(VERSIONS)


def test_an_engine_without_rules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no rules for 'ollama': choose from vllm"):
        judge_for(write(tmp_path, AWQ), ["ollama"])


EXPERT = PackedLayer(64, 64, 8, 64)
INT8_INPUTS = {"type": "int", "num_bits": 8, "dynamic": True}


@pytest.mark.parametrize(
    ("method", "group", "refusing"),
    [
        ("bitsandbytes", {}, {"transformers"}),
        ("compressed-tensors", {"weights": {"type": "int"}}, set()),
        (
            "compressed-tensors",
            {"weights": {"type": "int"}, "input_activations": INT8_INPUTS},
            {"transformers"},
        ),
        ("compressed-tensors", {"weights": {"type": "float"}}, {"vllm", "sglang"}),
        (
            "compressed-tensors",
            {"weights": {"type": "float"}, "input_activations": {"type": "float"}},
            set(),
        ),
    ],
)
def test_experts_are_read_by_fewer(method: str, group: dict[str, Any], refusing: set[str]) -> None:
    block = {"quant_method": method, "config_groups": {"group_0": group}}
    dense, experts = (
        {
            one.engine
            for one in judge(Facts(method, block, {name: EXPERT}, is_gemm=False), VERSIONS)
            if one.refusals
        }
        for name in ("mlp.up_proj", "mlp.experts.0.up_proj")
    )
    assert experts - dense == refusing
