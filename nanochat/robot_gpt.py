"""A MultimodalGPT that also acts: it reads pictures, the robot's state and an instruction, and predicts a chunk of actions.

    <|bos|> <|user_start|> <|image|>*N <|state|> open the door <|user_end|> <|assistant_start|>, then the action head's tokens

Questions about a picture are asked and answered as MultimodalGPT does, by the same weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn

from nanochat.action_heads import HEADS
from nanochat.actions import N_BINS, Scale
from nanochat.errors import UserError
from nanochat.fusion import Glances
from nanochat.gpt import Inputs, Linear
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig

FREQUENCIES = 6  # of states: periods from 4 (more than the range -1..1) down to 1/8
STATE_LIMIT = 1.5  # normalised states are clipped to this: beyond it the sines repeat


@dataclass
class RobotGPTConfig(MultimodalGPTConfig):
    action_head: str = "continuous"
    chunk: int = 10  # actions that are predicted at once
    map_channels: int = 64  # of the encoder's map; vision_embedding_dim is the width of a glance
    state_scale: dict = field(default_factory=dict)  # of `actions.Scale`
    action_scale: dict = field(default_factory=dict)
    state_token_id: int = 0
    act_token_id: int = 0
    bin_token_id: int = 0  # of the first bin; the others follow

    def __post_init__(self):
        super().__post_init__()
        if self.action_head not in HEADS:
            raise UserError(f"action_head must be one of {', '.join(HEADS)}, got {self.action_head!r}")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise UserError(f"chunk must be a positive integer, got {self.chunk!r}")
        for scale in (self.state_scale, self.action_scale):
            Scale(**scale)
        last = {"state_token_id": self.state_token_id, "act_token_id": self.act_token_id,
                "bin_token_id": self.bin_token_id + N_BINS - 1}  # fmt: skip
        for name, token in last.items():
            if not 0 <= token < self.vocab_size:
                raise UserError(f"{name} is outside the vocabulary of {self.vocab_size}")

    def check_vision_tokens(self) -> None:
        """Glances are no grid: any number will do."""
        if not isinstance(self.vision_tokens_per_image, int) or self.vision_tokens_per_image < 1:
            raise UserError(f"vision_tokens_per_image must be a positive integer, got {self.vision_tokens_per_image!r}")

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


class RobotGPT(MultimodalGPT):
    """Adds to MultimodalGPT: glances instead of grid cells, one token for the state, and an action head."""

    kind = "robot_gpt"
    config_class = RobotGPTConfig

    def __init__(self, config: RobotGPTConfig):
        super().__init__(config)
        self.state_scale, self.action_scale = Scale(**config.state_scale), Scale(**config.action_scale)
        self.glances = Glances(config.map_channels, config.vision_tokens_per_image, config.vision_embedding_dim)
        self.state_projector = Linear(2 * FREQUENCIES * config.state_dim, config.n_embd)
        self.action_head: nn.Module = HEADS[config.action_head](config)

    @property
    def map_channels(self) -> int:
        return self.config.map_channels

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        return self.glances(maps)

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """MultimodalGPT.embed; states replace the <|state|> tokens in reading order."""
        x = super().embed(inputs)
        if inputs.states is None:
            return x
        projected = self.state_projector(waves(inputs.states.clamp(-STATE_LIMIT, STATE_LIMIT)))
        return x.masked_scatter((inputs.idx == self.config.state_token_id)[..., None], projected.to(x.dtype))

    def param_group(self, name: str, parameter: nn.Parameter) -> str:
        if name.startswith("glances."):  # they learn with the encoder, from the same losses
            return "encoder"
        return "outputs" if name.startswith("action_head.") else super().param_group(name, parameter)

    @torch.inference_mode()
    def act(self, prompts: Sequence[Sequence[int]], images: torch.Tensor, states: np.ndarray) -> np.ndarray:
        """Chunks of actions in physical units, (B, chunk, action_dim) float32, as the network gives them: not clipped.

        prompts: of `conversation.action_message`, rendered, each with one picture and one state. images: (B, N, D) from `look`.
        states: (B, state_dim) in physical units. Raises ValueError where their numbers or shapes do not match.
        """
        states = np.asarray(states, np.float32)
        if not len(prompts) == len(images) == len(states) or states.shape[1:] != (self.config.state_dim,):
            raise UserError(
                f"{len(prompts)} prompts, {len(images)} pictures and states of shape {states.shape}: expected as many of "
                f"each, and {self.config.state_dim} numbers a state"
            )
        normalised = torch.from_numpy(self.state_scale.normalize(states)).to(self.device)
        return self.action_head.act(self, [list(prompt) for prompt in prompts], images.to(self.device), normalised)
