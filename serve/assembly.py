"""From a checkpoint folder to a service that can be put behind HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qserve.kernels import native
from qserve.kernels.kv_cache import KvFormat
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.admission import Admission
from qserve.serve.block_manager import BlockManager
from qserve.serve.bridge import Bridge
from qserve.serve.config import EngineConfig
from qserve.serve.engine import Engine
from qserve.serve.engine_thread import EngineThread
from qserve.serve.metrics import Metrics
from qserve.serve.model_runner import ModelRunner, read_eos_token_ids
from qserve.serve.sampling_defaults import SamplingDefaults
from qserve.serve.scheduler import Scheduler
from qserve.serve.server_config import ServerConfig
from qserve.serve.service import ModelCard, Service

if TYPE_CHECKING:
    from qserve.serve.tokenizer import Tokenizer

DISTRIBUTION = "qserve-llm"


def assemble(
    folder: Path,
    engine_config: EngineConfig,
    config: ServerConfig,
    load_tokenizer: Callable[[], Tokenizer],
) -> Service:
    """Load the model, and take its tokenizer.

    load_tokenizer: may wait for what another thread loads meanwhile; called after the weights.
    Raises ``CheckpointError`` for a model that cannot be served, ``StartupError`` for one that
    lacks a tokenizer, has unusable defaults or does not fit into memory.
    """
    # One core stays free for the thread that loads the tokenizer: OpenMP's threads spin while they
    # wait for each other, so one of them that gets no core makes loading several times slower.
    num_threads = engine_config.num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, num_threads - 1))
    checkpoint = Checkpoint(folder)
    defaults = SamplingDefaults()
    if config.generation_config:
        defaults = SamplingDefaults.from_folder(folder)
    runner = ModelRunner(checkpoint, engine_config)
    scheduler = Scheduler(
        runner.limits, BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    )
    tokenizer = load_tokenizer()
    ends = read_eos_token_ids(checkpoint) | tokenizer.eos_token_ids
    engine = Engine(runner, scheduler, ends)
    card = _describe(checkpoint, engine, runner.kv_format, engine_config, config)
    bridge = Bridge(partial(EngineThread, engine), _max_sequences(engine_config, config))
    metrics = Metrics(
        config.metrics_prefix, card.names[0], card.max_model_len, lambda: bridge.stats
    )
    plan = runner.plan
    metrics.describe_cache(runner.kv_format.value, plan.block_size, plan.num_blocks)
    return Service(config, card, tokenizer, defaults, bridge, metrics, Admission())


def _max_sequences(engine_config: EngineConfig, config: ServerConfig) -> int | None:
    if config.max_num_queued_reqs is None:
        return None
    return engine_config.max_num_seqs + config.max_num_queued_reqs


def _describe(
    checkpoint: Checkpoint,
    engine: Engine,
    kv_format: KvFormat,
    engine_config: EngineConfig,
    config: ServerConfig,
) -> ModelCard:
    names = config.served_model_names or (checkpoint.folder.resolve().name,)
    extras: dict[str, Any] = {
        "quantization": checkpoint.method,
        "kv_cache_dtype": kv_format.value,
        "weights_bytes": sum(path.stat().st_size for path in set(checkpoint.tensor_files.values())),
    }
    computed = replace(engine_config, weight_cache=None)  # where weights lie changes no result
    facts = [checkpoint.config, repr(computed), native.isa() if native.available() else None]
    digest = hashlib.sha256(json.dumps([*facts, extras], sort_keys=True).encode()).hexdigest()
    return ModelCard(
        names=names,
        root=checkpoint.folder.name,
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        fingerprint=f"qserve-{version(DISTRIBUTION)}-{digest[:8]}",
        created=int(time.time()),
        extras=extras,
    )
