"""Chunks of actions that cost nothing, to compare a policy's with: open-loop errors mean something only beside these.

An absolute action (a joint angle) lies near the present state, and neighbouring ones are alike: an error that looks small can be
larger than that of a robot that is told to stand still. This module does not import torch.
"""

from collections.abc import Sequence

import numpy as np

from nanochat.actions import Scale
from nanochat.data.deltas import follows_state, present
from nanochat.data.demonstrations import Demonstrations
from nanochat.safety import hold_still

HOLD, LAST, MEAN, NEAREST = "hold", "last action", "mean action", "nearest state"
BLOCK = 64  # frames whose distances to all others are in memory at a time


def baselines(
    data: Demonstrations, frames: Sequence[int], length: int, targets: str, known: Demonstrations | None
) -> dict[str, np.ndarray]:
    """{name: (n, length, A) float32} of the n frames, in the units of the data.

    hold: the robot stays as it is. Of absolute targets, each number that follows the state (see `follows_state`) is the present
        state, any other one the last action; of relative ones, no motion, and the last number (a gripper) as it was.
    last action: the action before the frame, repeated. mean action: that of `known`.
    nearest state: the actions from the frame of `known` on whose state is nearest, among those of the same task if there are any.

    known: the demonstrations that the policy learnt from; None if they are not there, then only the first two can be told.
    targets: "absolute" or "relative".
    """
    frames = np.asarray(frames)
    mean, follows = (known or data).action.mean(0), follows_state(known or data)
    last = last_actions(data, frames, np.where(follows & (targets == "absolute"), present(data, frames), mean))
    if targets == "absolute":
        still = np.where(follows, present(data, frames), last)
    else:
        none = np.array(hold_still(len(mean)))
        still = np.where(np.isnan(none), last, none)
    found = {HOLD: repeated(still, length), LAST: repeated(last, length)}
    if known is not None:
        found[MEAN] = repeated(np.broadcast_to(mean, last.shape), length)
        if known.state.shape[1] and data.state.shape[1] == known.state.shape[1]:
            found[NEAREST] = known.chunks(nearest_frames(data, frames, known), length)[0]
    return found


def last_actions(data: Demonstrations, frames: np.ndarray, before: np.ndarray) -> np.ndarray:
    """(n, A): the action before each frame. before: (n, A) instead of it at the first frame of an episode."""
    return np.where((frames > data.first[frames])[:, None], data.action[np.maximum(frames - 1, 0)], before)


def repeated(actions: np.ndarray, length: int) -> np.ndarray:
    """(n, A) -> (n, length, A) float32."""
    return np.repeat(actions.astype(np.float32)[:, None], length, axis=1)


def nearest_frames(data: Demonstrations, frames: np.ndarray, known: Demonstrations) -> np.ndarray:
    """(n,) int64, the frame of `known` with the nearest state, all numbers scaled by their range in `known`."""
    scale = Scale.fit(known.state)
    wanted, there = scale.normalize(data.state[frames]), scale.normalize(known.state)
    places = [(data.task(frame), data.names[data.episode[frame]]) for frame in frames]
    found = np.zeros(len(frames), np.int64)
    for task, episode in dict.fromkeys(places):
        among = candidates(known, task, episode)
        own = np.flatnonzero([place == (task, episode) for place in places])
        for rows in (own[start : start + BLOCK] for start in range(0, len(own), BLOCK)):
            # the square of the wanted state is the same for all: it decides nothing
            distance = (there[among] ** 2).sum(1) - 2 * wanted[rows] @ there[among].T
            found[rows] = among[distance.argmin(1)]
    return found


def candidates(known: Demonstrations, task: str, episode: str) -> np.ndarray:
    """Frames of the task, or of any task if there are none, in other episodes than the named one: a frame is not its own
    neighbour where the policy is asked about episodes that it learnt from."""
    others = np.array([name != episode for name in known.names])[known.episode]
    of_task = np.zeros(len(known), bool)
    for first, end in known.by_task.get(task, []):
        of_task[first:end] = True
    return np.flatnonzero(others & of_task if (others & of_task).any() else others if others.any() else ~others)
