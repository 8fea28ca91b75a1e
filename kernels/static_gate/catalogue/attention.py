"""Attention as it runs: an 8B Llama (32 heads, 8 KV heads) and a small model with heads of 64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.paged_attention import kernel as attention_kernel
from qserve.kernels.paged_attention import launch as attention_rule
from qserve.kernels.paged_attention.launch import AttentionProblem
from qserve.kernels.static_gate.spec import TRITON_NAMES, KernelSpec, Promises

_HALF, _BRAIN = torch.float16, torch.bfloat16


@dataclass(frozen=True, slots=True)
class _AttentionCase:
    kind: str
    num_sequences: int
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    is_core: bool = False


_ATTENTION_CASES = (
    _AttentionCase("decode", 8, (32, 8), 128, _HALF, is_core=True),
    _AttentionCase("decode", 8, (32, 8), 128, _BRAIN),
    _AttentionCase("decode", 8, (9, 3), 64, _BRAIN),
    _AttentionCase("decode", 256, (32, 8), 128, _HALF),
    _AttentionCase("decode", 256, (32, 8), 64, _BRAIN),
    _AttentionCase("prefill", 8, (32, 8), 128, _HALF),
    _AttentionCase("prefill", 8, (32, 8), 128, _BRAIN, is_core=True),
    _AttentionCase("prefill", 8, (32, 8), 64, _HALF),
    _AttentionCase("prefill", 8, (9, 3), 64, _BRAIN),
)
_BLOCK_SIZE = 64
_MAX_CONTEXT = 4096
_CHUNK = 256  # tokens of a prefilling sequence in one batch

_ATTENTION_INTEGERS = ("table_stride", "num_sequences", "num_segments")


def attention_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What the launch rules of attention launch on ``target``."""
    return [*(_attention_spec(case, target) for case in _ATTENTION_CASES), _merge_spec()]


def _attention_spec(case: _AttentionCase, target: GpuTarget) -> KernelSpec:
    is_prefill = case.kind == "prefill"
    problem = AttentionProblem(
        num_sequences=case.num_sequences,
        num_rows=case.num_sequences * (_CHUNK if is_prefill else 1),
        num_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=case.head_dim,
        block_size=_BLOCK_SIZE,
        max_context=_MAX_CONTEXT,
    )
    launch = attention_rule.attention_launch(problem, target)
    tile = launch.prefill if launch.prefill is not None else launch.decode
    constants = attention_rule.tile_constants(launch, tile)
    dtype = TRITON_NAMES[case.dtype]
    part_dtype = "fp32" if constants["PARALLEL"] else dtype
    arguments = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}:16"),
        **dict.fromkeys(("sum_ptr", "maximum_ptr"), f"*{part_dtype}:16"),
        **dict.fromkeys(("table_ptr", "context_ptr", "start_ptr"), "*i32:16"),
        "scale": "fp32",
        **dict.fromkeys(("q_stride", "out_stride"), "i32:16"),
        **dict.fromkeys(_ATTENTION_INTEGERS, "i32"),
    }
    shape = f"{case.num_sequences}x{problem.num_rows // case.num_sequences}"
    heads = f"{case.heads[0]}/{case.heads[1]} heads"
    parallel = ", segments in parallel" if constants["PARALLEL"] else ""
    return KernelSpec(
        name=f"paged_attention {case.kind} {shape}, {heads} of {case.head_dim} {dtype}",
        tile=f"{tile.rows} rows, {tile.num_warps} warps{parallel}",
        kernel=attention_kernel.attention_kernel,
        arguments=arguments,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        promises=_attention_promises(is_prefill, target),
        stream_bytes=attention_rule.trip_bytes(problem),
        is_core=case.is_core,
    )


def _attention_promises(is_prefill: bool, target: GpuTarget) -> Promises:
    if target.vendor is Vendor.AMD:
        return Promises(tensor_core="mfma", min_wide_share=0.9)
    # Sixteen rows are too few for the warp group instructions of sm_90 and the tensor memory of
    # sm_100; decode is bound by memory, and the older instruction is fast enough.
    newest = {"sm_90": "HGMMA", "sm_100": "UTC.*MMA"} if is_prefill else {}
    return Promises(
        tensor_core=newest.get(target.name, "HMMA"),
        min_wide_share=0.9,
        max_issue_share=None if is_prefill else 0.8,
        min_warps=8,
    )


def _merge_spec() -> KernelSpec:
    return KernelSpec(
        name="paged_attention merge, heads of 128 fp16",
        tile="1 row, 1 warp",
        kernel=attention_kernel.merge_kernel,
        arguments={
            **dict.fromkeys(("sum_ptr", "maximum_ptr"), "*fp32:16"),
            "out_ptr": "*fp16:16",
            **dict.fromkeys(("context_ptr", "start_ptr"), "*i32:16"),
            "out_stride": "i32:16",
            "num_segments": "i32",
        },
        constants={"SEGMENT_TOKENS": 256, "HEAD_DIM": 128, "BLOCK_D": 128},
        num_warps=1,
        num_stages=3,
        promises=Promises(),
    )
