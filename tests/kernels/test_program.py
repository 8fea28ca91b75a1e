"""A recorded program does what its calls did, with what lies at the addresses now."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qserve.kernels.gated_activation import gated_activation
from qserve.kernels.program import Program
from qserve.kernels.rms_norm import rms_norm


def test_recording_runs_nothing_and_running_reads_what_is_there_now() -> None:
    x, norm_weight = torch.ones(2, 64), torch.ones(64)
    normed, activated = torch.zeros(2, 64), torch.zeros(2, 32)

    def body() -> None:
        rms_norm(x, norm_weight, 1e-5, out=normed)
        gated_activation(normed, out=activated)

    program = Program(body)
    assert len(program) == 2
    assert not normed.any()
    for seed in range(3):
        x.copy_(torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)))
        program.run()
        expected = gated_activation(rms_norm(x, norm_weight, 1e-5))
        assert torch.equal(activated, expected)


def test_what_pytorch_does_while_recording_is_told_and_views_are_not() -> None:
    x, out = torch.ones(4, 64), torch.zeros(2, 32)
    rows = torch.arange(32)
    program = Program(lambda: gated_activation(x[1:3].flatten(1), out=out))
    assert (len(program), program.others) == (1, frozenset())
    for body, name in (
        (lambda: gated_activation(x[:2] + 1, out=out), "aten.add.Tensor"),
        (lambda: gated_activation(x[:2]), "aten.new_empty.default"),
        (lambda: out.zero_(), "aten.zero_.default"),
        (lambda: torch.index_select(x[:2], 1, rows, out=out), "aten.index_select.out"),
    ):
        assert name in Program(body).others


def test_calls_after_a_recording_run_again() -> None:
    x, out = torch.ones(1, 64), torch.zeros(1, 32)
    assert len(Program(lambda: gated_activation(x, out=out))) == 1
    gated_activation(x, out=out)
    assert out.any()


def test_a_recording_that_fails_ends() -> None:
    x, out = torch.ones(1, 64), torch.zeros(1, 32)

    def body() -> None:
        gated_activation(x, out=out)
        raise KeyError("body")

    with pytest.raises(KeyError):
        Program(body)
    gated_activation(x, out=out)
    assert out.any()


def test_a_program_inside_a_program_is_refused() -> None:
    with pytest.raises(RuntimeError, match="recording"):
        Program(lambda: Program(lambda: None))
    assert len(Program(lambda: None)) == 0


def test_recording_does_not_import_pytorchs_compiler() -> None:
    code = (
        "import sys, torch;"
        "from qserve.kernels.program import Program;"
        "program = Program(lambda: torch.ones(1) + 1);"
        "print(len(program.others), 'torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
