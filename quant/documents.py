"""The documents of a calibration file: plain text, or JSON lines of texts or conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qserve.quant.errors import CalibrationError
from qserve.quant.windows import load_tokenizer, read_text

JSON_LINES = ".jsonl"


def read_documents(path: Path, model: Path) -> list[str]:
    """The documents of a file, as text.

    A ``.jsonl`` file has an object on each line: its ``text``, or its ``messages`` as the chat
    template of the tokenizer in the folder ``model`` renders them, special tokens included (none
    are added later, so there is one at the beginning at most). Any other file is one document.
    Raises ``CalibrationError`` for a file that cannot be read, with the line, and for messages
    without a template.
    """
    text = read_text(path)
    if path.suffix.lower() != JSON_LINES:
        return [text]
    tokenizer: Any = None
    documents = []
    for where, entry in _entries(path, text):
        if isinstance(entry.get("text"), str):
            documents.append(entry["text"])
        elif isinstance(entry.get("messages"), list):
            tokenizer = tokenizer or load_tokenizer(model)
            documents.append(_render(tokenizer, entry["messages"], where))
        else:
            raise CalibrationError(f"{where}: expected `text`, or `messages` with role and content")
    return documents


def _entries(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line that is not blank, with its place for messages."""
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{where} is not JSON ({error})") from None
        if not isinstance(entry, dict):
            raise CalibrationError(f"{where}: expected an object with `text` or `messages`")
        yield where, entry


def _render(tokenizer: Any, messages: list[Any], where: str) -> str:
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where} is a conversation, and the model's tokenizer has no chat template: "
            "give `text`"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise CalibrationError(
            f"{where}: the chat template refuses these messages ({error}): expected a list of "
            "objects with role and content"
        ) from None
