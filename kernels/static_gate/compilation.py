"""Compiles a kernel for a target and reads what came out. Needs no GPU and no driver.

Compiler and disassembler are in Triton's wheel. A process that has TRITON_INTERPRET set holds
interpreted kernels and cannot compile them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.static_gate import amd, nvidia
from qserve.kernels.static_gate.program import Counts, count, hot_loop
from qserve.kernels.static_gate.report import Report, issue_share
from qserve.kernels.static_gate.spec import KernelSpec


def inspect_kernel(spec: KernelSpec, target: GpuTarget) -> Report:
    """The report on ``spec`` compiled for ``target``.

    Raises ``ValueError`` when the arguments of ``spec`` are not those of its kernel, and whatever
    the compiler raises.
    """
    compiled = triton.compile(
        _source(spec, target),
        target=_triton_target(target),
        options={
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "enable_fp_fusion": True,
        },
    )
    if target.vendor is Vendor.NVIDIA:
        return _nvidia_report(spec, target, compiled)
    return _amd_report(spec, target, compiled)


def _triton_target(target: GpuTarget) -> GPUTarget:
    if target.vendor is Vendor.NVIDIA:
        return GPUTarget("cuda", _capability(target), 32)
    return GPUTarget("hip", target.name, 64 if target.name.startswith("gfx9") else 32)


def _capability(target: GpuTarget) -> int:
    return int(target.name.removeprefix("sm_"))


def _source(spec: KernelSpec, target: GpuTarget) -> ASTSource:
    names = list(spec.kernel.arg_names)
    given = [*spec.arguments, *spec.constants]
    if sorted(given) != sorted(names):
        difference = sorted(set(given) ^ set(names))
        raise ValueError(f"{spec.name}: the kernel and its spec differ in {difference}")
    signature, constants, facts = {}, {}, {}
    for position, name in enumerate(names):
        if name in spec.constants:
            signature[name] = "constexpr"
            constants[(position,)] = spec.constants[name]
            continue
        signature[name], _, divisor = spec.arguments[name].partition(":")
        known = [["tt.divisibility", int(divisor)]] if divisor else []
        if target.vendor is Vendor.AMD and signature[name].startswith("*"):
            known.append(["tt.pointer_range", 32])  # true of tensors below 2 GiB: buffer loads
        if known:
            facts[(position,)] = known
    return ASTSource(spec.kernel, signature, constants, facts)


def _nvidia_report(spec: KernelSpec, target: GpuTarget, compiled: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        sass = _output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    program = nvidia.parse(sass)
    registers, local_bytes = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    num_warps = _number(r"\.reqntid\s+(\d+)", compiled.asm["ptx"]) // 32
    shared_bytes = compiled.metadata.shared
    resident = 0
    if shared_bytes <= target.shared_bytes:
        resident = nvidia.resident_warps(_capability(target), registers, shared_bytes, num_warps)
    whole = count(program.instructions)
    loop = hot_loop(program) or whole
    return Report(
        kernel=spec.name,
        target=target.name,
        tile=spec.tile,
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=shared_bytes,
        num_warps=num_warps,
        resident_warps=resident,
        issue_share=_issue_share(spec, target, loop, num_warps),
        whole=whole,
        loop=loop,
    )


def _amd_report(spec: KernelSpec, target: GpuTarget, compiled: Any) -> Report:
    assembly = compiled.asm["amdgcn"]
    program = amd.parse(assembly)
    whole = count(program.instructions)
    # Scalar registers spill into lanes of vector registers, and no farther.
    spilled = amd.resource(assembly, "vgpr_spill_count")
    frame = amd.resource(assembly, "private_segment_fixed_size")
    fits = compiled.metadata.shared <= target.shared_bytes
    return Report(
        kernel=spec.name,
        target=target.name,
        tile=spec.tile,
        registers=amd.resource(assembly, "vgpr_count"),
        local_bytes=max(4 * spilled, frame),
        shared_bytes=compiled.metadata.shared,
        num_warps=spec.num_warps,
        resident_warps=amd.resident_warps(assembly) if fits else 0,
        issue_share=None,
        whole=whole,
        loop=hot_loop(program) or whole,
    )


def _issue_share(spec: KernelSpec, target: GpuTarget, loop: Counts, num_warps: int) -> float | None:
    return issue_share(
        target.name, target.num_cores, loop.num_instructions, num_warps, spec.stream_bytes
    )


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the compiler said: {text[:200]!r}")
    return int(found[1])
