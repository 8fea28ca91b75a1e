"""Attention as it runs: an 8B Llama (32 heads, 8 KV heads), and models with other heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.gpu_target import TARGETS, GpuTarget, Vendor
from qserve.kernels.kv_cache import KvFormat
from qserve.kernels.online_softmax.kernel import merge_kernel
from qserve.kernels.paged_attention import kernel as attention_kernel
from qserve.kernels.paged_attention import launch as attention_rule
from qserve.kernels.paged_attention.launch import AttentionLaunch, AttentionProblem, TileLaunch
from qserve.kernels.static_gate.spec import TRITON_NAMES, KernelSpec, Promises

_HALF, _BRAIN = torch.float16, torch.bfloat16
_LLAMA, _GEMMA = (32, 8, 128), (16, 8, 256)


@dataclass(frozen=True, slots=True)
class _Case:
    """heads: query heads, KV heads and their size. format: None for a cache of ``dtype``."""

    kind: str
    num_sequences: int
    heads: tuple[int, int, int]
    dtype: torch.dtype
    format: KvFormat | None = None
    window: int | None = None
    soft_cap: bool = False
    sinks: bool = False
    is_core: bool = False


_CASES = (
    _Case("decode", 8, _LLAMA, _HALF, is_core=True),
    _Case("decode", 256, _LLAMA, _HALF),
    _Case("decode", 8, _GEMMA, _BRAIN, window=4096, soft_cap=True),
    _Case("decode", 8, _LLAMA, _HALF, KvFormat.FLOAT8),
    _Case("decode", 8, _LLAMA, _HALF, KvFormat.INT8),
    _Case("decode", 8, _LLAMA, _BRAIN, KvFormat.INT4),
    _Case("prefill", 8, _LLAMA, _BRAIN, is_core=True),
    _Case("prefill", 8, _LLAMA, _BRAIN, KvFormat.INT8),
    _Case("prefill", 8, _LLAMA, _BRAIN, KvFormat.INT4),
)
_BLOCK_SIZE = 64
_MAX_CONTEXT = 4096
_CHUNK = 256  # tokens of a prefilling sequence in one batch

_INTEGERS = ("table_stride", "num_sequences", "num_segments")
_CODES = {KvFormat.INT8: "*i8:16", KvFormat.FLOAT8: "*u8:16", KvFormat.INT4: "*u8:16"}


def attention_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What the launch rules of attention launch on ``target``."""
    merges = [
        _merge_spec(_Case("merge", 8, _LLAMA, _HALF)),
        _merge_spec(_Case("merge", 8, _LLAMA, _BRAIN, KvFormat.INT4)),
    ]
    return [*(_attention_spec(case, target) for case in _CASES), *merges]


def _problem(case: _Case) -> AttentionProblem:
    num_heads, num_kv_heads, head_dim = case.heads
    return AttentionProblem(
        num_sequences=case.num_sequences,
        num_rows=case.num_sequences * (_CHUNK if case.kind == "prefill" else 1),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=_BLOCK_SIZE,
        max_context=_MAX_CONTEXT,
        format=case.format or (KvFormat.FLOAT16 if case.dtype is _HALF else KvFormat.BFLOAT16),
        window=case.window,
    )


def _attention_spec(case: _Case, target: GpuTarget) -> KernelSpec:
    problem = _problem(case)
    launch = attention_rule.attention_launch(problem, target)
    tile = launch.prefill if launch.prefill is not None else launch.decode
    constants = attention_rule.tile_constants(launch, tile)
    arguments = _arguments(case, bool(constants["PARALLEL"]))
    return KernelSpec(
        name=_name(case, problem),
        tile=_tile(launch, tile),
        kernel=attention_kernel.attention_kernel,
        arguments={name: kind for name, kind in arguments.items() if kind is not None},
        constants=constants | {name: None for name, kind in arguments.items() if kind is None},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        promises=_promises(case, target),
        stream_bytes=attention_rule.trip_bytes(problem),
        is_core=case.is_core,
    )


