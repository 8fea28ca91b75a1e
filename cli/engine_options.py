"""The options of every command that runs the engine: how it computes and what it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qserve.cli.cache import WEIGHT_CACHE_VARIABLE, cache_folder, weight_cache_folder
from qserve.cli.console import say
from qserve.cli.threads import threads_option

AUTO = "auto"
KV_CACHE_DTYPES = {  # our names and vLLM's, to those of KvFormat
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_per_token_head": "fp8",
    "int8": "int8",
    "int8_per_token_head": "int8",
    "int4": "int4",
    "int4_per_token_head": "int4",
}

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = (
    threads_option,
    click.option(
        "--activations",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "int8", "float32", "int8-token", "float8-token"]),
        help="Input of the quantized layers: int8 is fast, float32 exact; int8-token and "
        "float8-token have one scale for each token. auto: what the checkpoint was made for, "
        "else int8.",
    ),
    click.option(
        "--head-dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "int8", "float"]),
        help="How the output layer is kept: int8 reads half the memory. auto: int8 for a quantized "
        "model.",
    ),
    click.option(
        "--kv-cache-dtype",
        default="auto",
        show_default=True,
        type=click.Choice([AUTO, *KV_CACHE_DTYPES]),
        metavar="[auto|float16|bfloat16|float32|fp8|int8|int4]",
        help="How keys and values are kept: int8 holds nearly twice the tokens, int4 3.5 times. "
        "auto: what the checkpoint has scales for, else float16.",
    ),
    click.option(
        "--weight-cache",
        metavar="DIR|off",
        envvar=WEIGHT_CACHE_VARIABLE,
        show_envvar=True,
        help="Where repacked weights are kept, which the next start reads. Default: in the user's "
        "cache folder.",
    ),
)


def engine_options(command: Command) -> Command:
    """Decorate a command with the options, in order; ``read_engine_options`` reads them."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def read_engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``EngineConfig`` that the options set; None where the engine decides."""
    from qserve.kernels.activations import Activations
    from qserve.kernels.kv_cache import KvFormat
    from qserve.serve.config import HeadDtype

    activations, head_dtype = options["activations"], options["head_dtype"]
    kv_cache_dtype = options["kv_cache_dtype"]
    return {
        "num_threads": options["threads"],
        "activations": None if activations == AUTO else Activations(activations),
        "head_dtype": None if head_dtype == AUTO else HeadDtype(head_dtype),
        "kv_format": None if kv_cache_dtype == AUTO else KvFormat(KV_CACHE_DTYPES[kv_cache_dtype]),
        "weight_cache": weight_cache_folder(os.environ, options["weight_cache"]),
    }


def find_folder(model: str) -> Path:
    """The folder of a model that is named by folder, hub id or GGUF file.

    Raises what ``quant.source.resolve_model`` raises.
    """
    if Path(model).is_dir():  # no need for the libraries that fetch and convert models
        return Path(model)
    from qserve.quant.source import resolve_model

    return resolve_model(model, cache=cache_folder(os.environ), notice=say).folder
