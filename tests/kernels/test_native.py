"""The native extension: choice of the instruction set, threads, and what happens without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.dense_matmul import dense_matmul, prepare

CSRC = Path(__file__).resolve().parents[2] / "kernels" / "csrc"
KNOWN_ISAS = ("avx512-vnni", "avx2", "portable")

PRODUCT = """
import torch
from qserve.kernels.dense_matmul import dense_matmul, prepare
weight = prepare(torch.ones(512, 256))
def multiply():
    return float(dense_matmul(torch.ones(4, 256), weight).sum())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_best_instruction_set_of_the_machine_is_taken_first() -> None:
    supported = native.supported_isas()
    assert supported == tuple(name for name in KNOWN_ISAS if name in supported)
    assert supported[-1] == "portable"


def test_the_environment_forces_an_instruction_set() -> None:
    code = "from qserve.kernels import native; print(native.isa())"
    result = run_python(code, QSERVE_ISA="portable")
    assert result.stdout.strip() == "portable", result.stderr


def test_an_unknown_instruction_set_is_refused_with_those_there_are() -> None:
    result = run_python("from qserve.kernels import native; native.available()", QSERVE_ISA="mmx")
    assert result.returncode != 0
    assert "ValueError" in result.stderr and "'mmx'" in result.stderr
    assert "portable" in result.stderr
    with pytest.raises(ValueError, match="mmx"):
        native.select_isa("mmx")


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_thread_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        native.set_num_threads(count)


@pytest.mark.usefixtures("restored_threads")
def test_the_number_of_threads_can_change_at_any_time(generator: torch.Generator) -> None:
    weight = prepare(torch.randn(512, 128, generator=generator))
    x = torch.randn(16, 128, generator=generator)
    expected = dense_matmul(x, weight)
    for count in (1, 4, 2, 3, 1, 2) * 5:
        native.set_num_threads(count)
        assert native.num_threads() == count
        assert torch.equal(dense_matmul(x, weight), expected)


@pytest.mark.usefixtures("restored_threads")
def test_calls_from_several_threads_do_not_disturb_each_other(generator: torch.Generator) -> None:
    native.set_num_threads(2)
    weights = [torch.randn(512, 96, generator=generator) for _ in range(4)]
    x = torch.randn(40, 96, generator=generator)
    packed = [prepare(weight) for weight in weights]
    expected = [dense_matmul(x, weight) for weight in packed]

    def work(index: int) -> bool:
        return all(torch.equal(dense_matmul(x, packed[index]), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_forked_child_has_workers_of_its_own() -> None:
    code = PRODUCT + (
        "import os\n"
        "from qserve.kernels import native\n"
        "native.set_num_threads(2)\n"
        "assert multiply() == 512 * 4 * 256\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if [multiply() for _ in range(50)] == [512 * 4 * 256] * 50 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert multiply() == 512 * 4 * 256\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_workers_sleep_when_there_is_nothing_to_do() -> None:
    code = PRODUCT + (
        "import time\n"
        "from qserve.kernels import native\n"
        "torch.set_num_threads(1)\n"
        "native.set_num_threads(4)\n"
        "multiply()\n"
        "before = time.process_time()\n"
        "time.sleep(0.5)\n"
        "print(time.process_time() - before)\n"
        "multiply()\n"  # and they wake up again
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.1


def test_ops_run_on_the_reference_when_the_extension_does_not_import() -> None:
    code = (
        "import sys\n"
        "sys.modules['qserve.kernels._cpu'] = None\n"  # what import makes of a missing module
        "import torch\n"
        "from qserve.kernels import native\n"
        "from qserve.kernels.backend import OPS, Backend, choose\n"
        "from qserve.kernels.int8_matmul import int8_matmul, quantize_int8\n"
        "from qserve.kernels.gated_activation import gated_activation\n"
        "from qserve.kernels.kv_cache import LayerCache\n"
        "assert not native.available()\n"
        "for op in OPS:\n"
        "    choice = choose(op, torch.device('cpu'))\n"
        "    assert choice.backend is Backend.REFERENCE, op\n"
        "    assert (Backend.CPU, native.failure()) in choice.rejected\n"
        "weight = quantize_int8(torch.eye(64))\n"
        "assert weight.backend is Backend.REFERENCE\n"
        "assert torch.allclose(int8_matmul(torch.eye(64), weight), torch.eye(64), atol=1e-2)\n"
        "assert gated_activation(torch.ones(1, 8)).shape == (1, 4)\n"
        "assert LayerCache(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)).handle is None\n"
        "print(native.failure())\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "reinstall" in result.stdout


def test_what_is_compiled_for_several_instruction_sets_shares_no_inline_code() -> None:
    """An inline function of the C++ library, compiled with AVX-512, could be linked for all."""
    pending, seen = [path.name for path in CSRC.glob("isa_*.cpp")], set[str]()
    while pending:
        name = pending.pop()
        seen.add(name)
        text = (CSRC / name).read_text()
        assert set(re.findall(r"#include <(.+)>", text)) <= {"cstdint", "immintrin.h"}, name
        pending += [found for found in re.findall(r'#include "(.+)"', text) if found not in seen]
    assert {"simd_avx512.h", "simd_avx2.h", "simd_portable.h", "attention.h"} <= seen
