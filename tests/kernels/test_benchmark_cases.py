"""The cases that ops are timed on: there are some for every op, and what they count is right."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.backend import OPS
from qserve.kernels.benchmark import CASES, find_cases, measure_case
from qserve.kernels.benchmark.case import LLAMA_8B, ModelShapes, num_copies
from qserve.kernels.machine_bounds import MachineBounds

CPU = torch.device("cpu")
BOUNDS = MachineBounds(read_gb_s=20.0, int8_gmac_s=100.0, float_gmac_s=50.0)
SMALL = ModelShapes(128, 256, 4, 2, 32, 300, (1, 3), (40,))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qserve.kernels.benchmark.shapes_for", lambda device: SMALL)
    monkeypatch.setattr("qserve.kernels.benchmark.case.MORE_THAN_CACHES", 1)


def test_every_op_has_cases() -> None:
    assert sorted(CASES) == sorted(OPS)
    for op, make in CASES.items():
        for shapes in (SMALL, LLAMA_8B):
            cases = list(make(shapes))
            assert {case.op for case in cases} == {op}
            assert len({case.shape for case in cases}) == len(cases)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("op", CASES)
def test_every_case_runs(op: str) -> None:
    for case in find_cases(CPU, (op,)):
        found = measure_case(case, CPU, BOUNDS, seconds=0.0)
        assert 0 < found.p20_us <= found.p50_us <= found.p80_us
        shortest_s = max(
            found.gb_s / BOUNDS.read_gb_s,
            # Which of the two rates is the bound depends on the case.
            found.gmac_s / BOUNDS.int8_gmac_s,
        )
        assert found.share >= 0.999 * shortest_s


@pytest.mark.usefixtures("_small")
def test_the_work_of_a_product_is_its_weight_and_its_rows() -> None:
    (case,) = find_cases(CPU, ("dense_matmul",), "bfloat16, 3 rows")
    workload = case.build(CPU)
    assert workload.cost.flops == 2 * 3 * 512 * 128
    assert workload.cost.num_bytes == 2 * 512 * 128 + 4 * 3 * (512 + 128)


@pytest.mark.usefixtures("_small")
def test_the_work_of_a_decode_step_is_the_cache_it_reads() -> None:
    (case,) = find_cases(CPU, ("paged_attention",), "int8, decode 1 x 40")
    workload = case.build(CPU)
    row_bytes = 32 + 2  # codes and a scale
    assert workload.cost.num_bytes == 40 * 2 * 2 * row_bytes + 2 * 4 * 4 * 32
    assert workload.cost.flops == 4 * 40 * 4 * 32


def test_operands_do_not_fit_a_cache_together() -> None:
    assert num_copies(1 << 30) == 1
    assert num_copies(1 << 25) == 2
    assert num_copies(1) == 64


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="'matmul': expected one of codebook_matmul"):
        find_cases(CPU, ("matmul",))
