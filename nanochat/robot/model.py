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

from nanochat.engine import KVCache
from nanochat.gpt import Linear, norm
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.robot.actions import N_BINS, Scale
from nanochat.tokenizer import Tokenizer

STATE, ACT = "<|state|>", "<|act|>"
BINS = tuple(f"<|action_{i}|>" for i in range(N_BINS))
HEADS = ("continuous", "bins")
FREQUENCIES = 6  # of positions and states: periods from 4 (more than the range -1..1) down to 1/8


@dataclass
class RobotGPTConfig(MultimodalGPTConfig):
    action_head: str = "continuous"
    chunk: int = 10  # actions that are given at once
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


class Keypoints(nn.Module):
    """Spatial soft-argmax (Levine et al. 2016, arXiv 1504.00702): each of N learnt heat maps says what it looks at and where.

    (B, C, H, W) -> (B, N, C + 4 * FREQUENCIES): the features under the heat, and its centre. A goal is a ball of a few
    pixels: the centre of a soft map is finer than its cells, the average over a grid's cell is coarser.
    """

    def __init__(self, channels: int, n_tokens: int):
        super().__init__()
        self.heat = nn.Conv2d(channels, n_tokens, 1)

    @staticmethod
    def width(channels: int) -> int:
        return channels + 4 * FREQUENCIES

    @staticmethod
    def places(tokens: torch.Tensor) -> torch.Tensor:
        """(..., N, D) tokens -> (..., N, 2): where each looks, x to the right and y down, 0..1 inside the picture."""
        sine, cosine = tokens[..., -4 * FREQUENCIES :].unflatten(-1, (2, 2, FREQUENCIES))[..., 0].unbind(-2)
        return (torch.atan2(sine, cosine) / math.pi + 0.5).flip(-1)  # the slowest wave turns once in 4

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        _, _, height, width = maps.shape
        share = self.heat(maps).flatten(2).softmax(-1)  # (B, N, H * W)
        features = share @ maps.flatten(2).transpose(1, 2)  # (B, N, C)
        y, x = (torch.linspace(-1, 1, n, dtype=maps.dtype, device=maps.device) for n in (height, width))
        cells = torch.cartesian_prod(y, x)  # (H * W, 2)
        return torch.cat([norm(features), waves(share @ cells)], -1)


class RobotGPT(MultimodalGPT):
    """Adds to MultimodalGPT: keypoints instead of a grid, one token for the state, and the continuous head."""

    def __init__(self, config: RobotGPTConfig):
        super().__init__(config)
        self.state_scale, self.action_scale = Scale(**config.state_scale), Scale(**config.action_scale)
        self.keypoints = Keypoints(self.map_channels, config.vision_tokens_per_image)
        self.state_projector = Linear(2 * FREQUENCIES * config.state_dim, config.n_embd)
        if config.action_head == "continuous":
            self.action_head = Linear(config.n_embd, config.chunk * config.action_dim)

    @property
    def map_channels(self) -> int:
        return self.config.vision_embedding_dim - Keypoints.width(0)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        return self.keypoints(maps.float())

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
