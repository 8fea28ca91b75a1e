"""A text as windows of tokens, the same way for calibration and for evaluation."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoTokenizer

from qserve.quant.errors import CalibrationError, CheckpointError


def tokenize(folder: Path, text: str) -> list[int]:
    """Token ids of the whole text by the tokenizer in ``folder``, no special tokens added.

    Raises ``CheckpointError`` when the folder has no usable tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``. Raises ``CheckpointError`` when it has no usable one."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no usable tokenizer ({error}): copy the model's tokenizer files there"
        ) from None


def spread_windows(token_ids: list[int], num_windows: int, length: int) -> torch.Tensor:
    """Windows ``[S, length]`` evenly spread over the text, from its start to its end.

    Window i starts at ``i * (T - length) // (S - 1)``. A text too short for ``num_windows`` windows
    that do not overlap gives as many as it holds. Raises ``CalibrationError`` when it holds none.
    """
    num_tokens = len(token_ids)
    num_windows = min(num_windows, num_tokens // length)
    if num_windows == 0:
        raise CalibrationError(
            f"the text has {num_tokens} tokens, one window takes {length}: give a longer text or "
            "shorter windows"
        )
    starts = _spread(num_tokens, num_windows, length)
    return torch.tensor([token_ids[start : start + length] for start in starts])


def windows_between(token_ids: list[int], num_windows: int, length: int) -> torch.Tensor:
    """Windows ``[S, length]`` of the tokens that ``spread_windows`` leaves out, in order.

    No two overlap; S may be 0.
    """
    starts = _spread(len(token_ids), min(num_windows, len(token_ids) // length), length)
    free = [
        token_ids[start : start + length]
        for end, following in zip(starts, [*starts[1:], len(token_ids)], strict=True)
        for start in range(end + length, following - length + 1, length)
    ]
    return torch.tensor(free, dtype=torch.long).view(-1, length)


def _spread(num_tokens: int, num_windows: int, length: int) -> list[int]:
    """Where evenly spread windows start."""
    return [i * (num_tokens - length) // max(num_windows - 1, 1) for i in range(num_windows)]


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file. Raises ``CalibrationError`` when there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read ({error.strerror}): give a text file"
        ) from None
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}): give a plain text file"
        ) from None


def python_topics() -> str:
    """The help topics that come with Python, some 700 KB of English prose: on every machine."""
    return "\n\n".join(topics[name] for name in sorted(topics))
