"""What goes into the compiler for a kernel, as a short hash: whether a row of a page is stale."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from typing import Any

from triton.language import constexpr
from triton.runtime.jit import JITCallable

from qserve.kernels.static_gate.spec import KernelSpec


def fingerprint(spec: KernelSpec) -> str:
    """Eight hexadecimal digits that change with the code of the kernel and of what it calls, with
    its arguments and its promises; not with comments or the place in a file."""
    facts = (
        sorted(_sources([spec.kernel, *_functions(spec)])),
        sorted(spec.arguments.items()),
        sorted(spec.constants.items()),
        (spec.num_warps, spec.num_stages, spec.stream_bytes, spec.promises),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def _functions(spec: KernelSpec) -> list[Any]:
    """What of the compile-time arguments is code: the tile code of a format."""
    return [value for value in spec.constants.values() if isinstance(value, JITCallable)]


def _sources(functions: list[Any]) -> set[str]:
    """The syntax trees of ``functions`` and of those below them, and the constants they use."""
    found: set[str] = set()
    waiting, seen = list(functions), set(functions)
    while waiting:
        function = waiting.pop().fn
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        found.add(ast.dump(tree))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Name):
                continue
            value = function.__globals__.get(node.id)
            if isinstance(value, constexpr):
                found.add(f"{node.id} = {value.value}")
            elif isinstance(value, JITCallable) and value not in seen:
                seen.add(value)
                waiting.append(value)
    return found
