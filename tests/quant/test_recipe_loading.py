"""Reading recipes: what is right is taken, every mistake is named with its line and field."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from qserve.quant.errors import RecipeError
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.recipe.loading import load_recipe, parse_recipe
from qserve.quant.recipe.running import Job
from qserve.quant.recipe.schema import (
    CalibrationSection,
    ChecksSection,
    EvaluateSection,
    GatesSection,
    QuantizeSection,
    Section,
    json_schema,
)
from qserve.quant.recipe.starter import STARTER

MINIMAL = "model: m\noutput: {folder: out}\n"


def mistake(text: str) -> str:
    """The message for a recipe that is not sound."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    return str(caught.value)


def test_what_a_recipe_leaves_out_has_the_defaults_of_the_command_line() -> None:
    recipe = parse_recipe(MINIMAL, "r.yaml")
    assert recipe.quantize.method is Method.AWQ
    assert (recipe.calibration.samples, recipe.calibration.seq_len) == (32, 512)
    assert recipe.evaluate is None and recipe.output.folder == "out"


def test_the_recipe_to_start_from_is_sound_and_says_its_defaults() -> None:
    methods = ", ".join(method.value for method in Method)
    recipe = parse_recipe(
        STARTER.format(name="r.yaml", model="m", output="out", methods=methods), "r.yaml"
    )
    assert recipe.gates.max_ppl_increase == 0.1 and recipe.gates.min_top1 == 0.8
    assert recipe.reports.html == "report.html"


EVERYTHING = """
model: m
quantize:
  {method: gptq, group_size: 64, format: gptq-v2, effort: fast, damping: 0.1, seed: 1,
   act_order: true, head: int8, {limit},
   overrides: [{layers: up_proj, bits: 8}], ignore: [down_proj], kv_cache: int8,
   tune: {steps: 3}, max_shard_size: 1GB}
calibration: {text: "hub:owner/chats:train", assistant_only: true, samples: 8, seq_len: 64}
evaluate: {}
output: {folder: out}
"""


def test_a_recipe_can_ask_for_all_that_the_command_can(tmp_path: Path) -> None:
    names = {field.name for field in fields(QuantizeOptions)}
    limits = ("bits: 3, max_kl: 0.1", "avg_bits: 3.5, widths: [3, 8]", "max_size: 90MB")
    for limit in limits:
        recipe = parse_recipe(EVERYTHING.replace("{limit}", limit), "r.yaml")
        asked, usual = Job(recipe, "r.yaml", tmp_path).options(), QuantizeOptions()
        names -= {name for name in names if getattr(asked, name) != getattr(usual, name)}
    assert names == set()


