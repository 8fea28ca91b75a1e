"""A quantized checkpoint whose group scales and norm weights learn, with one block in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.func import functional_call

from qserve.quant.decoder import FINAL_NORM, Block, Decoder
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.writer import Writer
from qserve.quant.tuning.divergence import Divergence
from qserve.quant.tuning.group_scales import as_stored, scales_of, with_scales
from qserve.quant.windows import Windows

State = Mapping[str, torch.Tensor]
"""How far each number has moved, as a share of where it started: float32, by the name of its packed
layer or of the tensor of its norm. What is not named has not moved."""


class TunedDecoder(Decoder):
    """A quantized checkpoint with its group scales and norm weights moved by ``state``.

    A scale becomes ``scale * (1 + share)``; a norm that multiplies by ``offset + weight`` moves the
    whole factor. A share means the same for all of them, whatever has been folded into the norms.
    As a decoder it computes what a reader of the checkpoint would if ``state`` were stored.
    arithmetic: the type of products while learning.
    """

    def __init__(self, checkpoint: Checkpoint, arithmetic: torch.dtype) -> None:
        super().__init__(checkpoint)
        self.state: State = {}
        self._arithmetic = arithmetic

    def unmoved(self) -> dict[str, torch.Tensor]:
        """A state of zeros for everything that can move."""
        shares = {FINAL_NORM: torch.zeros(self.checkpoint.shape(FINAL_NORM))}
        for index in range(self.num_blocks):
            block = self.shell(index, length=1)
            for name, parameter in block.layer.named_parameters():
                full_name = block.full_name(name)
                layer = full_name.removesuffix(".weight")
                if _is_norm(block, name):
                    shares[full_name] = torch.zeros(parameter.shape)
                elif self.checkpoint.describe(layer) is not None:
                    shares[layer] = torch.zeros_like(scales_of(self._packed(layer)))
        return shares

    def parameter(self, block: Block, name: str) -> torch.Tensor:
        """See ``Decoder``: as it would be stored."""
        full_name = block.full_name(name)
        layer = full_name.removesuffix(".weight")
        if layer != full_name and layer in self.state:
            return self._stored_weight(layer).dequantize()
        if full_name in self.state:
            return self._stored_norm(full_name).float()
        return super().parameter(block, name)

    def final_norm(self) -> nn.Module:
        """See ``Decoder``: as it would be stored."""
        norm = super().final_norm()
        if FINAL_NORM in self.state:
            norm.load_state_dict({"weight": self._stored_norm(FINAL_NORM).float()}, assign=True)
        return norm.requires_grad_(False)

    def learn(
        self, windows: Windows, target: torch.Tensor, divergence: Divergence, state: State
    ) -> float:
        """Add the gradient of the mean divergence where windows count to the leaves of a state.

        The blocks run forward without a graph; then each runs again from what it had received and
        passes the gradient on, so that one block's graph is in memory. ``state`` is taken as it
        is, in float32. target: the float model's final hidden states. Returns the divergence.
        """
        length = windows.token_ids.shape[1]
        hidden = self.embed(windows.token_ids)
        received = []
        with torch.no_grad():
            for index in range(self.num_blocks):
                received.append(hidden)
                hidden = self._run(index, length, hidden, state)
        hidden.requires_grad_()
        weight = self._moved_norm(FINAL_NORM, state)
        normed = functional_call(super().final_norm(), {"weight": weight}, (hidden,))
        loss, gradient = divergence.gradient(target, normed.detach(), windows.counts)
        normed.backward(gradient)
        for index in reversed(range(self.num_blocks)):
            gradient = _gradient_of(hidden)
            hidden = received.pop().requires_grad_()
            self._run(index, length, hidden, state).backward(gradient)
        return loss

    def stored(self, writer: Writer) -> dict[str, torch.Tensor]:
        """The stored tensors that ``state`` changes, with their new values."""
        changed: dict[str, torch.Tensor] = {}
        for name in self.state:
            if name in self.checkpoint:
                tensors = {name: self._stored_norm(name)}
            else:
                packed = writer.encode(self._stored_weight(name))
                tensors = {f"{name}.{key}": tensor for key, tensor in packed.items()}
            for key, tensor in tensors.items():
                if not torch.equal(tensor, self.checkpoint.tensor(key)):
                    changed[key] = tensor
        return changed

    def _run(self, index: int, length: int, hidden: torch.Tensor, state: State) -> torch.Tensor:
        self.checkpoint.unmap()
        block = self.shell(index, length)
        parameters = dict(self._moved_parameters(block, state))
        with torch.autocast("cpu", self._arithmetic, self._arithmetic is not torch.float32):
            return block.run_with(hidden, parameters)

    def _moved_parameters(self, block: Block, state: State) -> Iterator[tuple[str, torch.Tensor]]:
        for name in block.layer.state_dict():
            full_name = block.full_name(name)
            layer = full_name.removesuffix(".weight")
            if layer != full_name and layer in state:
                weight = self._packed(layer)
                scales = scales_of(weight) * (1 + state[layer])
                yield name, with_scales(weight, scales).dequantize()
            elif full_name in state:
                yield name, self._moved_norm(full_name, state)
            else:
                yield name, super().parameter(block, name)

    def _moved_norm(self, name: str, state: State) -> torch.Tensor:
        weight, offset = self.checkpoint.tensor(name).float(), self.architecture.norm_offset
        return weight + (weight + offset) * state[name]

    def _packed(self, layer: str) -> QuantizedWeight:
        weight = self.checkpoint.linear(layer)
        assert not isinstance(weight, torch.Tensor)
        return weight

    def _stored_weight(self, layer: str) -> QuantizedWeight:
        weight = self._packed(layer)
        return as_stored(weight, scales_of(weight) * (1 + self.state[layer]))

    def _stored_norm(self, name: str) -> torch.Tensor:
        return self._moved_norm(name, self.state).to(self.checkpoint.tensor(name).dtype)


def _is_norm(block: Block, name: str) -> bool:
    """Whether a parameter is the weight of a norm."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and not isinstance(block.module(module), nn.Linear)


def _gradient_of(hidden: torch.Tensor) -> torch.Tensor:
    assert hidden.grad is not None
    return hidden.grad
