"""The Llama family: the model, and the layer that most of its relatives share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from qserve.kernels.head_norm import head_norm
from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.kv_store import rope_and_store, rope_table
from qserve.kernels.output_head import argmax_head
from qserve.kernels.paged_attention import Scoring, paged_attention
from qserve.kernels.rms_norm import rms_norm
from qserve.kernels.soft_cap import soft_cap
from qserve.serve.batch import Batch
from qserve.serve.layers.feed_forward import Workspace
from qserve.serve.models.llama_config import LlamaConfig
from qserve.serve.models.mixtral import read_feed_forward
from qserve.serve.scheduler import Limits
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
    k: torch.Tensor  # [num_tokens, num_kv_heads * head_dim], a view into qkv
    attended: torch.Tensor  # [num_tokens, num_heads * head_dim]


class Layer(Protocol):
    """One layer of a model, with a norm of its own before it.

    input_norm: the weight of that norm. nbytes: memory of the weights that a step of one token
    reads.
    """

    input_norm: torch.Tensor
    nbytes: int

    def forward(self, b: Buffers, kv: LayerCache, cos_sin: torch.Tensor, batch: Batch) -> None:
        """Read ``b.normed``, the normed residual; leave what to add to it in ``b.update``."""


LayerMaker = Callable[[LlamaConfig, WeightReader, int, Workspace], Layer]
"""Reads the layer with an index, counted from 0."""


class Attention:
    """Projections, norms of heads, rotation and attention of one layer."""

    def __init__(self, config: LlamaConfig, weights: WeightReader, index: int) -> None:
        name, hidden = f"model.layers.{index}.self_attn", config.hidden_size
        parts = ("qkv_proj",) if config.has_joined_tensors else ("q_proj", "k_proj", "v_proj")
        self.qkv = weights.linear(
            *(f"{name}.{part}" for part in parts),
            shape=(config.q_size + 2 * config.kv_size, hidden),
        )
        self.o = weights.linear(f"{name}.o_proj", shape=(hidden, config.q_size))
        self.head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.has_head_norms:
            q_norm = weights.norm(f"{name}.q_norm", config.head_dim)
            self.head_norms = q_norm, weights.norm(f"{name}.k_norm", config.head_dim)
        self.eps = config.rms_norm_eps
        self.scoring = Scoring(
            config.attention_scale or config.head_dim**-0.5,
            config.windows[index],
            config.attention_soft_cap,
        )
        self.nbytes = self.qkv.nbytes + self.o.nbytes

    def __call__(self, b: Buffers, kv: LayerCache, cos_sin: torch.Tensor, batch: Batch) -> None:
        """Read ``b.normed``, store keys and values, leave the result in ``b.update``."""
        self.qkv(b.normed, b.qkv)
        if self.head_norms is not None:
            q_norm, k_norm = self.head_norms
            head_norm(b.q, q_norm, self.eps, out=b.q)
            head_norm(b.k, k_norm, self.eps, out=b.k)
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


class LlamaLayer:
    """Attention and feed-forward of one layer, each with its norm before it."""

    def __init__(
        self, config: LlamaConfig, weights: WeightReader, index: int, workspace: Workspace
    ) -> None:
        name, hidden = f"model.layers.{index}", config.hidden_size
        self.eps = config.rms_norm_eps
        self.norm_offset = config.norm_offset
        self.input_norm = weights.norm(f"{name}.input_layernorm", hidden)
        self.attention = Attention(config, weights, index)
        self.post_norm = weights.norm(f"{name}.post_attention_layernorm", hidden)
        self.feed_forward = read_feed_forward(config, weights, index, workspace)
        self.nbytes = self.attention.nbytes + self.feed_forward.nbytes

    def forward(self, b: Buffers, kv: LayerCache, cos_sin: torch.Tensor, batch: Batch) -> None:
        """See ``Layer``."""
        self.attention(b, kv, cos_sin, batch)
        rms_norm(
            b.update,
            self.post_norm,
            self.eps,
            residual=b.residual,
            weight_offset=self.norm_offset,
            out=b.normed,
        )
        self.feed_forward(b.normed, b.update)


class LlamaModel:
    """Embedding, layers, final norm and output head, with the buffers for one step.

    make_layer: of the architecture. limits: rows of a batch, rows whose logits are wanted and
    positions, at most.
    """

    def __init__(
        self, config: LlamaConfig, weights: WeightReader, make_layer: LayerMaker, limits: Limits
    ) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = weights.embedding("model.embed_tokens", shape)
        # Rounded as the product with embeddings of this dtype would be.
        scale = torch.tensor(config.embedding_scale, dtype=self.embedding.dtype)
        self.embedding_scale = float(scale)
        workspace = Workspace(limits.max_num_batched_tokens)
        self.layers = [make_layer(config, weights, i, workspace) for i in range(config.num_layers)]
        self.norm = weights.norm("model.norm", config.hidden_size)
        head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        self.head = weights.head(head, shape)
        self.rotations = _rotations(config, limits.max_model_len)
        self._buffers = self._allocate(limits.max_num_batched_tokens)
        self._views: dict[int, Buffers] = {}
        self._samples = torch.empty(limits.max_num_seqs, config.hidden_size)
        self._logits = torch.empty(limits.max_num_seqs, config.vocab_size)
        self._ids = torch.empty(limits.max_num_seqs, dtype=torch.int64)
        self._values = torch.empty(limits.max_num_seqs)

    @property
    def weight_bytes(self) -> int:
        """Memory of the linear layers that a step of one token reads."""
        return sum(layer.nbytes for layer in self.layers) + self.head.nbytes

    def embed(self, token_ids: torch.Tensor) -> None:
        """Begin a step: the rows of the tokens become the residual stream."""
        b = self._rows(token_ids.size(0))
        torch.index_select(self.embedding, 0, token_ids, out=b.embedded)
        b.residual.copy_(b.embedded)
        if self.embedding_scale != 1.0:
            b.residual.mul_(self.embedding_scale)

    def compute(self, batch: Batch, caches: list[LayerCache]) -> torch.Tensor:
        """Take an embedded batch through the layers and store its keys and values.

        Returns the normed rows ``[num_samples, hidden_size]`` of ``batch.sample_rows``, for
        ``logits`` or ``largest``, valid until the next call.
        """
        b = self._rows(batch.token_ids.size(0))
        eps, offset = self.config.rms_norm_eps, self.config.norm_offset
        norm = partial(rms_norm, eps=eps, weight_offset=offset, out=b.normed)
        norm(b.residual, self.layers[0].input_norm)
        for i, layer in enumerate(self.layers):
            if i:
                norm(b.update, layer.input_norm, residual=b.residual)
            layer.forward(b, caches[i], self.rotations[i], batch)
        norm(b.update, self.norm, residual=b.residual)
        num_samples = batch.sample_rows.size(0)
        samples = b.normed
        if num_samples < batch.token_ids.size(0):
            samples = self._samples[:num_samples]
            torch.index_select(b.normed, 0, batch.sample_rows, out=samples)
        return samples

    def logits(self, samples: torch.Tensor) -> torch.Tensor:
        """Float32 ``[num_samples, vocab_size]``, valid until the next call."""
        logits = self._logits[: samples.size(0)]
        if not samples.size(0):
            return logits
        self.head(samples, logits)
        if self.config.logit_soft_cap is not None:
            soft_cap(logits, self.config.logit_soft_cap, out=logits)
        return logits

    @property
    def finds_largest(self) -> bool:
        """Whether the head finds its largest logit while it computes them, see ``largest``; a cap
        could make equals of two."""
        whole = len(self.head.weights) == 1 and self.head.weights[0].native is not None
        return whole and self.config.logit_soft_cap is None

    def largest(self, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest of ``logits`` of each row, of which none is written: ids int64 and values
        ``[num_samples]``, valid until the next call."""
        (weight,) = self.head.weights
        out = self._ids[: samples.size(0)], self._values[: samples.size(0)]
        return argmax_head(samples, weight, activations=self.head.activations, out=out)

    def _allocate(self, num_tokens: int) -> Buffers:
        config = self.config
        qkv = torch.empty(num_tokens, config.q_size + 2 * config.kv_size)
        return Buffers(
            embedded=torch.empty(num_tokens, config.hidden_size, dtype=self.embedding.dtype),
            residual=torch.empty(num_tokens, config.hidden_size),
            normed=torch.empty(num_tokens, config.hidden_size),
            update=torch.empty(num_tokens, config.hidden_size),
            qkv=qkv,
            q=qkv[:, : config.q_size],
            k=qkv[:, config.q_size : config.q_size + config.kv_size],
            attended=torch.empty(num_tokens, config.q_size),
        )

    def _rows(self, num_tokens: int) -> Buffers:
        """The first rows of every buffer; remembered, since decode asks for the same few counts."""
        if num_tokens not in self._views:
            names = Buffers.__dataclass_fields__
            rows = {name: getattr(self._buffers, name)[:num_tokens] for name in names}
            self._views[num_tokens] = Buffers(**rows)
        return self._views[num_tokens]


def _rotations(config: LlamaConfig, max_model_len: int) -> list[torch.Tensor]:
    """The table of cosines and sines of each layer; layers share them."""
    rotary_dim = int(config.head_dim * config.rotary_share)
    turning = rope_table(rotary_dim, max_model_len, config.rope_theta, config.rope_scaling)
    still = torch.tensor([[1.0, 0.0]]).repeat(max_model_len, 1)  # a pair turned by nothing
    layers = range(config.num_layers)
    return [still if i in config.unrotated_layers else turning for i in layers]
