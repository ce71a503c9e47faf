"""A MultimodalGPT that also acts: it reads pictures, the robot's state and an instruction, and predicts a chunk of actions.

    <|bos|> <|user_start|> <|image|>*N <|state|> open the door <|user_end|> <|assistant_start|>, then the action head's tokens

With several cameras there are N places for each of them, in the order of the config. Questions are about pictures of the first
camera; they are asked and answered as MultimodalGPT does, by the same weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn

from nanochat.action_heads import HEADS
from nanochat.actions import N_BINS, TARGETS, Scale, check_states, described, number_array
from nanochat.cameras import check_names
from nanochat.errors import UserError
from nanochat.fusion import Glances
from nanochat.gpt import Inputs, Linear, pad_rows
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig, check_integer
from nanochat.vision.pixels import evaluating, read_pixels

FREQUENCIES = 6  # of states: periods from 4 (more than the range -1..1) down to 1/8
MAX_DIMENSIONS = 1024  # of a state or an action; a humanoid has about 100
STATE_LIMIT = 1.5  # normalised states are clipped to this: beyond it the sines repeat


@dataclass
class RobotGPTConfig(MultimodalGPTConfig):
    action_head: str = "continuous"
    chunk: int = 10  # actions that are predicted at once
    map_channels: int = 64  # of the encoder's map; vision_embedding_dim is the width of a glance
    state_scale: dict = field(default_factory=dict)  # of `actions.Scale`; empty for a policy that reads no state
    state_range: dict = field(default_factory=dict)  # least and greatest in the data; empty in older checkpoints
    action_scale: dict = field(default_factory=dict)
    targets: str = "relative"  # of the actions: relative or absolute
    committed: int = 0  # the continuous head was shown up to so many actions that a robot carries out anyway
    # numbers of an action that the network predicts as differences from the state's number of the same place, and the
    # percentiles of what it predicts; empty where it predicts the actions as they are
    deltas: list[int] = field(default_factory=list)
    delta_scale: dict = field(default_factory=dict)
    cameras: list[str] = field(default_factory=list)  # short names; empty in older ones: one camera without a name
    camera_dropout: float = 0.0  # share of single cameras that training hid; above 0, a policy can do without one
    state_names: list[str] = field(default_factory=list)  # of the numbers of a state; empty if the data names none
    action_names: list[str] = field(default_factory=list)
    units: str = ""  # of states and actions, if whoever trained it said so
    fps: float = 0.0  # actions per second; 0 if unknown
    state_token_id: int = 0
    act_token_id: int = 0
    bin_token_id: int = 0  # of the first bin; the others follow

    def __post_init__(self):
        super().__post_init__()
        if self.fusion != "prefix":
            raise UserError(f'a robot\'s glances are tokens of the row: fusion must be "prefix", got "{self.fusion}"')
        if self.action_head not in HEADS:
            raise UserError(f"action_head must be one of {', '.join(HEADS)}, got {self.action_head!r}")
        check_integer("chunk", self.chunk, 1, 1024)
        check_integer("committed", self.committed, 0, self.chunk - 1)
        check_integer("map_channels", self.map_channels, 1, 2**16)
        check_names(self.cameras)
        if not isinstance(self.units, str) or len(self.units) > 100:
            raise UserError(f"units must be a short text such as degrees, got {self.units!r:.80}")
        if type(self.fps) not in (int, float) or not 0 <= self.fps < 1e6:
            raise UserError(f"fps must be a number of actions per second, 0 if unknown, got {self.fps!r:.80}")
        if type(self.camera_dropout) not in (int, float) or not 0 <= self.camera_dropout < 1:
            raise UserError(f"camera_dropout must be a share, at least 0 and below 1, got {self.camera_dropout!r:.80}")
        if self.targets not in TARGETS:
            raise UserError(f"targets must be one of {', '.join(TARGETS)}, got {self.targets!r}")
        for scale in (self.state_scale, self.state_range, self.action_scale, self.delta_scale):
            if not isinstance(scale, dict):
                raise UserError(f"a scale must be an object with low and high, got {scale!r:.80}")
            if (scale or scale is self.action_scale) and len(Scale(**scale).low) > MAX_DIMENSIONS:
                raise UserError(f"a state or an action has at most {MAX_DIMENSIONS} numbers, got {len(scale['low'])}")
        if self.state_range and len(self.state_range["low"]) != self.state_dim:
            raise UserError(f"state_range must have {self.state_dim} numbers, got {len(self.state_range['low'])}")
        for name, width in (("state_names", self.state_dim), ("action_names", self.action_dim)):
            check_labels(name, getattr(self, name), width)
        self.check_deltas()
        last = {"state_token_id": self.state_token_id, "act_token_id": self.act_token_id,
                "bin_token_id": self.bin_token_id + N_BINS - 1}  # fmt: skip
        for name, token in last.items():
            check_integer(name, token, 0, self.vocab_size - 1)

    def check_vision_tokens(self) -> None:
        """Glances are no grid: any number will do."""

    def check_deltas(self) -> None:
        both = min(self.state_dim, self.action_dim)
        good = isinstance(self.deltas, list) and all(type(n) is int and 0 <= n < both for n in self.deltas)
        if not good or len(set(self.deltas)) < len(self.deltas) or bool(self.deltas) != bool(self.delta_scale):
            raise UserError(
                f"deltas must be different numbers in 0..{both - 1} that have a state, with a delta_scale, got "
                f"{self.deltas!r:.80} and a delta_scale of {len(self.delta_scale.get('low', ()))} numbers"
            )
        if self.deltas and (self.targets != "absolute" or len(self.delta_scale["low"]) != self.action_dim):
            raise UserError(f"deltas are of absolute targets, and delta_scale needs {self.action_dim} numbers")

    @property
    def predicted_scale(self) -> dict:
        """The percentiles of what the action head predicts."""
        return self.delta_scale or self.action_scale

    @property
    def n_cameras(self) -> int:
        return max(1, len(self.cameras))

    @property
    def state_dim(self) -> int:
        return len(self.state_scale.get("low", ()))

    @property
    def action_dim(self) -> int:
        return len(self.action_scale["low"])


def check_labels(name: str, labels: object, n: int) -> None:
    """Raises UserError unless this is a list of n texts, or an empty one."""
    if not isinstance(labels, list) or len(labels) not in (0, n) or not all(isinstance(text, str) for text in labels):
        raise UserError(f"{name} must be a list of {n} names, or empty, got {labels!r:.80}")


def waves(x: torch.Tensor) -> torch.Tensor:
    """(..., D) in -1..1 -> (..., 2 * D * FREQUENCIES) sines and cosines. Their length is the same for every x, so that a norm
    behind them loses nothing (NeRF's encoding, Mildenhall et al. 2020)."""
    frequency = math.pi / 2 * 2 ** torch.arange(FREQUENCIES, dtype=x.dtype, device=x.device)
    angle = (x[..., None] * frequency).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], -1)


