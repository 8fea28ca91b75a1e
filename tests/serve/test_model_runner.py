"""Recorded decode steps give the logits of steps that are not; not every model is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qserve.kernels.gated_activation import Gate
from qserve.kernels.program import Program
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.block_manager import BlockManager
from qserve.serve.config import EngineConfig
from qserve.serve.messages import SamplingParams
from qserve.serve.model_runner import ModelRunner, read_eos_token_ids
from qserve.serve.sampler import NO_TOKEN
from qserve.serve.scheduler import Chunk, Scheduler
from qserve.serve.sequence import Sequence

NUM_STEPS = 20
PROMPTS = ((5, 6, 7), (100,), tuple(range(40, 80)))

MakeLlama = Callable[..., Path]


def load(folder: Path) -> ModelRunner:
    return ModelRunner(Checkpoint(folder), EngineConfig(max_model_len=128, max_num_seqs=4))


def decode(
    runner: ModelRunner,
    prompts: tuple[tuple[int, ...], ...],
    compute: Callable[[list[Chunk]], Any] | None = None,
) -> list[NDArray[Any]]:
    """What ``compute`` gives in every step, all prompts in one batch: logits, or tokens."""
    blocks = BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    scheduler = Scheduler(runner.limits, blocks)
    for i, prompt in enumerate(prompts):
        scheduler.add(Sequence(str(i), prompt, SamplingParams(max_tokens=100)))
    steps = []
    for _ in range(NUM_STEPS):
        chunks = scheduler.schedule()
        found = np.array((compute or runner.run)(chunks))
        steps.append(found)
        tokens = found.argmax(axis=1) if found.ndim == 2 else found
        for chunk, token in zip(chunks, tokens, strict=True):
            chunk.sequence.num_computed = chunk.end
            chunk.sequence.token_ids.append(int(token))
    return steps


def count_recordings(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    recorded: list[Program] = []

    class Counted(Program):
        def __init__(self, body: Callable[[], object]) -> None:
            super().__init__(body)
            recorded.append(self)

    monkeypatch.setattr("qserve.serve.model_runner.Program", Counted)
    return recorded


@pytest.mark.parametrize("variant", [{}, {"attention_bias": True}])
def test_a_recorded_step_gives_the_logits_of_one_that_is_not(
    make_tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any]
) -> None:
    recorded = count_recordings(monkeypatch)
    model = make_tiny_llama(**variant)
    runner = load(model)
    found = [decode(runner, prompts) for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    assert len(recorded) == 2  # one for each number of sequences, however many steps there are
    eager = load(model)
    eager._records_programs = False
    expected = [decode(eager, prompts) for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    assert len(recorded) == 2
    np.testing.assert_array_equal(np.concatenate(sum(found, [])), np.concatenate(sum(expected, [])))


def load_capped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, soft_cap: float | None
) -> ModelRunner:
    runner = load(folder)
    capped = replace(runner._model.config, logit_soft_cap=soft_cap)
    monkeypatch.setattr(runner._model, "config", capped)
    return runner


@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_greedy_tokens_are_those_of_the_largest_logits(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, soft_cap: float | None
) -> None:
    runner = load_capped(tiny_llama, monkeypatch, soft_cap)
    assert runner._model.finds_largest == (soft_cap is None)
    expected = [logits.argmax(axis=1) for logits in decode(runner, PROMPTS)]
    np.testing.assert_array_equal(decode(runner, PROMPTS, runner.run_greedy), expected)


@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_no_token_is_taken_from_logits_that_overflowed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, soft_cap: float | None
) -> None:
    runner = load_capped(tiny_llama, monkeypatch, soft_cap)
    runner._model.norm.fill_(float("nan"))
    blocks = BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    scheduler = Scheduler(runner.limits, blocks)
    scheduler.add(Sequence("a", PROMPTS[0], SamplingParams(max_tokens=1)))
    assert runner.run_greedy(scheduler.schedule()) == [NO_TOKEN]


def activate_in_pytorch(gate_up: torch.Tensor, _: Gate, out: torch.Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def test_a_model_with_steps_that_are_not_native_is_not_recorded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "qserve.serve.layers.feed_forward.gated_activation"
    monkeypatch.setattr(module, activate_in_pytorch)
    recorded = count_recordings(monkeypatch)
    runner = load(tiny_llama)
    found = decode(runner, PROMPTS)
    assert not runner._programs
    assert len(recorded) == 1  # the attempt that shows it
    assert "aten.silu.default" in recorded[0].others
    runner._records_programs = False
    expected = decode(runner, PROMPTS)
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize(
    ("config_ids", "generation_ids", "expected"),
    [
        (2, None, {2}),
        (2, 7, {2, 7}),
        ([2, 3], [7, 2], {2, 3, 7}),
        (None, [7], {7}),
        (None, None, set()),
    ],
)
def test_end_tokens_are_those_of_either_config(
    tmp_path: Path, config_ids: object, generation_ids: object, expected: set[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config_ids}))
    if generation_ids is not None:
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": generation_ids}))
    assert read_eos_token_ids(Checkpoint(tmp_path)) == expected
