"""Gemma 2: what attention and feed-forward give is normed before it is added."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.rms_norm import rms_norm
from qserve.serve.batch import Batch
from qserve.serve.layers.feed_forward import Workspace
from qserve.serve.models.llama import Attention, Buffers
from qserve.serve.models.llama_config import LlamaConfig
from qserve.serve.models.mixtral import read_feed_forward
from qserve.serve.weights import WeightReader


class Gemma2Layer:
    """Attention and feed-forward of one layer, each between two norms."""

    def __init__(
        self, config: LlamaConfig, weights: WeightReader, index: int, workspace: Workspace
    ) -> None:
        name, hidden = f"model.layers.{index}", config.hidden_size
        self.eps = config.rms_norm_eps
        self.norm_offset = config.norm_offset
        self.input_norm = weights.norm(f"{name}.input_layernorm", hidden)
        self.attention = Attention(config, weights, index)
        self.attention_norm = weights.norm(f"{name}.post_attention_layernorm", hidden)
        self.inner_norm = weights.norm(f"{name}.pre_feedforward_layernorm", hidden)
        self.feed_forward = read_feed_forward(config, weights, index, workspace)
        self.output_norm = weights.norm(f"{name}.post_feedforward_layernorm", hidden)
        self.nbytes = self.attention.nbytes + self.feed_forward.nbytes

    def forward(self, b: Buffers, kv: LayerCache, cos_sin: torch.Tensor, batch: Batch) -> None:
        """See ``llama.Layer``."""
        self.attention(b, kv, cos_sin, batch)
        self._norm(b.update, self.attention_norm, out=b.update)
        self._norm(b.update, self.inner_norm, residual=b.residual, out=b.normed)
        self.feed_forward(b.normed, b.update)
        self._norm(b.update, self.output_norm, out=b.update)

    def _norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        rms_norm(x, weight, self.eps, residual=residual, weight_offset=self.norm_offset, out=out)
