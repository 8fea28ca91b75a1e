"""The body of ``POST /v1/chat/completions``, and its messages as the template wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator
from pydantic_core import PydanticCustomError

from qserve.serve.chat_options import ChatOptions
from qserve.serve.errors import BadRequest
from qserve.serve.protocol import SamplingBody

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class Message(BaseModel):
    """One message of a conversation; fields not named here go to the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        if isinstance(value, list):
            return "\n".join(_text_of(part) for part in value)
        return value

    def for_template(self) -> dict[str, Any]:
        """The message as templates expect it: text content, tool arguments as an object."""
        message = self.model_dump(exclude_none=True)
        if "reasoning_content" in message:  # an older name
            message.setdefault("reasoning", message.pop("reasoning_content"))
        if message.get("tool_calls"):
            message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
            message.setdefault("content", None)
        else:
            message.setdefault("content", "")
        return message


class ChatBody(SamplingBody):
    """The body of a chat request."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=-1)] = 0
    echo: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False

    def check(self) -> None:
        """Raise ``BadRequest`` for fields that contradict each other."""
        super().check()
        if self.top_logprobs != 0 and not self.logprobs:
            raise BadRequest(
                "top_logprobs is only for requests with logprobs: true.", "top_logprobs"
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise BadRequest(
                "add_generation_prompt and continue_final_message cannot both be true: the last "
                "message is either closed or continued.",
                "continue_final_message",
            )
        if self.echo:
            raise BadRequest("echo is not supported for chat: leave it out.", "echo")

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None when only the context limits them."""
        newer = self.max_completion_tokens
        return newer if newer is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None for no logprobs, else how many besides the drawn token's; -1: all of them."""
        return self.top_logprobs if self.logprobs else None

    def chat_options(self) -> ChatOptions:
        """How the conversation is to be rendered."""
        kwargs = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
            kwargs.setdefault("enable_thinking", self.reasoning_effort != "none")
        opens_reply = self.add_generation_prompt
        return ChatOptions(
            add_generation_prompt=(
                not self.continue_final_message if opens_reply is None else opens_reply
            ),
            continue_final_message=self.continue_final_message,
            chat_template=self.chat_template,
            documents=tuple(self.documents) if self.documents is not None else None,
            template_kwargs=kwargs,
        )


def _text_of(part: object) -> str:
    """The text of a content part. Raises for other kinds: this server reads only text."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise PydanticCustomError("content_part", "A content part must be an object or a string")
    kind = part.get("type")
    text = part.get(TEXT_PARTS.get(kind, "")) if isinstance(kind, str) else None
    if not isinstance(text, str):
        raise PydanticCustomError(
            "content_part", "Only content parts of type text, with a text, can be read"
        )
    return text


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, since templates iterate over them."""
    if not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            raise BadRequest(
                "the arguments of a tool call are not valid JSON.", "messages"
            ) from None
    return {**call, "function": function}
