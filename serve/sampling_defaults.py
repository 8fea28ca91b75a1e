"""From a request to sampling parameters: its fields, then the model's defaults, then OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from qserve.serve.errors import BadRequest, StartupError
from qserve.serve.messages import SamplingParams
from qserve.serve.protocol import INT64_MAX, SamplingBody, cut

GENERATION_CONFIG = "generation_config.json"
MAX_LOGIT_BIAS = 100.0
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What applies when a request does not say; the values here are OpenAI's.

    max_tokens: tokens that no request may exceed; None is no such limit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> SamplingDefaults:
        """The defaults in a checkpoint's ``generation_config.json``; OpenAI's without one.

        Raises ``StartupError`` for a file that is not JSON, or has a value out of range.
        """
        path = folder / GENERATION_CONFIG
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            given = {name: value for name, value in content.items() if value is not None}
            body = SamplingBody.model_validate({k: given[k] for k in FIELDS if k in given})
            max_tokens = given.get("max_new_tokens")
            if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
                raise ValueError(f"max_new_tokens is {max_tokens!r}, expected a positive integer")
        except (ValueError, AttributeError) as error:
            raise StartupError(
                f"{path} cannot be used ({str(error).splitlines()[0]}): mend it, or start with "
                "--generation-config none"
            ) from None
        fields = {name: getattr(body, name) for name in FIELDS if name in given}
        return replace(cls(), **fields, max_tokens=max_tokens)

    def describe(self) -> str:
        """The values that differ from OpenAI's, such as ``temperature 0.6, top_p 0.9``."""
        plain = SamplingDefaults()
        names = [*FIELDS, "max_tokens"]
        changed = [name for name in names if getattr(self, name) != getattr(plain, name)]
        return ", ".join(f"{name} {getattr(self, name)}" for name in changed)


def sampling_params(body: SamplingBody, defaults: SamplingDefaults, room: int) -> SamplingParams:
    """The parameters of a request's first sample.

    room: tokens of the context that the prompt leaves free, at least 1.
    Raises ``BadRequest`` for values that contradict each other.
    """
    max_tokens = _max_tokens(body, defaults, room)
    top_p = _first(body.top_p, defaults.top_p)
    top_k = max(0, _first(body.top_k, defaults.top_k))  # -1 is another word for off
    if top_p == 0:  # a mass of nothing: OpenAI allows it and keeps the most likely token
        top_p, top_k = 1.0, 1
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_first(body.temperature, defaults.temperature),
        top_p=top_p,
        top_k=top_k,
        min_p=_first(body.min_p, defaults.min_p),
        seed=body.seed,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(body.logit_bias),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids)),
        ignore_eos=body.ignore_eos,
        min_tokens=min(body.min_tokens, max_tokens),
        num_logprobs=body.num_logprobs,
    )


def nth_sample(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of sample ``index`` of a prompt: the same, with a seed of its own."""
    if params.seed is None or index == 0:
        return params
    seed = params.seed + index
    return replace(params, seed=seed if seed <= INT64_MAX else seed - 2**64)


def _max_tokens(body: SamplingBody, defaults: SamplingDefaults, room: int) -> int:
    asked = body.token_limit
    if asked is not None and body.min_tokens > asked:
        raise BadRequest(
            f"min_tokens is {body.min_tokens}, more than the {asked} tokens allowed: lower it.",
            "min_tokens",
        )
    return min(limit for limit in (asked, defaults.max_tokens, room) if limit is not None)


def _logit_bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    bias = {}
    for token, value in given.items():
        if not token.isascii() or not token.isdigit():
            raise BadRequest(
                f'logit_bias has the key {cut(token)!r}: expected token ids, such as "50256".',
                "logit_bias",
            )
        bias[int(token)] = max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, value))
    return tuple(bias.items())


def _first(asked: Number | None, default: Number) -> Number:
    return default if asked is None else asked
