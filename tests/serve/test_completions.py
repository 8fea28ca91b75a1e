"""Text completions: the kinds of prompts, echo, logprobs, choices and their order."""

from __future__ import annotations

from typing import Any

import pytest

TEXT = "Paris is the capital."


def texts(response: Any) -> list[str]:
    return [choice["text"] for choice in response.json()["choices"]]


def test_the_response_has_the_fields_of_the_api(client: Any) -> None:
    response = client.complete()
    body = response.json()
    assert body["object"] == "text_completion" and body["model"] == "tiny"
    assert body["id"] == f"cmpl-{response.headers['x-request-id']}"
    [choice] = body["choices"]
    assert choice == {
        "index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None,
    }  # fmt: skip
    assert body["usage"]["completion_tokens"] == len(client.engine.script) + 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The", ["The"]),
        (["The", "sea"], ["The", "sea"]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ],
)
def test_a_prompt_comes_in_four_kinds(client: Any, prompt: Any, expected: list[Any]) -> None:
    assert client.complete(prompt=prompt).status_code == 200
    encode = client.service.tokenizer.encode
    wanted = [encode(item) if isinstance(item, str) else item for item in expected]
    assert [request.prompt_token_ids for request in client.engine.added] == wanted


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], [1, "a"], ["a", 1], [["a"]], [[1], [True]], 5, {"a": 1}, [1.5], [True],
     [[1], []], ["a"] * 1025],
)  # fmt: skip
def test_other_prompts_are_refused(client: Any, message_of: Any, prompt: Any) -> None:
    assert message_of(client.complete(prompt=prompt), 400, "prompt")
    assert client.engine.added == []


@pytest.mark.parametrize("prompt", [[512], [-1], [[1], [2**40]]])
def test_ids_outside_the_vocabulary_are_refused(client: Any, message_of: Any, prompt: Any) -> None:
    assert "0 to 511" in message_of(client.complete(prompt=prompt), 400, "prompt")


def test_a_prompt_is_required(client: Any, message_of: Any) -> None:
    assert "[missing]" in message_of(client.post("/v1/completions", {}), 400, "prompt")


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(
    client: Any, message_of: Any
) -> None:
    for stream in (False, True):
        message = message_of(client.complete(prompt=[5] * 64, stream=stream), 400, "prompt")
        assert message.count("64") == 2
    assert client.complete(prompt=[5] * 63).status_code == 200


def test_sixteen_tokens_are_the_default(client: Any) -> None:
    client.complete()
    assert client.params().max_tokens == 16


def test_choices_come_in_the_order_of_prompts_and_samples(client: Any) -> None:
    body = client.complete(prompt=["The", "sea"], n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    prompts = [request.prompt_token_ids for request in client.engine.added]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert body["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])
    assert body["usage"]["completion_tokens"] == 4 * (len(client.engine.script) + 1)


def test_echo_puts_the_prompt_before_the_text(client: Any, read_stream: Any) -> None:
    assert texts(client.complete(echo=True)) == ["The harbour" + TEXT]
    stream = read_stream(client.complete(echo=True, stream=True))
    assert stream.choices()[0]["text"] == "The harbourP"
    assert stream.text() == "The harbour" + TEXT


def test_echo_of_ids_decodes_them(client: Any) -> None:
    ids = list(client.service.tokenizer.encode("The sea"))
    assert texts(client.complete(prompt=ids, echo=True)) == ["The sea" + TEXT]


def test_only_the_prompt_comes_back_when_no_token_is_asked_for(
    client: Any, read_stream: Any
) -> None:
    body = client.complete(echo=True, max_tokens=0, n=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["The harbour"] * 2
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert client.engine.added == []
    stream = read_stream(client.complete(echo=True, max_tokens=0, stream=True))
    assert stream.text() == "The harbour"


def test_no_tokens_without_echo_is_refused(client: Any, message_of: Any) -> None:
    assert "echo: true" in message_of(client.complete(max_tokens=0), 400, "max_tokens")


def test_logprobs_of_the_prompt_are_refused(client: Any, message_of: Any) -> None:
    assert "prompt" in message_of(client.complete(echo=True, logprobs=1), 400, "logprobs")


def test_logprobs_have_the_drawn_token_among_the_candidates(client: Any) -> None:
    logprobs = client.complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT + "<|im_end|>"
    assert logprobs["token_logprobs"] == [-1.0] * len(logprobs["tokens"])
    assert logprobs["top_logprobs"][0] == {"<": -0.5, "P": -1.0}
    assert logprobs["text_offset"][:4] == [0, 1, 4, 5]


def test_minus_infinity_is_written_as_a_number(client: Any) -> None:
    top = client.complete(logprobs=4).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert min(top[0].values()) == -9999.0


def test_offsets_go_on_between_frames(client: Any, read_stream: Any) -> None:
    whole = client.complete(logprobs=2, n=2).json()["choices"][1]["logprobs"]
    stream = read_stream(client.complete(logprobs=2, n=2, stream=True))
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        found = [e for c in stream.choices(1) if c["logprobs"] for e in c["logprobs"][key]]
        assert found == whole[key]


def test_a_stream_gives_the_text_of_the_response(client: Any, read_stream: Any) -> None:
    client.says("你好 🙂")
    fields = {"prompt": ["The", "sea"], "n": 2, "max_tokens": 30}
    stream = read_stream(client.complete(stream=True, **fields))
    assert [stream.text(index) for index in range(4)] == texts(client.complete(**fields))
    for index in range(4):
        ends = [choice["finish_reason"] for choice in stream.choices(index)]
        assert ends[-1] == "stop" and not any(ends[:-1])
    assert {event["object"] for event in stream.events} == {"text_completion"}


def test_usage_in_streams(client: Any, read_stream: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = read_stream(client.complete(stream=True, stream_options=options))
    assert stream.events[-1]["choices"] == []
    assert stream.events[-1]["usage"] == client.complete().json()["usage"]
    assert all("usage" in event for event in stream.events)


def test_token_ids_can_be_had(client: Any) -> None:
    [choice] = client.complete(prompt=[5, 6], return_token_ids=True).json()["choices"]
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["token_ids"] == [*client.engine.script, 2]


def test_a_stop_id_is_told_and_is_no_text(client: Any) -> None:
    assert client.complete(stop_token_ids=[7]).status_code == 200
    assert client.params().stop_token_ids == (7,)
