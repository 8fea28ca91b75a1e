"""Flags of `vllm serve` that people type: their spelling of numbers, and those without effect."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from qserve.cli.console import say

COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
# As vLLM reads them: a small letter is decimal, a capital one binary.
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}

# Accepted, so that a command line moves over unchanged; a line says that nothing happens.
VALUE_FLAGS = """
    --root-path --middleware --tokenizer --tokenizer-mode --revision --tokenizer-revision
    --dtype --quantization --seed --hf-overrides --logprobs-mode --load-format --download-dir
    --model-loader-extra-config --runner --convert --gpu-memory-utilization
    --kv-cache-dtype-skip-layers --num-gpu-blocks-override --prefix-caching-hash-algo
    --cpu-offload-gb --kv-offloading-size --max-num-active-seqs --max-num-queued-tokens
    --long-prefill-token-threshold --scheduling-policy --watermark --stream-interval
    --scheduler-cls --tensor-parallel-size --pipeline-parallel-size --data-parallel-size
    --distributed-executor-backend --compilation-config --cudagraph-capture-sizes
    --max-cudagraph-capture-size --attention-backend --linear-backend --structured-outputs-config
    --otlp-traces-endpoint --collect-detailed-traces --custom-histogram-buckets
    --show-hidden-metrics-for-version --tool-call-parser --tool-parser-plugin --reasoning-parser
    --response-role --chat-template-content-format --default-chat-template-kwargs --max-log-len
    --disable-access-log-for-endpoints --api-server-count --allowed-methods
    --allowed-headers --swap-space --max-loras --max-lora-rank --lora-dtype --max-cpu-loras
"""
SWITCH_FLAGS = """
    --allow-credentials --enable-request-id-headers --disable-fastapi-docs
    --enable-auto-tool-choice --exclude-tools-when-tool-choice-none --enable-prompt-tokens-details
    --enable-per-request-metrics --enable-server-load-tracking --enable-log-requests
    --enable-log-outputs --log-error-stack --trust-remote-code --enforce-eager
    --skip-tokenizer-init --enable-sleep-mode --enable-prefix-caching --enable-chunked-prefill
    --async-scheduling --enable-expert-parallel --disable-custom-all-reduce --numa-bind
    --disable-log-stats --disable-log-requests --kv-cache-metrics --fully-sharded-loras
"""
SHORT = {"--tensor-parallel-size": "-tp", "--pipeline-parallel-size": "-pp"}
SHORT |= {"--data-parallel-size": "-dp", "--quantization": "-q", "--compilation-config": "-O"}

Command = TypeVar("Command", bound=Callable[..., Any])


class TokenCount(click.ParamType[int | None]):
    """A count that may be written ``4096``, ``4k`` (4000), ``4K`` (4096) or ``auto`` (None)."""

    name = "count"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """The count, None for ``auto``."""
        if isinstance(value, int) or value == "auto":
            return None if value == "auto" else value
        found = COUNT.fullmatch(value)
        if found is None or float(found.group(1)) <= 0:
            self.fail(f"{value!r} is not a count: write 4096, 4k, 1M or auto", param, ctx)
        return int(float(found.group(1)) * UNITS[found.group(2)])


def without_effect(command: Command) -> Command:
    """Add the hidden flags that only say that they do nothing."""
    for flag in VALUE_FLAGS.split():
        names = [flag, SHORT[flag]] if flag in SHORT else [flag]
        command = click.option(*names, hidden=True, expose_value=False, callback=_warn)(command)
    for flag in SWITCH_FLAGS.split():
        switch = f"{flag}/--no-{flag.removeprefix('--')}"
        add = click.option(switch, default=None, hidden=True, expose_value=False, callback=_warn)
        command = add(command)
    return command


def _warn(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None:
        say(f"warning: {parameter.opts[0]} is accepted and has no effect here")
