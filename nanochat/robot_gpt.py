"""A MultimodalGPT that also acts: it reads pictures, the robot's own state and an instruction, and writes a chunk of actions.

<|bos|> <|user_start|> <|image|>*N <|state|> open the door <|user_end|> <|assistant_start|> then
    head "bins":       a token for each number of the chunk, one after another (OpenVLA, arXiv 2406.09246)
    head "continuous": <|act|>, whose hidden state gives the whole chunk at once (OpenVLA-OFT, arXiv 2502.19645)

Questions about a picture are asked and answered as MultimodalGPT does, by the same weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.actions import N_BINS, Scale
from nanochat.engine import KVCache
from nanochat.gpt import Linear
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.tokenizer import Tokenizer

STATE, ACT = "<|state|>", "<|act|>"
BINS = tuple(f"<|action_{i}|>" for i in range(N_BINS))
HEADS = ("continuous", "bins")
GRID = 8  # cells a side that a glance tells apart
FREQUENCIES = 6  # of states: periods from 4 (more than the range -1..1) down to 1/8


@dataclass
class RobotGPTConfig(MultimodalGPTConfig):
    action_head: str = "continuous"
    chunk: int = 10  # actions that are given at once
    map_channels: int = 64  # of the encoder's map; vision_embedding_dim is the width of a glance
    state_scale: dict = field(default_factory=dict)  # of `actions.Scale`
    action_scale: dict = field(default_factory=dict)
    state_token_id: int = 0
    act_token_id: int = 0
    bin_token_id: int = 0  # of the first bin; the others follow

    def __post_init__(self):
        super().__post_init__()
        if self.action_head not in HEADS:
            raise ValueError(f"action_head must be one of {', '.join(HEADS)}, got {self.action_head!r}")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk must be a positive integer, got {self.chunk!r}")
        for scale in (self.state_scale, self.action_scale):
            Scale(**scale)
        last = {"state_token_id": self.state_token_id, "act_token_id": self.act_token_id,
                "bin_token_id": self.bin_token_id + N_BINS - 1}  # fmt: skip
        for name, token in last.items():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} is outside the vocabulary of {self.vocab_size}")

    def check_vision_tokens(self) -> None:
        """Glances are no grid: any number will do."""
        if not isinstance(self.vision_tokens_per_image, int) or self.vision_tokens_per_image < 1:
            raise ValueError(
                f"vision_tokens_per_image must be a positive integer, got {self.vision_tokens_per_image!r}"
            )

    @property
    def state_dim(self) -> int:
        return len(self.state_scale["low"])

    @property
    def action_dim(self) -> int:
        return len(self.action_scale["low"])


def waves(x: torch.Tensor) -> torch.Tensor:
    """(..., D) in -1..1 -> (..., 2 * D * FREQUENCIES) sines and cosines. Their length is the same for every x, so that a norm
    behind them loses nothing (NeRF's encoding, Mildenhall et al. 2020)."""
    frequency = math.pi / 2 * 2 ** torch.arange(FREQUENCIES, dtype=x.dtype, device=x.device)
    angle = (x[..., None] * frequency).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Glances(nn.Module):
    """(B, C, H, W) -> (B, N, D): N linear looks at the whole map, pooled to GRID x GRID cells.

    A robot's camera does not move, so that a place in the picture is a place in the world: with its own weights for every cell, a
    look reads where things are off the map. Soft-argmax keypoints and a grid of cells as tokens were slower to learn it.
    """

    def __init__(self, channels: int, n_tokens: int, width: int):
        super().__init__()
        self.n_tokens = n_tokens
        self.linear = nn.Linear(channels * GRID * GRID, n_tokens * width)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        cells = F.adaptive_avg_pool2d(maps, GRID).flatten(1)  # (B, C * GRID * GRID)
        return self.linear(cells).unflatten(-1, (self.n_tokens, -1))


class RobotGPT(MultimodalGPT):
    """Adds to MultimodalGPT: glances instead of cells, one token for the state, and the continuous head."""

    def __init__(self, config: RobotGPTConfig):
        super().__init__(config)
        self.state_scale, self.action_scale = Scale(**config.state_scale), Scale(**config.action_scale)
        self.glances = Glances(config.map_channels, config.vision_tokens_per_image, config.vision_embedding_dim)
        self.state_projector = Linear(2 * FREQUENCIES * config.state_dim, config.n_embd)
        if config.action_head == "continuous":
            self.action_head = Linear(config.n_embd, config.chunk * config.action_dim)

    @property
    def map_channels(self) -> int:
        return self.config.map_channels

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        return self.glances(maps.float())

    def embed(self, idx, vision_embeddings=None, vision_mask=None, states=None) -> torch.Tensor:
        """MultimodalGPT.embed; states (S, state_dim), normalised, replace the <|state|> tokens in reading order."""
        x = super().embed(idx, vision_embeddings, vision_mask)
        if states is None:
            return x
        places = idx == self.config.state_token_id
        if int(places.sum()) != len(states) or states.size(-1) != self.config.state_dim:
            raise ValueError(
                f"{int(places.sum())} places for states of {self.config.state_dim} numbers, got {tuple(states.shape)}"
            )
        projected = self.state_projector(waves(states.to(x.device).clamp(-1.5, 1.5)))
        return x.masked_scatter(places[..., None], projected.to(x.dtype))

    def read_actions(self, hidden: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        """Continuous head: hidden states (B, T, C) -> normalised chunks (A, chunk, action_dim) of the <|act|> tokens."""
        found = hidden[idx == self.config.act_token_id]
        return self.action_head(found).float().view(-1, self.config.chunk, self.config.action_dim)

    @torch.inference_mode()
    def act(self, prompts: Sequence[Sequence[int]], vectors: torch.Tensor, states: np.ndarray) -> np.ndarray:
        """Chunks of actions in physical units, (B, chunk, action_dim) float32, unlimited as the network has them.

        prompts: of `action_prompt`. vectors: (B, N, D) from `encode_images`. states: (B, state_dim) in physical units.
        """
        states = torch.from_numpy(self.state_scale.normalize(np.asarray(states, np.float32)))
        if self.config.action_head == "continuous":
            idx = pad_right([[*prompt, self.config.act_token_id] for prompt in prompts], self.device)
            chunks = self.read_actions(self.trunk(self.embed(idx, vectors, states=states)), idx)
            return self.action_scale.restore(chunks.cpu().numpy())
        return self.action_scale.from_bins(self.speak_bins(prompts, vectors, states))

    def speak_bins(self, prompts, vectors, states) -> np.ndarray:
        """Greedy bins (B, chunk, action_dim) int64, one number after the other, chosen among the bins' tokens alone."""
        config, lengths = self.config, [len(prompt) for prompt in prompts]
        n, first = config.chunk * config.action_dim, config.bin_token_id
        cache = KVCache(config, len(prompts), max(lengths) + n, self.device, self.compute_dtype)
        hidden = self.trunk(self.embed(pad_right(prompts, self.device), vectors, states=states), cache)
        cache.rewind(lengths)
        hidden = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]  # (B, C)
        spoken = []
        for _ in range(n):
            spoken.append(self.logits(hidden)[:, first : first + N_BINS].argmax(-1))  # (B,)
            if len(spoken) < n:
                hidden = self.trunk(self.embed(first + spoken[-1][:, None]), cache)[:, 0]
        return torch.stack(spoken, 1).view(-1, config.chunk, config.action_dim).cpu().numpy()


def pad_right(rows: Sequence[Sequence[int]], device) -> torch.Tensor:
    """(B, T) ids. What is behind a row's end is never looked at, since attention is causal: any id will do."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in rows], device=device)


def action_prompt(tokenizer: Tokenizer, instruction: str, tokens_per_image: int) -> list[int]:
    """One picture, the state and the instruction, up to where the action begins."""
    names = {name: tokenizer.special(name) for name in (
        "<|bos|>", "<|user_start|>", "<|image|>", STATE, "<|user_end|>", "<|assistant_start|>")}  # fmt: skip
    return [
        names["<|bos|>"], names["<|user_start|>"], *[names["<|image|>"]] * tokens_per_image, names[STATE],
        *tokenizer.encode(instruction), names["<|user_end|>"], names["<|assistant_start|>"],
    ]  # fmt: skip
