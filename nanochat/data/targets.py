"""Whether the numbers of actions are absolute targets (joint angles, poses) or relative ones (motions, velocities).

It decides what a robot gets instead of an action that is not finite: zeros stop a robot with relative actions, and make one with
absolute targets jump. The rule, per dimension of the action that moves, with the frame's state at the same place of the vector:

1. The action follows the state: it is nearer to the state of this frame or of the next than half of the state's usual distance
   from its median, or, in other units, it correlates with the next state by more than 0.9 within the episodes. In both cases
   it must follow the state better than the motion to the next state. If more than half of the dimensions follow: absolute.
2. Otherwise zero motion must be possible: if zero lies outside of the actions' range in more than a quarter of the dimensions
   (the last one, usually a gripper, is left out): absolute.
3. Otherwise: relative.
"""

import numpy as np

from nanochat.data.demonstrations import Demonstrations

NEAR, CORRELATED = 0.5, 0.9
LEAST_RANGE = 1e-6  # a dimension that moves less is left out
BEYOND = 0.1  # of the range: how far from it zero must be
NOT_STATES = ("observation.environment_state",)  # a simulator's; for experts and questions


def find_targets(data: Demonstrations) -> tuple[str, str]:
    """("relative" or "absolute", the reason in a few words)."""
    compared = []
    for key, column in data.columns.items():
        is_numeric = column.ndim == 2 and column.dtype.kind in "fiu"
        if key.startswith("observation.") and key not in NOT_STATES and is_numeric:
            compared.append(key)
            follows = following(data, column.astype(np.float64))
            if len(follows) and follows.mean() > 0.5:
                return "absolute", f"{follows.sum()} of {len(follows)} numbers follow {key}"
    share = zero_is_outside(data.action)
    if share > 0.25:
        return "absolute", f"zero lies outside of the range of {share:.0%} of the numbers"
    if compared:
        return "relative", f"they do not follow {', '.join(compared)}"
    return "relative", "a guess: the data has no state to compare them with"


def following(data: Demonstrations, state: np.ndarray) -> np.ndarray:
    """For each dimension of the action that moves, whether it follows the state's. state: (n, S), NaN where it is unknown."""
    width = min(state.shape[1], data.action.shape[1])
    action, state = data.action[:, :width].astype(np.float64), state[:, :width]
    known = np.flatnonzero((np.arange(len(action)) + 1 < data.end) & np.isfinite(state).all(1))
    known = known[np.isfinite(state[known + 1]).all(1)] if len(known) else known
    if len(known) < 2:
        return np.zeros(0, bool)
    now, after, action, episode = state[known], state[known + 1], action[known], data.episode[known]
    motion = after - now
    moving = (np.ptp(data.action[:, :width], axis=0) > LEAST_RANGE) & (np.ptp(now, axis=0) > LEAST_RANGE)
    distance = np.minimum(np.abs(action - after).mean(0), np.abs(action - now).mean(0))
    usual = np.abs(after - np.median(after, axis=0)).mean(0)
    near = (distance < NEAR * usual) & (distance < np.abs(action - motion).mean(0))
    with_state = correlation(action, after, episode)
    correlated = (with_state > CORRELATED) & (with_state > correlation(action, motion, episode))
    return (near | correlated)[moving]


def correlation(a: np.ndarray, b: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """(D,) correlations of the columns of (m, D) arrays within the episodes: differences between episodes do not count."""
    a, b = within(a, episode), within(b, episode)
    return (a * b).sum(0) / np.maximum(np.sqrt((a**2).sum(0) * (b**2).sum(0)), 1e-12)


def within(values: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """(m, D) without the mean of each episode. episode: (m,), in order."""
    starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
    lengths = np.diff(starts, append=len(values))
    return values - np.repeat(np.add.reduceat(values, starts) / lengths[:, None], lengths, axis=0)


def zero_is_outside(action: np.ndarray) -> float:
    """The share of the action's dimensions that move and are never near zero; the last one of several is left out."""
    arm = action[:, : max(1, action.shape[1] - 1)]
    low, high = np.quantile(arm, (0.01, 0.99), axis=0)
    moving, beyond = high - low > LEAST_RANGE, BEYOND * (high - low)
    return float(((low > beyond) | (high < -beyond))[moving].mean()) if moving.any() else 0.0
