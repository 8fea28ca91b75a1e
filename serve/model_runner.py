"""A model, its KV cache and the batches that go through them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from math import isfinite
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from qserve.kernels import native
from qserve.kernels.kv_cache import KvFormat
from qserve.kernels.program import Program
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.compressed_schemes import Kind
from qserve.serve.batch import Batch, BatchBuilder
from qserve.serve.config import EngineConfig
from qserve.serve.kv_cache_allocation import (
    KVCachePlan,
    allocate_kv_cache,
    free_memory,
    plan_kv_cache,
)
from qserve.serve.models.llama import LlamaModel
from qserve.serve.models.registry import find_architecture
from qserve.serve.sampler import NO_TOKEN
from qserve.serve.scheduler import Chunk, Limits
from qserve.serve.weights import WeightReader

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
"""What is asked of the head: logits, or the largest."""


class ModelRunner:
    """Computes chunks of sequences: batch, forward pass, logits.

    plan: the size of the KV cache. limits: what a step may hold. kv_format: of the cache.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        """Load the model and allocate its cache.

        Raises ``CheckpointError`` for a checkpoint that cannot be served, ``KVCacheTooSmall`` when
        memory does not suffice.
        """
        self.kv_format = config.kv_format or kv_format_of(checkpoint)
        config = replace(config, kv_format=self.kv_format)
        if config.num_threads is not None and native.available():
            native.set_num_threads(config.num_threads)
        architecture = find_architecture(checkpoint.architecture)
        model_config = architecture.read_config(checkpoint.config)
        weights = WeightReader(
            checkpoint, config.activations, config.head_dtype, config.weight_cache
        )
        weight_bytes = sum(file.stat().st_size for file in set(checkpoint.tensor_files.values()))
        self.plan: KVCachePlan = plan_kv_cache(model_config, config, free_memory() - weight_bytes)
        self.limits = Limits(
            config.max_num_seqs, config.max_num_batched_tokens, self.plan.max_model_len
        )
        self.vocab_size = model_config.vocab_size
        self._model = LlamaModel(model_config, weights, architecture.layer, self.limits)
        weights.finish()
        self._caches = allocate_kv_cache(model_config, self.plan, self.kv_format)
        self._batches = BatchBuilder(self.limits, config.block_size)
        # By the number of sequences, and what is asked of the head.
        self._programs: dict[tuple[int, str], Program] = {}
        self._records_programs = native.available()

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that every step reads in full."""
        return self._model.weight_bytes

    def run(self, chunks: Items[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks; see ``engine.Runner``."""
        return self._compute(chunks, self._model.logits).numpy()

    def run_greedy(self, chunks: Items[Chunk]) -> list[int]:
        """Compute the chunks; see ``engine.Runner``."""
        if self._model.finds_largest:
            ids, values = self._compute(chunks, self._model.largest)
            return _finite(ids.tolist(), values.tolist())
        logits = self.run(chunks)
        tokens = logits.argmax(axis=1)  # the first of equals, and of NaN
        return _finite(tokens.tolist(), logits[np.arange(tokens.size), tokens].tolist())

    def _compute(self, chunks: Items[Chunk], head: Callable[[torch.Tensor], Found]) -> Found:
        """What ``head`` makes of the last rows of the chunks that sample."""
        batch = self._batches.build(chunks)
        self._model.embed(batch.token_ids)
        is_decode = batch.token_ids.size(0) == batch.sample_rows.size(0)
        if is_decode and self._records_programs:
            return self._run_program(batch, head)
        return head(self._model.compute(batch, self._caches))

    def _run_program(self, batch: Batch, head: Callable[[torch.Tensor], Found]) -> Found:
        """Compute a batch of one row a sequence as a recorded program.

        Such batches of one size differ only in what their arrays hold: the arrays, the buffers and
        the cache stay where they are.
        """
        key = batch.token_ids.size(0), head.__name__
        program = self._programs.get(key)
        if program is None:
            program = Program(lambda: head(self._model.compute(batch, self._caches)))
            if program.others:
                names = ", ".join(sorted(program.others))
                logger.info("decode steps are not recorded: PyTorch computes %s", names)
                self._records_programs = False
                self._model.embed(batch.token_ids)  # what did run has overwritten it
                return head(self._model.compute(batch, self._caches))
            self._programs[key] = program
        program.run()
        found: Found = program.result
        return found


def _finite(tokens: list[int], logits: list[float]) -> list[int]:
    """The tokens, ``NO_TOKEN`` in place of those whose logit is not finite."""
    pairs = zip(tokens, logits, strict=True)
    return [token if isfinite(logit) else NO_TOKEN for token, logit in pairs]


def kv_format_of(checkpoint: Checkpoint) -> KvFormat:
    """The format of keys and values that a checkpoint was made for; float16 when it says none."""
    stated = checkpoint.kv_cache
    if stated is None:
        return KvFormat.FLOAT16
    return KvFormat.FLOAT8 if stated.kind is Kind.FLOAT else KvFormat.INT8


def read_eos_token_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """The end-of-sequence tokens that ``generation_config.json`` and ``config.json`` name."""
    configs = [checkpoint.config]
    path = checkpoint.folder / "generation_config.json"
    if path.is_file():
        configs.append(json.loads(path.read_text(encoding="utf-8")))
    found: set[int] = set()
    for config in configs:
        ids = config.get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)
