"""Texts as windows of tokens, the same way for calibration and for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoTokenizer

from qserve.quant.errors import CalibrationError, CheckpointError

PADDING = 0
"""The token behind the last document of a window: it never counts, and what counts is before it."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of tokens, int64 ``[S, T]``.

    counts: bool ``[S, T]``, the positions that decide anything; the others are context of these, or
    padding behind the text.
    """

    token_ids: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: slice | list[int]) -> Windows:
        return Windows(self.token_ids[index], self.counts[index])

    def split(self, size: int) -> list[Windows]:
        """So many windows at a time, in their order."""
        return [self[start : start + size] for start in range(0, len(self), size)]


def windows_of_text(token_ids: torch.Tensor) -> Windows:
    """Windows ``[S, T]`` in which every token counts."""
    return Windows(token_ids, torch.ones_like(token_ids, dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a document, and which of them count."""

    ids: list[int]
    counts: list[bool]


def pack_windows(documents: Iterable[Tokens], length: int) -> tuple[list[Tokens], int]:
    """Documents in windows of up to ``length`` tokens, in their order, and how many were cut.

    A window takes documents as long as the next one fits as a whole; a document longer than a
    window loses its end. Windows in which nothing counts are left out.
    """
    windows: list[Tokens] = []
    current = Tokens([], [])
    num_cut = 0
    for document in documents:
        num_cut += len(document.ids) > length
        if len(current.ids) + len(document.ids) > length:
            windows.append(current)
            current = Tokens([], [])
        current.ids.extend(document.ids[:length])
        current.counts.extend(document.counts[:length])
    windows.append(current)
    return [window for window in windows if any(window.counts)], num_cut


def padded(windows: Iterable[Tokens], length: int) -> Windows:
    """The windows as tensors ``[S, length]``."""
    rows = [
        (tokens.ids + [PADDING] * missing, tokens.counts + [False] * missing)
        for tokens in windows
        for missing in (length - len(tokens.ids),)
    ]
    return Windows(
        torch.tensor([ids for ids, _ in rows], dtype=torch.long).view(-1, length),
        torch.tensor([counts for _, counts in rows], dtype=torch.bool).view(-1, length),
    )


def opening_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text (BOS); None when it does not."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids[0] == tokenizer.bos_token_id else None


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
    starts = spread(num_windows, num_tokens - length)
    return torch.tensor([token_ids[start : start + length] for start in starts])


def windows_between(token_ids: list[int], num_windows: int, length: int) -> torch.Tensor:
    """Windows ``[S, length]`` of the tokens that ``spread_windows`` leaves out, in order.

    No two overlap; S may be 0.
    """
    starts = spread(min(num_windows, len(token_ids) // length), len(token_ids) - length)
    free = [
        token_ids[start : start + length]
        for end, following in zip(starts, [*starts[1:], len(token_ids)], strict=True)
        for start in range(end + length, following - length + 1, length)
    ]
    return torch.tensor(free, dtype=torch.long).view(-1, length)


def spread(count: int, last: int) -> list[int]:
    """So many whole numbers evenly spread from 0 to ``last``."""
    return [i * last // max(count - 1, 1) for i in range(count)]


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
