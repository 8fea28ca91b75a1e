"""A real server process with a tiny model: raw sockets, plain HTTP and the official client."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

PROMPTS = [f"The harbour has {number} lamps" for number in range(8)]
CHAT: Any = [{"role": "user", "content": "Who counts the lamps?"}]
ABORT_LIMIT_S = 1.0


@pytest.fixture(scope="module")
def server(start_server: Any, tiny_llama: Path) -> Iterator[Any]:
    options = ["--port", "0", "--served-model-name", "tiny", "--threads", "1"]
    options += ["--max-num-seqs", "16", "--max-num-queued-reqs", "16", "--max-logprobs", "-1"]
    with start_server(str(tiny_llama), *options) as process:
        yield process.wait_until_ready()


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def official(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The first choice of a completion."""
    fields = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 24} | fields
    response = http.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_the_official_client_chats(official: openai.OpenAI) -> None:
    reply = official.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8, seed=1)
    assert reply.object == "chat.completion" and reply.model == "tiny"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None and 1 <= reply.usage.completion_tokens <= 8
    assert reply._request_id is not None and reply.id.endswith(reply._request_id)


def test_the_official_client_streams_the_same_text(official: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 24, "temperature": 0}
    whole = official.chat.completions.create(**fields)
    chunks = list(
        official.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **fields
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == whole.choices[0].finish_reason and not any(ends[:-1])


def test_the_official_client_completes_text(official: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": PROMPTS[:2], "max_tokens": 5, "temperature": 0}
    whole = official.completions.create(logprobs=2, n=2, **fields)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text == whole.choices[1].text  # greedy samples are copies
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    streamed = [""] * 2
    for chunk in official.completions.create(stream=True, **fields):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [whole.choices[0].text, whole.choices[2].text]


def test_the_official_client_lists_models(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").owned_by == "qserve"


def test_the_official_client_reads_raw_and_streamed_responses(official: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 3}
    raw = official.chat.completions.with_raw_response.create(**fields)
    assert raw.headers["x-request-id"] and raw.parse().choices
    with official.chat.completions.with_streaming_response.create(**fields) as response:
        assert json.loads(response.read())["choices"]


def test_the_official_client_raises_its_own_errors(official: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": CHAT}
    with pytest.raises(openai.NotFoundError) as missing:
        official.chat.completions.create(**fields | {"model": "gpt"})
    assert missing.value.param == "model" and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        official.chat.completions.create(temperature=3, **fields)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        official.chat.completions.create(stream=True, n=0, **fields)


def test_the_async_client_works_too(server: Any) -> None:
    async def work() -> tuple[str, str, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            fields: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0}
            whole = await client.chat.completions.create(**fields)
            stream = await client.chat.completions.create(stream=True, **fields)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return (
                whole.choices[0].message.content or "",
                text,
                [model.id async for model in client.models.list()],
            )

    whole, streamed, models = asyncio.run(work())
    assert whole == streamed and models == ["tiny"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": [600]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [512]}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"512": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a " * 600}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 512, "stream": True}, "prompt"),
        ("/v1/completions", {"prompt": "a", "n": 64}, "n"),
    ],
)
def test_what_only_the_engine_knows_is_refused_before_the_stream(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    response = http.post(path, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert http.post(path, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_prompt_may_fill_all_but_one_token_of_the_context(http: httpx.Client) -> None:
    choice = complete(http, prompt=[5] * 511, max_tokens=10, ignore_eos=True)
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_crosses_tokens_ends_the_text(
    http: httpx.Client, include: bool, stream: bool
) -> None:
    fields: dict[str, Any] = {"ignore_eos": True, "max_tokens": 60}
    text = complete(http, **fields)["text"]
    start = len(text) // 2
    stop = next(s for i in range(start, len(text)) if text.find(s := text[i : i + 5]) == i)
    fields |= {"stop": [stop], "include_stop_str_in_output": include}
    expected = text[: text.find(stop)] + (stop if include else "")
    if stream:
        body = {"prompt": PROMPTS[0], "temperature": 0, "stream": True} | fields
        lines = http.post("/v1/completions", json=body).text.split("\n\n")
        choices = [json.loads(line[6:])["choices"][0] for line in lines[:-2]]
        found, last = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        last = complete(http, **fields)
        found = last["text"]
    assert (found, last["finish_reason"], last["stop_reason"]) == (expected, "stop", stop)


def test_a_stop_id_ends_the_text_and_is_told(http: httpx.Client) -> None:
    tokens = complete(http, ignore_eos=True, return_token_ids=True)["token_ids"]
    stop = tokens[-1]
    choice = complete(
        http, ignore_eos=True, return_token_ids=True, max_tokens=100, stop_token_ids=[stop]
    )
    assert choice["token_ids"] == tokens[: tokens.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_probabilities_over_the_whole_vocabulary_sum_to_one(http: httpx.Client) -> None:
    choice = complete(http, logprobs=-1, max_tokens=3, return_tokens_as_token_ids=True)
    for token, drawn, top in zip(
        choice["logprobs"]["tokens"],
        choice["logprobs"]["token_logprobs"],
        choice["logprobs"]["top_logprobs"],
        strict=True,
    ):
        assert len(top) == 512
        # float32 log-probabilities: each is off by at most 2^-24 of its size, about 1e-6 here.
        assert math.fsum(math.exp(value) for value in top.values()) == pytest.approx(1, abs=1e-5)
        assert drawn == top[token] == max(top.values())  # greedy, and from the same float


SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 1234, "ignore_eos": True, "max_tokens": 24}
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}


@pytest.mark.parametrize("fields", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
def test_prompts_served_at_once_and_one_by_one_give_the_same_tokens(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    def tokens(prompt: str) -> list[int]:
        choice = complete(http, prompt=prompt, return_token_ids=True, **fields)
        found: list[int] = choice["token_ids"]
        return found

    one_by_one = [tokens(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        at_once = list(pool.map(tokens, PROMPTS))
    assert at_once == one_by_one
    assert len({tuple(found) for found in one_by_one}) > 1
    batch = http.post(
        "/v1/completions", json={"prompt": PROMPTS, "return_token_ids": True, **fields}
    )
    assert [choice["token_ids"] for choice in batch.json()["choices"]] == one_by_one


def test_samples_differ_and_are_reproducible(http: httpx.Client) -> None:
    body = {"prompt": PROMPTS[0], "n": 4, **SAMPLED}
    first, second = (http.post("/v1/completions", json=body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert len(set(texts)) == 4
    alone = complete(http, **(SAMPLED | {"seed": 1236}))
    assert alone["text"] == texts[2]  # sample i is drawn with seed + i


def leave_after_the_first_bytes(server: Any, body: dict[str, Any], read: bool) -> None:
    """Send a request on a raw socket and cut the connection, without a farewell (RST)."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + raw)
        if read:
            assert b"200 OK" in connection.recv(4096)
        else:
            wait_until(lambda: server.metric("num_requests_running") > 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def wait_until(condition: Any, limit_s: float = 10.0) -> float:
    """How long it took, in seconds."""
    start_s = time.monotonic()
    for _ in itertools.count():
        passed_s = time.monotonic() - start_s
        if condition():
            return passed_s
        assert passed_s < limit_s, "it did not happen in time"
        time.sleep(0.01)
    raise AssertionError


@pytest.mark.parametrize("stream", [True, False])
def test_a_killed_connection_frees_its_requests_within_a_second(server: Any, stream: bool) -> None:
    aborted = server.metric("request_success_total", finished_reason="abort")
    body = {"prompt": "The", "n": 32, "max_tokens": 500, "ignore_eos": True, "stream": stream}
    leave_after_the_first_bytes(server, body, read=stream)
    took_s = wait_until(
        lambda: (
            server.metric("num_requests_running") == 0
            and server.metric("num_requests_waiting") == 0
            and server.metric("kv_cache_usage_perc") == 0
        )
    )
    assert took_s < ABORT_LIMIT_S
    wait_until(
        lambda: server.metric("request_success_total", finished_reason="abort") == aborted + 32
    )


def test_a_full_queue_is_told_and_empties_again(http: httpx.Client) -> None:
    body = {"prompt": "The", "n": 32, "max_tokens": 400, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        refused = http.post("/v1/completions", json={"prompt": "The"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    wait_until(lambda: http.post("/v1/completions", json={"prompt": "The"}).status_code == 200)


def test_metrics_agree_with_what_was_served(server: Any, http: httpx.Client) -> None:
    before = server.metric("generation_tokens_total"), server.metric("prompt_tokens_total")
    body = {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    after = server.metric("generation_tokens_total"), server.metric("prompt_tokens_total")
    assert (after[0] - before[0], after[1] - before[1]) == (9, 3)
    assert (usage["completion_tokens"], usage["prompt_tokens"]) == (9, 3)


def test_long_prompts_and_short_ones_share_the_engine(http: httpx.Client) -> None:
    lengths = [1, 15, 16, 17, 100, 300, 450, 5]

    def tokens(length: int) -> list[int]:
        prompt = [3 + (7 * i) % 500 for i in range(length)]
        choice = complete(http, prompt=prompt, return_token_ids=True, **GREEDY)
        found: list[int] = choice["token_ids"]
        return found

    one_by_one = [tokens(length) for length in lengths]
    with ThreadPoolExecutor(len(lengths)) as pool:
        assert list(pool.map(tokens, lengths)) == one_by_one
