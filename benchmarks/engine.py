"""Measure qserve's engine on one checkpoint: whole steps, scheduling and sampling included.

    python benchmarks/engine.py MODEL --threads 2 --json

Prints tokens per second (medians of warm steps), the seconds to load and the peak memory. The same
work as benchmarks/llama_peer.py gives llama.cpp; benchmarks/compare_engines.py runs both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch

from qserve.kernels import native
from qserve.serve.config import EngineConfig
from qserve.serve.engine import Engine
from qserve.serve.messages import AddRequest, RequestFailed, SamplingParams

PROMPT_LENGTH = 512
NUM_PREFILLS = 5
NUM_STEPS = 48
NUM_STEPS_AFTER_PROMPT = 64
BATCH_SIZES = (1, 4, 8, 16)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Measure qserve's engine on one checkpoint.")
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--threads", type=int, help="default: every core this process may use")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    args = parser.parse_args()
    result = measure(args.model, args.threads)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:24} {value}")


def measure(model: Path, threads: int | None) -> dict[str, float | int | str]:
    """Every figure by name."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    config = EngineConfig(max_model_len=1024, max_num_seqs=16, num_threads=threads)
    engine = Engine.from_checkpoint(model, config)
    result: dict[str, float | int | str] = {
        "engine": "qserve",
        "threads": native.num_threads() if native.available() else torch.get_num_threads(),
        "load_s": round(time.perf_counter() - start, 3),
    }
    prefill = [seconds_of_prefill(engine) for _ in range(NUM_PREFILLS)]
    result["prefill512_tok_s"] = round(PROMPT_LENGTH / statistics.median(prefill), 1)
    at_512 = seconds_of_steps(engine, 1, NUM_STEPS_AFTER_PROMPT, PROMPT_LENGTH)
    result["decode_b1_at512_tok_s"] = round(1 / statistics.median(at_512), 1)
    for size in BATCH_SIZES:
        steps = seconds_of_steps(engine, size, NUM_STEPS, 1)
        result[f"decode_b{size}_tok_s"] = round(size / statistics.median(steps), 1)
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def seconds_of_prefill(engine: Engine) -> float:
    """Seconds from the arrival of a prompt to its first token."""
    add(engine, "prefill", PROMPT_LENGTH, 1)
    seconds = timed_step(engine)
    if engine.has_work():
        raise SystemExit("the prompt was not computed in one step: raise max_num_batched_tokens")
    return seconds


def seconds_of_steps(engine: Engine, size: int, num_steps: int, prompt_length: int) -> list[float]:
    """Seconds of each decode step with ``size`` requests."""
    for i in range(size):
        add(engine, str(i), prompt_length, num_steps + 1)
    engine.step()  # the prompts
    return [timed_step(engine) for _ in range(num_steps)]


def add(engine: Engine, name: str, prompt_length: int, max_tokens: int) -> None:
    """Queue a greedy request that never ends by itself."""
    prompt = tuple(
        (i * 7919 + len(name)) % min(40000, engine.vocab_size - 100) + 50
        for i in range(prompt_length)
    )
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(AddRequest(name, prompt, params, time.monotonic()))


def timed_step(engine: Engine) -> float:
    """Seconds of one step. A failed request ends the measurement."""
    start = time.perf_counter()
    outputs = engine.step()
    seconds = time.perf_counter() - start
    for output in outputs:
        if isinstance(output, RequestFailed):
            raise SystemExit(f"the engine failed: {output.message}")
    return seconds


if __name__ == "__main__":
    main()
