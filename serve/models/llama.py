"""The Llama family: Llama, SmolLM, TinyLlama, Mistral, with its sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.kv_store import rope_and_store, rope_table
from qserve.kernels.paged_attention import Scoring, paged_attention
from qserve.kernels.rms_norm import rms_norm
from qserve.serve.batch import Batch
from qserve.serve.layers.feed_forward import Workspace
from qserve.serve.models.llama_config import LlamaConfig
from qserve.serve.models.mixtral import read_feed_forward
from qserve.serve.weights import WeightReader


@dataclass(frozen=True, slots=True)
class Buffers:
    """Where the layers write, a row for each token of the step; float32, contiguous rows."""

    embedded: torch.Tensor  # [num_tokens, hidden_size], in the dtype of the embedding
    residual: torch.Tensor  # [num_tokens, hidden_size]
    normed: torch.Tensor  # [num_tokens, hidden_size]
    update: torch.Tensor  # [num_tokens, hidden_size], what a layer adds to the residual
    qkv: torch.Tensor  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    q: torch.Tensor  # [num_tokens, num_heads * head_dim], a view into qkv
    attended: torch.Tensor  # [num_tokens, num_heads * head_dim]


class LlamaLayer:
    """Attention and feed-forward of one layer, each with its norm before it."""

    def __init__(
        self, config: LlamaConfig, weights: WeightReader, index: int, workspace: Workspace
    ) -> None:
        name, hidden = f"model.layers.{index}", config.hidden_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        attention = f"{name}.self_attn"
        self.eps = config.rms_norm_eps
        self.scoring = Scoring(config.head_dim**-0.5, config.windows[index])
        self.input_norm = weights.norm(f"{name}.input_layernorm", hidden)
        self.qkv = weights.linear(
            f"{attention}.q_proj",
            f"{attention}.k_proj",
            f"{attention}.v_proj",
            shape=(q_size + 2 * kv_size, hidden),
        )
        self.o = weights.linear(f"{attention}.o_proj", shape=(hidden, q_size))
        self.post_norm = weights.norm(f"{name}.post_attention_layernorm", hidden)
        self.feed_forward = read_feed_forward(config, weights, index, workspace)

    def forward(self, b: Buffers, kv: LayerCache, cos_sin: torch.Tensor, batch: Batch) -> None:
        """Read ``b.normed``, the normed residual; leave what to add to it in ``b.update``."""
        self.qkv(b.normed, b.qkv)
        rope_and_store(b.qkv, batch.positions, cos_sin, kv, batch.slot_mapping)
        paged_attention(
            b.q,
            kv,
            batch.block_tables,
            batch.context_lens,
            batch.cu_seqlens_q,
            self.scoring,
            out=b.attended,
        )
        self.o(b.attended, b.update)
        rms_norm(b.update, self.post_norm, self.eps, residual=b.residual, out=b.normed)
        self.feed_forward(b.normed, b.update)


class LlamaModel:
    """Embedding, layers, final norm and output head, with the buffers for one step.

    max_model_len: positions that occur. max_num_tokens: rows of a batch at most. max_num_samples:
    rows whose logits are wanted at most.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: WeightReader,
        max_num_tokens: int,
        max_num_samples: int,
        max_model_len: int,
    ) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = weights.embedding("model.embed_tokens", shape)
        workspace = Workspace(max_num_tokens)
        self.layers = [LlamaLayer(config, weights, i, workspace) for i in range(config.num_layers)]
        self.norm = weights.norm("model.norm", config.hidden_size)
        head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        self.head = weights.head(head, shape)
        self.cos_sin = rope_table(
            config.head_dim, max_model_len, config.rope_theta, config.rope_scaling
        )
        self._buffers = self._allocate(max_num_tokens)
        self._views: dict[int, Buffers] = {}
        self._samples = torch.empty(max_num_samples, config.hidden_size)
        self._logits = torch.empty(max_num_samples, config.vocab_size)

    @property
    def weight_bytes(self) -> int:
        """Memory of the linear layers that a step of one token reads."""
        parts = [part for layer in self.layers for part in (layer.qkv, layer.o, layer.feed_forward)]
        return sum(part.nbytes for part in [*parts, self.head])

    def embed(self, token_ids: torch.Tensor) -> None:
        """Begin a step: the rows of the tokens become the residual stream."""
        b = self._rows(token_ids.size(0))
        torch.index_select(self.embedding, 0, token_ids, out=b.embedded)
        b.residual.copy_(b.embedded)

    def compute(self, batch: Batch, caches: list[LayerCache]) -> torch.Tensor:
        """Take an embedded batch through the layers and store its keys and values.

        Returns float32 logits ``[num_samples, vocab_size]`` of ``batch.sample_rows``, valid until
        the next call.
        """
        b = self._rows(batch.token_ids.size(0))
        eps = self.config.rms_norm_eps
        rms_norm(b.residual, self.layers[0].input_norm, eps, out=b.normed)
        for i, layer in enumerate(self.layers):
            if i:
                rms_norm(b.update, layer.input_norm, eps, residual=b.residual, out=b.normed)
            layer.forward(b, caches[i], self.cos_sin, batch)
        rms_norm(b.update, self.norm, eps, residual=b.residual, out=b.normed)
        num_samples = batch.sample_rows.size(0)
        logits = self._logits[:num_samples]
        if not num_samples:
            return logits
        samples = b.normed
        if num_samples < batch.token_ids.size(0):
            samples = self._samples[:num_samples]
            torch.index_select(b.normed, 0, batch.sample_rows, out=samples)
        return self.head(samples, logits)

    def logits(self, num_samples: int) -> torch.Tensor:
        """The logits that the last ``compute`` left: float32 ``[num_samples, vocab_size]``."""
        return self._logits[:num_samples]

    def _allocate(self, num_tokens: int) -> Buffers:
        config = self.config
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        qkv = torch.empty(num_tokens, q_size + 2 * kv_size)
        return Buffers(
            embedded=torch.empty(num_tokens, config.hidden_size, dtype=self.embedding.dtype),
            residual=torch.empty(num_tokens, config.hidden_size),
            normed=torch.empty(num_tokens, config.hidden_size),
            update=torch.empty(num_tokens, config.hidden_size),
            qkv=qkv,
            q=qkv[:, :q_size],
            attended=torch.empty(num_tokens, q_size),
        )

    def _rows(self, num_tokens: int) -> Buffers:
        """The first rows of every buffer; remembered, since decode asks for the same few counts."""
        if num_tokens not in self._views:
            names = Buffers.__dataclass_fields__
            rows = {name: getattr(self._buffers, name)[:num_tokens] for name in names}
            self._views[num_tokens] = Buffers(**rows)
        return self._views[num_tokens]
