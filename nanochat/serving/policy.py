"""From an agent to a robot: reads observations, and limits the actions that leave. Imports no torch."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from nanochat.actions import Scale, check_states, described, number_array
from nanochat.errors import UserError
from nanochat.files import short_repr
from nanochat.safety import SafeActions, hold_last, hold_still

logger = logging.getLogger(__name__)
HOLDS = ("auto", "still", "last")
MAX_PROMPT = 500  # characters of an instruction
STATE_KEYS, COMMITTED_KEY = ("observation/state", "observation.state"), "observation/committed"
PREVIOUS_KEY = "observation/previous"
MOST_PREVIOUS = 1000  # rows that a client may send; the last ones are read


class ActingAgent(Protocol):
    """What serving needs from an agent (see nanochat/agent.py).

    metadata: sent to every client; has at least "chunk", "action_dim" and "state_dim"
        (0 for a policy that reads no state). May have "targets", relative (the default) or absolute, "state_range",
        (low, high) of the training data's states, "committed", how many actions of a chunk may be given (0), "previous", how
        many actions before are read (0), "cameras", their names (none for one camera without a name), and "camera_dropout",
        above 0 if single cameras may be missing.
    action_range: (low, high), the limits of each action dimension in the training data, action_dim numbers each.
    act: B pictures, or B dicts camera -> picture (None: masked) where the cameras have names, (B, state_dim) states, B
        instructions -> (B, chunk, action_dim) float32, not limited yet. committed: (B, d, action_dim), with which the chunks
        begin; passed where the robot sent some. previous: (k, action_dim) for each robot, passed where the policy reads them.
    """

    metadata: dict
    action_range: tuple[Sequence[float], Sequence[float]]

    def act(
        self,
        images: Sequence,
        states: np.ndarray,
        instructions: Sequence[str],
        committed: np.ndarray | None = None,
        previous: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray: ...


def read_observation(
    observation: dict, state_dim: int, cameras: Sequence[str] = (), may_be_missing: bool = False
) -> tuple[np.ndarray | dict[str, np.ndarray | None], np.ndarray | None, str]:
    """(image (H, W, 3) uint8, state (state_dim,) float32, instruction) of an observation with openpi's keys "observation/image",
    "observation/state" and "prompt". LeRobot's "observation.image" and "observation.state" work too. With state_dim 0 the state
    is None, and one that was sent is not read.

    cameras: where they have names, there is a dict camera -> image. The camera wrist is "observation/wrist",
    "observation/image/wrist" or "observation.images.wrist"; the first camera may also be "observation/image".
    may_be_missing: single cameras, not all of them; they are None in the dict.

    Raises ValueError that names the missing or wrong key.
    """
    state, prompt = (
        observation.get("observation/state", observation.get("observation.state")),
        observation.get("prompt"),
    )
    images = read_images(observation, cameras, may_be_missing)
    state_array = read_state(state, state_dim) if state_dim else None
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
        raise UserError(f'"prompt" must be an instruction of 1 to {MAX_PROMPT} characters')
    return images, state_array, prompt


def read_images(observation: dict, cameras: Sequence[str], may_be_missing: bool):
    """The image of a camera without a name, or a dict of all cameras. See `read_observation`."""
    found = {}
    for number, name in enumerate(cameras or [""]):
        keys = camera_keys(name, number == 0)
        image = next((observation[key] for key in keys if observation.get(key) is not None), None)
        is_picture = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
        if not (is_picture and image.shape[2] == 3) and not (image is None and may_be_missing):
            those = f" (this policy needs the cameras {', '.join(cameras)})" if len(cameras) > 1 else ""
            raise UserError(f'"{keys[0]}" must be a (H, W, 3) uint8 array, got {described(image)}{those}')
        found[name] = image
    if all(image is None for image in found.values()):
        raise UserError(f"there is no picture of any camera; this policy has the cameras {', '.join(cameras)}")
    return found if cameras else found[""]


def camera_keys(name: str, is_first: bool) -> list[str]:
    """The keys under which an observation may have the picture of a camera, name "" if it has none; the usual one first."""
    keys = [f"observation/{name}", f"observation/image/{name}", f"observation.images.{name}", name] if name else []
    keys += ["observation/image", "observation.image"] if is_first else []
    return [key for key in keys if key not in (*STATE_KEYS, COMMITTED_KEY, PREVIOUS_KEY)]


def read_state(state: object, state_dim: int) -> np.ndarray:
    """(state_dim,) float32. Raises ValueError for anything but that many finite numbers: text and booleans are none."""
    expected = f'"observation/state" must be {state_dim} finite numbers'
    array = number_array([] if state is None else state, expected)
    if array.shape != (state_dim,):
        raise UserError(f"{expected}, got {described(state)}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    return number_array(array, expected).astype(np.float32)


def read_actions(observation: dict, key: str, action_dim: int, most: int) -> np.ndarray | None:
    """(k, action_dim) float32 of an observation: under COMMITTED_KEY the actions that the robot carries out while this chunk is
    made, under PREVIOUS_KEY the last ones that it was sent; None where there are none. Raises ValueError for more than `most`,
    and for anything but finite numbers."""
    found = observation.get(key)
    if found is None or (isinstance(found, (list, np.ndarray)) and not len(found)):
        return None
    expected = f'"{key}" must be up to {most} actions of {action_dim} finite numbers'
    actions = number_array(found, expected)
    if actions.ndim != 2 or actions.shape[1] != action_dim or len(actions) > most:
        why = "" if most else " (leave it out: this policy takes none)"
        raise UserError(f"{expected}{why}, got {described(found)}")
    return actions.astype(np.float32)


def act_on(agent: ActingAgent, observation: dict, committed: np.ndarray | None = None) -> np.ndarray:
    """One observation (see `read_observation`) -> (chunk, action_dim) float32, not limited yet. Raises ValueError for a wrong
    observation, also for a state far outside of the training data's range."""
    cameras, may_be_missing = agent.metadata.get("cameras", ()), agent.metadata.get("camera_dropout", 0) > 0
    image, state, prompt = read_observation(observation, agent.metadata["state_dim"], cameras, may_be_missing)
    if state is not None and "state_range" in agent.metadata:
        check_states(state[None], Scale(*agent.metadata["state_range"]), '"observation/state"')
    given = {} if committed is None else {"committed": committed[None]}
    if agent.metadata.get("previous"):
        previous = read_actions(observation, PREVIOUS_KEY, agent.metadata["action_dim"], MOST_PREVIOUS)
        given["previous"] = None if previous is None else [previous]
    return agent.act([image], None if state is None else state[None], [prompt], **given)[0]


