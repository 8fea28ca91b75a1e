"""Fields that would change what a model may write and are not supported: refused, never ignored.

A client that asks for JSON and gets prose with status 200 fails later, and in the wrong place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qserve.serve.errors import BadRequest

STRUCTURED = "constrains the output to a structure, which this server cannot do"
TOOLS = "asks for tool calls, which this server cannot do (tool_choice none is accepted)"
UNSUPPORTED = "is not supported by this server"
TEXT_ONLY = "asks for more than text, which is all this server has"


class Refusal(NamedTuple):
    """Why a field is refused, and the values that say nothing and are let through."""

    reason: str
    harmless: tuple[Any, ...] = ()


REFUSED = {
    "response_format": Refusal(STRUCTURED, ({"type": "text"},)),
    "json_schema": Refusal(STRUCTURED),
    "ebnf": Refusal(STRUCTURED),
    "regex": Refusal(STRUCTURED),
    "structural_tag": Refusal(STRUCTURED),
    "functions": Refusal(TOOLS),
    "function_call": Refusal(TOOLS, ("none",)),
    "tool_choice": Refusal(TOOLS, ("none",)),
    "use_beam_search": Refusal(UNSUPPORTED, (False,)),
    "allowed_token_ids": Refusal(UNSUPPORTED),
    "bad_words": Refusal(UNSUPPORTED, ([],)),
    "logprob_token_ids": Refusal(UNSUPPORTED),
    "prompt_logprobs": Refusal(UNSUPPORTED),
    "prompt_embeds": Refusal(UNSUPPORTED),
    "thinking_token_budget": Refusal(UNSUPPORTED, (-1,)),
    "repetition_detection": Refusal(UNSUPPORTED),
    "priority": Refusal(UNSUPPORTED, (0,)),
    "suffix": Refusal("is for fill-in-the-middle models, which this server cannot run", ("",)),
    "modalities": Refusal(TEXT_ONLY, (["text"],)),
    "audio": Refusal(TEXT_ONLY),
}
# Any other field that begins like this constrains the output in some server's dialect.
CONSTRAINING_PREFIXES = ("guided_", "structured", "grammar", "response_format")


def refuse(fields: Mapping[str, Any]) -> None:
    """Raise ``BadRequest`` for the first field whose meaning would be lost."""
    for name, value in fields.items():
        refusal = REFUSED.get(name)
        if refusal is None and name.startswith(CONSTRAINING_PREFIXES):
            refusal = Refusal(STRUCTURED)
        if refusal is not None and value not in refusal.harmless:
            raise BadRequest(f"{name} {refusal.reason}: leave it out.", name)
    if "tools" in fields and fields.get("tool_choice") != "none":
        raise BadRequest(f"tools {TOOLS}: leave them out.", "tools")
    _refuse_best_of(fields)


def _refuse_best_of(fields: Mapping[str, Any]) -> None:
    n = fields.get("n", 1)
    if "best_of" in fields and fields["best_of"] != n:
        raise BadRequest(
            f"best_of is only supported when it equals n ({n}): leave it out.", "best_of"
        )
