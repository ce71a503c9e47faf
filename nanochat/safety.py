"""The last check before the motors: every action is finite, within the limits and, optionally, rate-limited."""

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nanochat.errors import UserError

logger = logging.getLogger(__name__)


class SafeActions:
    """Call it with every action before it is executed. `counts` holds how many actions were changed, by reason.

    low, high: (D,) limits of each dimension.
    hold: (D,) sent instead of an unusable action; NaN repeats the last value sent in that dimension (a gripper in a robot with
        relative actions: 0, 0, 0, nan). Default: the middle between the limits.
    max_change: (D,) or a number, the largest change of a dimension between consecutive actions; None for no limit.
    max_age_s: the oldest observation, in seconds, whose action is used; None for any age.
    start: (D,) where the robot is before the first action, in the numbers of the actions: NaN in `hold` repeats it, and
        `max_change` is measured from it, also where it lies outside of the limits. Without it, a robot with absolute targets
        has nothing to repeat: NaN in the first action gives the middle between the limits.

    Raises ValueError for invalid limits. A call never raises, whatever the action.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        hold: Sequence[float] | None = None,
        max_change: Sequence[float] | float | None = None,
        max_age_s: float | None = None,
        start: Sequence[float] | None = None,
    ):
        self.low, self.high = np.array(low, np.float64), np.array(high, np.float64)
        if self.low.ndim != 1 or self.low.shape != self.high.shape or not np.all(self.low <= self.high):
            raise UserError(f"limits must be two lists of equal length with low <= high, got {low} and {high}")
        if not np.isfinite([self.low, self.high]).all():
            raise UserError(f"limits must be finite, got {low} and {high}")
        self.hold = (self.low + self.high) / 2 if hold is None else np.array(hold, np.float64)
        if self.hold.shape != self.low.shape or np.isinf(self.hold).any():
            raise UserError(f"hold must have {len(self.low)} numbers or NaN, got {hold}")
        self.max_change = None if max_change is None else np.array(max_change, np.float64)
        if max_change is not None and self.max_change.shape not in ((), self.low.shape):
            raise UserError(f"max_change must be a number or {len(self.low)} of them, got {max_change}")
        if max_change is not None and not np.all(self.max_change > 0):
            raise UserError(f"max_change must be more than 0, got {max_change}")
        if max_age_s is not None and not max_age_s > 0:
            raise UserError(f"max_age_s must be more than 0, got {max_age_s}")
        self.max_age_s = max_age_s
        self.last = None if start is None else np.array(start, np.float64)
        if start is not None and not (self.last.shape == self.low.shape and np.isfinite(self.last).all()):
            raise UserError(f"start must have {len(self.low)} finite numbers, got {start}")
        self.counts: Counter[str] = Counter()

    def __call__(self, action, age_s: float | None = None) -> np.ndarray:
        """action: (D,), the output of a network. age_s: age of its observation in seconds. Returns (D,) float32."""
        values, reason = self.checked(action, age_s)
        if reason:
            self.warn(reason)
        values = self.fallback() if reason else np.clip(values, self.low, self.high)
        if self.max_change is not None and self.last is not None:
            limited = np.clip(values, self.last - self.max_change, self.last + self.max_change)
            self.counts["rate limited"] += int((limited != values).any())
            values = limited
        self.last = values
        # rounding to float32 can exceed a limit; from a start outside of the limits the way back in takes several steps
        low, high = np.minimum(self.low, values), np.maximum(self.high, values)
        return np.clip(values.astype(np.float32), rounded(low, np.inf), rounded(high, -np.inf))

    def checked(self, action, age_s: float | None) -> tuple[np.ndarray | None, str]:
        """(the action as float64 or None, the reason it is unusable or "")."""
        # NaN or a negative age (the clock was changed) does not prove that the observation is fresh
        if self.max_age_s is not None and not (age_s is not None and 0 <= age_s <= self.max_age_s):
            return None, "stale observation"
        try:
            array = np.asarray(action)
            # numpy would also convert dates, text, and the real part of complex numbers
            values = array.astype(np.float64) if array.dtype.kind in "biufO" else None
        except Exception:  # the conversion methods of an object can raise anything
            values = None
        if values is None:
            return None, "not numeric"
        if values.shape != self.low.shape:
            return None, "wrong shape"
        return values, "" if np.isfinite(values).all() else "not finite"

    def fallback(self) -> np.ndarray:
        last = (self.low + self.high) / 2 if self.last is None else self.last
        return np.where(np.isnan(self.hold), last, np.clip(self.hold, self.low, self.high))

    def warn(self, reason: str) -> None:
        """Logs occurrence 1, 10, 100 and then every 1000th: at 80 steps per second a full log would fill the disk."""
        self.counts[reason] += 1
        if self.counts[reason] in (1, 10, 100) or self.counts[reason] % 1000 == 0:
            logger.warning("unusable action replaced (%s), %d times so far", reason, self.counts[reason])


def rounded(limit: np.ndarray, towards: float) -> np.ndarray:
    """The nearest float32 of each limit that does not exceed it. towards: the direction of the allowed range, inf or -inf."""
    near = limit.astype(np.float32)
    beyond = near < limit if towards > 0 else near > limit
    return np.where(beyond, np.nextafter(near, np.float32(towards)), near)


def hold_still(action_dim: int) -> list[float]:
    """`hold` for relative actions: zero motion, and the last dimension (the gripper) keeps the value last sent."""
    return [0.0] * (action_dim - 1) + [float("nan")]


def hold_last(action_dim: int) -> list[float]:
    """`hold` for absolute targets: all dimensions keep the value last sent. Zeros would be a pose, and moving there a jump."""
    return [float("nan")] * action_dim
