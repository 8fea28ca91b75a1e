"""`qserve serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.console import say
from qserve.cli.engine_options import engine_options, find_folder, read_engine_options
from qserve.cli.vllm_flags import TokenCount, without_effect

if TYPE_CHECKING:
    from qserve.serve.config import EngineConfig
    from qserve.serve.server_config import ServerConfig
    from qserve.serve.service import Service
    from qserve.serve.tokenizer import Tokenizer

DISTRIBUTION = "qserve-llm"
DEFAULT_BUDGET = 512  # tokens of a step
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def _read_chat_template(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value is None or ("{" in value and not Path(value).is_file()):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value} cannot be read as a template: {error}") from None


def _read_origins(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value is None or not value.startswith("["):
        return () if value is None else (value,)
    try:
        origins = json.loads(value)
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise click.BadParameter(f'{value} is not a JSON array of strings, such as ["*"]')
    return tuple(origins)


def _refuse_empty(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if any(not key.strip() for key in value):
        raise click.BadParameter("a key must not be empty")
    return value


@click.command(context_settings={"token_normalize_func": lambda flag: flag.replace("_", "-")})
@click.argument("model", required=False)
@click.option("--model", "model_option", hidden=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option("--uds", type=click.Path(path_type=Path), help="Unix socket instead of a port.")
@click.option(
    "--served-model-name",
    multiple=True,
    help="Name for clients; may be repeated. Default: the folder's name.",
)
@click.option("--allow-any-model-name", is_flag=True, help="Answer requests for any model name.")
@click.option(
    "--api-key",
    multiple=True,
    envvar="QSERVE_API_KEY",
    show_envvar=True,
    callback=_refuse_empty,
    help="Key that clients must send; may be repeated.",
)
@click.option(
    "--allowed-origins",
    callback=_read_origins,
    help="Web pages that may call from a browser: a JSON array, or one origin, or *.",
)
@click.option(
    "--max-model-len",
    type=TokenCount(),
    default="auto",
    show_default=True,
    help="Tokens of prompt and answer together.",
)
@click.option(
    "--max-num-seqs",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests computed at the same time.",
)
@click.option(
    "--max-num-batched-tokens",
    type=TokenCount(),
    help="Tokens computed in one step.  [default: 512, or --max-num-seqs if larger]",
)
@click.option(
    "--max-num-queued-reqs",
    type=click.IntRange(0),
    help="Requests that may wait; beyond, they get 503. Default: no limit.",
)
@engine_options
@click.option("--kv-cache-memory-bytes", type=TokenCount(), help="Memory for keys and values.")
@click.option(
    "--block-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Tokens of one block of the KV cache.",
)
@click.option(
    "--chat-template",
    callback=_read_chat_template,
    help="File with a Jinja template, instead of the model's own.",
)
@click.option(
    "--trust-request-chat-template",
    is_flag=True,
    help="Let requests bring their own chat template.",
)
@click.option(
    "--generation-config",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "none", "vllm"]),
    help="auto: sampling defaults from the model's generation_config.json. "
    "none (or vllm): OpenAI's defaults.",
)
@click.option(
    "--max-logprobs",
    type=click.IntRange(-1),
    default=20,
    show_default=True,
    help="Most logprobs a request may ask for; -1 is no limit.",
)
@click.option(
    "--max-body-bytes",
    type=TokenCount(),
    default=16 * 2**20,
    show_default=True,
    help="Largest request body.",
)
@click.option(
    "--sse-keep-alive-interval",
    type=click.FloatRange(0),
    default=0.0,
    help="Seconds of silence after which a stream gets a comment; 0 is never.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests get after SIGTERM.",
)
@click.option(
    "--metrics-prefix",
    type=click.Choice(["qserve", "vllm"]),
    default="qserve",
    show_default=True,
    help="First part of the metrics' names.",
)
@click.option(
    "--uvicorn-log-level",
    "log_level",
    default="info",
    show_default=True,
    type=click.Choice(["debug", "info", "warning", "error", "critical"]),
)
@click.option("--disable-uvicorn-access-log", is_flag=True, help="Log no line for each request.")
@without_effect
def command(model: str | None, model_option: str | None, **options: Any) -> None:
    """Serve MODEL (a folder, a hub id or a GGUF file) as an OpenAI-compatible API.

    SIGTERM or Ctrl-C once: running requests may finish. Twice: they are aborted.
    """
    named = model or model_option
    if named is None or (model and model_option):
        raise click.UsageError("give one model: a folder, a hub id or a .gguf file")
    logging.basicConfig(
        level=options["log_level"].upper(), format=LOG_FORMAT, stream=sys.stderr, force=True
    )
    _serve(named, options)


def _serve(model: str, options: dict[str, Any]) -> None:
    from qserve.serve.listener import address_of, listen

    start_s = time.monotonic()
    config = _server_config(options, model)
    listener = listen(config)  # before the imports below, which take seconds

    from qserve.serve.assembly import assemble
    from qserve.serve.server import serve

    engine_config = _engine_config(options)
    address = address_of(config, listener)
    with listener or nullcontext():
        folder = find_folder(model)
        with ThreadPoolExecutor(1) as beside:
            loading = beside.submit(_load_tokenizer, folder, config.chat_template)
            service = assemble(folder, engine_config, config, loading.result)
        loaded_s = time.monotonic() - start_s
        serve(service, listener, lambda: _announce(service, address, loaded_s))


def _load_tokenizer(folder: Path, chat_template: str | None) -> Tokenizer:
    """In a thread: importing transformers takes as long as loading the weights of a small model."""
    from qserve.serve.tokenizer import Tokenizer

    return Tokenizer(folder, chat_template)


def _server_config(options: dict[str, Any], model: str) -> ServerConfig:
    from qserve.serve.server_config import ServerConfig

    return ServerConfig(
        host=options["host"],
        port=options["port"],
        uds=options["uds"],
        served_model_names=options["served_model_name"] or (default_name(model),),
        allow_any_model_name=options["allow_any_model_name"],
        api_keys=options["api_key"],
        allowed_origins=options["allowed_origins"],
        chat_template=options["chat_template"],
        trust_request_chat_template=options["trust_request_chat_template"],
        generation_config=options["generation_config"] == "auto",
        max_logprobs=options["max_logprobs"],
        max_num_queued_reqs=options["max_num_queued_reqs"],
        max_body_bytes=options["max_body_bytes"],
        sse_keep_alive_s=options["sse_keep_alive_interval"],
        shutdown_timeout_s=options["shutdown_timeout"],
        metrics_prefix=options["metrics_prefix"],
        log_level=options["log_level"],
        access_log=not options["disable_uvicorn_access_log"],
    )


def _engine_config(options: dict[str, Any]) -> EngineConfig:
    from qserve.serve.config import EngineConfig

    budget = options["max_num_batched_tokens"]
    try:
        return EngineConfig(
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            max_num_batched_tokens=budget or max(DEFAULT_BUDGET, options["max_num_seqs"]),
            block_size=options["block_size"],
            kv_cache_bytes=options["kv_cache_memory_bytes"],
            **read_engine_options(options),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def default_name(model: str) -> str:
    """What clients call a model that got no name: the hub id, or the name of the folder or file."""
    path = Path(model)
    if not path.exists():
        return model
    return path.stem if path.is_file() else path.resolve().name


def _announce(service: Service, address: str, loaded_s: float) -> None:
    card, config = service.card, service.config
    call = {"model": card.names[0], "messages": [{"role": "user", "content": "Hello"}]}
    curl = "curl" if config.uds is None else f"curl --unix-socket {config.uds}"
    url = address if config.uds is None else "http://localhost"
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    say(f"qserve {version(DISTRIBUTION)} serves {', '.join(card.names)} at {address}")
    cache = f"keys and values in {card.extras['kv_cache_dtype']}"
    say(f"  context {card.max_model_len} tokens, {cache}, ready in {loaded_s:.1f} s")
    defaults = service.defaults.describe()
    if defaults:
        say(f"  sampling defaults of generation_config.json: {defaults}")
    say(f"  {curl} {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\")
    say(f"    -d '{json.dumps(call)}'")
