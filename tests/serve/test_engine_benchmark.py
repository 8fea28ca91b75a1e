"""Timing the engine: which steps are timed, and what the figures are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
import torch

from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.block_manager import BlockManager
from qserve.serve.engine import Engine
from qserve.serve.engine_benchmark import (
    NUM_TURNS,
    BenchmarkFailed,
    engine_config,
    measure_engine,
    time_beside_memory,
    time_decode,
    time_prefill,
)
from qserve.serve.model_runner import ModelRunner
from qserve.serve.scheduler import Scheduler

READ_GB_S = 10.0


@pytest.fixture(scope="module")
def folder(make_tiny_llama: Callable[..., Path]) -> Path:
    """A model whose context has room for what is measured."""
    return make_tiny_llama(max_position_embeddings=2048)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    runner = ModelRunner(Checkpoint(folder), engine_config())
    blocks = BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    return Engine(runner, Scheduler(runner.limits, blocks), frozenset())


@pytest.mark.parametrize(("size", "prompt_length"), [(1, 600), (4, 1)])
def test_decode_steps_begin_after_the_prompts(
    engine: Engine, size: int, prompt_length: int
) -> None:
    before = engine.stats()
    seconds = time_decode(engine, size, prompt_length, num_steps=3)
    after = engine.stats()
    assert len(seconds) == 3 and min(seconds) > 0
    assert after.prompt_tokens - before.prompt_tokens == size * prompt_length
    # One token of each request with its prompt, then one a step.
    assert after.generation_tokens - before.generation_tokens == 4 * size
    assert not engine.has_work()


def test_a_prompt_is_timed_to_its_first_token(engine: Engine) -> None:
    before = engine.stats().generation_tokens
    assert time_prefill(engine, 0) > 0
    assert engine.stats().generation_tokens - before == 1
    assert not engine.has_work()


def test_a_request_that_fails_ends_the_measurement(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ModelRunner, chunks: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(ModelRunner, "run_greedy", fail)
    with pytest.raises(BenchmarkFailed, match="RuntimeError"):
        time_decode(engine, size=1, prompt_length=1, num_steps=1)


class SlowingMemory:
    """In place of a ``ReadMeter``: half as fast at every other reading."""

    def __init__(self) -> None:
        self._num_readings = 0

    def gb_s(self, seconds: float) -> float:
        assert seconds > 0
        self._num_readings += 1
        return READ_GB_S / (2 - self._num_readings % 2)


def test_steps_are_compared_with_the_memory_of_their_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qserve.serve.engine_benchmark.ReadMeter", SlowingMemory)
    steps = iter([[1e-3, 2e-3, 9e-3], [4e-3] * 3] * (NUM_TURNS // 2))
    monkeypatch.setattr("qserve.serve.engine_benchmark.time_decode", lambda *_: next(steps))
    seconds: list[float] = []
    rates = time_beside_memory(cast(Engine, None), 12_000_000, seconds)
    assert rates == [pytest.approx((6.0, READ_GB_S)), pytest.approx((3.0, READ_GB_S / 2))] * (
        NUM_TURNS // 2
    )
    assert len(seconds) == 3 * NUM_TURNS


def test_the_figures_are_consistent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qserve.serve.engine_benchmark.ReadMeter", SlowingMemory)
    figures = measure_engine(folder, engine_config(), num_rounds=1)
    assert all(value > 0 for value in asdict(figures).values())
    assert figures.first_token_s > figures.load_s
    assert figures.read_gb_s == pytest.approx(0.75 * READ_GB_S)
    # Two layers of 64 x 128 + 64 x 64 + 3 x 64 x 128, and a head of 512 x 64, in bfloat16.
    assert figures.weight_bytes == 2 * (2 * 36864 + 512 * 64)
    assert torch.get_num_threads() == 1
