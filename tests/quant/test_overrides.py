"""Settings of single layers: how they are written, what they come to, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qserve.quant.decoder import Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.overrides import Override, parse_override
from qserve.quant.plan import Plan, make_plan

STAGES = ("attention input", "attention output", "mlp input", "mlp output")


def plan_for(folder: Path, *overrides: str, **options: Any) -> Plan:
    chosen = {"method": Method.GPTQ} | options
    parsed = tuple(map(parse_override, overrides))
    return make_plan(Decoder(Checkpoint(folder)), QuantizeOptions(overrides=parsed, **chosen))


def settings(plan: Plan, block: int = 0) -> list[tuple[int, int] | None]:
    """Bits and group size of each stage of a block."""
    specs = [plan.specs.get((block, stage)) for stage in STAGES]
    return [None if spec is None else (spec.levels.bits, spec.group_size) for spec in specs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("down_proj=bits:8,group:32", Override("down_proj", 8, 32)),
        ("down_proj = bits:8", Override("down_proj ", 8)),
        (r"layers\.[01]\.=group:-1", Override(r"layers\.[01]\.", None, -1)),
        ("proj=16", Override("proj", 16)),
        ("(?=a)b=3", Override("(?=a)b", 3)),
    ],
)
def test_an_override_is_a_pattern_and_settings(text: str, expected: Override) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    "text",
    ["proj", "=", "proj=", "proj=x", "proj=bits:4,bits:8", "proj=width:4", "proj=5", "(=8"],
)
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse_override(text)
    with pytest.raises(OptionError, match="neither bits nor"):
        Override("proj")


def test_layers_that_run_as_one_get_what_one_of_them_gets(tiny_llama: Path) -> None:
    plan = plan_for(tiny_llama, "v_proj=bits:8,group:32", r"0\.mlp\.gate=16")
    assert settings(plan) == [(8, 32), (4, 64), None, (4, 64)]
    assert settings(plan, 1) == [(8, 32), (4, 64), (4, 64), (4, 64)]
    assert plan.group_size == 64
    assert plan.notes == (
        "self_attn.q_proj, self_attn.k_proj are coded like self_attn.v_proj: engines run them as "
        "one",
        "mlp.up_proj stay in 16 bits like mlp.gate_proj: engines run them as one",
    )
    assert plan.specs[0, "attention input"].reason == "matches 'v_proj'"
    assert plan.specs[0, "mlp output"].reason == ""


def test_the_later_of_two_settings_counts_and_an_ignore_above_all(tiny_llama: Path) -> None:
    overrides = ("mlp=bits:8,group:32", r"layers\.1.*down=3", "o_proj=8")
    plan = plan_for(tiny_llama, *overrides, ignore=("o_proj",))
    assert settings(plan) == [(4, 64), None, (8, 32), (8, 32)]
    assert settings(plan, 1) == [(4, 64), None, (8, 32), (3, 32)]
    assert plan.specs[1, "mlp output"].reason == r"matches 'layers\\.1.*down'"


def test_the_common_group_size_is_that_of_the_layers_without_their_own(tiny_llama: Path) -> None:
    narrow = "q_proj|o_proj|gate_proj=group:32"
    assert settings(plan_for(tiny_llama, narrow)) == [(4, 32), (4, 32), (4, 32), (4, 128)]
    assert settings(plan_for(tiny_llama, "down=group:-1"))[3] == (4, -1)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a width of other codes": ("down=8", {"method": Method.NF4}, "codes of 4 bits alone"),
    "a width of another format": (
        "down=3",
        {"method": Method.AWQ},
        "AWQ gemm holds 4-bit integer codes",
    ),
    "groups stated once": ("down=group:32", {"method": Method.AWQ}, r"one group size .*\[32, 64\]"),
    "groups that do not divide": ("q_proj=group:128", {}, "64 inputs, .* multiple of 128"),
    "groups that no engine reads": ("down=group:48", {}, "group size 48: this method takes"),
    "codes beside 8-bit activations": ("down=4", {"method": Method.SMOOTHQUANT}, "8 bits alone"),
    "a pattern without a layer": ("lm_heads=8", {}, "'lm_heads' matches no linear layer"),
}


@pytest.mark.parametrize(("override", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_format_cannot_hold_is_refused(
    override: str, options: dict[str, Any], message: str, tiny_llama: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        plan_for(tiny_llama, override, **options)


def test_awq_in_compressed_tensors_may_mix_widths(tiny_llama: Path) -> None:
    options = {"method": Method.AWQ, "output": OutputFormat.COMPRESSED_TENSORS}
    assert settings(plan_for(tiny_llama, "down=8", **options))[2:] == [(4, 64), (8, 64)]
