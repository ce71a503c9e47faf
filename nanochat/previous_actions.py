"""What a robot was told to do just before: where a chunk of absolute targets goes on from, and how fast. No torch.

The next targets of a joint lie nearer to its last target than to its present angle, which follows that target late, and a motion
that has begun usually goes on. So a policy may read the last actions that were sent, and predict how far its chunk is from the
last of them. Where none are given, as before the first chunk, the robot is taken to have stood still at its present state.

A policy that knows what it did may learn to do it again instead of looking ("copycat": Wen et al. 2020, arXiv 2010.14876). So
training hides these actions in a share of the rows, and a policy with them can always do without.
"""

from collections.abc import Sequence

import numpy as np

MOTION_STEPS = (1, 2, 4, 8)  # a motion is the last action less the one so many steps before it
PREVIOUS = max(MOTION_STEPS) + 1  # actions that are read


def completed(previous: Sequence[np.ndarray], start: np.ndarray) -> np.ndarray:
    """The last actions (k, D) of each of B robots, from the oldest on, k from 0 on -> (B, PREVIOUS, D) float32: before the oldest
    the robot stood still there. start: (B, D), where it stands if k is 0."""
    rows = []
    for known, still in zip(previous, start, strict=True):
        known = known[-PREVIOUS:] if len(known) else still[None]
        rows.append(np.concatenate([np.repeat(known[:1], PREVIOUS - len(known), axis=0), known]))
    return np.stack(rows).astype(np.float32)


def motions(previous: np.ndarray, half: np.ndarray) -> np.ndarray:
    """(B, PREVIOUS, D) -> (B, len(MOTION_STEPS), D) float32. half: (D,), what a motion of 1 is."""
    before = previous[:, [-1 - step for step in MOTION_STEPS]]
    return ((previous[:, -1:] - before) / half).astype(np.float32)
