"""The weights of attention in one plain pass of a torch model.

The layers attend in a fused kernel, which keeps no weights. So hooks record what goes into each layer during the pass, and the
weights are computed again from the same queries and keys; the layers themselves know nothing of this.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn

from nanochat.gpt import Inputs
from nanochat.vision.pixels import evaluating


@torch.no_grad()
def attention_weights(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """(n_layer, n_head, T, cells) float32 on the CPU: from each position of one row to the cells of its pictures."""
    with evaluating(model), recorded(model) as weights:
        model.hidden(inputs)
    if model.cross_attention is None:
        weights = [each[..., inputs.places[0]] for each in weights]
    return torch.stack(weights).float().cpu()


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The weights of every layer in a pass over one row inside the block: a list that fills with (n_head, T, keys) tensors."""
    found: list[torch.Tensor] = []

    def self_attention(layer: nn.Module, arguments: tuple) -> None:
        x, cos, sin, *_ = arguments
        q, k = layer.queries_and_keys(x, cos, sin)
        may_see = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
        found.append(softmax_weights(q[0], k[0], may_see))

    def cross_attention(layer: nn.Module, arguments: tuple) -> None:
        x, keys, _, mask, blind, _ = arguments
        weights = softmax_weights(layer.queries(x)[0], keys[0], mask[0])
        found.append(weights.masked_fill(blind[0], 0.0))

    if model.cross_attention is None:
        hooks = [block.attn.register_forward_pre_hook(self_attention) for block in model.transformer.h]
    else:
        hooks = [layer.register_forward_pre_hook(cross_attention) for layer in model.cross_attention]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def softmax_weights(q: torch.Tensor, k: torch.Tensor, may_see: torch.Tensor) -> torch.Tensor:
    """q (T, H, D), k (S, H_kv, D), may_see: bool that broadcasts to (H, T, S) -> (H, T, S) float32 of rows that add up to 1."""
    q, k = q.float().transpose(0, 1), k.float().transpose(0, 1)
    k = k.repeat_interleave(len(q) // len(k), 0)  # grouped-query attention: several heads share one of the keys
    scores = q @ k.transpose(1, 2) / q.size(-1) ** 0.5
    return scores.masked_fill(~may_see, -torch.inf).softmax(-1)
