"""Checkpoint tensors into the layers of a model, in the layout that the kernels want."""

from __future__ import annotations

import torch

from qserve.kernels import int8_matmul
from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight, concatenate_rows, joinable
from qserve.kernels.linear_weight import NeutralWeight, prepare_linear, shape_of
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.config import HeadDtype
from qserve.serve.layers.linear import Linear


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
        weights: list[NeutralWeight] = [self._checkpoint.linear(name) for name in names]
        found = (sum(shape_of(w)[0] for w in weights), shape_of(weights[0])[1])
        if found != shape or any(shape_of(weight)[1] != shape[1] for weight in weights):
            raise CheckpointError(
                f"{' + '.join(names)} has {found[0]} outputs and {found[1]} inputs, config.json "
                f"says {shape[0]} and {shape[1]}: the checkpoint contradicts itself"
            )
        parts = _join(weights, [self._bias(name) for name in names])
        return Linear([prepare_linear(w, bias=bias) for w, bias in parts], self.activations)

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
        if not isinstance(weight, torch.Tensor) or self.head_dtype is HeadDtype.FLOAT:
            return self.linear(name, shape=shape)
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{name} has shape {tuple(weight.shape)}, expected {shape}")
        return Linear([int8_matmul.quantize_int8(weight, bias=self._bias(name))], self.activations)

    def _bias(self, name: str) -> torch.Tensor | None:
        tensor = f"{name}.bias"
        return self._checkpoint.tensor(tensor).float() if tensor in self._checkpoint else None


def _join(
    weights: list[NeutralWeight], biases: list[torch.Tensor | None]
) -> list[tuple[NeutralWeight, torch.Tensor | None]]:
    """The weights with their biases: as one where their formats agree, else one by one."""
    grouped = [weight for weight in weights if isinstance(weight, GroupedWeight)]
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if len(grouped) == len(weights) and joinable(grouped):
        return [(concatenate_rows(grouped), _join_biases(weights, biases))]
    if len(dense) == len(weights) and len({weight.dtype for weight in dense}) == 1:
        return [(torch.cat(dense), _join_biases(weights, biases))]
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
