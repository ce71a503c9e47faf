"""Between a network and a motor: whatever goes in, what comes out is finite, within the limits and, if asked, not too sudden."""

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

logger = logging.getLogger(__name__)


class SafeActions:
    """Call it with every action on its way out. `counts` says how often it had to step in, by reason.

    low, high: (D,) limits of each dimension.
    hold: (D,) what is sent in place of an action that cannot be used; NaN stands for "as it was last sent" (the fingers of a hand
        that is told how far to move: 0, 0, 0, nan). Default: the middle between the limits.
    max_change: (D,) or a number, the most that a dimension may change from one action to the next; None for no limit.
    max_age_s: the oldest observation, in seconds, that may still be acted on; None for any age.

    Raises ValueError for limits that are none; a call raises nothing, whatever the action.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        hold: Sequence[float] | None = None,
        max_change: Sequence[float] | float | None = None,
        max_age_s: float | None = None,
    ):
        self.low, self.high = np.array(low, np.float64), np.array(high, np.float64)
        if self.low.ndim != 1 or self.low.shape != self.high.shape or not np.all(self.low <= self.high):
            raise ValueError(f"limits must be two lists of one length, low <= high, got {low} and {high}")
        if not np.isfinite([self.low, self.high]).all():
            raise ValueError(f"limits must be finite, got {low} and {high}")
        self.hold = (self.low + self.high) / 2 if hold is None else np.array(hold, np.float64)
        if self.hold.shape != self.low.shape or np.isinf(self.hold).any():
            raise ValueError(f"hold must have {len(self.low)} numbers or NaN, got {hold}")
        self.max_change = None if max_change is None else np.array(max_change, np.float64)
        if max_change is not None and self.max_change.shape not in ((), self.low.shape):
            raise ValueError(f"max_change must be a number or {len(self.low)} of them, got {max_change}")
        if max_change is not None and not np.all(self.max_change > 0):
            raise ValueError(f"max_change must be more than 0, got {max_change}")
        if max_age_s is not None and not max_age_s > 0:
            raise ValueError(f"max_age_s must be more than 0, got {max_age_s}")
        self.max_age_s = max_age_s
        self.last: np.ndarray | None = None
        self.counts: Counter[str] = Counter()

    def __call__(self, action, age_s: float | None = None) -> np.ndarray:
        """action: (D,) as the network has it. age_s: of the observation that it answers, in seconds. Returns (D,) float32."""
        values, reason = self.checked(action, age_s)
        if reason:
            self.warn(reason)
            values = self.fallback()
        values = np.clip(values, self.low, self.high)
        if self.max_change is not None and self.last is not None:
            limited = np.clip(values, self.last - self.max_change, self.last + self.max_change)
            self.counts["slowed down"] += int((limited != values).any())
            values = limited
        self.last = values
        # float32 may round up, and beyond a limit
        return np.clip(values.astype(np.float32), rounded(self.low, np.inf), rounded(self.high, -np.inf))

    def checked(self, action, age_s: float | None) -> tuple[np.ndarray | None, str]:
        """The action as numbers, and why it cannot be used, or an empty string."""
        # an age that is NaN or negative (a clock that was set back) is no proof of freshness
        if self.max_age_s is not None and not (age_s is not None and 0 <= age_s <= self.max_age_s):
            return None, "stale observation"
        try:
            array = np.asarray(action)
            # numpy would make numbers of dates, of text, and of complex ones by half
            values = array.astype(np.float64) if array.dtype.kind in "biufO" else None
        except Exception:  # objects turn themselves into numbers, and may raise anything
            values = None
        if values is None:
            return None, "no numbers"
        if values.shape != self.low.shape:
            return None, "wrong shape"
        return values, "" if np.isfinite(values).all() else "not finite"

    def fallback(self) -> np.ndarray:
        last = (self.low + self.high) / 2 if self.last is None else self.last
        return np.where(np.isnan(self.hold), last, self.hold)

    def warn(self, reason: str) -> None:
        """The first time and then ever more seldom: a robot at 80 steps a second would fill the disk."""
        self.counts[reason] += 1
        if self.counts[reason] in (1, 10, 100) or self.counts[reason] % 1000 == 0:
            logger.warning("action held back (%s), %d times so far", reason, self.counts[reason])


def rounded(limit: np.ndarray, towards: float) -> np.ndarray:
    """The float32 next to each limit that is not beyond it. towards: where inside is."""
    near = limit.astype(np.float32)
    beyond = near < limit if towards > 0 else near > limit
    return np.where(beyond, np.nextafter(near, np.float32(towards)), near)


def stand_still(action_dim: int) -> list[float]:
    """`hold` for actions that say how far to move: nothing moves, and the last number, the fingers, is as it was last sent."""
    return [0.0] * (action_dim - 1) + [float("nan")]
