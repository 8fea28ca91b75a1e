"""The checks of a recipe, on a tiny result."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from qserve.quant.continuation import continue_greedily
from qserve.quant.decoder import Decoder
from qserve.quant.engine_rules import VERSIONS
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.overwriting import overwrite_tensors
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.recipe.checks import run_checks
from qserve.quant.recipe.schema import ChecksSection, Engine

ALL = ChecksSection(inspect=True, loads_in=("vllm", "transformers"), generate=True)


@pytest.fixture
def result(tiny_llama: Path, tmp_path: Path) -> Path:
    """A quantized checkpoint."""
    folder = tmp_path / "result"
    folder.mkdir()
    options = QuantizeOptions(method=Method.RTN, group_size=32)
    quantize(Checkpoint(tiny_llama), folder, options, lambda _: None)
    return folder


def test_a_sound_result_passes_every_check_and_says_what_was_found(result: Path) -> None:
    checks = run_checks(ALL, result)
    names = ["inspect", "loads in vllm", "loads in transformers", "generate"]
    assert [check.name for check in checks] == names
    assert all(check.passed for check in checks), checks
    assert "gptqmodel must be installed" in checks[2].says
    assert run_checks(ChecksSection(), result) == ()


def test_a_damaged_result_fails_by_what_is_wrong_with_it(result: Path) -> None:
    name = "model.norm.weight"
    broken = torch.full_like(Checkpoint(result).tensor(name), torch.nan)
    overwrite_tensors(result, {name: broken})
    found = {check.name: check for check in run_checks(ALL, result)}
    assert not found["inspect"].passed and name in found["inspect"].says
    assert not found["generate"].passed and name in found["generate"].says
    assert found["loads in vllm"].passed


def test_logits_that_are_not_finite_end_a_continuation(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(continue_greedily(decoder, [1, 2], 3)) == 3
    head = decoder.head()
    head.weight[0, 0] = torch.inf
    monkeypatch.setattr(decoder, "head", lambda: head)
    with pytest.raises(CheckpointError, match="NaN logits for token 0"):
        continue_greedily(decoder, [1, 2], 3)


def test_every_engine_that_a_recipe_can_name_has_rules() -> None:
    assert set(get_args(Engine)) == set(VERSIONS)
