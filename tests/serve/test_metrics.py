"""``/metrics``: names that dashboards know, and counts that are right."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qserve.serve.messages import EngineStats
from qserve.serve.metrics import Metrics, SequenceTimes, token_buckets

LABELS = {"model_name": "tiny", "engine": "0"}
GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
          "gpu_cache_usage_perc"]  # fmt: skip
COUNTERS = ["num_preemptions", "prompt_tokens", "generation_tokens", "request_success",
            "admission_rejections"]  # fmt: skip
HISTOGRAMS = [
    "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_params_n", "request_params_max_tokens",
]  # fmt: skip


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(text: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    raise AssertionError(f"{name} {labels} is not in the metrics")


def test_all_names_are_there_with_their_kind(client: Any) -> None:
    found = families(client.get("/metrics").text)
    for kind, names in (("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS)):
        for name in names:
            assert found[f"qserve:{name}"].type == kind, name
    assert found["http_requests"].type == "counter"


def test_every_sample_says_which_model(client: Any) -> None:
    client.chat()
    for name, family in families(client.get("/metrics").text).items():
        if name.startswith("qserve:"):
            assert all(sample.labels.items() >= LABELS.items() for sample in family.samples)


def test_the_prefix_can_be_the_one_of_public_dashboards(make_client: Any) -> None:
    assert "vllm:num_requests_running" in make_client(metrics_prefix="vllm").get("/metrics").text


def test_the_engine_s_numbers_are_read_when_asked_for(client: Any) -> None:
    text = client.get("/metrics").text
    assert value(text, "qserve:kv_cache_usage_perc") == 0.25
    assert value(text, "qserve:num_preemptions_total") == 3
    assert value(text, "qserve:prompt_tokens_total") == 10
    assert value(text, "qserve:generation_tokens_total") == 20


def test_ends_are_counted_by_their_reason(client: Any) -> None:
    client.chat(n=2)
    client.chat(max_tokens=1)
    client.engine.fails_after = 1
    client.chat()
    text = client.get("/metrics").text
    for reason, count in (("stop", 2), ("length", 1), ("error", 1)):
        assert value(text, "qserve:request_success_total", finished_reason=reason) == count
    assert value(text, "qserve:request_params_n_sum") == 2 + 2 + 1 + 1


def test_sizes_are_observed(client: Any) -> None:
    client.chat(max_tokens=5)
    text = client.get("/metrics").text
    assert value(text, "qserve:request_generation_tokens_sum") == 5
    assert value(text, "qserve:request_params_max_tokens_sum") == 5
    num_prompt = len(client.engine.added[-1].prompt_token_ids)
    assert value(text, "qserve:request_prompt_tokens_sum") == num_prompt


def test_answers_are_counted_by_route_and_status(client: Any) -> None:
    client.chat()
    client.chat(n=0)
    client.get("/v1/models/tiny")
    client.get("/v1/models/other")
    client.get("/some/where/1")
    client.get("/health")
    text = client.get("/metrics").text
    route = "/v1/chat/completions"
    assert value(text, "http_requests_total", handler=route, status="200") == 1
    assert value(text, "http_requests_total", handler=route, status="400") == 1
    assert value(text, "http_requests_total", handler="/v1/models/{id}", status="200") == 1
    assert value(text, "http_requests_total", handler="other", status="404") == 1
    assert "/health" not in text and "/some" not in text


def test_two_applications_do_not_share_counts(make_client: Any) -> None:
    make_client().chat()
    assert "finished_reason" not in make_client().get("/metrics").text


def test_the_cache_is_described() -> None:
    metrics = Metrics("qserve", "tiny", 100, lambda: EngineStats(0, 0, 0.0, 0, 0, 0))
    metrics.describe_cache("int8", 16, 320)
    labels = {"cache_dtype": "int8", "block_size": "16", "num_blocks": "320"}
    assert value(metrics.render().decode(), "qserve:cache_config_info", **labels) == 1


def test_times_are_taken_from_arrival_first_and_last_token() -> None:
    metrics = Metrics("qserve", "tiny", 100, lambda: EngineStats(0, 0, 0.0, 0, 0, 0))
    times = SequenceTimes(arrival_s=10.0, num_prompt_tokens=4)
    for now_s, num_tokens in ((10.5, 1), (10.6, 0), (10.7, 1), (11.1, 2)):
        metrics.tokens(times, num_tokens, now_s)
    metrics.finish(times, "stop")
    text = metrics.render().decode()
    assert value(text, "qserve:time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert value(text, "qserve:inter_token_latency_seconds_sum") == pytest.approx(0.2 + 0.2)
    assert value(text, "qserve:request_decode_time_seconds_sum") == pytest.approx(0.6)
    assert value(text, "qserve:e2e_request_latency_seconds_sum") == pytest.approx(1.1)
    assert value(text, "qserve:request_time_per_output_token_seconds_sum") == pytest.approx(0.2)


def test_token_buckets_end_at_the_context() -> None:
    assert token_buckets(64) == (1, 2, 5, 10, 20, 50)
