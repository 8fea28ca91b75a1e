"""The Triton norms, gated activations and soft cap agree with their definitions."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.gated_activation import kernel as gated_activation
from qserve.kernels.gated_activation import reference as gated_reference
from qserve.kernels.gated_activation.gate import Gate
from qserve.kernels.head_norm import kernel as head_norm
from qserve.kernels.head_norm import reference as head_reference
from qserve.kernels.layer_norm import kernel as layer_norm
from qserve.kernels.layer_norm import reference as layer_reference
from qserve.kernels.rms_norm import kernel as rms_norm
from qserve.kernels.rms_norm import reference as rms_reference
from qserve.kernels.rms_norm_int8 import kernel as rms_norm_int8
from qserve.kernels.rms_norm_int8 import reference as int8_reference
from qserve.kernels.soft_cap import kernel as soft_cap
from qserve.kernels.soft_cap import reference as cap_reference

DTYPES = (torch.float16, torch.bfloat16)
EPS = 1e-5

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
with_and_without_residual = pytest.mark.parametrize("has_residual", [True, False])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise in rows that lie apart, as a slice of a wider matrix."""
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.randn(*shape[:-1], shape[-1] + 8, generator=generator)
    return wide.to(dtype)[..., : shape[-1]]


def steps_apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in steps of the dtype at the size of the result: 1 is one rounding
    that went the other way."""
    steps = torch.finfo(found.dtype).eps * expected.float().abs().clamp(min=2**-6)
    return float(((found.float() - expected.float()).abs() / steps).nan_to_num(nan=1e9).max())


@every_dtype
@with_and_without_residual
@pytest.mark.parametrize("width", [576, 100])
def test_the_rms_norm_is_its_definition(width: int, has_residual: bool, dtype: torch.dtype) -> None:
    x, weight = random(3, width, dtype=dtype), random(width, dtype=dtype).contiguous()
    sums = [random(3, width, dtype=dtype) + 1 if has_residual else None for _ in range(2)]
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    rms_norm.rms_norm(x, weight, EPS, sums[0], 1.0, out)
    rms_reference.rms_norm(x, weight, EPS, sums[1], 1.0, expected)
    assert steps_apart(out, expected) <= 1
    if sums[0] is not None and sums[1] is not None:
        assert torch.equal(sums[0], sums[1])
    rms_norm.rms_norm(x, weight, EPS, None, 0.0, out)
    assert steps_apart(out, expected) > 8


@every_dtype
@with_and_without_residual
def test_the_rounded_norm_is_its_definition(has_residual: bool, dtype: torch.dtype) -> None:
    x, weight = random(4, 200, dtype=dtype), random(200, dtype=dtype).contiguous()
    x[3] = 0.0
    sums = [x.clone() if has_residual else None for _ in range(2)]
    results = []
    for run, residual in ((rms_norm_int8, sums[0]), (int8_reference, sums[1])):
        codes, scales = torch.full((4, 200), 99, dtype=torch.int8), torch.full((4,), float("nan"))
        run.rms_norm_int8(x, weight, EPS, residual, 0.0, codes, scales)
        results.append((codes, scales))
    (codes, scales), (expected_codes, expected_scales) = results
    assert torch.allclose(scales, expected_scales, rtol=1e-6)
    # Codes are of numbers that differ in their last bit: one near a half may go either way.
    differ = codes.int() - expected_codes.int()
    assert int(differ.abs().max()) <= 1 and int((differ != 0).sum()) <= 1
    assert int(codes[3].abs().max()) == 0 and float(scales[3]) == 0


@every_dtype
@with_and_without_residual
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_layer_norm_is_its_definition(
    has_bias: bool, has_residual: bool, dtype: torch.dtype
) -> None:
    x, weight = random(2, 130, dtype=dtype) + 3, random(130, dtype=dtype).contiguous()
    bias = random(131, dtype=dtype)[:130].contiguous() if has_bias else None
    sums = [random(2, 130, dtype=dtype) if has_residual else None for _ in range(2)]
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    layer_norm.layer_norm(x, weight, bias, EPS, sums[0], out)
    layer_reference.layer_norm(x, weight, bias, EPS, sums[1], expected)
    assert steps_apart(out, expected) <= 1
    if sums[0] is not None and sums[1] is not None:
        assert torch.equal(sums[0], sums[1])


@every_dtype
@pytest.mark.parametrize("activation", Gate)
def test_the_gated_activation_is_its_definition(activation: Gate, dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * 1100, dtype=dtype) * 4
    gate_up[0, :3] = torch.tensor([-60000.0, 60000.0, 0.0]).to(dtype)
    gate_up[0, 1100:1103] = 1.0
    out, expected = torch.full((3, 1100), float("nan"), dtype=dtype), torch.empty(3, 1100).to(dtype)
    gated_activation.gated_activation(gate_up, activation, out)
    gated_reference.gated_activation(gate_up, activation, expected)
    assert steps_apart(out, expected) <= 1
    other = Gate.SILU if activation is not Gate.SILU else Gate.GELU
    gated_activation.gated_activation(gate_up, other, out)
    assert steps_apart(out, expected) > 8


@every_dtype
@pytest.mark.parametrize(("num_heads", "head_dim"), [(3, 80), (20, 128), (1, 2)])
def test_the_norm_of_heads_is_its_definition(
    num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    x = random(2, num_heads * head_dim, dtype=dtype)
    weight = random(head_dim, dtype=dtype).contiguous()
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    head_norm.head_norm(x, weight, EPS, 1.0, out)
    head_reference.head_norm(x, weight, EPS, 1.0, expected)
    assert steps_apart(out, expected) <= 1
    head_norm.head_norm(x, weight, EPS, 0.0, out)
    assert steps_apart(out, expected) > 8
    head_norm.head_norm(x, weight, EPS, 1.0, x)  # in place
    assert steps_apart(x, expected) <= 1


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32))
def test_the_soft_cap_is_its_definition(dtype: torch.dtype) -> None:
    x = random(2, 1100, dtype=dtype) * torch.logspace(-4, 3, 1100).to(dtype)
    x[0, :3] = torch.tensor([0.0, 60000.0, -60000.0]).to(dtype)
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    soft_cap.soft_cap(x, 30.0, out)
    cap_reference.soft_cap(x.double(), 30.0, expected)
    relative = (out.double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-9)
    assert float(relative.max()) <= max(torch.finfo(dtype).eps, 2e-6)
    assert torch.equal(out[0, :3].float(), torch.tensor([0.0, 30.0, -30.0]))
    soft_cap.soft_cap(x, 40.0, out)
    assert steps_apart(out, expected) > 8
