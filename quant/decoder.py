"""A decoder run block by block: transformers' own modules, filled from a checkpoint one at a time.

Memory is one block in float32, whatever the size of the model, plus the caller's hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, PreTrainedConfig

from qserve.kernels.activations import Activations, round_activations
from qserve.quant.architecture import (
    ATTENTION_OUTPUT,
    MLP_OUTPUT,
    Architecture,
    Fold,
    LayerSet,
    Stage,
    architecture_of,
    attention_implementation,
    attention_mask,
    check_rotary,
    layer_sets,
)
from qserve.quant.errors import CheckpointError
from qserve.quant.experts import ExpertMixture, MixtureLayer
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.soundness import check, check_block_count, check_sizes, checked

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


class Block:
    """One decoder block in float32; changing its modules' weights changes what it computes."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        architecture: Architecture,
        stages: tuple[Stage, ...],
        context: dict[str, Any],
    ) -> None:
        """context: what the attention is given beside hidden states."""
        self.index = index
        self.layer = layer
        self.architecture = architecture
        self.stages = stages
        self._rounds_inputs = True
        self._context = context

    @property
    def layer_sets(self) -> tuple[LayerSet, ...]:
        """What is coded alike."""
        return layer_sets(self.stages)

    @property
    def mixture(self) -> ExpertMixture | None:
        """The experts in place of the MLP."""
        modules = (module for module in self.layer.children() if isinstance(module, ExpertMixture))
        return next(modules, None)

    def readers(self, stage: Stage) -> tuple[Stage, ...]:
        """The stages whose inputs share a scale with those of this one, itself included."""
        if stage.fold is not Fold.NORM:
            return (stage,)
        return tuple(
            one for one in self.stages if (one.fold, one.previous) == (stage.fold, stage.previous)
        )

    def module(self, name: str) -> nn.Module:
        """A submodule by its name inside the block, such as ``mlp.down_proj``."""
        return self.layer.get_submodule(name)

    def linear(self, name: str) -> nn.Linear:
        """A linear layer by its name inside the block."""
        module = self.module(name)
        assert isinstance(module, nn.Linear)
        return module

    def full_name(self, name: str) -> str:
        """The name that a module of this block has in the checkpoint."""
        return f"model.layers.{self.index}.{name}"

    def round_inputs_(self, names: Iterable[str], activations: Activations) -> None:
        """Let linear layers round their inputs, as the kernels that run a checkpoint do."""

        def rounded(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            if not self._rounds_inputs:
                return inputs
            rows = inputs[0].flatten(0, -2)
            return (round_activations(rows, activations).view_as(inputs[0]),)

        for name in names:
            self.linear(name).register_forward_pre_hook(rounded)

    def release_(self, names: Iterable[str]) -> None:
        """Free the weights of linear layers, which nothing is computed with any more."""
        for name in names:
            self.linear(name).weight = nn.Parameter(torch.empty(0), requires_grad=False)

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Meanwhile no layer rounds its inputs."""
        self._rounds_inputs = False
        try:
            yield
        finally:
            self._rounds_inputs = True

    def adds(self, stage: Stage) -> bool:
        """Whether the outputs of a stage are added to the hidden states, and as they are."""
        is_output = stage.name in (ATTENTION_OUTPUT, MLP_OUTPUT)
        return is_output and self._norm_behind(stage) is None

    def _norm_behind(self, output: Stage) -> str | None:
        is_attention = output.name == ATTENTION_OUTPUT
        return self.architecture.attention_norm if is_attention else self.architecture.mlp_norm

    def store_into(self, cache: Any) -> None:
        """Let attention hand its keys and values to a cache, one in transformers' sense."""
        self._context["past_key_values"] = cache

    def run_(self, hidden: torch.Tensor) -> None:
        """Replace hidden states ``[S, T, hidden_size]`` by the output of the block."""
        for window in hidden:
            window.copy_(self.output(window))

    def output(self, window: torch.Tensor) -> torch.Tensor:
        """What the block makes of the hidden states ``[T, hidden_size]`` of one window."""
        output: torch.Tensor = self.layer(window[None], **self._context)[0]
        return output

    @contextmanager
    def watched(self, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
        """Put the input and the output of every linear layer of a stage into ``seen``."""

        def watch(name: str) -> Any:
            def keep(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
                seen[name] = inputs[0], output

            return self.linear(name).register_forward_hook(keep)

        handles = [watch(name) for stage in self.stages for name in stage.linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_with(
        self, hidden: torch.Tensor, parameters: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The output ``[S, T, hidden_size]`` for hidden states, differentiable in both.

        parameters: all of the block's, by their names inside it; its own are not looked at.
        """
        output: torch.Tensor = functional_call(
            self.layer, dict(parameters), (hidden,), dict(self._context)
        )
        return output

    def mix(self, output: Stage, normed: torch.Tensor) -> torch.Tensor:
        """What the stage ``output``, the last of attention or of the MLP, receives.

        normed: a window ``[T, hidden_size]`` behind the norm before attention or MLP.
        """
        parent, _, name = output.linears[0].rpartition(".")
        module = self.module(parent)
        with _bypassed(module, name):
            if parent == "self_attn":
                mixed: torch.Tensor = module(normed[None], **self._context)[0][0]
            else:
                mixed = module(normed)
        return mixed

    def add_(self, output: Stage, window: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the outputs of such a stage to the hidden states ``[T, hidden_size]`` of a window."""
        outputs = self.linear(output.linears[0])(inputs)
        norm = self._norm_behind(output)
        window.add_(outputs if norm is None else self.module(norm)(outputs))


@contextmanager
def _bypassed(parent: nn.Module, name: str) -> Iterator[None]:
    """The submodule returns its input, so that its parent gives what it would have been given."""
    original = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, name, original)


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The output matrix ``[vocab_size, hidden_size]``, in the type that products are computed in.

    soft_cap: of Gemma 2's logits x, which become ``soft_cap * tanh(x / soft_cap)``; None leaves
    them as they are. activations: what hidden states are rounded to, None for not at all.
    """

    weight: torch.Tensor
    soft_cap: float | None
    activations: Activations | None

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[..., vocab_size]``, float32, of normed hidden states ``[..., hidden_size]``.

        out: memory for the product, in the type of the matrix.
        """
        if self.activations is not None:
            rows = hidden.flatten(0, -2)
            hidden = round_activations(rows, self.activations).view_as(hidden)
        hidden = hidden.to(self.weight.dtype)
        logits: torch.Tensor = torch.matmul(hidden, self.weight.T, out=out).float()
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits


class Decoder:
    """A float or quantized checkpoint as embedding, blocks and head, each read when asked for.

    Raises ``UnsupportedModelError`` for an architecture that is not in the table,
    ``CheckpointError`` for a configuration that contradicts itself.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture_of(checkpoint)
        self.config = _configuration(checkpoint)
        check_rotary(self.config, str(checkpoint.folder))
        self._skeletons: dict[bool, Block] = {}

    @property
    def num_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def is_tied(self) -> bool:
        """The head is the embedding matrix."""
        return bool(self.config.tie_word_embeddings)

    def skeleton(self, index: int) -> Block:
        """What has the names and shapes of block ``index``, on the meta device: without memory."""
        has_experts = self.architecture.experts_of(self.config, index) is not None
        if has_experts not in self._skeletons:
            self._skeletons[has_experts] = self.shell(index, length=1)
        return self._skeletons[has_experts]

    def block(self, index: int, length: int) -> Block:
        """Block ``index`` for windows of ``length`` tokens, in float32, packed weights dequantized.

        Where the checkpoint was made for quantized activations, its packed layers round their
        inputs as the kernels that run them do. What was read before counts as memory no more.
        Raises ``CheckpointError`` for missing, wrongly shaped or non-finite tensors.
        """
        self.checkpoint.unmap()
        block = self.shell(index, length)
        block.layer.load_state_dict(
            {name: self.parameter(block, name) for name in block.layer.state_dict()}, assign=True
        )
        block.layer.requires_grad_(False)
        if self.checkpoint.activations is not None:
            block.round_inputs_(self._packed_in(block), self.checkpoint.activations)
        return block

    def _packed_in(self, block: Block) -> list[str]:
        names = [name for stage in block.stages for name in stage.linears]
        return [n for n in names if self.checkpoint.describe(block.full_name(n)) is not None]

    def shell(self, index: int, length: int) -> Block:
        """Block ``index`` for windows of ``length`` tokens without memory: on the meta device."""
        experts = self.architecture.experts_of(self.config, index)
        with torch.device("meta"):
            layer = self.architecture.layer(self.config, index)
            if experts is not None:
                layer = MixtureLayer(layer, self.config, experts)
        context = {
            "position_embeddings": self._positions(length),
            "attention_mask": attention_mask(self.config, index, length),
        }
        stages = self.architecture.stages_of(self.config, index)
        return Block(index, layer.eval(), self.architecture, stages, context)

    def _positions(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each ``[1, T, rotary width]``."""
        rotary = self.architecture.rotary(self.config)
        cosines, sines = rotary(torch.empty(0), torch.arange(length)[None])
        return cosines, sines

    def parameter(self, block: Block, name: str) -> torch.Tensor:
        """A parameter of a block as the modules want it: float32, of their shape, finite."""
        full_name = block.full_name(name)
        module, _, kind = name.rpartition(".")
        if kind == "weight" and isinstance(block.module(module), nn.Linear):
            weight = self.checkpoint.linear(block.full_name(module))
            value = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        else:
            value = self.checkpoint.tensor(full_name)
        expected = tuple(block.layer.get_parameter(name).shape)
        return checked(value, full_name, expected)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., hidden_size]`` float32 of token ids ``[...]``."""
        table = self.checkpoint.tensor(EMBEDDING)
        if int(token_ids.max()) >= table.shape[0]:
            raise CheckpointError(
                f"the tokenizer gives id {int(token_ids.max())}, the embedding has "
                f"{table.shape[0]} rows: the tokenizer files belong to another model"
            )
        hidden = checked(nn.functional.embedding(token_ids, table), EMBEDDING, None)
        return hidden * table.shape[1] ** 0.5 if self.architecture.scales_embedding else hidden

    def check_outside_blocks(self) -> None:
        """Raise ``CheckpointError`` unless embedding, final norm and head are there and sound.

        Blocks are checked when they are read; what is outside them may only be copied.
        """
        table = (self.config.vocab_size, self.config.hidden_size)
        expected = {EMBEDDING: table, FINAL_NORM: table[1:]}
        if not self.is_tied:
            expected[HEAD] = table
        for name, shape in expected.items():
            check(self.checkpoint.tensor(name), name, shape)
        check_block_count(self.checkpoint, self.num_blocks)

    def final_norm(self) -> nn.Module:
        """The norm before the head, float32."""
        norm = self.architecture.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        weight = checked(self.checkpoint.tensor(FINAL_NORM), FINAL_NORM, (self.config.hidden_size,))
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.requires_grad_(False)

    def head(self) -> OutputHead:
        """What makes logits of normed hidden states, in float32."""
        name = EMBEDDING if self.is_tied else HEAD
        stored = self.checkpoint.linear(name.removesuffix(".weight"))
        is_float = isinstance(stored, torch.Tensor)
        weight = stored if isinstance(stored, torch.Tensor) else stored.dequantize()
        return OutputHead(
            checked(weight, name, (self.config.vocab_size, self.config.hidden_size)),
            getattr(self.config, "final_logit_softcapping", None),
            None if is_float else self.checkpoint.activations,
        )


def _configuration(checkpoint: Checkpoint) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} is not a usable configuration: {error}"
        ) from None
    check_sizes(config, str(checkpoint.folder))
    config._attn_implementation = attention_implementation(config)
    return config
