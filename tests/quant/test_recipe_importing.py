"""llm-compressor's recipes in our words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qserve.quant.errors import RecipeError
from qserve.quant.recipe.importing import import_recipe
from qserve.quant.recipe.loading import parse_recipe

AWQ = """
quant_stage:
  quant_modifiers:
    AWQModifier:
      ignore: [lm_head, "re:.*down_proj$"]
      duo_scaling: both
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 64}
"""
SMOOTH = """
stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    GPTQModifier: {scheme: W8A8, targets: Linear, ignore: [lm_head]}
"""
GPTQ = """
stage: {quant_modifiers: {GPTQModifier: {scheme: W4A16, ignore: [lm_head], dampening_frac: 0.05}}}
"""
FLOAT4 = "config_groups: {a: {weights: {num_bits: 4, type: float}}}"


def translated(text: str, folder: Path) -> tuple[dict[str, object], tuple[str, ...]]:
    """The `quantize` section of a translation, which must be a sound recipe, and its notes."""
    path = folder / "theirs.yaml"
    path.write_text(text)
    imported = import_recipe(path, "owner/name", "out")
    parse_recipe(imported.text, "ours.yaml")
    return yaml.safe_load(imported.text)["quantize"], imported.notes


def test_an_asymmetric_group_becomes_awq(tmp_path: Path) -> None:
    section, notes = translated(AWQ, tmp_path)
    assert section == {"method": "awq", "bits": 4, "group_size": 64, "ignore": [".*down_proj$"]}
    assert notes == ()


def test_quantized_activations_become_smoothquant(tmp_path: Path) -> None:
    section, notes = translated(SMOOTH, tmp_path)
    assert section == {"method": "smoothquant"}
    assert notes == ("SmoothQuantModifier.smoothing_strength is left out",)


def test_a_symmetric_scheme_becomes_int4(tmp_path: Path) -> None:
    section, notes = translated(GPTQ, tmp_path)
    assert section == {"method": "int4", "bits": 4, "group_size": 128, "damping": 0.05}
    assert notes == ()


@pytest.mark.parametrize(
    ("settings", "section"),
    [
        ("scheme: FP8_DYNAMIC", {"method": "fp8"}),
        ("config_groups: {a: {weights: {num_bits: 8, type: float}}}", {"method": "fp8-weight"}),
        (
            "scheme: W8A8, kv_cache_scheme: {num_bits: 8, type: float}",
            {"method": "smoothquant", "kv_cache": "fp8", "format": "compressed-tensors"},
        ),
        (
            "scheme: W8A16, kv_cache_scheme: {num_bits: 8, type: int}",
            {"method": "int8", "kv_cache": "int8", "format": "compressed-tensors"},
        ),
    ],
)
def test_eight_bit_floats_and_caches_keep_their_kind(
    settings: str, section: dict[str, str], tmp_path: Path
) -> None:
    text = f"stage: {{modifiers: {{QuantizationModifier: {{{settings}}}}}}}"
    assert translated(text, tmp_path) == (section, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no stages"),
        ("stage: {mods: {GPTQModifier: {scheme: W3A16}}}", "scheme W3A16: expected one of W4A16"),
        ("stage: {mods: {GPTQModifier: {}}}", "expected a scheme"),
        ("stage: {mods: {}}", "holds no modifier: expected one"),
        ("stage: {mods: {SparseGPTModifier: {}}}", "holds SparseGPTModifier: expected one"),
        ("stage: {mods: {SmoothQuantModifier: {}}}", "holds SmoothQuantModifier: expected one"),
        (f"stage: {{mods: {{GPTQModifier: {{{FLOAT4}}}}}}}", "floats of 4 bits: expected 8"),
        (
            "stage: {mods: {GPTQModifier: {scheme: W4A16, kv_cache_scheme: {num_bits: 4}}}}",
            "expected one of 8 bits",
        ),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_cannot_be_translated_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        translated(text, tmp_path)
