"""How fast the engine is on one checkpoint: whole steps, scheduling and sampling included."""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qserve.kernels.machine_bounds import ReadMeter
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.block_manager import BlockManager
from qserve.serve.config import EngineConfig
from qserve.serve.engine import Engine
from qserve.serve.errors import ServeError
from qserve.serve.messages import AddRequest, RequestFailed, SamplingParams
from qserve.serve.model_runner import ModelRunner
from qserve.serve.scheduler import Scheduler

PROMPT_LENGTH = 512
NUM_PREFILLS = 5
NUM_STEPS = 48
NUM_STEPS_AFTER_PROMPT = 64
CONTEXTS = (512, 1024)
BATCH_SIZES = (1, 4, 8, 16)
NUM_TURNS = 6
READING_SECONDS = 0.1

MIN_MODEL_LEN = CONTEXTS[-1] + NUM_STEPS_AFTER_PROMPT + 1
"""Tokens of context that the longest request reaches."""


class BenchmarkFailed(ServeError):
    """The engine could not do what is measured."""


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Medians of warm steps; tokens a second are of all requests of a batch together.

    load_s: from the files to an engine that takes requests. first_token_s: from the files to the
    first token of a prompt of one token. weight_bytes: what a decode step reads of the weights.
    read_gb_s: the rate at which this machine reads memory, measured between the steps.
    decode_b1_read_share: ``weight_bytes`` times steps a second, as a share of the rate beside them.
    """

    load_s: float
    first_token_s: float
    prefill512_tok_s: float
    decode_b1_tok_s: float
    decode_b4_tok_s: float
    decode_b8_tok_s: float
    decode_b16_tok_s: float
    decode_b1_at512_tok_s: float
    decode_b1_at1024_tok_s: float
    peak_rss_mib: int
    weight_bytes: int
    read_gb_s: float
    decode_b1_read_share: float


def engine_config(**formats: Any) -> EngineConfig:
    """Limits that hold what is measured; formats: other fields of ``EngineConfig``."""
    return EngineConfig(max_model_len=MIN_MODEL_LEN, max_num_seqs=BATCH_SIZES[-1], **formats)


def measure_engine(folder: Path, config: EngineConfig, num_rounds: int) -> EngineFigures:
    """Load the model in ``folder`` and time it.

    config: from ``engine_config``. num_rounds: how often everything but loading is measured, in
    turn, so that a slow minute of the machine does not fall on one figure alone. Raises
    ``BenchmarkFailed`` when a request fails, and what loading a model raises.
    """
    start = time.perf_counter()
    runner = ModelRunner(Checkpoint(folder), config)
    blocks = BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    engine = Engine(runner, Scheduler(runner.limits, blocks), frozenset())
    load_s = time.perf_counter() - start
    time_decode(engine, 1, 1, 0)
    first_token_s = time.perf_counter() - start
    seconds = defaultdict[str, list[float]](list)
    peak_rss_mib = 0
    rates_beside: list[tuple[float, float]] = []
    for _ in range(num_rounds):
        time_everything(engine, seconds)
        # Before the meter takes its memory.
        peak_rss_mib = peak_rss_mib or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        rates_beside += time_beside_memory(engine, runner.weight_bytes, seconds["b1"])
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    rates = {f"decode_b{size}_tok_s": size / medians[f"b{size}"] for size in BATCH_SIZES}
    rates |= {f"decode_b1_at{n}_tok_s": 1 / medians[f"at{n}"] for n in CONTEXTS}
    return EngineFigures(
        load_s=load_s,
        first_token_s=first_token_s,
        prefill512_tok_s=PROMPT_LENGTH / medians["prefill"],
        peak_rss_mib=peak_rss_mib,
        weight_bytes=runner.weight_bytes,
        read_gb_s=statistics.median(memory for _, memory in rates_beside),
        decode_b1_read_share=statistics.median(step / memory for step, memory in rates_beside),
        **rates,
    )


def time_everything(engine: Engine, seconds: dict[str, list[float]]) -> None:
    """Prompts, and all steps but those of ``time_beside_memory``; adds the seconds of each to the
    list of its kind."""
    seconds["prefill"] += [time_prefill(engine, shift) for shift in range(NUM_PREFILLS)]
    for context in CONTEXTS:
        seconds[f"at{context}"] += time_decode(engine, 1, context, NUM_STEPS_AFTER_PROMPT)
    for size in BATCH_SIZES[1:]:
        seconds[f"b{size}"] += time_decode(engine, size, 1, NUM_STEPS)


def time_beside_memory(
    engine: Engine, weight_bytes: int, seconds: list[float]
) -> list[tuple[float, float]]:
    """Steps of a single sequence and readings of memory in turn: what one has to do with the other
    shows only so where neighbours change the rate of memory within seconds.

    Adds to ``seconds`` those of each step. Returns, of each turn, the rates at which the steps read
    weights and at which memory can be read, in 10^9 bytes a second.
    """
    meter = ReadMeter()
    rates = []
    for _ in range(NUM_TURNS):
        steps = time_decode(engine, 1, 1, NUM_STEPS)
        seconds += steps
        read_gb_s = weight_bytes / statistics.median(steps) / 1e9
        rates.append((read_gb_s, meter.gb_s(READING_SECONDS)))
    return rates


def time_prefill(engine: Engine, shift: int) -> float:
    """Seconds from the arrival of a prompt to its first token; each ``shift`` is another prompt."""
    _add(engine, str(shift), PROMPT_LENGTH, 1)
    seconds = 0.0
    while engine.has_work():
        seconds += _time_step(engine)
    return seconds


def time_decode(engine: Engine, size: int, prompt_length: int, num_steps: int) -> list[float]:
    """Seconds of each of ``num_steps`` decode steps with ``size`` requests, after their prompts,
    which together fit one step when there are several."""
    computed = engine.stats().prompt_tokens
    for i in range(size):
        _add(engine, str(i), prompt_length, num_steps + 1)
    while engine.stats().prompt_tokens < computed + size * prompt_length:
        _time_step(engine)
    return [_time_step(engine) for _ in range(num_steps)]


def _add(engine: Engine, name: str, prompt_length: int, max_tokens: int) -> None:
    """Queue a greedy request that never ends by itself."""
    step = 7919  # a prime: the tokens of a prompt are spread over the vocabulary
    prompt = tuple((step * i + int(name)) % engine.vocab_size for i in range(prompt_length))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(AddRequest(name, prompt, params, time.monotonic()))


def _time_step(engine: Engine) -> float:
    start = time.perf_counter()
    outputs = engine.step()
    seconds = time.perf_counter() - start
    for output in outputs:
        if isinstance(output, RequestFailed):
            raise BenchmarkFailed(f"the engine failed on what is measured: {output.message}")
    return seconds
