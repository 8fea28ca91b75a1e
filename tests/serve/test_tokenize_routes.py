"""The tokenizer over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_text_gives_its_tokens(client: Any) -> None:
    body = client.post("/tokenize", {"prompt": "The sea", "return_token_strs": True}).json()
    tokens = list(client.service.tokenizer.encode("The sea"))
    assert body["tokens"] == tokens and body["count"] == len(tokens)
    assert body["max_model_len"] == 64
    assert "".join(body["token_strs"]) == "The sea"


def test_a_conversation_gives_the_tokens_a_chat_would_use(client: Any) -> None:
    tokens = client.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    client.chat(messages=MESSAGES)
    assert tuple(tokens) == client.engine.added[-1].prompt_token_ids
    shorter = {"messages": MESSAGES, "add_generation_prompt": False}
    assert len(client.post("/tokenize", shorter).json()["tokens"]) < len(tokens)


def test_llama_cpp_s_dialect_is_understood(client: Any) -> None:
    body = client.post("/tokenize", {"content": "The", "with_pieces": True}).json()
    assert "".join(entry["piece"] for entry in body["tokens"]) == "The"


def test_tokens_give_their_text(client: Any) -> None:
    tokens = [1, *client.service.tokenizer.encode("你 sea")]
    assert client.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "<|im_start|>你 sea"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [512]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "nope"}, 404, "model"),
    ],
)
def test_what_does_not_make_sense_is_refused(
    client: Any, message_of: Any, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    assert message_of(client.post(path, body), status, param)
