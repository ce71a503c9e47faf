"""From an agent to a robot: reads observations, and limits the actions that leave. Imports no torch."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from nanochat.errors import UserError
from nanochat.safety import SafeActions, hold_still

HOLDS = ("still", "last")
MAX_PROMPT = 500  # characters of an instruction


class ActingAgent(Protocol):
    """What serving needs from an agent (see nanochat/agent.py).

    metadata: sent to every client; has at least "chunk", "action_dim" and "state_dim".
    action_range: (low, high), the limits of each action dimension in the training data, action_dim numbers each.
    act: B images, (B, state_dim) states, B instructions -> (B, chunk, action_dim) float32, not limited yet.
    """

    metadata: dict
    action_range: tuple[Sequence[float], Sequence[float]]

    def act(self, images: Sequence, states: np.ndarray, instructions: Sequence[str]) -> np.ndarray: ...


def read_observation(observation: dict, state_dim: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(image (H, W, 3) uint8, state (state_dim,) float32, instruction) of an observation with openpi's keys "observation/image",
    "observation/state" and "prompt". LeRobot's "observation.image" and "observation.state" work too.

    Raises ValueError that names the missing or wrong key.
    """
    image, state = (
        observation.get(f"observation/{key}", observation.get(f"observation.{key}")) for key in ("image", "state")
    )
    prompt = observation.get("prompt")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f'"observation/image" must be a (H, W, 3) uint8 array, got {described(image)}')
    try:
        state_array = np.asarray(state if state is not None else [], np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f'"observation/state" must be {state_dim} finite numbers, got {described(state)}') from error
    if state_array.shape != (state_dim,) or not np.isfinite(state_array).all():
        raise UserError(f'"observation/state" must be {state_dim} finite numbers, got {described(state)}')
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
        raise UserError(f'"prompt" must be an instruction of 1 to {MAX_PROMPT} characters')
    return image, state_array, prompt


def act_on(agent: ActingAgent, observation: dict) -> np.ndarray:
    """One observation (see `read_observation`) -> (chunk, action_dim) float32, not limited yet."""
    image, state, prompt = read_observation(observation, agent.metadata["state_dim"])
    return agent.act([image], state[None], [prompt])[0]


class SafePolicy:
    """An agent behind `SafeActions`, one session for each robot: every action that leaves is finite and within the range of
    the training data.

    execute: how many actions of a chunk are sent, None for all. The robot should execute all of them before it asks again,
        because `max_change` is measured from the last action that was sent.
    max_change: the largest allowed change of each number between two consecutive actions, None for no limit.
    hold: what is sent instead of an unusable action (NaN or infinity). "still": zero motion with the gripper unchanged, for
        relative actions. "last": the previous action, for absolute position targets.

    Raises ValueError for settings out of range.
    """

    def __init__(
        self, agent: ActingAgent, execute: int | None = None, max_change: float | None = None, hold: str = "still"
    ):
        chunk = agent.metadata["chunk"]
        if execute is not None and not 1 <= execute <= chunk:
            raise UserError(f"execute must lie in 1..{chunk}, the policy's chunk, got {execute}")
        if hold not in HOLDS:
            raise UserError(f"hold must be one of {', '.join(HOLDS)}, got {hold!r}")
        self.agent, self.execute, self.max_change, self.hold = agent, execute or chunk, max_change, hold
        self.metadata = agent.metadata | {"chunk": self.execute}
        self.limits()  # checks max_change before the first client connects

    def limits(self) -> SafeActions:
        low, high = self.agent.action_range
        hold = hold_still(len(low)) if self.hold == "still" else [float("nan")] * len(low)
        return SafeActions(low, high, hold, max_change=self.max_change)

    def session(self) -> Callable[[dict], dict]:
        """A function for one robot: observation -> {"actions": (execute, action_dim) float32}. It raises ValueError for a wrong
        observation, and where there is no usable action and no previous one to repeat."""
        limits = self.limits()

        def act(observation: dict) -> dict:
            chunk = act_on(self.agent, observation)[: self.execute]
            if self.hold == "last" and limits.last is None and not np.isfinite(chunk[0]).all():
                raise UserError("the model's first action is not finite, and there is no previous action to repeat")
            return {"actions": np.stack([limits(action) for action in chunk])}

        return act


def described(value) -> str:
    """The type and shape of a received value, for messages."""
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} of {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return "nothing" if value is None else type(value).__name__
