"""`recipe.lock`: what a result was made from and what it is, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.recipe.schema import Recipe
from qserve.quant.report import QuantizationReport

FILE_NAME = "recipe.lock"


def write_lock(
    recipe: Recipe, source: Checkpoint, out: Path, quantization: QuantizationReport
) -> None:
    """Write ``recipe.lock`` beside the result in ``out``.

    JSON: the recipe with its defaults, SHA-256 of every weight file read and written, of the
    calibration text and of the tokens that quantization took from it, the steps that tuning took
    (the clock may have ended it), and the versions that the result depends on. The same recipe,
    inputs and versions give the same hashes of the result; where the recipe limits tuning by time,
    with these steps for a limit.
    """
    calibration = quantization.calibration
    content: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", by_alias=True, exclude={"reports"}),
        "source": _hashes(source.folder, {path.name for path in source.tensor_files.values()}),
        "calibration_sha256": None if calibration is None else calibration.sha256,
        "tokens_sha256": None if calibration is None else calibration.tokens_sha256,
        "tuning_steps": None if quantization.tuning is None else quantization.tuning.steps,
        "versions": quantization.versions,
        "result": _hashes(out, {path.name for path in out.glob("*.safetensors")}),
    }
    (out / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _hashes(folder: Path, names: set[str]) -> dict[str, str]:
    hashes = {}
    for name in sorted({*names, "config.json"}):
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
