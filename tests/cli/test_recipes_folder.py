"""The recipes that come with the project, run on a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qserve.cli.errors import ExitCode
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.recipe.loading import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# A random model of two layers loses far more than a trained one: only the steps are judged here.
NO_LIMITS = {"max_kl": 50}


def write_with_less_text(
    path: Path, folder: Path, calibration: dict[str, int], judged: dict[str, int]
) -> Path:
    """A copy of a recipe in ``folder`` that reads other numbers of windows."""
    content = yaml.safe_load(path.read_text())
    content["calibration"] |= calibration
    content["evaluate"] |= judged
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(content))
    return copy


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_project_runs(
    path: Path, tiny_llama: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    assert load_recipe(path).gates.need_evaluation
    smaller = write_with_less_text(
        path, tmp_path, {"samples": 4, "seq_len": 64}, {"windows": 1, "seq_len": 32}
    )
    smaller.write_text(yaml.safe_dump(yaml.safe_load(smaller.read_text()) | {"gates": NO_LIMITS}))
    done = qserve("run", smaller, "--model", tiny_llama, "-o", tmp_path / "out")
    assert done.code == ExitCode.OK, done.err
    assert Checkpoint(tmp_path / "out").method is not None
    assert {file.suffix for file in (tmp_path / "reports").iterdir()} == {
        ".json",
        ".md",
        ".html",
        ".xml",
    }
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_project_keeps_its_limits_on_the_demo_model(
    path: Path, demo_model: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    smaller = write_with_less_text(path, tmp_path, {"samples": 16}, {"windows": 4})
    done = qserve("run", smaller, "--model", demo_model, "-o", tmp_path / "out")
    assert done.code == ExitCode.OK, done.out + done.err
    shutil.rmtree(tmp_path / "out")


def test_every_recipe_is_described_and_the_pipelines_name_one_that_exists() -> None:
    folder = RECIPES[0].parent
    described = (folder / "README.md").read_text()
    for path in RECIPES:
        assert f"[{path.name}]({path.name})" in described
        assert f"qserve run {path.name}" in path.read_text()
    for pipeline in (folder / "ci").iterdir():
        assert yaml.safe_load(pipeline.read_text())
        assert 'qserve run recipes/awq.yaml --model "$MODEL" -o out/model' in pipeline.read_text()
