"""Products of a mixture of experts in Triton: the tiles of the int4 and int8 matmuls, each with the
weight of the expert that its rows are sent to."""

# The launchers are untyped, as Triton is.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.expert_matmul.launch import expert_launch
from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.grouped_weight import GroupedWeight, concatenate_rows
from qserve.kernels.int4_matmul import kernel as int4_kernel
from qserve.kernels.int4_matmul.planar4 import pack_planar4
from qserve.kernels.int8_matmul import kernel as int8_kernel
from qserve.kernels.int8_matmul.layout import pack_int8
from qserve.kernels.quantize_tokens.kernel import round_tokens
from qserve.kernels.tiled_matmul.kernel import TiledProduct, TiledWeight, check_half, run
from qserve.kernels.tiled_matmul.launch import MatmulProblem
from qserve.kernels.tiled_matmul.routing import share_rows


class ExpertProduct:
    """Products with the grouped weights of experts, with rows of 16 bits."""

    __slots__ = ("_asymmetric", "_bits", "_num_experts", "_scale_dtype", "_shape", "weight")

    def __init__(self, experts: Sequence[GroupedWeight], device: torch.device) -> None:
        """experts: weights that ``launch.suits_tiles`` accepts."""
        joined = concatenate_rows(list(experts))
        self._num_experts = len(experts)
        self._bits = joined.bits
        self._asymmetric = not joined.is_symmetric
        if joined.bits == 8:
            byte_codes = pack_int8(joined)
            tiled = TiledWeight(byte_codes.codes, byte_codes.parameters, byte_codes.channel_scales)
            self._scale_dtype, group_size = byte_codes.scale_dtype, byte_codes.group_size
        else:
            nibbles = pack_planar4(joined)
            tiled = TiledWeight(nibbles.words, nibbles.parameters, joined.channel_scales)
            self._scale_dtype, group_size = nibbles.scale_dtype, nibbles.group_size
        self.weight = self._split(tiled).to(device)
        self._shape = (experts[0].out_features, joined.in_features, group_size)

    def run(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        out: torch.Tensor,
        activations: Activations,
    ) -> None:
        """Writes the products of float16 or bfloat16 rows with their experts to ``out``.

        x: ``[M, K]`` or ``[M, top_k, K]``, expert_ids: ``[M, top_k]``, both contiguous. out:
        ``[M, top_k, N]``. Rows are read as they are unless ``activations`` rounds each with one
        scale. Raises ``TypeError`` for rows of another dtype.
        """
        check_half(x)
        top_k = expert_ids.shape[1] if x.dim() == 2 else 1
        rows, scales = round_tokens(x.reshape(-1, x.shape[-1]), activations)
        if scales is not None:
            scales = scales.repeat_interleave(top_k)
        problem = MatmulProblem(expert_ids.numel(), *self._shape, x.dtype, self._num_experts)
        launch = expert_launch(
            problem,
            gpu_target(x.device),
            bits=self._bits,
            asymmetric=self._asymmetric,
            scale_dtype=self._scale_dtype,
        )
        routing = share_rows(expert_ids, self._num_experts, launch.tile.block_m, top_k)
        kernel = int8_kernel if self._bits == 8 else int4_kernel
        product = TiledProduct(rows, self.weight, launch, kernel.sum_blocks, scales, routing)
        run(product, out.flatten(0, 1))

    def _split(self, joined: TiledWeight) -> TiledWeight:
        """The outputs of all experts, one after the other, as a weight for each."""
        parameters, channels = joined.parameters, joined.channel_scales
        if parameters is not None:
            parameters = parameters.unflatten(1, (self._num_experts, -1)).transpose(0, 1)
            parameters = parameters.contiguous()
        if channels is not None:
            channels = channels.unflatten(0, (self._num_experts, -1))
        codes = joined.codes.unflatten(0, (self._num_experts, -1))
        return replace(joined, codes=codes, parameters=parameters, channel_scales=channels)