class RobotGPT(MultimodalGPT):
    """Adds to MultimodalGPT: glances instead of grid cells, one token for the state, and an action head.

    Without a state (state_dim 0) the token stays in the prompt, with the embedding that it has as a word."""

    kind = "robot_gpt"
    config_class = RobotGPTConfig

    def __init__(self, config: RobotGPTConfig):
        super().__init__(config)
        self.state_scale = Scale(**config.state_scale) if config.state_dim else None
        self.trained_states = Scale(**(config.state_range or config.state_scale)) if config.state_dim else None
        self.action_scale, self.predicted_scale = Scale(**config.action_scale), Scale(**config.predicted_scale)
        shape = config.map_channels, config.vision_tokens_per_image, config.vision_embedding_dim
        self.glances = Glances(*shape, config.n_cameras)
        self.state_projector = Linear(2 * FREQUENCIES * config.state_dim, config.n_embd) if config.state_dim else None
        n_committed = config.committed * (config.action_dim + 1)
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
            pixels, _ = read_pixels(self.vision_encoder, pictures)
            with evaluating(self.vision_encoder):
                vectors[shown.to(self.device)] = self.see(pixels, shown.sum(1).tolist()).to(self.device)
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

    @torch.inference_mode()
    def act(
        self,
        prompts: Sequence[Sequence[int]],
        images: torch.Tensor,
        states: np.ndarray | None,
        committed: np.ndarray | None = None,
    ) -> np.ndarray:
        """Chunks of actions in physical units, (B, chunk, action_dim) float32, as the network gives them: not clipped.

        prompts: of `conversation.action_message`, rendered, each with a picture of each camera and one state. images: (B, K * N,
        D) from `look_around`. states: (B, state_dim) in physical units; None for a policy without a state. committed: (B, d,
        action_dim) in physical units, d <= `action_head.most_committed`: actions that will be carried out anyway. They are
        the first of the chunks, which continue them.

        Raises UserError where their numbers or shapes do not match, and for states far outside of the training data's range
        (see `actions.check_states`).
        """
        if len(prompts) != len(images):
            raise UserError(f"{len(prompts)} prompts and {len(images)} pictures: expected as many of each")
        normalised = self.normalised_states(states, len(prompts))
        known, offsets = self.checked_committed(committed, len(prompts)), self.offsets(states, len(prompts))
        prompts = [list(prompt) for prompt in prompts]
        chunks = self.action_head.act(self, prompts, images.to(self.device), normalised, known - offsets) + offsets
        chunks[:, : known.shape[1]] = known
        return chunks

    def offsets(self, states: np.ndarray | None, n: int) -> np.ndarray:
        """(n, 1, action_dim) float32: what is added to the numbers that are predicted, those of the state for `config.deltas` and
        zero for the others. states: (n, state_dim) in physical units."""
        found, deltas = np.zeros((n, 1, self.config.action_dim), np.float32), self.config.deltas
        if deltas:
            found[:, 0, deltas] = np.asarray(states, np.float32)[:, deltas]
        return found

    def checked_committed(self, committed: np.ndarray | None, n: int) -> np.ndarray:
        """(n, d, action_dim) float32, d = 0 for None."""
        dim, most = self.config.action_dim, self.action_head.most_committed
        expected = f"committed actions must be up to {most} rows of {dim} finite numbers for each prompt"
        if committed is None:
            return np.zeros((n, 0, dim), np.float32)
        values = number_array(committed, expected)
        if values.ndim != 3 or len(values) != n or values.shape[1] > most or values.shape[2] != dim:
            raise UserError(f"{expected}, got {described(committed)}")
        return values.astype(np.float32)

    def normalised_states(self, states: np.ndarray | None, n: int) -> torch.Tensor | None:
        """(n, state_dim) float32 for `Inputs`; None for a policy without a state."""
        dim = self.config.state_dim
        if dim == 0:
            if states is not None and np.size(states):
                raise UserError(f"this policy was trained without a state, got {described(states)}: pass None")
            return None
        if states is None:
            raise UserError(f"this policy reads a state of {dim} numbers, got none")
        values = number_array(states, f"states must be {dim} finite numbers for each prompt")
        if len(values.shape) != 2 or values.shape[1] != dim or len(values) != n:
            raise UserError(
                f"{n} prompts and pictures, and states of shape {values.shape}: expected as many of each, and {dim} numbers "
                "a state"
            )
        check_states(values, self.trained_states)
        return torch.from_numpy(self.state_scale.normalize(values)).to(self.device)