def unread(observation: dict, metadata: dict) -> list[str]:
    """What the policy does not read of an observation, and which cameras it has to do without, as lines for the log."""
    lines, cameras = [], metadata.get("cameras") or [""]
    known = [camera_keys(name, number == 0) for number, name in enumerate(cameras)]
    if metadata["state_dim"] == 0 and any(key in observation for key in STATE_KEYS):
        lines.append("this policy reads no state: the one that was sent is not read")
    read = {"prompt", COMMITTED_KEY, *[PREVIOUS_KEY] * bool(metadata.get("previous")), *STATE_KEYS}.union(*known)
    if metadata.get("previous") and PREVIOUS_KEY not in observation:
        lines.append(
            f'"{PREVIOUS_KEY}" is not sent: the robot is taken to stand still (the policy reads its last actions)'
        )
    if others := [key for key in observation if key not in read]:
        lines.append(f"not read of the observation: {', '.join(map(short_repr, others[:10]))}")
    for name, keys in zip(cameras, known, strict=True):
        if name and metadata.get("camera_dropout", 0) > 0 and all(observation.get(key) is None for key in keys):
            lines.append(f"there is no picture of the camera {name}: the policy does without")
    return lines


class SafePolicy:
    """An agent behind `SafeActions`, one session for each robot: every action that leaves is finite and within the range of
    the training data.

    execute: how many actions of a chunk are sent, None for all. The robot should execute all of them before it asks again,
        because `max_change` is measured from the last action that was sent, or from the last of those that the robot says
        it carries out meanwhile ("observation/committed").
    max_change: the largest allowed change of each number between two consecutive actions, None for no limit.
    hold: what is sent instead of an unusable action (NaN or infinity). "still": zero motion with the gripper unchanged, for
        relative actions. "last": the previous action, for absolute targets. "auto": what fits the policy's actions, as its
        checkpoint describes them.

    Raises ValueError for settings out of range, and for "still" with absolute targets: zeros would be a jump.
    """

    def __init__(
        self, agent: ActingAgent, execute: int | None = None, max_change: float | None = None, hold: str = "auto"
    ):
        chunk = agent.metadata["chunk"]
        if execute is not None and not 1 <= execute <= chunk:
            raise UserError(f"execute must lie in 1..{chunk}, the policy's chunk, got {execute}")
        if hold not in HOLDS:
            raise UserError(f"hold must be one of {', '.join(HOLDS)}, got {hold!r}")
        absolute = agent.metadata.get("targets") == "absolute"
        if absolute and hold == "still":
            raise UserError(
                "hold still sends zeros, but this policy's actions are absolute targets, and the robot would jump there: use "
                "last or auto (or train with --targets relative if they are motions)"
            )
        self.agent, self.execute, self.max_change = agent, execute or chunk, max_change
        self.hold = hold if hold != "auto" else "last" if absolute else "still"
        committed = min(agent.metadata.get("committed", 0), self.execute - 1)  # one action at least is new
        self.metadata = agent.metadata | {"chunk": self.execute, "committed": committed}
        self.limits()  # checks max_change before the first client connects

    def limits(self) -> SafeActions:
        low, high = self.agent.action_range
        hold = hold_still(len(low)) if self.hold == "still" else hold_last(len(low))
        return SafeActions(low, high, hold, max_change=self.max_change)

    def session(self) -> Callable[[dict], dict]:
        """A function for one robot: observation -> {"actions": (execute, action_dim) float32}. It raises ValueError for a wrong
        observation, and where there is no usable action and no previous one to repeat."""
        limits, told = self.limits(), set()

        def act(observation: dict) -> dict:
            for line in unread(observation, self.agent.metadata):
                if line not in told:
                    logger.info(line)
                    told.add(line)
            known = read_actions(observation, COMMITTED_KEY, self.metadata["action_dim"], self.metadata["committed"])
            chunk = act_on(self.agent, observation, known)[: self.execute]
            if known is not None:  # they precede the first new action
                known, chunk = np.clip(known, *self.agent.action_range).astype(np.float32), chunk[len(known) :]
                limits.last = known[-1].astype(np.float64)
            if self.hold == "last" and limits.last is None and not np.isfinite(chunk[0]).all():
                raise UserError("the model's first action is not finite, and there is no previous action to repeat")
            return {"actions": np.stack([*(() if known is None else known), *map(limits, chunk)])}

        return act