def _arguments(case: _Case, parallel: bool) -> dict[str, str | None]:
    dtype = TRITON_NAMES[case.dtype]
    part_dtype = "fp32" if parallel else dtype
    format = case.format
    codes = f"*{dtype}:16" if format is None else _CODES[format]
    scales = "*fp16:16" if format is not None and format.has_scales else None
    offsets = "*fp16:16" if format is not None and format.has_offsets else None
    return {
        **dict.fromkeys(("q_ptr", "out_ptr"), f"*{dtype}:16"),
        **dict.fromkeys(("k_ptr", "v_ptr"), codes),
        **dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), scales),
        **dict.fromkeys(("k_offset_ptr", "v_offset_ptr"), offsets),
        "sink_ptr": "*fp32:16" if case.sinks else None,
        **dict.fromkeys(("sum_ptr", "maximum_ptr"), f"*{part_dtype}:16"),
        **dict.fromkeys(("table_ptr", "context_ptr", "start_ptr"), "*i32:16"),
        "scale": "fp32",
        "soft_cap": "fp32" if case.soft_cap else None,
        "window": "i32" if case.window is not None else None,
        **dict.fromkeys(("q_stride", "out_stride"), "i32:16"),
        **dict.fromkeys(_INTEGERS, "i32"),
    }


def _name(case: _Case, problem: AttentionProblem) -> str:
    shape = f"{case.num_sequences}x{problem.num_rows // case.num_sequences}"
    num_heads, num_kv_heads, head_dim = case.heads
    traits = [TRITON_NAMES[case.dtype]]
    if case.format is not None:
        traits.append(f"{case.format.value} cache")
    names = {"window": case.window, "soft cap": case.soft_cap, "sinks": case.sinks}
    traits += [name for name, is_there in names.items() if is_there]
    heads = f"{num_heads}/{num_kv_heads} heads of {head_dim}"
    return f"paged_attention {case.kind} {shape}, {heads} {', '.join(traits)}"


def _tile(launch: AttentionLaunch, tile: TileLaunch) -> str:
    is_parallel = tile is launch.decode and launch.parallel
    segments = ", segments in parallel" if is_parallel else ""
    return f"{tile.rows} rows, {tile.num_warps} warps{segments}"


def _promises(case: _Case, target: GpuTarget) -> Promises:
    is_prefill = case.kind == "prefill"
    min_wide_share = _min_wide_share(case)
    if target.vendor is Vendor.AMD:
        # Codes come 8 bytes a lane: a wave has twice the lanes.
        share = min_wide_share if case.format is None else 0.0
        return Promises(tensor_core="mfma", min_wide_share=share)
    # Sixteen or 32 rows are too few for the warp group instructions of sm_90 and the tensor memory
    # of sm_100; decode is bound by memory, and the older instruction is fast enough.
    has_many_rows = is_prefill and case.format is None and case.heads[2] <= 128
    newest = {"sm_90": "HGMMA", "sm_100": "UTC.*MMA"} if has_many_rows else {}
    return Promises(
        tensor_core=newest.get(target.name, "HMMA"),
        min_wide_share=min_wide_share,
        max_issue_share=None if is_prefill else _max_issue_share(case, target),
        min_warps=8,
    )


def _max_issue_share(case: _Case, target: GpuTarget) -> float:
    """Converting costs the same whatever it is paid with: fewer bytes pay for less of it. Offsets
    of values meet weights as they were rounded for the codes: one conversion more."""
    has_offsets = case.format is not None and case.format.has_offsets
    if target.name == "sm_100" and case.format is not None:
        return 1.65 if has_offsets else 1.05
    return 0.85 if target.name == "sm_90" and has_offsets else 0.8


def _min_wide_share(case: _Case) -> float:
    """Codes come 16 bytes a lane where a row of them is a multiple of that; scales and offsets are
    two bytes a token, and a larger share of narrower codes."""
    if case.format is None:
        return 0.9
    if case.format.row_size(case.heads[2]) % 16:
        return 0.0
    return 0.55 if case.format.has_offsets else 0.8


def _merge_spec(case: _Case) -> KernelSpec:
    problem = _problem(case)
    launch = attention_rule.attention_launch(problem, TARGETS["sm_80"])
    dtype = TRITON_NAMES[case.dtype]
    format = "" if case.format is None else f", {case.format.value} cache"
    return KernelSpec(
        name=f"paged_attention merge, heads of {problem.head_dim} {dtype}{format}",
        tile="1 row, 1 warp",
        kernel=merge_kernel,
        arguments={
            **dict.fromkeys(("sum_ptr", "maximum_ptr"), "*fp32:16"),
            "out_ptr": f"*{dtype}:16",
            **dict.fromkeys(("context_ptr", "start_ptr"), "*i32:16"),
            "out_stride": "i32:16",
            "num_segments": "i32",
        },
        constants={
            "sink_ptr": None,
            "window": None,
            **attention_rule.merge_constants(launch),
        },
        num_warps=1,
        num_stages=3,
        promises=Promises(),
    )
