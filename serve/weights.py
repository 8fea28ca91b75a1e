"""Checkpoint tensors into the layers of a model, in the layout that the kernels want."""

from __future__ import annotations

import torch

from qserve.kernels import dense_matmul, int4_matmul, int8_matmul
from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight, concatenate_rows
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.config import HeadDtype
from qserve.serve.layers.linear import Linear, Weight


class WeightReader:
    """Reads the layers of a checkpoint one at a time, so that only one is in memory twice.

    activations, head_dtype: None takes what suits the checkpoint (see ``EngineConfig``).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        activations: Activations | None = None,
        head_dtype: HeadDtype | None = None,
    ) -> None:
        quantized = checkpoint.method is not None
        self._checkpoint = checkpoint
        self.activations = activations or (Activations.INT8 if quantized else Activations.FLOAT32)
        self.head_dtype = head_dtype or (HeadDtype.INT8 if quantized else HeadDtype.FLOAT)

    def linear(self, *names: str, shape: tuple[int, int]) -> Linear:
        """The layers ``names``, which share their input, as one of ``shape`` ``(outputs, inputs)``.

        Raises ``CheckpointError`` when the tensors have another shape.
        """
        weights = [self._checkpoint.linear(name) for name in names]
        found = (sum(_shape(w)[0] for w in weights), _shape(weights[0])[1])
        if found != shape or any(_shape(weight)[1] != shape[1] for weight in weights):
            raise CheckpointError(
                f"{' + '.join(names)} has {found[0]} outputs and {found[1]} inputs, config.json "
                f"says {shape[0]} and {shape[1]}: the checkpoint contradicts itself"
            )
        return Linear(_prepare(weights), self._bias(names, weights), self.activations)

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

    def head(self, name: str, shape: tuple[int, int]) -> Linear:
        """The output head; a float one is rounded to 8 bits if ``head_dtype`` says so."""
        weight = self._checkpoint.linear(name)
        if isinstance(weight, GroupedWeight) or self.head_dtype is HeadDtype.FLOAT:
            return self.linear(name, shape=shape)
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{name} has shape {tuple(weight.shape)}, expected {shape}")
        bias = self._bias((name,), [weight])
        return Linear([int8_matmul.quantize_int8(weight)], bias, self.activations)

    def _bias(
        self, names: tuple[str, ...], weights: list[GroupedWeight | torch.Tensor]
    ) -> torch.Tensor | None:
        """The biases side by side, zeros where a layer has none; None when none has."""
        if not any(f"{name}.bias" in self._checkpoint for name in names):
            return None
        parts = [
            self._checkpoint.tensor(f"{name}.bias").float()
            if f"{name}.bias" in self._checkpoint
            else torch.zeros(_shape(weight)[0])
            for name, weight in zip(names, weights, strict=True)
        ]
        return torch.cat(parts)


def _prepare(weights: list[GroupedWeight | torch.Tensor]) -> list[Weight]:
    """The weights repacked: as one where their formats agree, else one by one."""
    grouped = [weight for weight in weights if isinstance(weight, GroupedWeight)]
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if not dense and len({(weight.bits, weight.group_size) for weight in grouped}) == 1:
        return [int4_matmul.prepare(concatenate_rows(grouped))]
    if not grouped and len({weight.dtype for weight in dense}) == 1:
        return [dense_matmul.prepare(torch.cat(dense))]
    return [
        int4_matmul.prepare(weight)
        if isinstance(weight, GroupedWeight)
        else dense_matmul.prepare(weight)
        for weight in weights
    ]


def _shape(weight: GroupedWeight | torch.Tensor) -> tuple[int, int]:
    if isinstance(weight, GroupedWeight):
        return weight.out_features, weight.in_features
    return weight.shape[0], weight.shape[1]
