"""How a conversation becomes a prompt, in words that need no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered.

    add_generation_prompt: end with the opening of the assistant's turn.
    continue_final_message: leave the last message open, so that the model continues it.
    chat_template: instead of the model's. template_kwargs: more variables for the template.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    documents: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
