"""A checkpoint as something that drives: pictures, states and instructions in, chunks of motor commands out."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanochat.assistant import resolve_checkpoint
from nanochat.checkpoint import load_checkpoint
from nanochat.robot_gpt import RobotGPT, action_prompt
from nanochat.safety import SafeActions, hold_still
from nanochat.vision.images import open_image

HOLDS = ("still", "last")


class Policy:
    """Build one with `load`. `metadata` is what a server tells its clients."""

    def __init__(self, model: RobotGPT, tokenizer, training: dict):
        if not isinstance(model, RobotGPT):
            raise ValueError(
                f"this checkpoint is a {type(model).__name__}, which cannot act: train one with nanochat train robot"
            )
        self.model, self.tokenizer, self.training = model, tokenizer, training
        config = model.config
        self.metadata = {
            "action_head": config.action_head,
            "chunk": config.chunk,
            "action_dim": config.action_dim,
            "state_dim": config.state_dim,
            "image_size": config.vision_image_size,
        }

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> "Policy":
        """A checkpoint folder, "robot" (the one that ships) or a hub name."""
        return cls(*load_checkpoint(resolve_checkpoint(name), device))

    @torch.inference_mode()
    def __call__(self, images: Sequence, states: np.ndarray, instructions: Sequence[str]) -> np.ndarray:
        """B pictures, (B, state_dim) states in physical units, B instructions -> (B, chunk, action_dim) float32. None in place of
        a picture hides it, as training hides some.

        What comes out is the network's word, unchecked: send it through `safety.SafeActions` before anything moves.
        Raises ValueError for numbers that do not match, and ImageError for pictures that are none.
        """
        states = np.asarray(states, np.float32)
        if not len(images) == len(instructions) == len(states) or states.shape[1:] != (self.model.config.state_dim,):
            raise ValueError(
                f"{len(images)} pictures, {len(instructions)} instructions and states of shape {states.shape}: expected as "
                f"many of each, and {self.model.config.state_dim} numbers a state"
            )
        config, shown = self.model.config, [i for i, image in enumerate(images) if image is not None]
        n_tokens = config.vision_tokens_per_image
        vectors = torch.zeros(len(images), n_tokens, config.vision_embedding_dim, device=self.model.device)
        if shown:
            vectors[shown] = self.model.encode_images([images[i] for i in shown])
        prompts = [action_prompt(self.tokenizer, text, n_tokens) for text in instructions]
        return self.model.act(prompts, vectors, states)

    def act(self, observation: dict) -> dict:
        """One observation as openpi names it: {"observation/image": (H, W, 3) uint8, "observation/state": (state_dim,),
        "prompt": str} -> {"actions": (chunk, action_dim) float32}; LeRobot's "observation.image" and "observation.state" will
        do as well. Raises ValueError naming what is missing or wrong."""
        image, state = (
            observation.get(f"observation/{key}", observation.get(f"observation.{key}")) for key in ("image", "state")
        )
        prompt = observation.get("prompt")
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError('"observation/image" must be a (H, W, 3) uint8 array')
        state = np.asarray(state if state is not None else [], np.float32)
        if state.shape != (self.model.config.state_dim,) or not np.isfinite(state).all():
            raise ValueError(f'"observation/state" must be {self.model.config.state_dim} finite numbers')
        if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > 500:
            raise ValueError('"prompt" must be an instruction of 1 to 500 characters')
        return {"actions": self([open_image(image)], state[None], [prompt])[0]}


class Served:
    """A policy as `server` wants it. Its actions stay within what the demonstrations did, and NaN never leaves (see safety.py).

    execute: actions of a chunk that are sent, None for all. A robot should carry out all of them before it asks again: limits run
        from the last one that was sent.
    max_change: the most that a number may change from one action to the next, None for any.
    hold: what is sent in place of an action that cannot be used. "still": no motion, where actions say how far to move;
        "last": the action before, where they say where to be.
    """

    def __init__(
        self, policy: Policy, execute: int | None = None, max_change: float | None = None, hold: str = "still"
    ):
        config = policy.model.config
        if execute is not None and not 1 <= execute <= config.chunk:
            raise ValueError(f"execute must lie in 1..{config.chunk}, the policy's chunk, got {execute}")
        if hold not in HOLDS:
            raise ValueError(f"hold must be one of {', '.join(HOLDS)}, got {hold!r}")
        self.policy, self.execute, self.max_change, self.hold = policy, execute or config.chunk, max_change, hold
        self.metadata = policy.metadata | {"chunk": self.execute}
        self.limits()  # refuses a max_change that is none before anybody connects

    def limits(self) -> SafeActions:
        config = self.policy.model.config
        dim, scale = config.action_dim, config.action_scale
        hold = hold_still(dim) if self.hold == "still" else [float("nan")] * dim
        return SafeActions(scale["low"], scale["high"], hold, max_change=self.max_change)

    def session(self) -> Callable[[dict], dict]:
        """`act` for one robot."""
        limits = self.limits()

        def act(observation: dict) -> dict:
            chunk = self.policy.act(observation)["actions"][: self.execute]
            if self.hold == "last" and limits.last is None and not np.isfinite(chunk[0]).all():
                raise ValueError("the network gave no numbers, and there is no action before to hold on to")
            return {"actions": np.stack([limits(action) for action in chunk])}

        return act
