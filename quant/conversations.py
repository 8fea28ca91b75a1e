"""Conversations as tokens: what the chat template of a model makes of them, and what it answers."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from qserve.quant.documents import Document
from qserve.quant.errors import CalibrationError
from qserve.quant.windows import Tokens

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Where a template says itself what the assistant writes."""

REFUSALS = (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)
"""What templates raise at messages they were not made for."""


class ConversationTokenizer:
    """Renders and tokenizes conversations.

    assistant_only: the tokens of the assistant's messages count, with what ends them; else all.
    """

    def __init__(self, tokenizer: Any, assistant_only: bool) -> None:
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only

    def tokenize(self, document: Document) -> Tokens:
        """The tokens of a conversation, special tokens as the template writes them and no others.

        Raises ``CalibrationError`` without a template, for messages that it refuses, and when it
        cannot be told what the assistant says.
        """
        messages = document.content
        assert isinstance(messages, list)
        if self._tokenizer.chat_template is None:
            raise CalibrationError(
                f"{document.where} is a conversation, and the model's tokenizer has no chat "
                "template: give `text`"
            )
        try:
            text = self._render(messages)
        except REFUSALS as error:
            raise CalibrationError(
                f"{document.where}: the chat template refuses these messages ({error}): expected "
                "a list of objects with role and content"
            ) from None
        if not self._assistant_only:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return Tokens(ids, [True] * len(ids))
        if MARK.search(self._tokenizer.get_chat_template()):
            return self._read_marks(messages)
        return self._count_between(text, self._answers(messages, text, document.where))

    def _render(self, messages: list[Any], prompts: bool = False) -> str:
        """prompts: with what makes the model answer at the end."""
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompts
            )
        )

    def _read_marks(self, messages: list[Any]) -> Tokens:
        found = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Tokens(found["input_ids"], [bool(mark) for mark in found["assistant_masks"]])

    def _answers(self, messages: list[Any], text: str, where: str) -> list[tuple[int, int]]:
        """Where in the text the assistant's messages are."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                span = self._find(messages, index, text)
                if span is None:
                    raise CalibrationError(
                        f"{where}: it cannot be told what the assistant says in message "
                        f"{index + 1}, which the chat template writes in another way when it is "
                        "the last: put {% generation %} into the template, or count all messages"
                    )
                spans.append(span)
        return spans

    def _find(self, messages: list[Any], index: int, text: str) -> tuple[int, int] | None:
        """Where in the text a message is: what it adds to those before it; where the template
        writes it in another way when it is the last, its content, right behind them."""
        try:
            before = self._render(messages[:index], prompts=True) if index else ""
            after = self._render(messages[: index + 1])
            if not text.startswith(before):
                before = self._render(messages[:index])
        except REFUSALS:
            return None
        if not text.startswith(before):
            return None
        start = len(before)
        if text.startswith(after) and after.startswith(before):
            return start, len(after)
        content = str(messages[index]["content"]).strip()
        place = text.find(content, start)
        is_behind = place >= 0 and not text[start:place].strip()
        return (place, place + len(content)) if is_behind else None

    def _count_between(self, text: str, spans: list[tuple[int, int]]) -> Tokens:
        try:
            found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:  # what transformers' tokenizers written in Python raise
            raise CalibrationError(
                "the model's tokenizer cannot tell where a token stands in the text: put "
                "{% generation %} into the chat template, or count all messages"
            ) from None
        counts = [
            any(start < last and first < end for first, last in spans)
            for start, end in found["offset_mapping"]
        ]
        return Tokens(found["input_ids"], counts)
