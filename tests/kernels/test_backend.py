"""The choice of a backend for an op."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qserve.kernels.backend import OPS, Backend, choose

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def test_every_folder_with_a_reference_is_an_op() -> None:
    assert sorted(OPS) == sorted(path.parent.name for path in KERNELS.glob("*/reference.py"))


@pytest.mark.parametrize("op", OPS)
def test_tensors_on_a_cpu_take_the_native_kernels(op: str) -> None:
    choice = choose(op, torch.device("cpu"))
    assert choice.backend is Backend.CPU
    assert "native" in choice.reason
    assert [backend for backend, _ in choice.rejected] == [Backend.TRITON, Backend.REFERENCE]


@pytest.mark.parametrize("op", OPS)
def test_tensors_on_a_gpu_take_triton(op: str) -> None:
    choice = choose(op, torch.device("cuda", 0))
    assert choice.backend is Backend.TRITON
    assert (Backend.CPU, "the tensors are on cuda") in choice.rejected


def test_other_devices_take_the_reference() -> None:
    choice = choose("int4_matmul", torch.device("meta"))
    assert choice.backend is Backend.REFERENCE
    assert {backend for backend, _ in choice.rejected} == {Backend.CPU, Backend.TRITON}


def test_an_unknown_op_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="int4_matmul"):
        choose("int3_matmul", torch.device("cpu"))
