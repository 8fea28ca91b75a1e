"""Row ops, the store into the cache and sampling as they run, with the shapes of an 8B Llama."""

from __future__ import annotations

from typing import Any

from qserve.kernels.gated_activation import kernel as gate_kernel
from qserve.kernels.gated_activation import launch as gate_rule
from qserve.kernels.gated_activation.gate import Gate
from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.head_norm import kernel as head_norm_kernel
from qserve.kernels.head_norm.launch import HeadNormProblem, head_norm_launch
from qserve.kernels.kv_cache import KvFormat
from qserve.kernels.kv_store import kernel as store_kernel
from qserve.kernels.kv_store.launch import StoreProblem, store_constants, store_launch
from qserve.kernels.layer_norm import kernel as layer_kernel
from qserve.kernels.rms_norm import kernel as norm_kernel
from qserve.kernels.rms_norm.launch import NormProblem, norm_launch
from qserve.kernels.sample import kernel as sample_kernel
from qserve.kernels.sample import launch as sample_rule
from qserve.kernels.soft_cap import kernel as cap_kernel
from qserve.kernels.soft_cap import launch as cap_rule
from qserve.kernels.static_gate.spec import KernelSpec, Promises

_CODES = {
    KvFormat.BFLOAT16: "*bf16:16",
    KvFormat.FLOAT8: "*u8:16",
    KvFormat.INT8: "*i8:16",
    KvFormat.INT4: "*u8:16",
}
_STRIDES = ("x_stride", "residual_stride", "out_stride")


