"""Chat completions: the response object, the stream, messages, ends."""

from __future__ import annotations

from typing import Any

import pytest

TEXT = "Paris is the capital."


def test_the_response_has_the_fields_of_the_api(client: Any) -> None:
    response = client.chat()
    body = response.json()
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert body["system_fingerprint"] == "qserve-test"
    [choice] = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "stop", None)
    assert choice["logprobs"] is None
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", TEXT)
    assert "tool_calls" not in message and message["refusal"] is None


def test_usage_counts_the_end_token(client: Any) -> None:
    usage = client.chat().json()["usage"]
    num_prompt = len(client.engine.added[-1].prompt_token_ids)
    assert usage["completion_tokens"] == len(client.engine.script) + 1
    assert usage["prompt_tokens"] == num_prompt
    assert usage["total_tokens"] == num_prompt + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_conversation_is_rendered_by_the_template(client: Any) -> None:
    client.chat(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Say"}, "hello"]},
        ]
    )
    text = client.service.tokenizer.decode(client.engine.added[-1].prompt_token_ids, False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_last_message_can_be_continued(client: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Par"}]
    client.chat(messages=messages, continue_final_message=True)
    text = client.service.tokenizer.decode(client.engine.added[-1].prompt_token_ids, False)
    assert text.endswith("<|im_start|>assistant\nPar")


def test_an_assistant_message_without_content_is_accepted(client: Any) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Again"},
    ]
    assert client.chat(messages=messages).status_code == 200


def test_tool_arguments_are_an_object_for_the_template(make_client: Any) -> None:
    template = "{{ messages[1].tool_calls[0].function.arguments.city }}{{ messages[1].reasoning }}"
    client = make_client(trust_request_chat_template=True)
    call = {"id": "1", "type": "function",
            "function": {"name": "f", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    assistant = {"role": "assistant", "tool_calls": [call], "reasoning_content": "why"}
    client.chat(messages=[{"role": "user", "content": "Hi"}, assistant], chat_template=template)
    tokens = client.engine.added[-1].prompt_token_ids
    assert client.service.tokenizer.decode(tokens) == "Romewhy"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages.0.role"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages.0.role"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "messages",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
    ],
)
def test_what_does_not_make_sense_is_refused(
    client: Any, message_of: Any, fields: dict[str, Any], param: str
) -> None:
    assert message_of(client.chat(**fields), 400, param)


def test_messages_are_required(client: Any, message_of: Any) -> None:
    assert "[missing]" in message_of(client.post("/v1/chat/completions", {}), 400, "messages")


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(
    client: Any, message_of: Any
) -> None:
    long = [{"role": "user", "content": "a" * 200}]
    for stream in (False, True):
        message = message_of(client.chat(messages=long, stream=stream), 400, "messages")
        assert "64" in message and "21" in message


def test_a_prompt_may_be_cut_from_the_left_instead(client: Any) -> None:
    long = [{"role": "user", "content": "a" * 200}]
    assert client.chat(messages=long, truncate_prompt_tokens=-1).status_code == 200
    assert len(client.engine.added[-1].prompt_token_ids) == 63
    client.chat(messages=long, truncate_prompt_tokens=5)
    text = client.service.tokenizer.decode(client.engine.added[-1].prompt_token_ids, False)
    assert text.endswith("assistant\n")


def test_the_end_by_length_is_told(client: Any) -> None:
    choice = client.chat(max_tokens=2).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert TEXT.startswith(choice["message"]["content"])


@pytest.mark.parametrize("frame_size", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"stop": "capital"}, "Paris is the ", "capital"),
        ({"stop": ["is th", "zzz"]}, "Paris ", "is th"),
        ({"stop": ["s i"], "include_stop_str_in_output": True}, "Paris i", "s i"),
        ({"stop": ["capital."]}, "Paris is the ", "capital."),
        ({"stop": ["capital. And"]}, TEXT, None),
    ],
)
def test_a_stop_string_ends_the_text_wherever_tokens_and_frames_end(
    client: Any,
    read_stream: Any,
    frame_size: int,
    stream: bool,
    fields: dict[str, Any],
    text: str,
    reason: str | None,
) -> None:
    client.engine.frame_size = frame_size
    response = client.chat(stream=stream, **fields)
    if stream:
        read = read_stream(response)
        found, choice = read.chat_text(), read.choices()[-1]
    else:
        choice = response.json()["choices"][0]
        found = choice["message"]["content"]
    assert (found, choice["finish_reason"], choice["stop_reason"]) == (text, "stop", reason)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_work_of_the_engine(client: Any, stream: bool) -> None:
    client.engine.endless = True
    assert client.chat(stop="Par", n=2, stream=stream).status_code == 200
    assert len(client.engine.aborted) == 2 and client.engine.running == set()


def test_tokens_after_a_stop_string_do_not_count(client: Any) -> None:
    usage = client.chat(stop="Par").json()["usage"]
    assert usage["completion_tokens"] == 2  # "P", "ari"


def test_stop_strings_within_min_tokens_do_not_count(client: Any) -> None:
    body = client.chat(stop=["ari", "cap"], min_tokens=4, max_tokens=20).json()
    assert body["choices"][0]["message"]["content"] == "Paris is the "


