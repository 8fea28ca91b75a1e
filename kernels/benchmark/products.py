"""The products with weights of every format, and the output head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from qserve.kernels import expert_matmul as experts
from qserve.kernels import output_head
from qserve.kernels.activations import Activations
from qserve.kernels.benchmark.case import Case, ModelShapes, Workload, num_copies, randn
from qserve.kernels.codebook_weight import CODEBOOK_SIZE, CodebookWeight
from qserve.kernels.cost import Cost
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int8_matmul import round_weight
from qserve.kernels.linear_weight import NeutralWeight, prepare_linear
from qserve.kernels.packed_weight import multiply

GROUP_SIZE = 64
NUM_EXPERTS, TOP_K = 8, 2

MakeWeight = Callable[[int, int], NeutralWeight]


def int4_cases(shapes: ModelShapes) -> Iterator[Case]:
    """Every linear layer of a block in groups of 64; one of them in other ways."""
    for layer, size in shapes.linears.items():
        for rows in shapes.rows:
            name = f"{layer} {_size(size)}, groups of {GROUP_SIZE}, {rows} rows"
            yield _product("int4_matmul", name, partial(grouped, 4, GROUP_SIZE), size, rows)
    size = shapes.linears["down"]
    for rows in shapes.rows:
        for group_size, activations in (
            (32, Activations.INT8),
            (128, Activations.INT8),
            (GROUP_SIZE, Activations.FLOAT32),
            (GROUP_SIZE, Activations.INT8_TOKEN),
        ):
            make = partial(grouped, 4, group_size)
            how = f"groups of {group_size}, {activations.value} activations"
            name = f"down {_size(size)}, {how}, {rows} rows"
            yield _product("int4_matmul", name, make, size, rows, activations)
        for bits in (2, 3):
            make = partial(grouped, bits, GROUP_SIZE)
            name = f"down {_size(size)}, {bits} bits, groups of {GROUP_SIZE}, {rows} rows"
            yield _product("int4_matmul", name, make, size, rows)


def int8_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The widest linear layer: a scale for 64 inputs, and W8A8 with one for each row."""
    size = shapes.linears["gate_up"]
    for rows in shapes.rows:
        name = f"gate_up {_size(size)}, groups of {GROUP_SIZE}, {rows} rows"
        yield _product("int8_matmul", name, partial(grouped, 8, GROUP_SIZE), size, rows)
        name = f"gate_up {_size(size)}, W8A8 by token, {rows} rows"
        make = partial(grouped, 8, size[1])
        yield _product("int8_matmul", name, make, size, rows, Activations.INT8_TOKEN)


def float8_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The widest linear layer, weight-only and with activations in 8 bits."""
    size = shapes.linears["gate_up"]
    for rows in shapes.rows:
        for activations in (Activations.FLOAT32, Activations.FLOAT8_TOKEN):
            name = f"gate_up {_size(size)}, {activations.value} activations, {rows} rows"
            yield _product("float8_matmul", name, float8, size, rows, activations)


def codebook_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The widest linear layer in nf4."""
    size = shapes.linears["gate_up"]
    for rows in shapes.rows:
        for activations in (Activations.INT8, Activations.FLOAT32):
            how = f"blocks of {GROUP_SIZE}, {activations.value} activations"
            name = f"gate_up {_size(size)}, {how}, {rows} rows"
            yield _product("codebook_matmul", name, codebook, size, rows, activations)


def dense_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The widest linear layer with 16-bit weights."""
    size = shapes.linears["gate_up"]
    for rows in shapes.rows:
        for dtype in (torch.bfloat16, torch.float16):
            word = str(dtype).removeprefix("torch.")
            name = f"gate_up {_size(size)}, {word}, {rows} rows"
            make = partial(dense, dtype)
            yield _product("dense_matmul", name, make, size, rows, Activations.FLOAT32)


def head_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The largest logits of a head in 8 bits and in 16."""
    size = (shapes.vocab_size, shapes.hidden)
    for rows in shapes.rows[:2]:
        for word, make, activations in (
            ("int8", partial(grouped, 8, GROUP_SIZE), Activations.INT8),
            ("bfloat16", partial(dense, torch.bfloat16), Activations.FLOAT32),
        ):
            for k in (1, 20):
                name = f"{_size(size)}, {word}, top {k}, {rows} rows"
                yield Case("output_head", name, partial(_head, make, size, rows, k, activations))


