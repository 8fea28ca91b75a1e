"""How many KV blocks there can be, and the memory behind them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.serve.config import EngineConfig
from qserve.serve.errors import KVCacheTooSmall, StartupError
from qserve.serve.models.llama_config import LlamaConfig

SHARE_OF_FREE_MEMORY = 0.5  # the rest is for the page cache that holds the weights, and for others
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """Sizes of the cache: blocks of ``block_size`` tokens, requests of ``max_model_len``."""

    num_blocks: int
    block_size: int
    max_model_len: int


def plan_kv_cache(model: LlamaConfig, config: EngineConfig, free_bytes: int) -> KVCachePlan:
    """As many blocks as are useful and fit, and the context length that they allow.

    Useful is what ``max_num_seqs`` requests of full length hold. Raises ``StartupError`` when the
    context length asked for is longer than the model's, ``KVCacheTooSmall`` when one request of it
    or one block does not fit; a context length that was not asked for is lowered instead.
    """
    asked = config.max_model_len
    if asked is not None and not 1 < asked <= model.max_positions:
        raise StartupError(
            f"max_model_len is {asked}: expected 2 to {model.max_positions}, the model's positions"
        )
    max_model_len = asked or model.max_positions
    block_bytes = bytes_per_token(model, config) * config.block_size
    budget = config.kv_cache_bytes or max(0, int(free_bytes * SHARE_OF_FREE_MEMORY))
    affordable = budget // block_bytes
    if not affordable:
        raise KVCacheTooSmall(
            f"A block of {config.block_size} tokens needs {block_bytes:,} bytes of KV cache and "
            f"there are {budget:,}: give the KV cache more memory, or set a smaller block_size."
        )
    per_request = -(-max_model_len // config.block_size)
    if affordable < per_request:
        fitting = affordable * config.block_size
        if asked:
            raise KVCacheTooSmall(
                f"A request of {max_model_len} tokens needs {per_request * block_bytes >> 20} MiB "
                f"of KV cache and there are {budget >> 20} MiB: set max_model_len to {fitting} or "
                "less, or give the KV cache more memory."
            )
        max_model_len = fitting
        per_request = affordable
    num_blocks = min(affordable, per_request * config.max_num_seqs)
    return KVCachePlan(num_blocks, config.block_size, max_model_len)


def bytes_per_token(model: LlamaConfig, config: EngineConfig) -> int:
    """Bytes of keys and values of one token in all layers, with their scales and offsets."""
    format = config.kv_format or KvFormat.FLOAT16
    row_bytes = format.row_bytes(model.head_dim)
    return 2 * model.num_layers * model.num_kv_heads * row_bytes


def allocate_kv_cache(model: LlamaConfig, plan: KVCachePlan, format: KvFormat) -> list[LayerCache]:
    """The cache of every layer, zeroed. The system gives the memory when a block is first used."""
    sizes = (plan.num_blocks, model.num_kv_heads, plan.block_size, model.head_dim)
    return [LayerCache.allocate(format, *sizes) for _ in range(model.num_layers)]


def free_memory() -> int:
    """Bytes this process can still take: what the system has left, within the container's limit."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if "MemAvailable" in line)
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
    except OSError:  # no cgroup v2: no limit that we know of
        return available
    return available if limit == "max" else min(available, int(limit) - used)
