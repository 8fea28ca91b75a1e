"""The fields that requests share, and what is wrong with a body in one readable sentence."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from qserve.serve.errors import BadRequest

MAX_PROBLEMS = 10
MAX_ECHOED_CHARS = 200  # of a value, in a message
MAX_STOPS = 4
MAX_SEQUENCES_PER_PROMPT = 128
INT64_MAX = 2**63 - 1

Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """``stream_options``: what a stream tells beside the text.

    include_usage: a last frame with the token counts. continuous_usage_stats: the counts so far in
    every frame.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(BaseModel):
    """The fields that chat and text completions share, with the ranges of the API.

    A field that is null is taken as not given. None means that the server's default applies.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str = ""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES_PER_PROMPT)] = 1
    min_tokens: Annotated[int, Field(ge=0)] = 0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, float] = Field(default_factory=dict)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: Annotated[list[int], FailFast()] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, value: object) -> object:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and any(stop == "" for stop in stops):
            raise PydanticCustomError("string_too_short", "A stop string must not be empty")
        if isinstance(stops, list) and len(stops) > MAX_STOPS:
            raise PydanticCustomError("too_long", f"At most {MAX_STOPS} stop strings are allowed")
        return stops

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None when only the context limits them."""
        return None

    @property
    def num_logprobs(self) -> int | None:
        """None for no logprobs, else how many besides the drawn token's; -1: all of them."""
        return None

    def check(self) -> None:
        """Raise ``BadRequest`` for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest(
                "stream_options is only for requests with stream: true.", "stream_options"
            )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every frame of a stream has the token counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class Body(BaseModel):
    """A body without sampling fields."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="allow")


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], fields: Mapping[str, Any]) -> Parsed:
    """Validate the fields of a body. Raises ``BadRequest`` that lists what is wrong with them.

    ``param`` of the error is the first field at fault, as a dotted path.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise BadRequest(_describe_all(problems), _path(problems[0])) from None


def cut(text: str) -> str:
    """A client's text, short enough to be echoed."""
    return text if len(text) <= MAX_ECHOED_CHARS else text[:MAX_ECHOED_CHARS] + "..."


def _describe_all(problems: list[ErrorDetails]) -> str:
    described = [_describe(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        described.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return "; ".join(described) + "."


def _describe(problem: ErrorDetails) -> str:
    got = ""
    if problem["type"] != "missing":
        got = f", got {cut(_echo(problem['input']))}"
    return f"{_path(problem)}: {problem['msg']}{got} [{problem['type']}]"


def _path(problem: ErrorDetails) -> str:
    return ".".join(str(part) for part in problem["loc"])


def _echo(value: object) -> str:
    """A value as Python writes it, shortened while it is read: a large one is never built."""
    short = Repr()
    short.maxstring = short.maxother = MAX_ECHOED_CHARS
    return short.repr(value)
