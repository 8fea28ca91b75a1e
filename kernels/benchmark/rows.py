"""The ops on each row: norms, activation, sampling. One row is mostly the call from Python."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from qserve.kernels.benchmark.case import Case, ModelShapes, Workload, randn
from qserve.kernels.cost import Cost
from qserve.kernels.gated_activation import Gate, gated_activation
from qserve.kernels.head_norm import head_norm
from qserve.kernels.layer_norm import layer_norm
from qserve.kernels.rms_norm import rms_norm
from qserve.kernels.rms_norm_int8 import rms_norm_int8
from qserve.kernels.sample import SamplingBatch, sample_tokens
from qserve.kernels.soft_cap import soft_cap

EPS = 1e-5


def norm_cases(op: str, shapes: ModelShapes) -> Iterator[Case]:
    """A norm with the addition to the residual stream."""
    for rows in shapes.rows:
        build = partial(_normalize, op, rows, shapes.hidden)
        yield Case(op, f"hidden {shapes.hidden}, {rows} rows", build)


def activation_cases(shapes: ModelShapes) -> Iterator[Case]:
    """Each of the gates."""
    for gate in Gate:
        for rows in shapes.rows:
            build = partial(_activate, gate, rows, shapes.inner)
            name = f"{gate.value}, inner {shapes.inner}, {rows} rows"
            yield Case("gated_activation", name, build)


def head_norm_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The norm of the heads of the queries."""
    for rows in shapes.rows:
        build = partial(_normalize_heads, rows, shapes.num_heads, shapes.head_dim)
        yield Case("head_norm", f"{shapes.num_heads} x {shapes.head_dim}, {rows} rows", build)


def soft_cap_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The limit for the logits of a few rows."""
    for rows in shapes.rows[:2]:
        build = partial(_cap, rows, shapes.vocab_size)
        yield Case("soft_cap", f"vocabulary {shapes.vocab_size}, {rows} rows", build)


def sample_cases(shapes: ModelShapes) -> Iterator[Case]:
    """Greedy rows and rows that are drawn; a copy of the logits is part of it."""
    for rows in shapes.rows[:2]:
        for name, temperature in (("greedy", 0.0), ("top-k 50, top-p 0.95", 1.0)):
            build = partial(_sample, temperature, rows, shapes.vocab_size)
            yield Case("sample", f"{name}, vocabulary {shapes.vocab_size}, {rows} rows", build)


def _normalize(op: str, rows: int, width: int, device: torch.device) -> Workload:
    x, residual, out = (randn(device, rows, width) for _ in range(3))
    weight, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    calls = {
        "rms_norm": lambda _: rms_norm(x, weight, EPS, residual=residual, out=out),
        "rms_norm_int8": lambda _: rms_norm_int8(x, weight, EPS, residual=residual),
        "layer_norm": lambda _: layer_norm(x, weight, bias, EPS, residual=residual, out=out),
    }
    written = x.numel() if op == "rms_norm_int8" else out.nbytes
    return Workload(calls[op], Cost(x.nbytes + 2 * residual.nbytes + written, 4 * x.numel()))


def _normalize_heads(rows: int, num_heads: int, head_dim: int, device: torch.device) -> Workload:
    x, out = (randn(device, rows, num_heads * head_dim) for _ in range(2))
    weight = torch.ones(head_dim, device=device, dtype=x.dtype)
    return Workload(
        call=lambda _: head_norm(x, weight, EPS, out=out),
        cost=Cost(x.nbytes + out.nbytes, 4 * x.numel()),
    )


def _cap(rows: int, vocab_size: int, device: torch.device) -> Workload:
    x, out = (randn(device, rows, vocab_size) for _ in range(2))
    return Workload(
        call=lambda _: soft_cap(x, 30.0, out=out),
        cost=Cost(x.nbytes + out.nbytes, 2 * x.numel()),
    )


def _activate(gate: Gate, rows: int, width: int, device: torch.device) -> Workload:
    gate_up, out = randn(device, rows, 2 * width), randn(device, rows, width)
    return Workload(
        call=lambda _: gated_activation(gate_up, gate, out=out),
        cost=Cost(gate_up.nbytes + out.nbytes, 4 * out.numel()),
    )


def _sample(temperature: float, rows: int, vocab_size: int, device: torch.device) -> Workload:
    source = 4 * torch.randn(rows, vocab_size, device=device)
    logits = torch.empty_like(source)
    zeros, ones = torch.zeros(rows, device=device), torch.ones(rows, device=device)
    batch = SamplingBatch(
        temperature=temperature * ones,
        top_k=50 * ones.int(),
        top_p=0.95 * ones,
        min_p=zeros,
        repetition_penalty=ones,
        frequency_penalty=zeros,
        presence_penalty=zeros,
        uniforms=0.5 * ones.double(),
    )
    return Workload(
        call=lambda _: sample_tokens(logits.copy_(source), batch),
        cost=Cost(3 * source.nbytes, 2 * source.numel()),
    )