def test_the_page_on_recipes_names_every_field_and_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    named = set(re.findall(r"`(?:[a-z]+\.)?([\w-]+)`", page))
    sections: list[type[Section]] = [
        *(QuantizeSection, CalibrationSection, EvaluateSection, GatesSection, ChecksSection)
    ]
    known = {field for section in sections for field in section.model_fields}
    explained = {"text", "samples", "windows", "seq_len"}  # in sentences
    assert known | {method.value for method in Method} <= named | explained


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("120MB", 120_000_000),
        ("4.5 GB", 4_500_000_000),
        ("2GiB", 2 << 30),
        ("77", 77),
        ("1k", 1000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    recipe = parse_recipe(f"{MINIMAL}gates: {{max_size: {text}}}", "r.yaml")
    assert recipe.gates.max_size == expected


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            "quantize: {tune: {}}",
            "r.yaml:3: quantize.tune: tuning needs `minutes`, `steps` or both",
        ),
        ("quantise: {}", "r.yaml:3: quantise: unknown key, did you mean 'quantize'?"),
        ("zzz: 1", "r.yaml:3: zzz: unknown key: expected one of version, model,"),
        ("quantize: {methd: awq}", "quantize.methd: unknown key, did you mean 'method'?"),
        (
            "quantize: {method: awqq}",
            "r.yaml:3: quantize.method: got 'awqq': input should be 'awq'",
        ),
        ("quantize:\n  bits: four", "r.yaml:4: quantize.bits: got 'four': input should be a valid"),
        ("quantize: {group_size: 1.5}", "quantize.group_size: got 1.5"),
        ("quantize: awq", "r.yaml:3: quantize: got 'awq'"),
        ("quantize: {ignore: lm_head}", "quantize.ignore: got 'lm_head'"),
        ("quantize: {ignore: [1]}", "r.yaml:3: quantize.ignore.0: got 1"),
        ("quantize: {overrides: [{bits: 8}]}", "overrides.0.layers: missing: a regular expression"),
        ("quantize: {overrides: [{layers: a, bit: 8}]}", "unknown key, did you mean 'bits'?"),
        ("quantize: {effort: much}", "quantize.effort: got 'much'"),
        ("quantize: {head: 8}", "quantize.head: got '8'"),
        ("quantize: {damping: 2}", "quantize.damping: got 2"),
        ("quantize: {avg_bits: 0}", "quantize.avg_bits: got 0: input should be greater than 0"),
        ("quantize: {max_kl: 0.1}", "gates on quality need an `evaluate` section"),
        ("quantize: {max_size: tiny}", "quantize.max_size: got 'tiny': 'tiny' is no size"),
        ("quantize: {max_shard_size: big}", "'big' is no size"),
        ("quantize: {max_shard_size: 0}", "quantize.max_shard_size: got 0"),
        ("calibration: {samples: 0}", "calibration.samples: got 0: input should be greater than"),
        ("calibration: {samples: many}", "calibration.samples: got 'many'"),
        ("calibration: {seq_len: 1}", "calibration.seq_len: got 1"),
        ("calibration: {text: 7}", "calibration.text: got 7: input should be a valid string"),
        ("evaluate: {windows: -1}", "evaluate.windows: got -1"),
        ("evaluate: yes", "r.yaml:3: evaluate: got True"),
        ("gates: {max_kl: 0.1}", "gates on quality need an `evaluate` section"),
        ("evaluate: {}\ngates: {max_kl: -1}", "r.yaml:4: gates.max_kl: got -1"),
        ("evaluate: {}\ngates: {min_top1: 150%}", "gates.min_top1: got '150%'"),
        ("evaluate: {}\ngates: {min_top1: most}", "gates.min_top1: got 'most'"),
        ("evaluate: {}\ngates: {max_ppl_increase: -5%}", "gates.max_ppl_increase: got '-5%'"),
        ("gates: {max_size: 12 apples}", "'12 apples' is no size"),
        ("reports: {pdf: a.pdf}", "reports.pdf: unknown key"),
        ("reports: {json: [a]}", "reports.json"),
        ("version: 2", "version: got 2"),
        ("model: other", "r.yaml:3: 'model' is given twice, first in line 1"),
        ("a: [1, 2", "not valid YAML"),
        ("a: &x *y", "not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_field(added: str, message: str) -> None:
    assert message in mistake(MINIMAL + added)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing, expected some such as `model`"),
        ("- a\n- b", "holds no keys"),
        ("just words", "holds no keys"),
        ("model: m", "r.yaml:1: output: missing"),
        ("output: {folder: o}", "r.yaml:1: model: missing: a model folder"),
        ("model: m\noutput: {}", "r.yaml:2: output.folder: missing: folder to write"),
        ("model: m\noutput: {folder: o, overwrite: maybe}", "output.overwrite: got 'maybe'"),
        ("model: \x00", "not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, message: str) -> None:
    assert message in mistake(text)


def test_all_mistakes_are_told_at_once() -> None:
    found = mistake("modle: m\nquantize: {bits: x}\noutput: {folder: o}")
    assert "r.yaml:1: modle" in found and "quantize.bits" in found and "model: missing" in found


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_the_schema_for_editors_knows_every_section_and_forbids_the_rest() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "output"}
    sections = schema["$defs"]
    assert sections["ReportsSection"]["properties"].keys() == {"json", "markdown", "html", "junit"}
    assert all(s["additionalProperties"] is False for n, s in sections.items() if "Section" in n)


@pytest.mark.parametrize("written", ["16", "'16'", "int8"])
def test_the_head_may_be_given_as_a_number_or_a_word(written: str) -> None:
    text = f"model: m\noutput: {{folder: o}}\nquantize: {{head: {written}}}"
    assert parse_recipe(text, "r.yaml").quantize.head.value == written.strip("'")
