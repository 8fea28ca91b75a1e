"""Checkpoint tensors into the layers of a model, in the layout that the kernels want."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qserve.kernels import int8_matmul, native
from qserve.kernels.activations import Activations
from qserve.kernels.joined_rows import join_rows
from qserve.kernels.linear_weight import NeutralWeight, prepare_linear, shape_of
from qserve.kernels.packed_weight import PackedWeight, from_native
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.config import HeadDtype
from qserve.serve.layers.linear import Linear
from qserve.serve.weight_cache import WeightCache


class WeightReader:
    """Reads the layers of a checkpoint one at a time, so that only one is in memory twice.

    activations, head_dtype: None takes what suits the checkpoint. cache_folder: of packed weights,
    None for none (see ``EngineConfig``).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        activations: Activations | None = None,
        head_dtype: HeadDtype | None = None,
        cache_folder: Path | None = None,
    ) -> None:
        quantized = checkpoint.method is not None
        suiting = Activations.INT8 if quantized else Activations.FLOAT32
        self._checkpoint = checkpoint
        self.activations = activations or checkpoint.activations or suiting
        self.head_dtype = head_dtype or (HeadDtype.INT8 if quantized else HeadDtype.FLOAT)
        self._cache: WeightCache | None = None
        if cache_folder is not None and native.available():
            options = {"head_dtype": self.head_dtype.value}
            self._cache = WeightCache(cache_folder, checkpoint, options)

    def linear(self, *names: str, shape: tuple[int, int]) -> Linear:
        """The layers ``names``, which share their input, as one of ``shape`` ``(outputs, inputs)``.

        Raises ``CheckpointError`` when the tensors have another shape.
        """
        return self._packed(names, shape, lambda: self._pack(names, shape))

    def head(self, name: str, shape: tuple[int, int]) -> Linear:
        """The output head; a float one is rounded to 8 bits if ``head_dtype`` says so."""
        return self._packed((name, "head"), shape, lambda: self._pack_head(name, shape))

    def finish(self) -> None:
        """Keep what was packed for the next start; call when the last layer has been read."""
        if self._cache is not None:
            self._cache.save()

    def norm(self, name: str, size: int) -> torch.Tensor:
        """The weight of a norm, float32 ``[size]``."""
        weight = self._checkpoint.tensor(f"{name}.weight")
        if tuple(weight.shape) != (size,):
            raise CheckpointError(f"{name} has shape {tuple(weight.shape)}, expected ({size},)")
        return weight.float()

    def embedding(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """The embedding ``[vocab_size, hidden_size]`` in its stored dtype, mapped from the file."""
        weight = self._checkpoint.tensor(f"{name}.weight")
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{name} has shape {tuple(weight.shape)}, expected {shape}")
        return weight

    def _packed(
        self, names: tuple[str, ...], shape: tuple[int, int], pack: Callable[[], list[PackedWeight]]
    ) -> Linear:
        """The layer that the cache holds under ``names``, or else what ``pack`` gives."""
        key = " ".join([*names, f"{shape[0]}x{shape[1]}"])
        found = self._cache.get(key) if self._cache is not None else None
        if found is not None:
            return Linear([from_native(weight) for weight in found], self.activations)
        weights = pack()
        natives = [weight.native for weight in weights if weight.native is not None]
        if self._cache is not None and len(natives) == len(weights):
            self._cache.put(key, natives)
        return Linear(weights, self.activations)

    def _pack(self, names: tuple[str, ...], shape: tuple[int, int]) -> list[PackedWeight]:
        weights: list[NeutralWeight] = [self._checkpoint.linear(name) for name in names]
        found = (sum(shape_of(w)[0] for w in weights), shape_of(weights[0])[1])
        if found != shape or any(shape_of(weight)[1] != shape[1] for weight in weights):
            raise CheckpointError(
                f"{' + '.join(names)} has {found[0]} outputs and {found[1]} inputs, config.json "
                f"says {shape[0]} and {shape[1]}: the checkpoint contradicts itself"
            )
        parts = _join(weights, [self._bias(name) for name in names])
        return [prepare_linear(weight, bias=bias) for weight, bias in parts]

    def _pack_head(self, name: str, shape: tuple[int, int]) -> list[PackedWeight]:
        weight = self._checkpoint.linear(name)
        if not isinstance(weight, torch.Tensor) or self.head_dtype is HeadDtype.FLOAT:
            return self._pack((name,), shape)
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{name} has shape {tuple(weight.shape)}, expected {shape}")
        return [int8_matmul.quantize_int8(weight, bias=self._bias(name))]

    def _bias(self, name: str) -> torch.Tensor | None:
        tensor = f"{name}.bias"
        return self._checkpoint.tensor(tensor).float() if tensor in self._checkpoint else None


def _join(
    weights: list[NeutralWeight], biases: list[torch.Tensor | None]
) -> list[tuple[NeutralWeight, torch.Tensor | None]]:
    """The weights with their biases: as one where their forms agree, else one by one."""
    joined = join_rows(weights)
    if joined is not None:
        return [(joined, _join_biases(weights, biases))]
    return list(zip(weights, biases, strict=True))


def _join_biases(
    weights: list[NeutralWeight], biases: list[torch.Tensor | None]
) -> torch.Tensor | None:
    """The biases side by side, zeros where a layer has none; None when none has."""
    if all(bias is None for bias in biases):
        return None
    parts = [
        torch.zeros(shape_of(weight)[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(parts)
