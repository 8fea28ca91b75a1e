"""What ``/metrics`` tells Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qserve.serve.messages import EngineStats

ENGINE = "0"  # there is one engine in a process; dashboards of other servers expect the label

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_TIME_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_TIME_BUCKETS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50),
    *(60, 120, 240, 480, 960, 1920, 7680),
)
SAMPLE_BUCKETS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(slots=True)
class SequenceTimes:
    """When things happened to one sequence, in seconds of ``time.monotonic()``."""

    arrival_s: float
    num_prompt_tokens: int
    first_token_s: float | None = None
    last_token_s: float = 0.0
    num_tokens: int = 0


class EngineCollector:
    """Reads the engine's own counts at the moment they are asked for."""

    def __init__(self, prefix: str, model_name: str, read: Callable[[], EngineStats]) -> None:
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": ENGINE}
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names need not be known before the engine runs."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The metrics, as prometheus_client asks for them."""
        stats = self._read()
        usage = "Share of the KV cache blocks in use, 0 to 1."
        yield self._gauge("num_requests_running", "Sequences in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", usage, stats.kv_usage)
        yield self._gauge("gpu_cache_usage_perc", f"{usage} (older name)", stats.kv_usage)
        preemptions = "Sequences that gave up their blocks to be computed again later."
        yield self._counter("num_preemptions", preemptions, stats.num_preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


class Metrics:
    """Counts and times of one server.

    prefix: of every name but the HTTP ones. max_model_len: where the token buckets end.
    read_stats: gives the engine's load now.
    """

    def __init__(
        self,
        prefix: str,
        model_name: str,
        max_model_len: int,
        read_stats: Callable[[], EngineStats],
    ) -> None:
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": ENGINE}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCollector(prefix, model_name, read_stats))
        self._define_counters()
        self._define_times()
        self._define_sizes(token_buckets(max_model_len))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe_cache(self, dtype: str, block_size: int, num_blocks: int) -> None:
        """Note what the KV cache is: labels of a gauge that is always 1."""
        labels = self._labels | {
            "cache_dtype": dtype,
            "block_size": str(block_size),
            "num_blocks": str(num_blocks),
        }
        name = f"{self._prefix}:cache_config_info"
        info = Gauge(name, "The KV cache.", list(labels), registry=self._registry)
        info.labels(**labels).set(1)

    def request(self, times: SequenceTimes, max_tokens: int, n: int) -> None:
        """Note that a sequence was accepted."""
        self._prompt_tokens.observe(times.num_prompt_tokens)
        self._params_n.observe(n)
        self._params_max_tokens.observe(max_tokens)

    def tokens(self, times: SequenceTimes, num_tokens: int, now_s: float) -> None:
        """Note that a sequence got tokens, all at the same moment."""
        if not num_tokens:
            return
        if times.first_token_s is None:
            times.first_token_s = now_s
            self._ttft.observe(now_s - times.arrival_s)
        else:
            self._itl.observe((now_s - times.last_token_s) / num_tokens)
        times.last_token_s = now_s
        times.num_tokens += num_tokens

    def finish(self, times: SequenceTimes, reason: str) -> None:
        """Note how a sequence ended: stop, length, abort or error."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        if times.first_token_s is None:
            return
        decode_s = times.last_token_s - times.first_token_s
        self._e2e.observe(times.last_token_s - times.arrival_s)
        self._decode.observe(decode_s)
        self._generation_tokens.observe(times.num_tokens)
        if times.num_tokens > 1:
            for histogram in self._tpot:
                histogram.observe(decode_s / (times.num_tokens - 1))

    def reject(self, reason: str) -> None:
        """Note that a request was turned away because of the load."""
        self._rejections.labels(**self._labels, reason=reason).inc()

    def http(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Note an answered HTTP request. ``handler``: the route, not the path with its values."""
        self._http_requests.labels(method=method, handler=handler, status=str(status)).inc()
        self._http_seconds.labels(method=method, handler=handler).observe(seconds)

    def _define_counters(self) -> None:
        self._success = self._counter("request_success", "Ended sequences.", ["finished_reason"])
        self._rejections = self._counter(
            "admission_rejections", "Requests turned away because of the load.", ["reason"]
        )
        self._http_requests = Counter(
            "http_requests",
            "Answered HTTP requests.",
            ["method", "handler", "status"],
            registry=self._registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time from the request's headers to the end of the response.",
            ["method", "handler"],
            registry=self._registry,
        )

    def _define_times(self) -> None:
        per_token = "Time per output token after the first, of one sequence, s."
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Time to the first token, s.", TTFT_BUCKETS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Time between tokens, s.", TOKEN_TIME_BUCKETS
        )
        self._tpot = (
            self._histogram("request_time_per_output_token_seconds", per_token, TOKEN_TIME_BUCKETS),
            self._histogram(
                "time_per_output_token_seconds", f"{per_token} (older name)", TOKEN_TIME_BUCKETS
            ),
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token, s.", REQUEST_TIME_BUCKETS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "First to last token, s.", REQUEST_TIME_BUCKETS
        )

    def _define_sizes(self, buckets: tuple[float, ...]) -> None:
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of the prompt.", buckets
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a sequence.", buckets
        )
        self._params_max_tokens = self._histogram(
            "request_params_max_tokens", "Tokens a sequence may generate.", buckets
        )
        self._params_n = self._histogram(
            "request_params_n", "Samples asked for a prompt.", SAMPLE_BUCKETS
        )

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        names = [*self._labels, *labels]
        return Counter(f"{self._prefix}:{name}", text, names, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"{self._prefix}:{name}",
            text,
            list(self._labels),
            registry=self._registry,
            buckets=buckets,
        ).labels(**self._labels)


def token_buckets(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the context length."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return tuple(float(step) for step in steps if step <= max_model_len)