def test_the_end_token_is_no_text_even_if_special_tokens_are_kept(client: Any) -> None:
    content = client.chat(skip_special_tokens=False).json()["choices"][0]["message"]["content"]
    assert content == TEXT
    fields = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    content = client.chat(**fields).json()["choices"][0]["message"]["content"]
    assert content == TEXT + "<|im_end|>"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("frame_size", [1, 4])
@pytest.mark.parametrize("text", [TEXT, "你好, naïve 🙂 world", ""])
def test_a_stream_gives_the_text_of_the_response(
    client: Any, read_stream: Any, n: int, frame_size: int, text: str
) -> None:
    client.says(text).engine.frame_size = frame_size
    whole = client.chat(n=n, max_tokens=40).json()
    stream = read_stream(client.chat(n=n, max_tokens=40, stream=True))
    for index in range(n):
        assert stream.chat_text(index) == whole["choices"][index]["message"]["content"] == text
        assert "\ufffd" not in stream.raw


def test_the_frames_of_a_stream_follow_the_rules(client: Any, read_stream: Any) -> None:
    stream = read_stream(client.chat(stream=True, n=2))
    for key in ("id", "created", "model", "object"):
        assert len({event[key] for event in stream.events}) == 1
    assert stream.events[0]["object"] == "chat.completion.chunk"
    for index in (0, 1):
        choices = stream.choices(index)
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == "stop" and choices[-1]["delta"] == {}
        assert "stop_reason" in choices[-1]
    assert not any("usage" in event for event in stream.events)


def test_the_last_text_travels_with_the_end_by_length(client: Any, read_stream: Any) -> None:
    last = read_stream(client.chat(stream=True, max_tokens=2)).choices()[-1]
    assert last["delta"] == {"content": "ari"} and last["finish_reason"] == "length"


def test_usage_comes_last_when_asked_for(client: Any, read_stream: Any) -> None:
    options = {"include_usage": True}
    stream = read_stream(client.chat(stream=True, stream_options=options))
    assert stream.events[-1]["choices"] == []
    assert stream.events[-1]["usage"] == client.chat().json()["usage"]
    assert not any("usage" in event for event in stream.events[:-1])


def test_usage_so_far_comes_in_every_frame_when_asked_for(client: Any, read_stream: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = read_stream(client.chat(stream=True, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in stream.events]
    assert counts[0] == 0 and counts == sorted(counts)
    assert counts[-1] == len(client.engine.script) + 1


def test_logprobs_name_every_token(client: Any, read_stream: Any) -> None:
    fields = {"logprobs": True, "top_logprobs": 4}
    content = client.chat(**fields).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == TEXT + "<|im_end|>"
    first = content[0]
    assert (first["logprob"], first["bytes"]) == (-1.0, [80])
    assert [entry["logprob"] for entry in first["top_logprobs"]] == [-0.5, -1.0, -2.0, -9999.0]
    stream = read_stream(client.chat(stream=True, **fields))
    streamed = [
        entry
        for choice in stream.choices()
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert streamed == content


def test_logprobs_without_candidates(client: Any) -> None:
    content = client.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in content)
    assert client.params().num_logprobs == 0


def test_logprobs_of_held_text_are_not_lost(client: Any, read_stream: Any) -> None:
    client.says("你")
    stream = read_stream(client.chat(stream=True, logprobs=True))
    entries = [c["logprobs"]["content"][0] for c in stream.choices() if c["logprobs"]]
    assert bytes(byte for entry in entries[:3] for byte in entry["bytes"]).decode() == "你"
    assert stream.chat_text() == "你"


def test_tokens_can_be_written_as_ids(client: Any) -> None:
    fields = {"logprobs": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
    body = client.chat(**fields).json()
    [choice] = body["choices"]
    tokens = [*client.engine.script, 2]
    assert [e["token"] for e in choice["logprobs"]["content"]] == [f"token_id:{t}" for t in tokens]
    assert choice["token_ids"] == tokens
    assert body["prompt_token_ids"] == list(client.engine.added[-1].prompt_token_ids)


def test_an_engine_failure_is_a_500_and_the_server_goes_on(client: Any, message_of: Any) -> None:
    client.engine.fails_after = 2
    assert "could not compute" in message_of(client.chat(n=2), 500, None)
    assert client.engine.running == set()
    client.engine.fails_after = None
    assert client.chat().status_code == 200


def test_a_failure_in_a_stream_is_its_last_event(client: Any, read_stream: Any) -> None:
    client.engine.fails_after = 2
    response = client.chat(stream=True)
    assert response.status_code == 200
    *events, last = read_stream(response).events
    assert last["error"]["code"] == 500 and last["error"]["type"] == "InternalServerError"
    assert all("error" not in event for event in events)


def test_a_chosen_request_id_names_the_completion(client: Any) -> None:
    assert client.chat(request_id="mine").json()["id"] == "chatcmpl-mine"
    assert client.chat(request_id="two\nlines").json()["id"] != "chatcmpl-two\nlines"
