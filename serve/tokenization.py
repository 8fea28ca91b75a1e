"""``POST /tokenize`` and ``/detokenize``: the model's tokenizer over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.serve.bodies import read_object
from qserve.serve.chat_options import ChatOptions
from qserve.serve.protocol import parse
from qserve.serve.protocol_completions import DetokenizeBody, TokenizeBody
from qserve.serve.service import Service


class TokenizerEndpoint:
    """The two routes, bound to a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a rendered conversation."""
        service = self._service
        body = parse(TokenizeBody, await read_object(request, service.config.max_body_bytes))
        body.check()
        service.check_model(body.model)
        token_ids = await service.encode(await self._text(body), _adds_special_tokens(body))
        reply: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": service.card.max_model_len,
            "tokens": list(token_ids),
            "token_strs": None,
        }
        if body.return_token_strs:
            reply["token_strs"] = [service.tokenizer.token_text(token) for token in token_ids]
        if body.with_pieces:
            reply["tokens"] = [
                {"id": token, "piece": service.tokenizer.token_text(token)} for token in token_ids
            ]
        return JSONResponse(reply)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens included."""
        service = self._service
        body = parse(DetokenizeBody, await read_object(request, service.config.max_body_bytes))
        service.check_model(body.model)
        service.check_vocabulary(body.tokens, "tokens")
        text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text, "content": text})

    async def _text(self, body: TokenizeBody) -> str:
        if body.messages is None:
            return body.prompt if body.prompt is not None else body.content or ""
        options = ChatOptions(
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )
        messages = [message.for_template() for message in body.messages]
        return await self._service.render(messages, options)


def _adds_special_tokens(body: TokenizeBody) -> bool:
    """What was asked; else yes for a text, and no for a template, which writes its own."""
    for asked in (body.add_special_tokens, body.add_special):
        if asked is not None:
            return asked
    return body.messages is None
