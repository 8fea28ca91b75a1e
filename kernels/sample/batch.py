"""How the rows of a batch are to be sampled, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

GREEDY_BELOW = 1e-5
"""A temperature below this divides logits into infinities: the largest is its limit."""

NOT_SEEN = -1


@dataclass(frozen=True, slots=True)
class TokenAdjustments:
    """Tokens whose logits change before sampling; those of row ``m`` are the entries from
    ``starts[m]`` to ``starts[m + 1]``, each token at most once.

    starts: int32 ``[M + 1]``. token_ids: int32 ``[T]``. biases: float32 ``[T]``, added first; minus
    infinity forbids the token. counts: int32 ``[T]``, how often the row's output has the token so
    far: 0 for one that only the prompt has (the repetition penalty alone applies), ``NOT_SEEN``
    for one that neither has (only its bias applies). Raises ``ValueError`` for shapes and
    ``TypeError`` for dtypes that do not fit.
    """

    starts: torch.Tensor
    token_ids: torch.Tensor
    biases: torch.Tensor
    counts: torch.Tensor

    def __post_init__(self) -> None:
        num_entries, device = self.token_ids.numel(), self.token_ids.device
        _check_vector("starts", self.starts, self.starts.numel(), torch.int32, device)
        _check_vector("token_ids", self.token_ids, num_entries, torch.int32, device)
        _check_vector("biases", self.biases, num_entries, torch.float32, device)
        _check_vector("counts", self.counts, num_entries, torch.int32, device)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The settings of M rows, each a vector ``[M]``.

    temperature, top_p, min_p: float32; 1.0 and 0.0 turn the latter two off. top_k: int32, 0 is off.
    repetition_penalty, frequency_penalty, presence_penalty: float32; off at 1.0, 0.0 and 0.0.
    uniforms: float64 in [0, 1), the random number of each row: what is drawn follows from it, and
    from nothing else. adjustments: None when no row has a bias, a forbidden token or a penalty.
    Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit; what the vectors
    hold is not looked at, except by the native kernel.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    uniforms: torch.Tensor
    adjustments: TokenAdjustments | None = None

    def __post_init__(self) -> None:
        num_rows, device = self.temperature.numel(), self.temperature.device
        special = {"top_k": torch.int32, "uniforms": torch.float64}
        for field in fields(self):
            if field.name != "adjustments":
                vector: torch.Tensor = getattr(self, field.name)
                dtype = special.get(field.name, torch.float32)
                _check_vector(field.name, vector, num_rows, dtype, device)
        if self.adjustments is not None:
            starts = self.adjustments.starts
            _check_vector("starts", starts, num_rows + 1, torch.int32, device)

    def check(self, logits: torch.Tensor) -> None:
        """Raises ``ValueError`` unless these are the settings of the rows of ``logits``."""
        if self.temperature.shape[0] != logits.shape[0]:
            raise ValueError(
                f"settings of {self.temperature.shape[0]} rows for {logits.shape[0]} rows of "
                "logits, expected as many"
            )
        if self.temperature.device != logits.device:
            raise ValueError(
                f"settings are on {self.temperature.device}, expected {logits.device}, where the "
                "logits are"
            )


def _check_vector(
    name: str, vector: torch.Tensor, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    if vector.shape != (size,) or not vector.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected contiguous [{size}]")
    if vector.dtype is not dtype:
        raise TypeError(f"{name} is {vector.dtype}, expected {dtype}")
    if vector.device != device:
        raise ValueError(f"{name} is on {vector.device}, expected {device} like the others")
