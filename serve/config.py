"""What the engine can be told at start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qserve.kernels.activations import Activations
from qserve.kernels.kv_cache import KvFormat


class HeadDtype(Enum):
    """How the output head is kept in memory."""

    INT8 = "int8"  # 8-bit groups: half the bytes of a 16-bit head, read in full for every token
    FLOAT = "float"  # as the checkpoint holds it


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and formats of one engine; every field has a value that does.

    max_model_len: tokens of prompt and output a request may reach; None is the model's own limit.
    max_num_seqs: requests in one batch. max_num_batched_tokens: tokens in one step; a longer prompt
        is computed in chunks, between which running requests get their tokens.
    block_size: tokens of one KV block.
    kv_cache_bytes: memory for the KV cache; None takes what ``max_num_seqs`` requests of full
        length need, at most a share of the memory that is free.
    num_threads: CPU threads of the kernels; None is every core this process may use.
    activations: input of the quantized matmuls; None is what the checkpoint was made for, else int8
        for a quantized one and float32 for a 16-bit one.
    head_dtype: None is int8 for a quantized checkpoint, float for a 16-bit one.
    kv_format: how keys and values are kept; float16 loses nothing visible, int8 holds nearly twice
        as many tokens and int4 3.5 times. None is what the checkpoint has scales for, else float16;
        the scales used are those of each token and head, which are nearer than stored ones.
    weight_cache: folder for packed weights, which the next start maps; None keeps none.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_cache_bytes: int | None = None
    num_threads: int | None = None
    activations: Activations | None = None
    head_dtype: HeadDtype | None = None
    kv_format: KvFormat | None = None
    weight_cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs "
                f"{self.max_num_seqs}: a step must have room for one token of every request"
            )