def row_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What is launched on ``target``: the same on every one."""
    del target
    return [
        _norm_spec(4096, is_int8=False),
        _norm_spec(4096, is_int8=True),
        _layer_norm_spec(4096),
        _head_norm_spec(),
        *(_gate_spec(gate) for gate in Gate),
        *(_store_spec(format) for format in _CODES),
        _sample_spec(),
        _cap_spec(),
    ]


def _spec(
    name: str,
    kernel: Any,
    arguments: dict[str, str | None],
    constants: dict[str, Any],
    num_warps: int,
    tile: str,
    promises: Promises,
) -> KernelSpec:
    """A kernel whose absent arguments are None."""
    absent = {name: None for name, kind in arguments.items() if kind is None}
    return KernelSpec(
        name=name,
        tile=tile,
        kernel=kernel,
        arguments={name: kind for name, kind in arguments.items() if kind is not None},
        constants=constants | absent,
        num_warps=num_warps,
        num_stages=3,
        promises=promises,
    )


def _norm_spec(width: int, *, is_int8: bool) -> KernelSpec:
    launch = norm_launch(NormProblem(8, width, has_residual=True, is_int8=is_int8))
    arguments: dict[str, str | None] = {
        **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), "*bf16:16"),
        "out_ptr": "*i8:16" if is_int8 else "*bf16:16",
        "scale_ptr": "*fp32:16" if is_int8 else None,
        **dict.fromkeys(("eps", "weight_offset"), "fp32"),
        **dict.fromkeys(("width", *_STRIDES), "i32:16"),
    }
    name = "rms_norm_int8" if is_int8 else "rms_norm"
    return _spec(
        f"{name} {width} bf16, residual",
        norm_kernel.norm_kernel,
        arguments,
        {"BLOCK": launch.block},
        launch.num_warps,
        f"1 row, {launch.num_warps} warps",
        Promises(min_wide_share=0.9),
    )


def _layer_norm_spec(width: int) -> KernelSpec:
    launch = norm_launch(NormProblem(8, width, has_residual=True))
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "out_ptr")
    return _spec(
        f"layer_norm {width} bf16, residual",
        layer_kernel.layer_norm_kernel,
        {
            **dict.fromkeys(pointers, "*bf16:16"),
            "eps": "fp32",
            **dict.fromkeys(("width", *_STRIDES), "i32:16"),
        },
        {"BLOCK": launch.block},
        launch.num_warps,
        f"1 row, {launch.num_warps} warps",
        Promises(min_wide_share=0.9),
    )


def _head_norm_spec() -> KernelSpec:
    launch = head_norm_launch(HeadNormProblem(8, 32, 128))
    return _spec(
        "head_norm 32 heads of 128 bf16",
        head_norm_kernel.head_norm_kernel,
        {
            **dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16:16"),
            **dict.fromkeys(("eps", "weight_offset"), "fp32"),
            "num_heads": "i32",
            **dict.fromkeys(("x_stride", "out_stride"), "i32:16"),
        },
        {"HEADS": launch.heads, "HEAD_DIM": 128, "BLOCK": launch.block},
        launch.num_warps,
        f"{launch.heads} heads, {launch.num_warps} warps",
        # The weight of a head is shared by all lanes: 4 bytes each.
        Promises(min_wide_share=0.85),
    )


def _cap_spec() -> KernelSpec:
    return _spec(
        "soft_cap bf16",
        cap_kernel.cap_kernel,
        {
            **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16:16"),
            "cap": "fp32",
            **dict.fromkeys(("width", "in_stride", "out_stride"), "i32:16"),
        },
        {"BLOCK": cap_rule.BLOCK},
        cap_rule.NUM_WARPS,
        f"{cap_rule.BLOCK} columns, {cap_rule.NUM_WARPS} warps",
        Promises(min_wide_share=0.9),
    )


def _gate_spec(gate: Gate) -> KernelSpec:
    return _spec(
        f"gated_activation {gate.value} 14336 bf16",
        gate_kernel.gate_kernel,
        {
            **dict.fromkeys(("gate_up_ptr", "out_ptr"), "*bf16:16"),
            **dict.fromkeys(("width", "in_stride", "out_stride"), "i32:16"),
        },
        {"GATE": gate.value, "BLOCK": gate_rule.BLOCK},
        gate_rule.NUM_WARPS,
        f"{gate_rule.BLOCK} columns, {gate_rule.NUM_WARPS} warps",
        Promises(min_wide_share=0.9),
    )


def _store_spec(format: KvFormat) -> KernelSpec:
    launch = store_launch(StoreProblem(8, 32, 8, 128, 128, 64, format))
    scales = "*fp16:16" if format.has_scales else None
    offsets = "*fp16:16" if format.has_offsets else None
    return _spec(
        f"kv_store 32/8 heads of 128 bf16, {format.value} cache",
        store_kernel.store_kernel,
        {
            "qkv_ptr": "*bf16:16",
            **dict.fromkeys(("position_ptr", "slot_ptr"), "*i32:16"),
            "cos_sin_ptr": "*fp32:16",
            **dict.fromkeys(("k_ptr", "v_ptr"), _CODES[format]),
            **dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), scales),
            **dict.fromkeys(("k_offset_ptr", "v_offset_ptr"), offsets),
            "qkv_stride": "i32:16",
            **dict.fromkeys(("num_heads", "num_kv_heads"), "i32"),
        },
        store_constants(launch),
        launch.num_warps,
        f"{launch.heads} heads, {launch.num_warps} warps",
        # The heads come 16 bytes a lane; angles are read once more by each of them.
        Promises(min_wide_share=0.5),
    )


def _sample_spec() -> KernelSpec:
    settings = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
    changes = ("start_ptr", "id_ptr", "count_ptr")
    return _spec(
        "sample, adjustments",
        sample_kernel.sample_kernel,
        {
            "logit_ptr": "*fp32:16",
            "token_ptr": "*i64:16",
            "top_k_ptr": "*i32:16",
            "uniform_ptr": "*fp64:16",
            **dict.fromkeys((f"{name}_ptr" for name in settings), "*fp32:16"),
            **dict.fromkeys(changes, "*i32:16"),
            "bias_ptr": "*fp32:16",
            **dict.fromkeys(("vocabulary", "logit_stride"), "i32:16"),
        },
        {"BLOCK": sample_rule.BLOCK},
        sample_rule.NUM_WARPS,
        f"1 row, {sample_rule.NUM_WARPS} warps",
        Promises(min_wide_share=0.9),
    )
