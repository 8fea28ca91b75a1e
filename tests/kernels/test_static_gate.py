"""The kernels keep their promises in machine code, and a broken promise does not go unseen."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qserve.kernels.gpu_target import TARGETS
from qserve.kernels.static_gate import amd, nvidia
from qserve.kernels.static_gate.catalogue import FAMILIES, production_kernels
from qserve.kernels.static_gate.fingerprint import fingerprint
from qserve.kernels.static_gate.program import Counts, Kind, count, hot_loop
from qserve.kernels.static_gate.report import Report, broken_promises, issue_share
from qserve.kernels.static_gate.spec import KernelSpec, Promises
from qserve.kernels.static_gate.table import COLUMNS, page, page_path, read_page, row

REFERENCE = Path(__file__).resolve().parent.parent.parent / "docs" / "reference"
UPDATE = "python -m qserve.kernels.static_gate --pages docs/reference"
CORE_TARGETS = ("sm_80", "sm_90", "gfx942")

SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;
.L_x_2:
        /*0040*/                   LDG.E R5, [R2.64] ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/                   NOP ;
        /*0070*/                   I2F R9, R8 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   STL [R1], R9 ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""
AMDGCN = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_ushort v5, v[6:7], off
	buffer_load_dword v4, s[0:3], 0 offen lds
	ds_read_b64 v[8:9], v10
	v_cvt_f32_ubyte0_e32 v11, v12
	v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_add_u32_e32 v1, v2, v3
	s_cbranch_scc1 .LBB0_1
	scratch_store_dword off, v1, s32
	s_endpgm
; Occupancy: 5
	.section	.AMDGPU.csdata
	.vgpr_count:     72
	.vgpr_spill_count: 3
"""


def make_report(**changes: Any) -> Report:
    """A report on a kernel that has nothing wrong with it."""
    counts = Counts(100, {"HMMA": 16}, {4: 1}, {16: 7}, 10, 0, 0, 50)
    report = Report("k", "sm_80", "16x64", 80, 0, 1024, 4, 24, 0.5, counts, counts)
    return replace(report, **changes)


def make_spec(promises: Promises) -> KernelSpec:
    return KernelSpec("k", "16x64", None, {}, {}, 4, 3, promises)


