"""How hidden states become actions. A head is one class:

    rows(prompts, actions, inside)          the token rows that training reads, and what of them is learnt
    loss(model, hidden, batch)              the loss of an ActionBatch, given its hidden states
    act(model, prompts, images, states, committed)     chunks of actions in physical units

A chunk can continue actions that the robot carries out anyway while it is made: the committed ones, its first (see
`chunk_player`). For bins they are the tokens before. The continuous head lets its difference from the last of them die away, and
can learn to take them into account (Black et al. 2025, arXiv 2512.05964).

To add one: write the class, list it in HEADS, and name it in `training.recipes.Robot.action_head`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.actions import N_BINS, Scale
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import Inputs, Linear, pad_rows
from nanochat.sampling import Sampling

STILL_LEFT = 0.6  # of what a chunk differs by from the committed actions, a step later
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


def known_actions(chunks: torch.Tensor, counts: torch.Tensor, most: int) -> torch.Tensor:
    """(A, most, D + 1) of normalised chunks (A, chunk, D), for `Inputs.committed`: the first counts[i] actions of each chunk, and
    zeros behind them; the last number is 1 for an action that is given. counts: (A,), at most `most`."""
    given = (torch.arange(most, device=chunks.device) < counts[:, None])[..., None].to(chunks.dtype)
    return torch.cat([chunks[:, :most] * given, given], -1)


def joined(chunks: np.ndarray, committed: np.ndarray) -> np.ndarray:
    """Chunks (B, n, D) that begin with the committed actions (B, d, D) and go on from them: what the last of them differs by from
    the chunk's own action is added to the next ones, less in each step."""
    d = committed.shape[1]
    if d == 0:
        return chunks
    left = STILL_LEFT ** np.arange(1, chunks.shape[1] - d + 1, dtype=np.float32)[:, None]  # (n - d, 1)
    rest = chunks[:, d:] + left * (committed[:, -1:] - chunks[:, d - 1 : d])
    return np.concatenate([committed, rest], 1)


class ActionHead(Protocol):
    unit: str  # of the loss
    most_committed: int  # so many actions of a chunk may be given at most

    def rows(self, prompts: Sequence[list[int]], actions: np.ndarray, inside: np.ndarray) -> list[TokenRow]: ...

    def loss(self, model, hidden: torch.Tensor, batch: ActionBatch) -> torch.Tensor: ...

    def act(
        self, model, prompts: Sequence[list[int]], images: torch.Tensor, states: torch.Tensor, committed: np.ndarray
    ) -> np.ndarray: ...


class ContinuousHead(Linear):
    """The hidden state of an <|act|> token gives the whole chunk at once; L1 loss (OpenVLA-OFT, arXiv 2502.19645)."""

    unit = "actions: L1, in half ranges"

    def __init__(self, config):
        super().__init__(config.n_embd, config.chunk * config.action_dim)
        self.shape, self.act_token_id = (config.chunk, config.action_dim), config.act_token_id
        self.most_committed, self.learnt_committed = config.chunk - 1, config.committed
        self.scale = Scale(**config.predicted_scale)

    def rows(self, prompts, actions, inside):
        return [([*prompt, self.act_token_id], [0] * (len(prompt) + 1)) for prompt in prompts]

    def loss(self, model, hidden, batch):
        distance = (self.chunks(hidden, batch.inputs.idx) - batch.chunks).abs().mean(-1)  # (A, chunk)
        return distance[batch.inside].mean()

    def chunks(self, hidden: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> normalised chunks (A, chunk, action_dim) float32 of the A <|act|> tokens."""
        return self(hidden[idx == self.act_token_id]).float().unflatten(-1, self.shape)

    def act(self, model, prompts, images, states, committed):
        if not prompts:
            return np.zeros((0, *self.shape), np.float32)
        longest, fits = max(map(len, prompts)) + 1, model.config.sequence_len
        if longest > fits:
            raise UserError(f"{longest} tokens do not fit the context of {fits}: shorten the instruction")
        # a row is padded with its own start, which is no placeholder
        idx = pad_rows([[*prompt, self.act_token_id] for prompt in prompts], prompts[0][0]).to(model.device)
        inputs = Inputs(idx, idx == model.config.vision_token_id, images.flatten(0, 1), states)
        if self.learnt_committed:
            chunks = torch.from_numpy(self.scale.normalize(committed[:, : self.learnt_committed])).to(
                model.device
            )  # (B, d, D)
            counts = torch.full((len(chunks),), chunks.shape[1], device=model.device)
            chunks = F.pad(chunks, (0, 0, 0, self.learnt_committed - chunks.shape[1]))
            inputs.committed = known_actions(chunks, counts, self.learnt_committed)
        return joined(self.scale.restore(self.chunks(model.hidden(inputs), idx).cpu().numpy()), committed)


class BinsHead(nn.Module):
    """One token for each number of the chunk, one after another; cross-entropy (OpenVLA, arXiv 2406.09246)."""

    unit = "actions: nats per number"

    def __init__(self, config):
        super().__init__()
        self.shape, self.first_id = (config.chunk, config.action_dim), config.bin_token_id
        self.most_committed = config.chunk - 1
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

    def act(self, model, prompts, images, states, committed):
        if not prompts:
            return np.zeros((0, *self.shape), np.float32)
        known = (self.scale.to_bins(committed) + self.first_id).reshape(len(prompts), -1)
        prompts = [[*prompt, *before] for prompt, before in zip(prompts, known.tolist(), strict=True)]
        n, bins = self.shape[0] * self.shape[1] - known.shape[1], tuple(range(self.first_id, self.first_id + N_BINS))
        states = None if states is None else states[:, None]
        rows = Engine(model).generate(prompts, n, sampling=Sampling(allowed_ids=bins), images=images, states=states)
        return self.scale.from_bins(np.concatenate([known, rows], 1).reshape(-1, *self.shape) - self.first_id)


HEADS: dict[str, type] = {"continuous": ContinuousHead, "bins": BinsHead}
