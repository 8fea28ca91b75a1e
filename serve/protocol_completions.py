"""The bodies of ``POST /v1/completions``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from qserve.serve.errors import BadRequest
from qserve.serve.protocol import Body, SamplingBody
from qserve.serve.protocol_chat import Message

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


class CompletionBody(SamplingBody):
    """The body of a text completion. ``prompt`` is normalized to a list of prompts."""

    prompt: list[Prompt]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_MAX_TOKENS
    logprobs: Annotated[int, Field(ge=-1)] | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("prompt", mode="plain")
    @classmethod
    def _list_prompts(cls, value: object) -> list[Prompt]:
        if isinstance(value, str) or _begins_with_an_id(value):
            return [_checked(value)]
        if not isinstance(value, list):
            raise _refused("a string, a list of strings, of token ids, or of lists of token ids")
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError("too_long", f"At most {MAX_PROMPTS} prompts are allowed")
        if not value:
            raise _refused("at least one prompt")
        return [_checked(prompt) for prompt in value]

    def check(self) -> None:
        """Raise ``BadRequest`` for fields that contradict each other."""
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens 0 is only for requests with echo: true.", "max_tokens")
        if self.echo and self.logprobs is not None:
            raise BadRequest(
                "echo together with logprobs is not supported, since this server does not compute "
                "the logprobs of prompt tokens: leave one of them out.",
                "logprobs",
            )

    @property
    def token_limit(self) -> int:
        """Tokens to generate at most."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None for no logprobs, else how many besides the drawn token's; -1: all of them."""
        return self.logprobs


class TokenizeBody(Body):
    """A text, under its name here or in llama.cpp's dialect, or a conversation."""

    model: str = ""
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False
    with_pieces: bool = False

    def check(self) -> None:
        """Raise ``BadRequest`` unless there is exactly one thing to tokenize."""
        given = [self.prompt, self.content, self.messages]
        if sum(value is not None for value in given) != 1:
            raise BadRequest("Give either prompt or messages to tokenize.", "prompt")


class DetokenizeBody(Body):
    """Token ids."""

    model: str = ""
    tokens: list[Annotated[int, Field(ge=0)]]


def _begins_with_an_id(value: object) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def _checked(prompt: object) -> Prompt:
    if isinstance(prompt, str):
        if not prompt:
            raise _refused("a prompt that is not empty")
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise _refused("prompts that are strings or non-empty lists of token ids")


def _refused(expected: str) -> PydanticCustomError:
    return PydanticCustomError("prompt", f"Expected {expected}")