def run_gate(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The records of the command in a process of its own, which compiles and never interprets."""
    path = folder / "gate.json"
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qserve.kernels.static_gate", "--json", str(path), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert path.exists(), result.stderr
    records: list[dict[str, Any]] = json.loads(path.read_text())
    assert (result.returncode == 0) == all(not record["broken"] for record in records)
    return records


def describe(records: list[dict[str, Any]]) -> list[str]:
    return [f"{r['target']} {r['kernel']}: {r['broken']}" for r in records if r["broken"]]


@pytest.fixture(scope="module")
def core_records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The few kernels of every test run, compiled for one target of each kind."""
    folder = tmp_path_factory.mktemp("gate")
    return run_gate(folder, "--core", "--targets", ",".join(CORE_TARGETS))


@pytest.mark.parametrize("target", CORE_TARGETS)
def test_the_core_kernels_keep_their_promises(
    core_records: list[dict[str, Any]], target: str
) -> None:
    records = [record for record in core_records if record["target"] == target]
    assert len(records) == sum(spec.is_core for spec in production_kernels(TARGETS[target]))
    assert describe(records) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_keeps_its_promises(target: str, tmp_path: Path) -> None:
    records = run_gate(tmp_path, "--targets", target)
    assert len(records) == len(production_kernels(TARGETS[target]))
    assert describe(records) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_is_of_the_kernels_as_they_are(family: str) -> None:
    expected = {
        (spec.name, target.name, spec.tile, fingerprint(spec))
        for target in TARGETS.values()
        for spec in FAMILIES[family](target)
    }
    written = {(*cells[:3], cells[-1]) for cells in read_page(page_path(REFERENCE, family))}
    assert sorted(expected ^ written) == [], UPDATE


def test_the_pages_say_what_the_core_kernels_compile_to(
    core_records: list[dict[str, Any]],
) -> None:
    rows = {cells[:2]: cells for f in FAMILIES for cells in read_page(page_path(REFERENCE, f))}
    registers = COLUMNS.index("registers")
    for record in core_records:
        written = rows[record["kernel"], record["target"]]
        assert written[registers] == str(record["registers"]), f"{written}: {UPDATE}"


def test_a_fingerprint_is_of_all_that_the_compiler_is_given() -> None:
    first, second = production_kernels(TARGETS["sm_80"])[:2]
    assert fingerprint(first) == fingerprint(first)
    changed = [
        second,
        replace(first, num_warps=1),
        replace(first, arguments={**first.arguments, "x_ptr": "*fp16"}),
        replace(first, constants={**first.constants, "BLOCK_M": 128}),
        replace(first, promises=Promises(min_warps=1)),
    ]
    assert len({fingerprint(spec) for spec in (first, *changed)}) == 6


def test_a_fingerprint_follows_the_kernel_into_what_it_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = next(s for s in production_kernels(TARGETS["sm_80"]) if "int4_matmul" in s.name)
    before = fingerprint(spec)
    source = inspect.getsource

    def change_one(function: Any) -> str:
        text = source(function)
        return text.replace("& 15", "& 7") if function.__name__ == "_less_zero" else text

    monkeypatch.setattr(inspect, "getsource", change_one)
    assert fingerprint(spec) != before


def test_sass_is_read_with_its_loops() -> None:
    program = nvidia.parse(SASS)
    assert sorted(program.loops) == [(0x30, 0xA0), (0x40, 0x80)]
    whole = count(program.instructions)
    assert whole.num_instructions == 11
    assert whole.loads == {16: 1, 4: 1} and whole.copies == {16: 1}
    assert whole.num_local == 1
    assert whole.wide_share == 32 / 36


def test_the_hot_loop_is_the_innermost_that_works() -> None:
    loop = hot_loop(nvidia.parse(SASS))
    assert loop is not None
    assert loop.tensor_core == {"HMMA": 1}
    assert loop.loads == {4: 1} and loop.copies == {}
    assert loop.num_conversions == 1 and loop.num_local == 0


def test_straight_code_has_no_hot_loop() -> None:
    assert hot_loop(nvidia.parse(SASS.split(".L_x_1")[0])) is None


def test_amd_code_is_read_with_its_loop_and_resources() -> None:
    program = amd.parse(AMDGCN)
    loop = hot_loop(program)
    assert loop is not None
    assert loop.tensor_core == {"mfma": 1}
    assert loop.loads == {16: 1, 2: 1} and loop.copies == {4: 1}
    assert (loop.num_shared, loop.num_conversions, loop.num_arithmetic) == (1, 1, 2)
    assert sum(i.kind is Kind.LOCAL for i in program.instructions) == 1
    assert amd.resource(AMDGCN, "vgpr_spill_count") == 3
    assert amd.resident_warps(AMDGCN) == 20


def test_resident_warps_are_limited_by_what_runs_out_first() -> None:
    assert nvidia.resident_warps(80, registers=32, shared_bytes=0, num_warps=4) == 64
    assert nvidia.resident_warps(80, registers=128, shared_bytes=0, num_warps=4) == 16
    assert nvidia.resident_warps(80, registers=32, shared_bytes=80 * 1024, num_warps=4) == 8


def test_the_issue_share_is_issue_time_over_memory_time() -> None:
    # 108 cores at 1.41 GHz and 2039 GB/s: 13.39 bytes a cycle and core.
    assert issue_share("sm_80", 108, 200, 4, 4096) == pytest.approx(200 / (4096 / 13.39), rel=1e-3)
    assert issue_share("gfx942", 304, 200, 4, 4096) is None
    assert issue_share("sm_80", 108, 200, 4, None) is None


def test_a_kernel_with_nothing_wrong_breaks_no_promise() -> None:
    promises = Promises("HMMA", 0.9, 0.8, 8, True)
    assert broken_promises(make_report(), make_spec(promises)) == []


LOOP = make_report().loop


@pytest.mark.parametrize(
    ("changes", "promises", "words"),
    [
        ({"local_bytes": 8}, Promises(), "spills"),
        ({"whole": replace(LOOP, num_local=2)}, Promises(), "spills"),
        ({"resident_warps": 0}, Promises(), "does not fit"),
        ({}, Promises(tensor_core="HGMMA"), "no HGMMA"),
        ({"loop": replace(LOOP, copies={8: 7})}, Promises(min_wide_share=0.9), "wide"),
        ({"issue_share": 0.81}, Promises(max_issue_share=0.8), "issue share"),
        ({"resident_warps": 4}, Promises(min_warps=8), "4 warps"),
        ({"loop": replace(LOOP, num_conversions=1)}, Promises(no_conversions=True), "conversions"),
    ],
)
def test_a_broken_promise_is_named(changes: dict[str, Any], promises: Promises, words: str) -> None:
    found = broken_promises(make_report(**changes), make_spec(promises))
    assert len(found) == 1 and words in found[0]


def test_a_page_that_is_written_reads_back(tmp_path: Path) -> None:
    rows = [row(make_report(), "0123abcd"), row(make_report(target="sm_90"), "4567abcd")]
    path = page_path(tmp_path, "matmul")
    assert read_page(path) == []
    path.write_text(page("matmul", rows))
    assert read_page(path) == rows


def test_the_command_names_the_targets_it_knows() -> None:
    command = [sys.executable, "-m", "qserve.kernels.static_gate", "--targets", "sm_70"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "sm_70" in result.stderr and "sm_90" in result.stderr
