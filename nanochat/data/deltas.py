"""Which numbers of an action a network should predict as differences from the robot's present state.

An absolute target of a joint lies near the joint's angle. As a difference it needs a fraction of the range, and the network need
not read the angle off the state and write it down again. That holds for a number whose targets follow the state's number of the
same place, in the same unit. The rule asks what costs nothing to try: is a constant difference much nearer to the targets of
held-out episodes, over a whole chunk, than a constant target, both medians of the training episodes?

Nearer still is the last target that was sent (see `previous_actions`), where the robot follows its targets late. Here nothing is
fitted: is a robot that repeats its last action for a chunk nearer to the recorded ones than one that holds its state?
"""

import numpy as np

from nanochat.actions import Scale
from nanochat.data.demonstrations import Demonstrations

SAMPLED = 4000  # frames of each split
# A number is predicted as a difference if that constant is off by less than this share of the other. With 1, all that are nearer
# at all, a policy of a Unitree G1 was worse (dev/LOG.md).
NEARER = 0.5
LAST_NEARER = 0.9  # the last action is gone on from if it is off by less than this share of what the state is


def find_deltas(fit: Demonstrations, val: Demonstrations, length: int) -> tuple[list[int], float, float]:
    """(the numbers of the action, from 0, whose differences from the state are to be predicted; how far a constant target is off
    in held-out episodes; how far a constant difference is). The errors are means over these numbers (over all that have a state,
    if there are none), in half ranges of the actions. length: of a chunk."""
    width = min(fit.action.shape[1], fit.state.shape[1])
    if width == 0:
        return [], 0.0, 0.0
    half = Scale.fit(fit.action).half[:width]
    errors = []
    for known, unknown in zip(sampled_chunks(fit, length), sampled_chunks(val, length), strict=True):
        constant = np.median(known[:, :width], axis=0)
        errors.append(np.abs(unknown[:, :width] - constant).mean(0) / half)
    target, difference = errors
    found = np.flatnonzero(difference < NEARER * target)
    shown = found if len(found) else np.arange(width)
    return found.tolist(), float(target[shown].mean()), float(difference[shown].mean())


def difference_scale(data: Demonstrations, deltas: list[int], length: int) -> Scale:
    """The percentiles of what is predicted: of differences for the numbers `deltas`, of the actions for the others."""
    action, differences = Scale.fit(data.action), Scale.fit(sampled_chunks(data, length)[1])
    low, high = list(action.low), list(action.high)
    for number in deltas:
        low[number], high[number] = differences.low[number], differences.high[number]
    return Scale(low, high)


def from_last(data: Demonstrations, length: int) -> tuple[list[int], Scale, float, float]:
    """(the numbers that follow the state, the percentiles of differences from the last action, how far off the last action is if
    it is repeated for a chunk, how far the present state is). The errors are means over the numbers that follow the state, in
    half ranges of the actions; NaN without any."""
    frames = np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int))
    frames = frames[frames > data.first[frames]]  # there is an action before
    actions, inside = data.chunks(frames, length)
    follows, differences = follows_state(data), actions - data.action[frames - 1][:, None]
    if not len(frames) or not follows.any():
        return [], Scale.fit(data.action), np.nan, np.nan
    half = Scale.fit(data.action).half[follows]
    last, still = (
        float((np.abs(found[inside][:, follows]).mean(0) / half).mean())
        for found in (differences, actions - present(data, frames)[:, None])
    )
    return np.flatnonzero(follows).tolist(), Scale.fit(differences[inside]), last, still


def present(data: Demonstrations, frames: np.ndarray | slice = slice(None)) -> np.ndarray:
    """(n, A): the first A numbers of the state, with zeros where it has fewer."""
    state, width = data.state[frames], data.action.shape[1]
    return np.pad(state[:, :width], ((0, 0), (0, max(0, width - state.shape[1]))))


def follows_state(data: Demonstrations) -> np.ndarray:
    """(A,) bool: whether a number of the action is nearer to the state's number at the same place than to its own mean."""
    action = data.action
    nearer = np.abs(action - present(data)).mean(0) < np.abs(action - action.mean(0)).mean(0)
    return nearer & (np.arange(action.shape[1]) < data.state.shape[1])


def sampled_chunks(data: Demonstrations, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(m, A) actions of the chunks of some frames, and (m, A) their differences from the state of the chunk's frame; numbers
    without a state stay as they are."""
    frames = np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int))
    actions, inside = data.chunks(frames, length)
    width = min(actions.shape[2], data.state.shape[1])
    differences = actions.copy()
    differences[..., :width] -= data.state[frames, None, :width]
    return actions[inside], differences[inside]
