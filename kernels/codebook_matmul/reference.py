"""The definition of the codebook matmul in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.kernels.activations import MAX_CODE, Activations
from qserve.kernels.backend import Backend
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.reference_product import ReferenceProduct

INTEGER = (Activations.INT8, Activations.INT8_TOKEN)


def round_codebook(codebook: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The int8 codebook ``[16]`` that integer dot products look up, and the value of one step.

    ``step = max(abs(codebook)) / 127`` and ``code = rint(codebook / step)``: an entry moves by at
    most half a step, 0.4 % of the largest. A codebook of zeros has step 0.
    """
    step = float(codebook.abs().max()) / MAX_CODE
    return (codebook / (step or 1.0)).round().to(torch.int8), step


def prepare(
    weight: CodebookWeight, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """The product with the floats that the codes stand for; under int8 activations, with those
    that the rounded codebook stands for."""
    codes, step = round_codebook(weight.codebook)
    rounded = replace(weight, codebook=codes.float() * step)
    exact_product = ReferenceProduct(weight.dequantize().to(device), bias)
    integer_product = ReferenceProduct(rounded.dequantize().to(device), bias)

    def run(x: torch.Tensor, out: torch.Tensor, activations: Activations) -> None:
        product = integer_product if activations in INTEGER else exact_product
        product.run(x, out, activations)

    out_features, in_features = weight.codes.shape
    nbytes = 2 * 4 * weight.codes.numel()
    return PackedWeight(in_features, out_features, nbytes, Backend.REFERENCE, run)
