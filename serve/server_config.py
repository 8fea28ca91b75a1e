"""What the HTTP server can be told at start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_MAX_BODY_BYTES = 16 * 1024 * 1024  # a million tokens of text is about 5 MB


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Limits and manners of the HTTP side; every field has a value that does.

    host, port: where to listen; port 0 takes a free one. uds: a Unix socket instead of both.
    served_model_names: all of them answer; the first is echoed and labels the metrics. Empty: the
        name of the checkpoint's folder.
    allow_any_model_name: a request for an unknown model is answered by this one, not with 404.
    api_keys: any of them opens the guarded routes; empty: all routes are open.
    allowed_origins: web pages that may call the server from a browser (CORS); ``*`` is every page.
    chat_template: replaces the checkpoint's own. trust_request_chat_template: a request may bring
        one.
    generation_config: take sampling defaults from the checkpoint's ``generation_config.json``.
    max_logprobs: limit of ``top_logprobs`` and ``logprobs``.
    max_num_queued_reqs: sequences that may wait beyond the engine's ``max_num_seqs``; None is no
        limit. max_body_bytes: a longer request body is refused.
    sse_keep_alive_s: a stream idle for so long gets a comment frame; 0 is never.
    shutdown_timeout_s: how long running requests may go on after SIGTERM.
    metrics_prefix: what the names in ``/metrics`` start with, without the colon.
    log_level, access_log: of the HTTP server, on stderr.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    served_model_names: tuple[str, ...] = ()
    allow_any_model_name: bool = False
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    generation_config: bool = True
    max_logprobs: int = 20
    max_num_queued_reqs: int | None = None
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    sse_keep_alive_s: float = 0.0
    shutdown_timeout_s: float = 30.0
    metrics_prefix: str = "qserve"
    log_level: str = "info"
    access_log: bool = True
