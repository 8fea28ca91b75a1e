"""The native CPU extension: loaded when first asked for, told which instruction set to use, and how
many threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

ABI_VERSION = 5
"""What ``_cpu.abi_version()`` must answer: an extension left over from other sources is not
called."""

ISA_VARIABLE = "QSERVE_ISA"


@dataclass(frozen=True, slots=True)
class _Extension:
    module: ModuleType | None
    failure: str | None


@cache
def _load() -> _Extension:
    try:
        module = import_module("qserve.kernels._cpu")
    except ImportError as error:
        return _Extension(None, f"the native extension does not import ({error}): reinstall")
    if module.abi_version() != ABI_VERSION:
        found = module.abi_version()
        return _Extension(None, f"the native extension has ABI {found}, not {ABI_VERSION}: rebuild")
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        module.select_isa(wanted)
    return _Extension(module, None)


def available() -> bool:
    """Whether the native CPU kernels can run here. Raises ``ValueError`` when QSERVE_ISA names an
    instruction set that is unknown or that this machine lacks."""
    return _load().module is not None


def failure() -> str | None:
    """Why the native kernels cannot run, or None when they can."""
    return _load().failure


@cache
def extension() -> Any:
    """The extension module. Raises ``RuntimeError`` with the reason when there is none."""
    loaded = _load()
    if loaded.module is None:
        raise RuntimeError(loaded.failure)
    return loaded.module


def isa() -> str:
    """The instruction set in use: "avx512-vnni", "avx2" or "portable" (QSERVE_ISA forces one)."""
    return str(extension().isa())


def select_isa(name: str) -> None:
    """Makes the native kernels use another instruction set from now on: weights are laid out the
    same way for all of them.

    Raises ``ValueError`` for one that is unknown or that this machine lacks.
    """
    extension().select_isa(name)


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that were built and that this machine has, best first."""
    return tuple(extension().supported_isas())


def num_threads() -> int:
    """Threads that the native kernels use, the calling one included; at first all cores allowed."""
    return int(extension().num_threads())


def set_num_threads(count: int) -> None:
    """Makes the native kernels use ``count`` threads; results do not depend on it.

    Raises ``ValueError`` for a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} threads asked for, expected at least 1")
    extension().set_num_threads(count)
