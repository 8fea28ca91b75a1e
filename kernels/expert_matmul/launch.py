"""How the Triton products of experts are launched: pure functions of the shapes and the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.grouped_weight import GroupedWeight, joinable
from qserve.kernels.int4_matmul.launch import int4_launch
from qserve.kernels.int4_matmul.planar4 import PLANE
from qserve.kernels.int8_matmul.launch import int8_launch
from qserve.kernels.int8_matmul.layout import suits_tiles as suits_int8
from qserve.kernels.tiled_matmul.launch import MatmulLaunch, MatmulProblem, matmul_cost


def suits_tiles(experts: Sequence[object]) -> bool:
    """Whether ``experts`` are grouped weights of one shape, alike enough to be one weight on a
    GPU."""
    grouped = [expert for expert in experts if isinstance(expert, GroupedWeight)]
    if len(grouped) < len(experts) or not joinable(grouped):
        return False
    if len({expert.codes.shape for expert in grouped}) != 1:
        return False
    first = grouped[0]
    if first.input_order is not None:
        return False
    if first.bits == 8:
        return all(suits_int8(expert) for expert in grouped)
    return first.group_size % PLANE == 0


def expert_launch(
    problem: MatmulProblem,
    target: GpuTarget,
    *,
    bits: int,
    asymmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> MatmulLaunch:
    """The launch of ``problem`` with weights of ``bits`` on ``target``; its tiles are of the rows
    that an expert gets when all get the same."""
    if bits == 8:
        return int8_launch(problem, target, asymmetric=asymmetric, scale_dtype=scale_dtype)
    return int4_launch(problem, target, scale_dtype)


def expert_cost(problem: MatmulProblem, bits: int) -> Cost:
    """The work of ``problem``: the weights that its rows can choose, activations in and out."""
    return matmul_cost(problem, bits=8 if bits == 8 else 4, parameter_bytes=4)
