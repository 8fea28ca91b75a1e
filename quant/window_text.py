"""Calibration text as windows: those that quantization takes, and those that are left over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qserve.quant.conversations import ConversationTokenizer
from qserve.quant.documents import Document, read_documents
from qserve.quant.errors import CalibrationError
from qserve.quant.options import QuantizeOptions
from qserve.quant.windows import (
    Tokens,
    Windows,
    load_tokenizer,
    opening_token,
    pack_windows,
    padded,
    spread,
    spread_windows,
    windows_between,
    windows_of_text,
)


@dataclass(frozen=True, slots=True)
class WindowText:
    """Windows of one text, and what became of it.

    taken: evenly spread over the text, as many as were asked for or as there are. left: others.
    sha256: of the text. num_tokens: in all of it. num_taken_tokens: of these in the windows taken.
    num_cut: conversations that are longer than a window and lose their end.
    """

    taken: Windows
    left: Windows
    sha256: str
    num_tokens: int
    num_taken_tokens: int
    num_documents: int
    num_conversations: int
    num_cut: int


def read_window_text(model: Path, options: QuantizeOptions) -> WindowText:
    """The calibration text of the options as windows, by the tokenizer in the folder ``model``.

    Raises ``CalibrationError`` for a text that cannot be read or is shorter than one window, and
    where the messages of an assistant are asked for and there are none.
    """
    tokenizer = load_tokenizer(model)
    documents = read_documents(options.calibration)
    if any(isinstance(document.content, list) for document in documents):
        return _pack(tokenizer, documents, options)
    if options.assistant_only:
        raise CalibrationError(
            f"{options.calibration_name} holds no conversations of which the assistant's messages "
            "could count: give a .jsonl file or a data set with `messages`"
        )
    return _cut(tokenizer, documents, options)


def _cut(tokenizer: Any, documents: list[Document], options: QuantizeOptions) -> WindowText:
    """Texts, one after the other, cut anywhere; BOS stands before each window."""
    text = "\n\n".join(str(document.content) for document in documents)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_token(tokenizer)
    length = options.seq_len - (opening is not None)
    taken = spread_windows(ids, options.num_samples, length)
    return WindowText(
        taken=windows_of_text(_opened(taken, opening)),
        left=windows_of_text(_opened(windows_between(ids, options.num_samples, length), opening)),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        num_tokens=len(ids),
        num_taken_tokens=taken.numel(),
        num_documents=len(documents),
        num_conversations=0,
        num_cut=0,
    )


def _opened(windows: torch.Tensor, opening: int | None) -> torch.Tensor:
    if opening is None:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], opening), windows], 1)


def _pack(tokenizer: Any, documents: list[Document], options: QuantizeOptions) -> WindowText:
    """Conversations, each from its beginning, and texts among them in pieces."""
    chats = ConversationTokenizer(tokenizer, options.assistant_only)
    length = options.seq_len
    tokenized: list[Tokens] = []
    digest = hashlib.sha256()
    num_conversations = 0
    for document in documents:
        digest.update(repr(document.content).encode())
        if isinstance(document.content, str):
            tokenized += _pieces(tokenizer, document, options)
        else:
            tokenized.append(chats.tokenize(document))
            num_conversations += 1
    windows, num_cut = pack_windows(tokenized, length)
    if not windows:
        raise CalibrationError(
            f"{options.calibration_name}: nothing that would count: the assistant says nothing "
            f"within the first {length} tokens of any conversation; give longer windows"
        )
    places = spread(min(options.num_samples, len(windows)), len(windows) - 1)
    taken = [windows[place] for place in places]
    left = [window for place, window in enumerate(windows) if place not in set(places)]
    return WindowText(
        taken=padded(taken, length),
        left=padded(left, length),
        sha256=digest.hexdigest(),
        num_tokens=sum(len(tokens.ids) for tokens in tokenized),
        num_taken_tokens=sum(len(window.ids) for window in taken),
        num_documents=len(documents),
        num_conversations=num_conversations,
        num_cut=num_cut,
    )


def _pieces(tokenizer: Any, document: Document, options: QuantizeOptions) -> Iterator[Tokens]:
    """A text in pieces as long as a window, BOS before each."""
    if options.assistant_only:
        raise CalibrationError(
            f"{document.where} is a text, and only the messages of an assistant are to count: "
            "leave texts out"
        )
    ids = tokenizer(document.content, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_token(tokenizer)
    first = [] if opening is None else [opening]
    step = options.seq_len - len(first)
    for start in range(0, len(ids), step):
        piece = first + ids[start : start + step]
        yield Tokens(piece, [True] * len(piece))
