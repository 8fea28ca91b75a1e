"""Which layers are quantized: all that fit, engines' fused layers together, none in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qserve.quant.decoder import Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.grid import LevelSet
from qserve.quant.options import Head, Method, QuantizeOptions
from qserve.quant.overrides import Override
from qserve.quant.plan import Plan, make_plan
from qserve.quant.target import StageSpec

MakeLlama = Callable[..., Path]


def plan_for(folder: Path, **options: Any) -> Plan:
    return make_plan(Decoder(Checkpoint(folder)), QuantizeOptions(**options))


def test_every_layer_is_quantized_in_the_largest_groups_that_fit(
    tiny_llama: Path, make_tiny_llama: MakeLlama
) -> None:
    plan = plan_for(tiny_llama)
    spec = StageSpec(LevelSet(), group_size=64)
    stages = ("attention input", "attention output", "mlp input", "mlp output")
    specs = {(index, stage): spec for index in range(2) for stage in stages}
    assert plan == Plan(bits=4, group_size=64, specs=specs, skipped=())
    wide = make_tiny_llama(hidden_size=96, num_attention_heads=6)
    assert plan_for(wide).group_size == 32
    assert plan_for(tiny_llama, group_size=32).group_size == 32


def test_a_group_size_that_does_not_divide_a_layer_is_refused_with_those_that_do(
    tiny_llama: Path,
) -> None:
    with pytest.raises(
        OptionError, match=r"groups of 128 .* inputs of .*q_proj \(64\).*use .* 64 or 32"
    ):
        plan_for(tiny_llama, group_size=128)


def test_ignored_layers_stay_with_those_they_run_fused_with(tiny_llama: Path) -> None:
    plan = plan_for(tiny_llama, ignore=(r"layers\.1\..*up_proj$",))
    assert {layer.name: layer.reason for layer in plan.skipped} == {
        "model.layers.1.mlp.gate_proj": "runs fused with mlp.up_proj, which stays in 16 bits",
        "model.layers.1.mlp.up_proj": r"matches 'layers\\.1\\..*up_proj$'",
    }


def test_shapes_that_the_format_cannot_hold_stay_in_16_bits(make_tiny_llama: MakeLlama) -> None:
    folder = make_tiny_llama(num_key_value_heads=1, intermediate_size=144, num_hidden_layers=1)
    plan = plan_for(folder)
    reasons = {layer.name.rpartition(".")[2]: layer.reason for layer in plan.skipped}
    assert reasons == {
        "q_proj": "runs fused with self_attn.k_proj, self_attn.v_proj, which stays in 16 bits",
        "k_proj": "AWQ gemm needs a multiple of 32 outputs, got 16",
        "v_proj": "AWQ gemm needs a multiple of 32 outputs, got 16",
        "gate_proj": "AWQ gemm needs a multiple of 32 outputs, got 144",
        "up_proj": "AWQ gemm needs a multiple of 32 outputs, got 144",
        "down_proj": "144 inputs, the format needs a multiple of 32",
    }
    assert plan.group_size == 64  # of what is left


def test_a_group_size_that_the_format_does_not_have_is_refused_with_those_it_has(
    tiny_llama: Path,
) -> None:
    with pytest.raises(OptionError, match="group size 48: this method takes 128 or 64 or 32"):
        plan_for(tiny_llama, group_size=48)
    whole_rows = plan_for(tiny_llama, method=Method.GPTQ, group_size=-1)
    assert whole_rows.group_size == -1
    assert {spec.group_size for spec in whole_rows.specs.values()} == {-1}
    assert plan_for(tiny_llama, method=Method.NF4).group_size == 64


def test_an_ignore_that_matches_nothing_is_a_mistake(tiny_llama: Path) -> None:
    with pytest.raises(OptionError, match=r"'lm_heads' matches no linear layer"):
        plan_for(tiny_llama, ignore=("lm_heads",))


def test_the_output_head_may_be_ignored_where_it_stays_in_16_bits(tiny_llama: Path) -> None:
    usual = plan_for(tiny_llama)
    assert plan_for(tiny_llama, ignore=("lm_head",)) == usual
    assert plan_for(tiny_llama, overrides=(Override("lm_head", 16),)) == usual
    contradiction = {"method": Method.GPTQ, "head": Head.INT8, "ignore": ("lm_head",)}
    for options in (contradiction, {"overrides": (Override("lm_head", 4),)}):
        with pytest.raises(OptionError, match="bits of lm_head are the option head's"):
            plan_for(tiny_llama, **options)


def test_a_layer_fits_a_format_when_one_of_the_method_s_groups_does(tiny_llama: Path) -> None:
    plan = plan_for(tiny_llama, method=Method.INT8, output=OutputFormat.BITSANDBYTES)
    assert plan.group_size == -1 and not plan.skipped


def test_ignoring_everything_is_a_mistake(tiny_llama: Path) -> None:
    with pytest.raises(OptionError, match="no linear layer is left"):
        plan_for(tiny_llama, ignore=("proj",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits 3"),
        ({"num_samples": 0}, "num_samples 0"),
        ({"seq_len": 1}, "seq_len 1"),
        ({"max_shard_bytes": 0}, "max_shard_bytes 0"),
        ({"ignore": ("(",)}, "not a regular expression"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_no_model_satisfies_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizeOptions(**options)
