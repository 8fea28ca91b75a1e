"""What is wrong with a checkpoint, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch


class Severity(Enum):
    """Whether the checkpoint can be used."""

    ERROR = "error"
    """Some reader computes nonsense from it, or refuses it."""

    WARNING = "warning"
    """It works, and is not what it should be."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes that mend a checkpoint.

    summary: what they do. config: keys of ``quantization_config`` with their new values. tensors:
    tensor name -> what replaces it. dropped: tensors that are left out. A remedy without changes
    is writing the files anew, with an index of their own.
    """

    summary: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    where: a layer, a tensor or a file. remedy: None when there is none.
    """

    severity: Severity
    where: str
    problem: str
    remedy: Remedy | None = None
