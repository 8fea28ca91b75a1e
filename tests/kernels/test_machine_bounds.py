"""The bounds of a machine, and the share of them that a piece of work can be said to reach."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.cost import Cost
from qserve.kernels.machine_bounds import MachineBounds, measure_bounds
from qserve.kernels.timing import summarize, time_calls

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qserve.kernels.machine_bounds.PROBE_BYTES", 4 << 20)
    monkeypatch.setattr("qserve.kernels.machine_bounds.PROBE_STEPS", 400)


@pytest.mark.parametrize("isa", native.supported_isas())
def test_every_instruction_set_has_bounds(isa: str) -> None:
    before = native.isa()
    native.select_isa(isa)
    try:
        bounds = measure_bounds(CPU, seconds=0.01)
    finally:
        native.select_isa(before)
    # No processor multiplies more than some TMAC/s, none that runs this less than 0.1 GMAC/s.
    assert 0.1 < bounds.float_gmac_s < 1e4
    assert 0.1 < bounds.int8_gmac_s < 1e5
    assert 0.1 < bounds.read_gb_s < 1e4


def test_a_probe_counts_the_products_it_makes() -> None:
    probe = native.extension().MachineProbe(1)
    for multiply in (probe.multiply_bytes, probe.multiply_floats):
        assert multiply(8) == 2 * multiply(4) > 0
    assert probe.read() == 1 << 20  # whole tasks


def test_without_native_kernels_pytorch_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    bounds = measure_bounds(CPU, seconds=0.0)
    assert bounds.int8_gmac_s == bounds.float_gmac_s > 0
    assert bounds.read_gb_s > 0


def test_the_shortest_time_is_that_of_the_scarcer_resource() -> None:
    bounds = MachineBounds(read_gb_s=10.0, int8_gmac_s=100.0, float_gmac_s=50.0)
    much_to_read = Cost(num_bytes=20_000_000_000, flops=2)
    much_to_compute = Cost(num_bytes=1, flops=400_000_000_000)
    assert bounds.shortest_s(much_to_read, is_int8=True) == pytest.approx(2.0)
    assert bounds.shortest_s(much_to_compute, is_int8=True) == pytest.approx(2.0)
    assert bounds.shortest_s(much_to_compute, is_int8=False) == pytest.approx(4.0)


def test_percentiles_are_samples_at_their_rank() -> None:
    timing = summarize([float(value) for value in range(100, -1, -1)])
    assert (timing.p20_s, timing.p50_s, timing.p80_s, timing.num_calls) == (20.0, 50.0, 80.0, 101)
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_a_call_gets_its_number_and_the_first_one_does_not_count() -> None:
    numbers: list[int] = []
    timing = time_calls(numbers.append, seconds=0.0)
    assert numbers == [0, 0, 1, 2, 3, 4]
    assert timing.num_calls == 5