def expert_cases(shapes: ModelShapes) -> Iterator[Case]:
    """Gate and up of a mixture of 8 experts of which a row takes 2."""
    size = shapes.linears["gate_up"]
    for bits in (4, 8):
        for rows in shapes.rows:
            name = f"{NUM_EXPERTS} of {_size(size)}, int{bits}, top {TOP_K}, {rows} rows"
            yield Case("expert_matmul", name, partial(_experts, bits, size, rows))


def grouped(bits: int, group_size: int, num_outputs: int, num_inputs: int) -> GroupedWeight:
    """Random codes in groups: with zero points below 8 bits, rounded from floats at 8."""
    if bits == 8:
        return round_weight(torch.randn(num_outputs, num_inputs), group_size)
    groups = (num_outputs, num_inputs // group_size)
    return GroupedWeight(
        codes=torch.randint(0, 2**bits, (num_outputs, num_inputs), dtype=torch.uint8),
        scales=(torch.rand(groups) * 0.02 + 0.001).half(),
        zero_points=torch.randint(0, 2**bits, groups, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
    )


def float8(num_outputs: int, num_inputs: int) -> Float8Weight:
    """Random e4m3 weights with a scale for each output."""
    weight = torch.randn(num_outputs, num_inputs).to(torch.float8_e4m3fn)
    return Float8Weight(weight, torch.full((num_outputs, 1), 0.01), block=(1, num_inputs))


def codebook(num_outputs: int, num_inputs: int) -> CodebookWeight:
    """Random 4-bit codes into sixteen levels."""
    return CodebookWeight(
        codes=torch.randint(0, CODEBOOK_SIZE, (num_outputs, num_inputs), dtype=torch.uint8),
        codebook=torch.linspace(-1, 1, CODEBOOK_SIZE),
        block_scales=torch.rand(num_outputs * num_inputs // GROUP_SIZE) * 0.02,
        block_size=GROUP_SIZE,
    )


def dense(dtype: torch.dtype, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """A random float weight."""
    return torch.randn(num_outputs, num_inputs).to(dtype)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _product(
    op: str,
    name: str,
    make: MakeWeight,
    size: tuple[int, int],
    rows: int,
    activations: Activations = Activations.INT8,
) -> Case:
    return Case(op, name, partial(_multiply, make, size, rows, activations))


def _multiply(
    make: MakeWeight,
    size: tuple[int, int],
    rows: int,
    activations: Activations,
    device: torch.device,
) -> Workload:
    neutral = make(*size)
    first = prepare_linear(neutral, device)
    weights = [first] + [
        prepare_linear(neutral, device) for _ in range(num_copies(first.nbytes) - 1)
    ]
    x, out = randn(device, rows, size[1]), randn(device, rows, size[0])
    return Workload(
        call=lambda i: multiply(x, weights[i % len(weights)], out=out, activations=activations),
        cost=Cost(first.nbytes + x.nbytes + out.nbytes, 2 * rows * size[0] * size[1]),
        is_int8=activations in (Activations.INT8, Activations.INT8_TOKEN),
        backend=first.backend,
    )


def _head(
    make: MakeWeight,
    size: tuple[int, int],
    rows: int,
    k: int,
    activations: Activations,
    device: torch.device,
) -> Workload:
    weight = prepare_linear(make(*size), device)
    x = randn(device, rows, size[1])
    return Workload(
        call=lambda _: output_head.topk_head(x, weight, k, activations=activations),
        cost=Cost(weight.nbytes + x.nbytes, 2 * rows * size[0] * size[1]),
        is_int8=activations is Activations.INT8,
        backend=weight.backend,
    )


def _experts(bits: int, size: tuple[int, int], rows: int, device: torch.device) -> Workload:
    weights = [grouped(bits, GROUP_SIZE, *size) for _ in range(NUM_EXPERTS)]
    prepared = experts.prepare(weights, device)
    x = randn(device, rows, size[1])
    # Experts one after the other: as many are read as there can be.
    ids = (torch.arange(rows * TOP_K, device=device).view(rows, TOP_K) % NUM_EXPERTS).int()
    num_read = min(NUM_EXPERTS, rows * TOP_K)
    num_bytes = prepared.nbytes * num_read // NUM_EXPERTS + x.nbytes
    out = torch.empty(rows, TOP_K, size[0], dtype=x.dtype, device=device)
    return Workload(
        call=lambda _: experts.expert_matmul(x, prepared, ids, out=out),
        cost=Cost(num_bytes + out.nbytes, 2 * rows * TOP_K * size[0] * size[1]),
        is_int8=True,
        backend=prepared.backend,
    )
