"""What a checkpoint writes after a prompt, by the decoder that quantization runs on."""

from __future__ import annotations

import torch

from qserve.quant.decoder import Decoder
from qserve.quant.errors import CheckpointError
from qserve.quant.evaluate import final_hidden


def continue_greedily(decoder: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    """The most likely ``num_tokens`` tokens after those of a prompt, one after the other.

    Nothing is cached: every token reads all blocks again, so this is for a few tokens. Raises
    ``CheckpointError`` for logits that are infinite or NaN.
    """
    head = decoder.head()
    token_ids = list(prompt)
    for position in range(num_tokens):
        hidden = final_hidden(decoder, torch.tensor([token_ids]), lambda: None)
        logits = head.logits(hidden[0, -1])
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(f"infinite or NaN logits for token {position} after the prompt")
        token_ids.append(int(logits.argmax()))
    return token_ids[len(prompt) :]
