"""The files of a checkpoint folder beside its tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that stay as they are. chat_template may be a folder."""


def write_config(
    out: Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    *,
    dtype: str = "float16",
    side_file: str | None = None,
) -> None:
    """Write ``config.json``: that of the source, with the quantization and the 16-bit type stated.

    quantization: None for a float checkpoint. side_file: another file that gets the block too.
    """
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    content["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype  # older and newer name
    if quantization is not None:
        content["quantization_config"] = quantization
        if side_file is not None:
            _write_object(out / side_file, quantization)
    _write_object(out / "config.json", content)


def copy_files(folder: Path, out: Path) -> None:
    """Copy the tokenizer and what else stays as it is."""
    for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _write_object(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
