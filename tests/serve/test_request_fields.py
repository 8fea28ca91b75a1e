"""Every field of a request: what it becomes, which values are refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INT64_MAX = 2**63 - 1
OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "greater_than_equal"),
    ("temperature", 2.1, "less_than_equal"),
    ("temperature", "hot", "float_type"),
    ("temperature", True, "float_type"),
    ("top_p", -0.1, "greater_than_equal"),
    ("top_p", 1.1, "less_than_equal"),
    ("top_k", -2, "greater_than_equal"),
    ("top_k", 1.5, "int_type"),
    ("min_p", 1.5, "less_than_equal"),
    ("min_p", -1, "greater_than_equal"),
    ("seed", INT64_MAX + 1, "less_than_equal"),
    ("seed", -INT64_MAX - 2, "greater_than_equal"),
    ("n", 0, "greater_than_equal"),
    ("n", 129, "less_than_equal"),
    ("max_tokens", -1, "greater_than_equal"),
    ("max_tokens", "10", "int_type"),
    ("min_tokens", -1, "greater_than_equal"),
    ("frequency_penalty", 2.5, "less_than_equal"),
    ("frequency_penalty", -2.5, "greater_than_equal"),
    ("presence_penalty", -3, "greater_than_equal"),
    ("repetition_penalty", 0, "greater_than"),
    ("logit_bias", [1], "dict_type"),
    ("logit_bias", {"5": "much"}, "float_type"),
    ("stop", "", "string_too_short"),
    ("stop", ["a", ""], "string_too_short"),
    ("stop", ["a"] * 5, "too_long"),
    ("stop", 7, "list_type"),
    ("stop_token_ids", ["x"], "int_type"),
    ("stream", "yes", "bool_type"),
    ("ignore_eos", 1, "bool_type"),
    ("truncate_prompt_tokens", -2, "greater_than_equal"),
    ("model", 5, "string_type"),
]
REFUSED: list[tuple[str, Any]] = [
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}),
    ("response_format", "json"),
    ("structured_outputs", {"regex": "a+"}),
    ("guided_json", {}),
    ("guided_regex", "a+"),
    ("guided_choice", ["a"]),
    ("guided_grammar", "root ::= x"),
    ("guided_decoding_backend", "xgrammar"),
    ("grammar", "root ::= x"),
    ("json_schema", {}),
    ("regex", "a"),
    ("ebnf", "a"),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tools", []),
    ("tool_choice", "auto"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [{"name": "f"}]),
    ("function_call", "auto"),
    ("use_beam_search", True),
    ("allowed_token_ids", [1]),
    ("bad_words", ["no"]),
    ("logprob_token_ids", [1]),
    ("prompt_logprobs", 1),
    ("prompt_embeds", "AAAA"),
    ("repetition_detection", {}),
    ("thinking_token_budget", 10),
    ("priority", 1),
    ("suffix", "end"),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x"}),
    ("best_of", 2),
]
HARMLESS: list[tuple[str, Any]] = [
    ("response_format", {"type": "text"}),
    ("tool_choice", "none"),
    ("function_call", "none"),
    ("use_beam_search", False),
    ("bad_words", []),
    ("priority", 0),
    ("suffix", ""),
    ("modalities", ["text"]),
    ("best_of", 1),
    ("guided_json", None),
    ("tools", None),
    ("user", "u"),
    ("metadata", {"a": "b"}),
    ("store", True),
    ("service_tier", "auto"),
    ("parallel_tool_calls", True),
    ("a_field_of_next_year", {"x": [1]}),
]


@pytest.mark.parametrize(("field", "value", "kind"), OUT_OF_RANGE)
@pytest.mark.parametrize("route", ["chat", "complete"])
def test_a_value_out_of_range_is_refused_with_its_field_and_kind(
    client: Any, message_of: Any, route: str, field: str, value: Any, kind: str
) -> None:
    message = message_of(getattr(client, route)(**{field: value}), 400, _param(field, value))
    assert f"[{kind}]" in message
    assert not client.engine.added
    assert getattr(client, route)().status_code == 200  # the server still answers


def _param(field: str, value: Any) -> str:
    inside = {"logit_bias": ".5", "stop_token_ids": ".0"}
    return field + (inside[field] if field in inside and value in ({"5": "much"}, ["x"]) else "")


@pytest.mark.parametrize(("field", "value"), REFUSED)
@pytest.mark.parametrize("route", ["chat", "complete"])
def test_a_field_that_would_be_lost_is_refused(
    client: Any, message_of: Any, route: str, field: str, value: Any
) -> None:
    message = message_of(getattr(client, route)(**{field: value}), 400, field)
    assert message.startswith(field) and "leave" in message


@pytest.mark.parametrize(("field", "value"), HARMLESS)
@pytest.mark.parametrize("route", ["chat", "complete"])
def test_a_field_that_says_nothing_is_accepted(
    client: Any, route: str, field: str, value: Any
) -> None:
    assert getattr(client, route)(**{field: value}).status_code == 200


def test_tools_that_may_not_be_called_are_accepted(client: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert client.chat(tools=tools, tool_choice="none").status_code == 200


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not_got_are_refused(
    client: Any, message_of: Any, literal: str
) -> None:
    raw = f'{{"prompt": "a", "temperature": {literal}}}'
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=raw, headers=headers)
    assert "not valid JSON" in message_of(response, 400, None)


def test_all_problems_are_told_at_once_and_the_first_is_the_param(
    client: Any, message_of: Any
) -> None:
    message = message_of(client.chat(temperature=9, top_p=9, n=0), 400, "temperature")
    assert "temperature: " in message and "top_p: " in message and "n: " in message


def test_at_most_ten_problems_are_told(client: Any, message_of: Any) -> None:
    fields = dict.fromkeys(
        ("temperature", "top_p", "top_k", "min_p", "seed", "n", "min_tokens", "presence_penalty",
         "frequency_penalty", "repetition_penalty", "ignore_eos", "stream"), "x"
    )  # fmt: skip
    message = message_of(client.complete(**fields), 400, "temperature")
    assert message.count("; ") == 10 and "and 2 more" in message


def test_a_long_value_is_cut_in_the_message(client: Any, message_of: Any) -> None:
    message = message_of(client.chat(temperature="x" * 100_000), 400, "temperature")
    assert len(message) < 400


def test_a_list_with_many_wrong_items_gives_a_short_message(client: Any, message_of: Any) -> None:
    response = client.chat(stop_token_ids=["x"] * 100_000)
    assert len(message_of(response, 400, "stop_token_ids.0")) < 400


def test_null_is_the_same_as_absent(client: Any) -> None:
    fields = ("temperature", "top_p", "max_tokens", "stop", "n", "seed", "logprobs", "stream",
              "stream_options", "logit_bias", "top_logprobs", "presence_penalty")  # fmt: skip
    assert client.chat(**dict.fromkeys(fields)).status_code == 200


def test_the_defaults_are_openai_s(client: Any) -> None:
    client.chat()
    params = client.params()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1, 0, 0)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (
        0,
        0,
        1,
    )
    assert (params.seed, params.num_logprobs, params.min_tokens) == (None, None, 0)
    assert params.max_tokens == 64 - len(client.engine.added[-1].prompt_token_ids)


def test_sampling_fields_reach_the_engine(client: Any) -> None:
    client.chat(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=7, max_tokens=9, min_tokens=3,
        frequency_penalty=1, presence_penalty=-1, repetition_penalty=1.2, ignore_eos=True,
        stop_token_ids=[5, 6, 5], logit_bias={"7": 200, "8": -200.0},
    )  # fmt: skip
    params = client.params()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.1)
    assert (params.seed, params.max_tokens, params.min_tokens) == (7, 9, 3)
    assert (params.frequency_penalty, params.presence_penalty) == (1, -1)
    assert (params.repetition_penalty, params.ignore_eos) == (1.2, True)
    assert params.stop_token_ids == (5, 6)
    assert params.logit_bias == ((7, 100.0), (8, -100.0))


def test_top_p_of_nothing_keeps_one_token(client: Any) -> None:
    client.chat(top_p=0, top_k=50)
    assert (client.params().top_p, client.params().top_k) == (1.0, 1)


def test_top_k_minus_one_is_off(client: Any) -> None:
    client.chat(top_k=-1)
    assert client.params().top_k == 0


def test_every_sample_has_a_seed_of_its_own(client: Any) -> None:
    client.chat(n=3, seed=INT64_MAX - 1)
    seeds = [request.params.seed for request in client.engine.added]
    assert seeds == [INT64_MAX - 1, INT64_MAX, -INT64_MAX - 1]


def test_samples_without_a_seed_stay_without(client: Any) -> None:
    client.chat(n=2)
    assert [request.params.seed for request in client.engine.added] == [None, None]


def test_the_tokens_asked_for_are_limited_by_the_context(client: Any) -> None:
    client.chat(max_tokens=100_000)
    assert client.params().max_tokens == 64 - len(client.engine.added[-1].prompt_token_ids)


def test_max_completion_tokens_wins_over_max_tokens(client: Any) -> None:
    client.chat(max_tokens=3, max_completion_tokens=5)
    assert client.params().max_tokens == 5


def test_more_tokens_required_than_allowed_is_refused(client: Any, message_of: Any) -> None:
    assert "5" in message_of(client.chat(min_tokens=6, max_tokens=5), 400, "min_tokens")


@pytest.mark.parametrize("key", ["word", "-1", "1.5", "٣"])
def test_a_bias_for_what_is_no_token_id_is_refused(client: Any, message_of: Any, key: str) -> None:
    assert "token ids" in message_of(client.chat(logit_bias={key: 1}), 400, "logit_bias")


def test_stream_options_without_a_stream_are_refused(client: Any, message_of: Any) -> None:
    response = client.chat(stream_options={"include_usage": True})
    assert "stream" in message_of(response, 400, "stream_options")


def test_more_logprobs_than_the_server_gives_are_refused(client: Any, message_of: Any) -> None:
    assert "20" in message_of(client.chat(logprobs=True, top_logprobs=21), 400, "top_logprobs")
    assert "20" in message_of(client.complete(logprobs=21), 400, "logprobs")
    message_of(client.complete(logprobs=-1), 400, "logprobs")
    assert client.complete(logprobs=20).status_code == 200


def test_the_whole_vocabulary_can_be_asked_for_when_the_server_allows(make_client: Any) -> None:
    client = make_client(max_logprobs=-1)
    client.complete(logprobs=-1)
    assert client.params().num_logprobs == 512


def test_logprobs_of_a_completion_is_a_number_not_a_boolean(client: Any, message_of: Any) -> None:
    assert "[int_type]" in message_of(client.complete(logprobs=True), 400, "logprobs")


def test_top_logprobs_needs_logprobs(client: Any, message_of: Any) -> None:
    message_of(client.chat(top_logprobs=2), 400, "top_logprobs")
    assert "[int_type]" in message_of(client.chat(top_logprobs="2"), 400, "top_logprobs")


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]) | JSON_VALUES},
        optional={
            "content": JSON_VALUES | st.just([{"type": "text", "text": "a"}]),
            "tool_calls": JSON_VALUES | st.just([{"function": {"name": "f", "arguments": "{}"}}]),
            "reasoning_content": JSON_VALUES,
            "name": JSON_VALUES,
        },
    ),
    min_size=1,
    max_size=3,
)
NAMES = sorted(
    {name for name, *_ in [*OUT_OF_RANGE, *REFUSED, *HARMLESS]}
    | {"messages", "prompt", "logprobs", "top_logprobs", "echo", "stream_options", "documents"}
    | {"chat_template_kwargs", "continue_final_message", "max_completion_tokens", "request_id"}
    | {"reasoning_effort", "skip_special_tokens", "return_token_ids", "add_special_tokens"}
)


@given(
    route=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]),
    fields=st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, max_size=4),
    base=st.sampled_from([{}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}]),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_body_is_too_strange(
    client: Any, route: str, fields: dict[str, Any], base: dict[str, Any]
) -> None:
    assert client.post(route, base | fields).status_code in (200, 400, 404)
    assert client.engine.running == set()


@given(messages=MESSAGES)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_message_is_too_strange(client: Any, messages: list[Any]) -> None:
    for route in ("/v1/chat/completions", "/tokenize"):
        assert client.post(route, {"messages": messages}).status_code in (200, 400)
