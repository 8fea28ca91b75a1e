"""The calibration on a GPU, as far as it can be tested without one: with a timer that knows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qserve.kernels.benchmark import Measurement
from qserve.kernels.benchmark.case import Case


@dataclass(frozen=True)
class Tile:
    """Stands for the tile of a launch rule."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@pytest.fixture
def calibration(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    script = load_script("gpu_calibration")
    monkeypatch.setattr(script, "import_module", lambda name: SimpleNamespace(Tile=Tile))
    return script


@pytest.fixture
def rule(calibration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A launch rule that takes a tile of 16 x 64 with 4 warps and 4 stages."""

    def plan(problem: object, form: object, tile: Tile, target: object) -> Tile:
        return tile

    module = SimpleNamespace(plan_launch=plan)
    monkeypatch.setattr(calibration, "launch_module", lambda op: module)
    return module


def timer(rule: Any, seconds: Callable[[Tile], float]) -> Callable[[Case], Measurement]:
    """Times a case by what the rule plans for it."""

    def measure(case: Case) -> Measurement:
        tile = rule.plan_launch(None, None, Tile(16, 64, 4, 4), None)
        us = seconds(tile)
        return Measurement(case.op, case.shape, "triton", us, us, us, 1.0, 1.0, 0.5)

    return measure


def case(shape: str) -> Case:
    return Case("int4_matmul", shape, lambda device: pytest.fail("nothing is built here"))


def test_the_fastest_tile_gets_a_row_beside_the_rule(calibration: ModuleType, rule: Any) -> None:
    measure = timer(rule, lambda tile: 10.0 / tile.block_n + tile.num_warps + tile.num_stages)
    rows = calibration.time_case(case("x, 20 rows"), measure, with_tiles=True)
    assert [row["tile"] for row in rows] == ["rule", str(Tile(32, 128, 2, 2))]
    assert rows[1]["p50_us"] < rows[0]["p50_us"]


def test_a_rule_that_is_right_has_one_row(calibration: ModuleType, rule: Any) -> None:
    measure = timer(rule, lambda tile: 1.0 if tile == Tile(16, 64, 4, 4) else 2.0)
    (row,) = calibration.time_case(case("x, 1 rows"), measure, with_tiles=True)
    assert (row["tile"], row["p50_us"]) == ("rule", 1.0)


def test_a_tile_that_does_not_fit_is_passed_over(calibration: ModuleType, rule: Any) -> None:
    def seconds(tile: Tile) -> float:
        if tile.num_stages == 2:
            raise RuntimeError("out of shared memory")
        return float(tile.num_stages)

    rows = calibration.time_case(case("x, 64 rows"), timer(rule, seconds), with_tiles=True)
    assert rows[1]["p50_us"] == 3.0
    # What was forced is undone, also after a failure.
    assert rule.plan_launch(None, None, Tile(1, 2, 3, 4), None) == Tile(1, 2, 3, 4)


def test_without_tiles_the_rule_alone_is_timed(calibration: ModuleType, rule: Any) -> None:
    measure = timer(rule, lambda tile: 5.0)
    assert len(calibration.time_case(case("x"), measure, with_tiles=False)) == 1


@pytest.mark.parametrize(
    ("shape", "rows"), [("gate_up 3072x576, groups of 64, 512 rows", 512), ("decode 8 x 128", 1)]
)
def test_rows_are_read_from_the_shape(calibration: ModuleType, shape: str, rows: int) -> None:
    assert calibration.rows_of(shape) == rows


def test_the_table_is_named_after_the_gpu(calibration: ModuleType) -> None:
    assert calibration.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_without_a_gpu_it_says_so(calibration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_calibration.py"])
    with pytest.raises(SystemExit, match="no GPU here"):
        calibration.main()


def test_failed_tests_end_it(calibration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(calibration, "run_tests", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["gpu_calibration.py"])
    assert calibration.main() == 1
