"""How hidden states become actions. A head is one class:

    rows(prompts, actions, inside)          the token rows that training reads, and what of them is learnt
    loss(model, hidden, batch)              the loss of an ActionBatch, given its hidden states
    act(model, prompts, images, states, committed, moved)     chunks of actions, see `acting.Policy`

To add one: write the class, list it in HEADS, and name it in `training.recipes.Robot.action_head`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn as nn

from nanochat.acting import act_at_once, act_by_tokens
from nanochat.actions import Scale
from nanochat.gpt import Inputs, Linear

TokenRow = tuple[list[int], list[int]]  # ids, and a mask that is 1 where the token is learnt


@dataclass
class ActionBatch:
    """A rows to learn actions from.

    inputs: of (A, T) tokens. targets: (A, T) int64, shifted, -1 where no token is learnt. chunks: (A, chunk, action_dim)
    normalised actions. inside: (A, chunk) bool, False where nothing is learnt: behind the episode's end, and for actions that
    are given (committed).
    """

    inputs: Inputs
    targets: torch.Tensor
    chunks: torch.Tensor
    inside: torch.Tensor


class ActionHead(Protocol):
    unit: str  # of the loss

    def rows(self, prompts: Sequence[list[int]], actions: np.ndarray, inside: np.ndarray) -> list[TokenRow]: ...

    def loss(self, model, hidden: torch.Tensor, batch: ActionBatch) -> torch.Tensor: ...

    def act(
        self,
        model,
        prompts: Sequence[list[int]],
        images: torch.Tensor,
        states: np.ndarray | None,
        committed: np.ndarray,
        moved: np.ndarray | None = None,
    ) -> np.ndarray: ...


class ContinuousHead(Linear):
    """The hidden state of an <|act|> token gives the whole chunk at once; L1 loss (OpenVLA-OFT, arXiv 2502.19645)."""

    unit = "actions: L1, in half ranges"

    def __init__(self, config):
        super().__init__(config.n_embd, config.chunk * config.action_dim)
        self.shape, self.act_token_id = (config.chunk, config.action_dim), config.act_token_id

    def rows(self, prompts, actions, inside):
        return [([*prompt, self.act_token_id], [0] * (len(prompt) + 1)) for prompt in prompts]

    def loss(self, model, hidden, batch):
        distance = (self.chunks(hidden, batch.inputs.idx) - batch.chunks).abs().mean(-1)  # (A, chunk)
        return distance[batch.inside].mean()

    def chunks(self, hidden: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> normalised chunks (A, chunk, action_dim) float32 of the A <|act|> tokens."""
        return self(hidden[idx == self.act_token_id]).float().unflatten(-1, self.shape)

    def act(self, model, prompts, images, states, committed, moved=None):
        return act_at_once(model, prompts, images, states, committed, moved)


class BinsHead(nn.Module):
    """One token for each number of the chunk, one after another; cross-entropy (OpenVLA, arXiv 2406.09246)."""

    unit = "actions: nats per number"

    def __init__(self, config):
        super().__init__()
        self.shape, self.first_id = (config.chunk, config.action_dim), config.bin_token_id
        self.scale = Scale(**config.predicted_scale)

    def rows(self, prompts, actions, inside):
        tokens = (self.scale.to_bins(actions) + self.first_id).reshape(len(prompts), -1).tolist()
        learnt = np.repeat(np.asarray(inside, int), self.shape[1], axis=1).tolist()
        return [
            ([*prompt, *bins], [*[0] * len(prompt), *mask])
            for prompt, bins, mask in zip(prompts, tokens, learnt, strict=True)
        ]

    def loss(self, model, hidden, batch):
        return model.loss(hidden, batch.targets)

    def act(self, model, prompts, images, states, committed, moved=None):
        return act_by_tokens(model, prompts, images, states, committed, moved)


HEADS: dict[str, type] = {"continuous": ContinuousHead, "bins": BinsHead}
