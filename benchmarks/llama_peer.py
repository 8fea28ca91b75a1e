"""Measure llama.cpp on one GGUF file: what qserve's engine has to beat on a CPU.

    pip install llama-cpp-python          # in an environment of its own; it compiles for minutes
    python llama_peer.py MODEL.gguf --threads 2
    python llama_peer.py MODEL.gguf --convert-to q4_0 --output CONVERTED.gguf

Prints one line of JSON with the figures of `qserve bench engine`. Needs nothing of qserve, so that
it runs in the peer's environment.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import llama_cpp

FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7}  # llama_ftype in llama.h
PROMPT_LENGTH = 512
NUM_PREFILLS = 5
NUM_STEPS = 48
NUM_STEPS_AFTER_PROMPT = 64
CONTEXTS = (512, 1024)
BATCH_SIZES = (1, 4, 8, 16)


class Context:
    """A llama.cpp context, with decoding reduced to lists of (token, position, sequence)."""

    def __init__(self, model: Any, num_seqs: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 8192, 2048, 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = num_seqs
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp could not make a context")

    def decode(self, rows: list[tuple[int, int, int]], *, all_logits: bool) -> float:
        """Seconds of one ``llama_decode``; logits of every row, or of the last one."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = all_logits or i == len(rows) - 1
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_get_logits(self._context)  # waits for the result
        seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise SystemExit(f"llama_decode failed with status {status}")
        return seconds

    def clear(self) -> None:
        """Forget every sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def close(self) -> None:
        """Free the context."""
        llama_cpp.llama_free(self._context)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama_cpp has no types
def discard(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Keep llama.cpp's log off the output."""


def convert(path: Path, file_type: str, output: Path) -> None:
    """Write a copy of a GGUF file in another type; it is there in full or not at all."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.allow_requantize = True
    beside = output.with_suffix(".part")
    arguments = (str(path).encode(), str(beside).encode(), ctypes.byref(params))
    if llama_cpp.llama_model_quantize(*arguments) != 0:
        raise SystemExit(f"llama.cpp could not convert {path} to {file_type}")
    beside.replace(output)


def measure(path: Path, threads: int) -> dict[str, float | int | str]:
    """Every figure by name."""
    start = time.perf_counter()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    context = Context(model, 1, threads)
    result: dict[str, float | int | str] = {
        "engine": f"llama.cpp ({llama_cpp.__version__})",
        "threads": threads,
        "load_s": round(time.perf_counter() - start, 3),
    }
    prefill = []
    for _ in range(NUM_PREFILLS):
        context.clear()
        prefill.append(context.decode(make_prompt(0, PROMPT_LENGTH), all_logits=False))
    result["prefill512_tok_s"] = round(PROMPT_LENGTH / statistics.median(prefill), 1)
    for length in CONTEXTS:
        context.clear()
        for start_at in range(0, length, PROMPT_LENGTH):
            context.decode(make_prompt(start_at, PROMPT_LENGTH), all_logits=False)
        steps = [
            context.decode([(5, length + i, 0)], all_logits=True)
            for i in range(NUM_STEPS_AFTER_PROMPT)
        ]
        result[f"decode_b1_at{length}_tok_s"] = round(1 / statistics.median(steps), 1)
    context.close()
    for size in BATCH_SIZES:
        context = Context(model, size, threads)
        steps = [
            context.decode([(5 + s, i, s) for s in range(size)], all_logits=True)
            for i in range(NUM_STEPS)
        ]
        result[f"decode_b{size}_tok_s"] = round(size / statistics.median(steps), 1)
        context.close()
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def make_prompt(position: int, length: int) -> list[tuple[int, int, int]]:
    """Tokens spread over the vocabulary, from ``position`` on."""
    return [((i * 7919) % 40000 + 100, i, 0) for i in range(position, position + length)]


def main() -> None:
    """Parse the command line, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description="Measure llama.cpp on one GGUF file.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--convert-to", choices=FILE_TYPES, help="only convert the file")
    parser.add_argument("--output", type=Path, help="of the conversion")
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(discard, None)
    if args.convert_to:
        convert(args.gguf, args.convert_to, args.output)
    else:
        print(json.dumps(measure(args.gguf, args.threads)))


if __name__ == "__main__":
    main()
