"""What rounding activations, the output head and the KV cache costs on top of the weights.

    python benchmarks/activations.py MODEL --text FILE

Each way is compared with the same quantized weights computed exactly: float32 activations, the head
as it is in the file, a float32 cache. All go through the engine's own model and kernels. A row for
each way goes to docs/benchmarks/activations.csv.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qserve.cli.console import progress
from qserve.cli.row_table import append_rows, stamp
from qserve.kernels.activations import Activations
from qserve.kernels.dense_matmul import prepare
from qserve.kernels.int8_matmul import quantize_int8
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.packed_weight import PackedWeight, multiply
from qserve.kernels.soft_cap import soft_cap
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.windows import python_topics, read_text, spread_windows, tokenize
from qserve.serve.batch import Batch
from qserve.serve.models.llama import LlamaModel
from qserve.serve.models.registry import find_architecture
from qserve.serve.scheduler import Limits
from qserve.serve.weights import WeightReader

TABLE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "activations.csv"
BLOCK_SIZE = 16
POSITIONS_AT_ONCE = 128
INT8, EXACT = Activations.INT8, Activations.FLOAT32
WHOLE_ROW = 0  # as a group size of the head: one scale for a row


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute: activations and cache of the layers, group size and input of the head.

    head_group: None keeps the head as it is in the file.
    """

    activations: Activations
    kv: KvFormat
    head_group: int | None
    head_activations: Activations

    @property
    def head(self) -> str:
        """The column that says how the head is kept."""
        if self.head_group is None:
            return "float"
        return f"int8 groups of {self.head_group}" if self.head_group else "int8 rows"


REFERENCE = Way(EXACT, KvFormat.FLOAT32, None, EXACT)
GROUPS = (32, 64, 192, WHOLE_ROW)
WAYS = (
    Way(INT8, KvFormat.FLOAT32, None, EXACT),
    *(Way(EXACT, KvFormat.FLOAT32, group, EXACT) for group in GROUPS),
    *(Way(INT8, KvFormat.FLOAT32, group, INT8) for group in GROUPS),
    *(Way(INT8, kv, 64, INT8) for kv in KvFormat if kv is not KvFormat.FLOAT32),
)


class Engine:
    """The layers of one checkpoint computed in any way; loaded once for a kind of activations."""

    def __init__(self, checkpoint: Checkpoint, length: int) -> None:
        self._checkpoint = checkpoint
        self._length = length
        architecture = find_architecture(checkpoint.architecture)
        self._layer = architecture.layer
        self.config = architecture.read_config(checkpoint.config)
        self._model = cache(self._load)
        self._head = cache(self._prepare_head)

    def hidden(self, way: Way, token_ids: torch.Tensor) -> torch.Tensor:
        """What the head gets for every position of a window: ``[length, hidden_size]``."""
        model, config = self._model(way.activations), self.config
        blocks = -(-self._length // BLOCK_SIZE)
        size = (blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        caches = [LayerCache.allocate(way.kv, *size) for _ in range(config.num_layers)]
        places = torch.arange(self._length, dtype=torch.int32)
        batch = Batch(
            token_ids=token_ids,
            positions=places,
            slot_mapping=places,
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            context_lens=torch.tensor([self._length], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, self._length], dtype=torch.int32),
            sample_rows=places.long(),
        )
        model.embed(token_ids)
        return model.compute(batch, caches).clone()

    def log_probs(self, way: Way, hidden: torch.Tensor) -> torch.Tensor:
        """Log probabilities of the next token for some positions."""
        logits = multiply(hidden, self._head(way.head_group), activations=way.head_activations)
        if self.config.logit_soft_cap is not None:
            soft_cap(logits, self.config.logit_soft_cap, out=logits)
        return torch.log_softmax(logits, 1, dtype=torch.float32)

    def _load(self, activations: Activations) -> LlamaModel:
        reader = WeightReader(self._checkpoint, activations)
        limits = Limits(1, self._length, self._length)
        return LlamaModel(self.config, reader, self._layer, limits)

    def _prepare_head(self, group: int | None) -> PackedWeight:
        name = "model.embed_tokens" if self.config.tie_embeddings else "lm_head"
        weight = self._checkpoint.tensor(f"{name}.weight")
        return prepare(weight) if group is None else quantize_int8(weight, group or weight.size(1))


def compare(engine: Engine, token_ids: torch.Tensor) -> Iterator[tuple[Way, float, float]]:
    """For each way, over the positions of a window: mean KL divergence in nats, and the share where
    the most likely token is that of the reference."""
    states: dict[tuple[Activations, KvFormat], torch.Tensor] = {}
    for way in (REFERENCE, *WAYS):
        key = (way.activations, way.kv)
        if key not in states:
            states[key] = engine.hidden(way, token_ids)[:-1]
    sums = {way: [0.0, 0.0] for way in WAYS}
    num_positions = len(token_ids) - 1
    for start in range(0, num_positions, POSITIONS_AT_ONCE):
        piece = slice(start, start + POSITIONS_AT_ONCE)
        expected = engine.log_probs(REFERENCE, states[REFERENCE.activations, REFERENCE.kv][piece])
        weights, best = expected.exp(), expected.argmax(1)
        for way in WAYS:
            found = engine.log_probs(way, states[way.activations, way.kv][piece])
            sums[way][1] += float((found.argmax(1) == best).sum())
            sums[way][0] += float((weights * (expected - found)).sum(dtype=torch.float64))
    for way, (kl, same) in sums.items():
        yield way, kl / num_positions, same / num_positions


def main() -> None:
    """Parse the command line, compare window by window, print and append the rows."""
    parser = argparse.ArgumentParser(description="What 8-bit activations and heads cost.")
    parser.add_argument("model", type=Path, help="a quantized checkpoint folder")
    parser.add_argument("--text", type=Path, help="default: the help that comes with Python")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--name", help="of the model in the table; default: that of its folder")
    parser.add_argument("--text-name", help="of the text in the table")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint(args.model)
    text = read_text(args.text) if args.text else python_topics()
    windows = spread_windows(tokenize(args.model, text), args.windows, args.seq_len)
    engine = Engine(checkpoint, args.seq_len)
    figures: dict[Way, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with progress("comparing", len(windows)) as advance, torch.inference_mode():
        for index, window in enumerate(windows):
            advance(index)
            for way, kl, same in compare(engine, window):
                figures[way].append((kl, same))
    described = {
        "model": args.name or args.model.name,
        "text": args.text_name or (args.text.name if args.text else "python help"),
        "windows": f"{len(windows)}x{args.seq_len}",
    }
    rows = [described | describe(way, found) for way, found in figures.items()]
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    if not args.no_rows:
        append_rows(TABLE, [{**stamp(), **row} for row in rows])


def describe(way: Way, found: list[tuple[float, float]]) -> dict[str, Any]:
    """The columns of a way: what it is, and its means over windows."""
    kl, same = torch.tensor(found, dtype=torch.float64).unbind(1)
    error = float(kl.std()) / math.sqrt(len(kl)) if len(kl) > 1 else math.nan
    return {
        "activations": way.activations.value,
        "head": way.head,
        "head_activations": way.head_activations.value,
        "kv": way.kv.value,
        "kl": f"{float(kl.mean()):.5f}",
        "kl_standard_error": f"{error:.5f}",
        "top1": f"{float(same.mean()):.4f}",
    }


if __name__ == "__main__":
    main()
