"""A GGUF file as a bfloat16 checkpoint folder, written once and kept under its content hash."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.output import publish
from qserve.quant.silence import silenced

MAGIC = b"GGUF"
HASH_DIGITS = 16  # 64 bits: no two files that one person owns will meet
# Rotary scaling as ggml writes it. transformers' importer passes over both, and the model would
# then run with wrong angles, which nothing but its answers would show.
SCALED_ROPE_MARKS = (b"rope_freqs.weight", b".rope.scaling.factor")
HEADER_BYTES = 1 << 26  # a header with 256 thousand tokens has 10 MB


def import_gguf(path: Path, cache: Path, notice: Callable[[str], None]) -> Path:
    """The folder below ``cache`` that holds the model of a GGUF file, made when it is not there.

    Weights are dequantized to bfloat16; the tokenizer comes along. ``notice`` is told, in a
    sentence, that an import begins. Raises ``CheckpointError`` for a file that is not GGUF, is
    damaged or of a kind that transformers does not read, and ``OutputError`` when the cache
    cannot be written.
    """
    folder = cache / "gguf" / _content_hash(path)
    if not (folder / "config.json").is_file():
        _refuse_scaled_rope(path)
        notice(f"importing {path.name} as bfloat16 to {folder} (once)")
        with publish(folder) as partial, silenced():
            model, tokenizer = _read(path)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


def _content_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(
                    f"{path} is not a GGUF file (it does not begin with {MAGIC.decode()}): "
                    "fetch it again"
                )
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _refuse_scaled_rope(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        if any(content.find(mark, 0, HEADER_BYTES) >= 0 for mark in SCALED_ROPE_MARKS):
            raise UnsupportedModelError(
                f"{path} scales its rotary embedding, which is lost when GGUF is imported: give "
                "the folder or hub id of the model that the file was made from"
            )


def _read(path: Path) -> tuple[Any, Any]:
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
            **where,
        )
    except Exception as error:  # whatever the parsers stumble over: they check little themselves
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({type(error).__name__}: {error}): the file is "
            "truncated, damaged or of a kind that transformers does not know"
        ) from error
    return model, tokenizer
