"""Makes Triton's interpreter right where it is silently wrong, and lets it run inline assembly.

Triton 3.9 keeps bfloat16 and float8 as unsigned integers and computes with those: sums and `tl.dot`
are off by orders of magnitude, comparisons are wrong for negative numbers, and conversions truncate
where hardware rounds to nearest even (and, to float8, saturates). Here such operands are widened to
float32, and results rounded back. Comparisons give booleans, also of scalars, which then may serve
as masks. `tl.dot` sums in float64 and rounds once, so that a result does
not depend on the order in which numpy's BLAS adds, which changes with the shape of the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Evaluate = Callable[[str, int, Sequence[np.ndarray]], list[np.ndarray]]

_DTYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_BIT_OPERATIONS = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


class _Results:
    """What a builder returns for an operation with several results."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        """The result number ``index``."""
        return self._handles[index]


def install(evaluate: Evaluate) -> None:
    """Replaces the interpreter's builder methods for the life of the process.

    evaluate: runs the text of inline assembly on 32-bit registers.
    """
    _repair_arithmetic()
    _repair_conversions()

    def dot(_: Any, a: Any, b: Any, accumulator: Any, *__: Any) -> Any:
        if np.issubdtype(accumulator.data.dtype, np.integer):
            product = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32))
        else:
            product = np.matmul(_widen(a).astype(np.float64), _widen(b).astype(np.float64))
        total = (product + accumulator.data).astype(accumulator.data.dtype)
        return TensorHandle(total, accumulator.dtype.scalar)

    def inline_asm(
        _: Any, assembly: str, constraints: str, values: Any, types: Any, *rest: Any
    ) -> Any:
        """What the assembly gives for the registers that hold the elements of ``values``."""
        _pure, pack = rest
        num_outputs = constraints.count("=")
        inputs = [word for value in values for word in _registers(value.data, pack)]
        words = evaluate(assembly, num_outputs, inputs)
        results, shape = [], values[0].data.shape
        for kind in types:
            size = np.dtype(interpreter._get_np_dtype(kind.scalar)).itemsize * pack // 4
            results.append(_elements(words[:size], kind, shape))
            words = words[size:]
        return _Results(results)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_inline_asm = inline_asm


def _repair_arithmetic() -> None:
    original_binary, original_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def binary(builder: Any, left: Any, right: Any, operation: Any) -> Any:
        if operation in _COMPARISONS:
            return TensorHandle(np.asarray(operation(_widen(left), _widen(right))), tl.int1)
        if not _is_kept_as_integer(left.dtype) or operation in _BIT_OPERATIONS:
            return original_binary(builder, left, right, operation)
        return _narrow(operation(_widen(left), _widen(right)), left.dtype.scalar)

    def unary(builder: Any, value: Any, operation: Any) -> Any:
        if not _is_kept_as_integer(value.dtype):
            return original_unary(builder, value, operation)
        return _narrow(operation(_widen(value)), value.dtype.scalar)

    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.unary_op = unary


def _repair_conversions() -> None:
    originals = {
        name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp")
    }

    def convert_with(name: str) -> Callable[..., Any]:
        """The conversion of this name, for types that NumPy lacks too."""

        def convert(builder: Any, source: Any, target: Any, *rest: Any) -> Any:
            if _is_kept_as_integer(target):
                return _narrow(_widen(source), target.scalar)
            if _is_kept_as_integer(source.dtype):
                data = _widen(source).astype(interpreter._get_np_dtype(target.scalar))
                return TensorHandle(data, target.scalar)
            return originals[name](builder, source, target, *rest)

        return convert

    for name in originals:
        setattr(InterpreterBuilder, name, convert_with(name))


def _is_kept_as_integer(dtype: Any) -> bool:
    return dtype.scalar in _DTYPES


def _widen(handle: Any) -> np.ndarray:
    if not _is_kept_as_integer(handle.dtype):
        data: np.ndarray = handle.data
        return data
    bits = torch.from_numpy(np.ascontiguousarray(handle.data))
    wide: np.ndarray = bits.view(_DTYPES[handle.dtype.scalar]).float().numpy()
    return wide.reshape(handle.data.shape)


def _narrow(values: np.ndarray, dtype: Any) -> Any:
    target = _DTYPES[dtype]
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    if target is not torch.bfloat16:
        largest = torch.finfo(target).max
        wide = wide.clamp(-largest, largest)
    bits = wide.to(target).view(torch.uint16 if target is torch.bfloat16 else torch.uint8)
    return TensorHandle(bits.numpy().reshape(np.shape(values)), dtype)


def _registers(data: np.ndarray, pack: int) -> list[np.ndarray]:
    # The GPU groups elements as registers hold them, here they are grouped as memory does: the same
    # for assembly that treats every element alike, which is the only kind we write.
    size, rest = divmod(data.itemsize * pack, 4)
    if rest:
        raise ValueError(f"{pack} elements of {data.itemsize} bytes fill no register")
    return list(np.ascontiguousarray(data).reshape(-1).view(np.uint32).reshape(-1, size).T)


def _elements(words: list[np.ndarray], kind: Any, shape: tuple[int, ...]) -> Any:
    dtype = kind.scalar
    data = np.stack(words, axis=-1).reshape(-1).view(interpreter._get_np_dtype(dtype))
    return TensorHandle(data.reshape(shape), dtype)
