"""Measure the native CPU kernels one by one: what `make bench` runs first.

    python benchmarks/native_kernels.py --threads 2 --isa avx2

The shapes are those of SmolLM2-135M, and there are as many weights of each as the model has layers,
so that weights come from memory as they do when a model runs. The best of many calls is reported:
other work on the machine only ever adds. A row for each case goes to docs/benchmarks/kernels.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from qserve.kernels import dense_matmul as dense
from qserve.kernels import native
from qserve.kernels.activations import Activations
from qserve.kernels.gated_activation import gated_activation
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import int4_matmul, prepare
from qserve.kernels.int8_matmul import int8_matmul, quantize_int8
from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.kv_store import rope_and_store, rope_table
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.paged_attention import Scoring, paged_attention
from qserve.kernels.rms_norm import rms_norm

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "kernels.csv"
NUM_LAYERS, GROUP_SIZE, VOCABULARY, HIDDEN = 30, 64, 49152, 576
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
LINEARS = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
READ_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One case. gb_s: bytes of weights or cache read; gmac_s: multiply-adds; both at the best."""

    op: str
    shape: str
    rows: int
    best_us: float
    gb_s: float
    gmac_s: float


def main() -> None:
    """Parse the command line, measure, print, append."""
    parser = argparse.ArgumentParser(description="Measure the native CPU kernels one by one.")
    parser.add_argument("--threads", type=int, default=native.num_threads())
    parser.add_argument("--isa", choices=native.supported_isas(), default=native.isa())
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case")
    parser.add_argument("--json", action="store_true", help="print rows of JSON, append nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    native.set_num_threads(args.threads)
    native.select_isa(args.isa)
    rows = []
    for row in measure(args.seconds):
        rows.append(row)
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            rates = f"{row.gb_s:8.1f} GB/s {row.gmac_s:8.1f} GMAC/s"
            print(f"{row.op:22} {row.shape:22} {row.rows:5} {row.best_us:10.1f} us {rates}")
    if not args.json:
        append(rows, args.isa, args.threads)


def measure(seconds: float) -> Iterator[Row]:
    """Every case in turn."""
    yield measure_memory(seconds)
    yield from measure_int4(seconds)
    yield from measure_head(seconds)
    yield from measure_dense(seconds)
    yield from measure_attention(seconds)
    yield from measure_small(seconds)


def measure_memory(seconds: float) -> Row:
    """What PyTorch reads when it has next to nothing to compute."""
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    best = best_of(lambda _: memory.sum(), seconds)
    return Row("read (torch sum)", "256 MiB", 1, best * 1e6, READ_BYTES / best / 1e9, 0.0)


def measure_int4(seconds: float) -> Iterator[Row]:
    """Each linear of the model, then all of them in the order of a token."""
    layers = [
        {name: random_weight(*shape) for name, shape in LINEARS.items()} for _ in range(NUM_LAYERS)
    ]
    for name in LINEARS:
        weights = [layer[name] for layer in layers]
        for num_rows in (1, 8, 512):
            yield measure_product("int4_matmul", name, int4_matmul, weights, num_rows, seconds)
    exact = partial(int4_matmul, activations=Activations.FLOAT32)
    wide = [layer["gate_up"] for layer in layers]
    yield measure_product("int4_matmul float32", "gate_up", exact, wide, 512, seconds)
    nbytes = sum(weight.nbytes for layer in layers for weight in layer.values())
    macs = NUM_LAYERS * sum(
        num_outputs * num_inputs for num_outputs, num_inputs in LINEARS.values()
    )
    for num_rows in (1, 4, 16):
        best = best_of(partial(multiply_all, layers, buffers(num_rows)), seconds)
        rates = nbytes / best / 1e9, num_rows * macs / best / 1e9
        yield Row("int4_matmul", "all 120 linears", num_rows, best * 1e6, *rates)


def buffers(num_rows: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every linear."""
    return {
        name: (torch.randn(num_rows, num_inputs), torch.empty(num_rows, num_outputs))
        for name, (num_outputs, num_inputs) in LINEARS.items()
    }


def multiply_all(
    layers: list[dict[str, PackedWeight]],
    operands: dict[str, tuple[torch.Tensor, torch.Tensor]],
    _: int,
) -> None:
    """The linears of a token, layer by layer."""
    for layer in layers:
        for name, weight in layer.items():
            x, out = operands[name]
            int4_matmul(x, weight, out=out)


def measure_head(seconds: float) -> Iterator[Row]:
    """The output head in 8 bits."""
    weight = quantize_int8(torch.randn(VOCABULARY, HIDDEN))
    for num_rows in (1, 8):
        yield measure_product("int8_matmul", "head", int8_matmul, [weight], num_rows, seconds)


def measure_dense(seconds: float) -> Iterator[Row]:
    """The widest linear with float weights."""
    for dtype in (torch.bfloat16, torch.float16):
        op = f"dense_matmul {str(dtype).removeprefix('torch.')}"
        weights = [dense.prepare(torch.randn(3072, 576).to(dtype)) for _ in range(NUM_LAYERS)]
        for num_rows in (1, 8, 512):
            yield measure_product(op, "gate_up", dense.dense_matmul, weights, num_rows, seconds)


def measure_product(
    op: str,
    name: str,
    multiply: Callable[..., torch.Tensor],
    weights: Sequence[PackedWeight],
    num_rows: int,
    seconds: float,
) -> Row:
    """Products with each of the weights in turn."""
    first = weights[0]
    x = torch.randn(num_rows, first.in_features)
    out = torch.empty(num_rows, first.out_features)
    best = best_of(lambda i: multiply(x, weights[i % len(weights)], out=out), seconds)
    macs = num_rows * first.in_features * first.out_features
    shape = f"{name} {first.out_features}x{first.in_features}"
    return Row(op, shape, num_rows, best * 1e6, first.nbytes / best / 1e9, macs / best / 1e9)


def measure_attention(seconds: float) -> Iterator[Row]:
    """Decode steps after 128 to 2048 tokens, and a whole prompt."""
    shape = (160, KV_HEADS, 16, HEAD_DIM)
    caches = [
        LayerCache(torch.randn(shape).half(), torch.randn(shape).half()) for _ in range(NUM_LAYERS)
    ]
    for num_rows, context in ((1, 128), (1, 512), (1, 2048), (512, 512)):
        q = torch.randn(num_rows, HEADS * HEAD_DIM)
        attend = partial(
            paged_attention,
            block_tables=torch.randperm(160)[: -(-context // 16)][None].int().contiguous(),
            context_lens=torch.tensor([context], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, num_rows], dtype=torch.int32),
            scoring=Scoring(HEAD_DIM**-0.5),
            out=torch.empty_like(q),
        )
        best = best_of(partial(attend_in_turn, attend, q, caches), seconds)
        pairs = sum(range(context - num_rows + 1, context + 1))
        gb_s = 2 * context * KV_HEADS * HEAD_DIM * 2 / best / 1e9
        gmac_s = 2 * pairs * HEADS * HEAD_DIM / best / 1e9
        yield Row("paged_attention", f"context {context}", num_rows, best * 1e6, gb_s, gmac_s)


def attend_in_turn(
    attend: Callable[..., torch.Tensor], q: torch.Tensor, caches: list[LayerCache], number: int
) -> None:
    """Attention of the next layer."""
    attend(q, caches[number % len(caches)])


def measure_small(seconds: float) -> Iterator[Row]:
    """The ops between the matmuls, on one row: mostly the call from Python."""
    x, residual, ones = torch.randn(1, HIDDEN), torch.randn(1, HIDDEN), torch.ones(HIDDEN)
    out, gate_up, activated = torch.empty(1, HIDDEN), torch.randn(1, 3072), torch.empty(1, 1536)
    cache = LayerCache(torch.zeros(9, 3, 16, 64).half(), torch.zeros(9, 3, 16, 64).half())
    qkv, table = torch.randn(1, 960), rope_table(HEAD_DIM, 2048, 10000.0)
    place = torch.tensor([5], dtype=torch.int32)
    calls: dict[str, Callable[[int], object]] = {
        "rms_norm": lambda _: rms_norm(x, ones, 1e-5, residual=residual, out=out),
        "gated_activation": lambda _: gated_activation(gate_up, out=activated),
        "kv_store": lambda _: rope_and_store(qkv, place, table, cache, place),
    }
    for name, call in calls.items():
        yield Row(name, f"hidden {HIDDEN}", 1, best_of(call, seconds) * 1e6, 0.0, 0.0)


def random_weight(num_outputs: int, num_inputs: int) -> PackedWeight:
    """A 4-bit weight of random codes."""
    groups = (num_outputs, num_inputs // GROUP_SIZE)
    return prepare(
        GroupedWeight(
            codes=torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8),
            scales=(torch.rand(groups) * 0.02 + 0.001).half(),
            zero_points=torch.randint(0, 16, groups, dtype=torch.uint8),
            bits=4,
            group_size=GROUP_SIZE,
        )
    )


def best_of(call: Callable[[int], object], seconds: float) -> float:
    """Seconds of the fastest call within ``seconds``, five calls at least; each gets its number."""
    call(0)
    best, number, end = float("inf"), 0, time.perf_counter() + seconds
    while number < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call(number)
        best = min(best, time.perf_counter() - start)
        number += 1
    return best


def append(rows: list[Row], isa: str, threads: int) -> None:
    """Add the rows to the table, with what they were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    stamp = [datetime.date.today().isoformat(), commit, cpu_name(), isa, threads]
    columns = [field.name for field in fields(Row)]
    new = not TABLE.exists()
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["date", "commit", "cpu", "isa", "threads", *columns])
        for row in rows:
            values = [getattr(row, name) for name in columns]
            writer.writerow([*stamp, *(f"{v:.1f}" if isinstance(v, float) else v for v in values)])


def cpu_name() -> str:
    """What Linux calls the processor, or the architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
