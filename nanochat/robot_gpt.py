"""A MultimodalGPT that also acts: it reads pictures, the robot's state and an instruction, and predicts a chunk of actions.

    <|bos|> <|user_start|> <|image|>*N <|state|> open the door <|user_end|> <|assistant_start|>, then the action head's tokens

With several cameras there are N places for each of them, in the order of the config. Questions are about pictures of the first
camera; they are asked and answered as MultimodalGPT does, by the same weights.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn

from nanochat.acting import Policy
from nanochat.action_heads import HEADS
from nanochat.config import RobotGPTConfig
from nanochat.errors import UserError
from nanochat.files import short_repr
from nanochat.fusion import Glances
from nanochat.gpt import Inputs, Linear, pad_rows
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.vision.pixels import read_squares

FREQUENCIES = 6  # of states: periods from 4 (more than the range -1..1) down to 1/8
STATE_LIMIT = 1.5  # normalised states are clipped to this: beyond it the sines repeat


def waves(x: torch.Tensor) -> torch.Tensor:
    """(..., D) in -1..1 -> (..., 2 * D * FREQUENCIES) sines and cosines. Their length is the same for every x, so that a norm
    behind them loses nothing (NeRF's encoding, Mildenhall et al. 2020)."""
    frequency = math.pi / 2 * 2 ** torch.arange(FREQUENCIES, dtype=x.dtype, device=x.device)
    angle = (x[..., None] * frequency).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], -1)


class RobotGPT(Policy, MultimodalGPT):
    """Adds to MultimodalGPT: glances instead of grid cells, one token for the state, and an action head.

    Without a state (state_dim 0) the token stays in the prompt, with the embedding that it has as a word."""

    kind = "robot_gpt"
    config_class = RobotGPTConfig

    def __init__(self, config: RobotGPTConfig):
        if config.action_head not in HEADS:
            raise UserError(f"action_head must be one of {', '.join(HEADS)}, got {short_repr(config.action_head)}")
        super().__init__(config)
        shape = config.map_channels, config.vision_tokens_per_image, config.vision_embedding_dim
        self.glances = Glances(*shape, config.n_cameras)
        self.state_projector = Linear(2 * FREQUENCIES * config.state_dim, config.n_embd) if config.state_dim else None
        n_committed = config.known_rows * (config.action_dim + 1)
        self.committed_projector = Linear(n_committed, config.n_embd) if n_committed else None
        self.action_head: nn.Module = HEADS[config.action_head](config)

    @torch.no_grad()
    def init_weights(self) -> None:
        """MultimodalGPT.init_weights; committed actions change nothing at first, so that a policy can learn them later."""
        super().init_weights()
        if self.committed_projector is not None:
            self.committed_projector.weight.zero_()

    @property
    def map_channels(self) -> int:
        return self.config.map_channels

    def see(self, pixels: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
        """MultimodalGPT.see for pictures of several cameras at once. counts: how many are of each camera, those of the first
        camera first; without it all are of the first."""
        return self.glances(self.maps(pixels), counts)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) maps of the first camera -> (B, N, D)."""
        return self.glances(maps)

    @torch.no_grad()
    def look_around(self, rows: Sequence[Sequence]) -> torch.Tensor:
        """B rows with a picture of each of the K cameras -> (B, K * N, D) float32 for `act`, in one pass through the encoder.
        None instead of a picture masks it: its vectors are zero, as training masks some."""
        config = self.config
        n, shape = config.n_cameras, (config.vision_tokens_per_image, config.vision_embedding_dim)
        shown = torch.tensor([[row[camera] is not None for row in rows] for camera in range(n)]).view(n, len(rows))
        vectors = torch.zeros(n, len(rows), *shape, device=self.device)
        if shown.any():
            pictures = [rows[row][camera] for camera, row in shown.nonzero().tolist()]
            squares, _ = read_squares(self.vision_encoder, pictures)
            seen = self.glances(self.inference_maps(squares), shown.sum(1).tolist())
            vectors[shown.to(self.device)] = seen.to(self.device)
        return vectors.transpose(0, 1).flatten(1, 2)

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """MultimodalGPT.embed; states replace the <|state|> tokens in reading order, committed actions are added to <|act|>."""
        x = super().embed(inputs)
        if inputs.committed is not None:
            known = self.committed_projector(inputs.committed.flatten(1)).to(x.dtype)  # (A, C)
            x = x + torch.zeros_like(x).masked_scatter((inputs.idx == self.config.act_token_id)[..., None], known)
        if inputs.states is None:
            return x
        projected = self.state_projector(waves(inputs.states.clamp(-STATE_LIMIT, STATE_LIMIT)))
        return x.masked_scatter((inputs.idx == self.config.state_token_id)[..., None], projected.to(x.dtype))

    def inputs_of(self, rows: Sequence) -> Inputs:
        """MultimodalGPT.inputs_of with the states of the rows. Padding is no <|state|>, which would need one."""
        inputs = super().inputs_of(rows)
        if self.config.state_token_id == 0:
            inputs.idx = pad_rows([row.tokens for row in rows], 1).to(self.device)
        if any(row.states is not None for row in rows):
            states = [torch.as_tensor(row.states) for row in rows if row.states is not None]
            inputs.states = torch.cat(states).to(self.device)
        return inputs

    def is_projector(self, name: str) -> bool:
        return name.startswith("glances.") or super().is_projector(name)

    def param_group(self, name: str, parameter: nn.Parameter) -> str:
        if name.startswith("glances."):  # they learn with the encoder, from the same losses
            return "encoder"
        return "outputs" if name.startswith("action_head.") else super().param_group(name, parameter)

    def predict(self, prompts, images, states, committed, moved=None) -> np.ndarray:
        return self.action_head.act(self, prompts, images, states, committed, moved)

    @torch.inference_mode()
    def chunks(
        self, rows: Sequence[list[int]], images, states: np.ndarray | None, known: np.ndarray | None
    ) -> np.ndarray:
        """What the continuous head says at the <|act|> tokens of the rows, one in each: normalised chunks (B, chunk, action_dim).
        The rest as `acting.act_at_once` has it."""
        # a row is padded with its own start, which is no placeholder
        idx = pad_rows(rows, rows[0][0]).to(self.device)
        inputs = Inputs(idx, idx == self.config.vision_token_id, torch.as_tensor(images).to(self.device).flatten(0, 1))
        inputs.states = None if states is None else torch.as_tensor(states).to(self.device)
        inputs.committed = None if known is None else torch.as_tensor(known).to(self.device)
        return self.action_head.chunks(self.hidden(inputs), idx).cpu().numpy()
