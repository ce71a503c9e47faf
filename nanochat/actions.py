"""Actions and states as numbers in -1..1, and actions as tokens. No torch.

Every dimension is scaled so that its 1st and 99th percentile in the demonstrations are -1 and 1. As tokens (RT-2; OpenVLA,
Kim et al. 2024, arXiv 2406.09246) that range is cut into 256 bins, and a bin is a token.
"""

from dataclasses import dataclass

import numpy as np

from nanochat.errors import UserError

N_BINS = 256
STATE, ACT = "<|state|>", "<|act|>"  # special tokens
BINS = tuple(f"<|action_{i}|>" for i in range(N_BINS))
TARGETS = ("relative", "absolute")  # what the numbers of an action are: motions, or joint angles and poses
MARGIN = 3  # a state may lie outside of the training data's range by this many times its width, and by this many units
LEAST_RANGE = 1e-3  # a dimension that hardly moves is not scaled up to the full range: its noise would be


@dataclass(frozen=True)
class Scale:
    """low, high: percentiles of each of D dimensions, as lists so that they go into a config.json."""

    low: list[float]
    high: list[float]

    def __post_init__(self):
        low, high = np.asarray(self.low, float), np.asarray(self.high, float)
        if low.ndim != 1 or low.shape != high.shape or not len(low) or not np.isfinite([low, high]).all():
            raise UserError(f"a scale needs two finite lists of one length, got {self.low} and {self.high}")
        if (high < low).any():
            raise UserError(f"the upper percentiles must not lie below the lower ones, got {self.low} and {self.high}")

    @classmethod
    def fit(cls, values: np.ndarray) -> "Scale":
        """Of (n, D) values. Raises ValueError where there are none, or NaN among them."""
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
            raise UserError(f"a scale is fitted to finite (n, D) values, got shape {values.shape}")
        low, high = np.quantile(values, (0.01, 0.99), axis=0)
        return cls(low.tolist(), high.tolist())

    @property
    def center(self) -> np.ndarray:
        return (np.asarray(self.low) + np.asarray(self.high)) / 2

    @property
    def half(self) -> np.ndarray:
        """Half the range; 1 for a dimension that is nearly constant, which then stays near 0."""
        half = (np.asarray(self.high) - np.asarray(self.low)) / 2
        return np.where(half < LEAST_RANGE / 2, 1.0, half)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """(..., D) in physical units -> (..., D) float32, mostly within -1..1."""
        return ((values - self.center) / self.half).astype(np.float32)

    def restore(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `normalize`."""
        return (values * self.half + self.center).astype(np.float32)

    def to_bins(self, values: np.ndarray) -> np.ndarray:
        """(..., D) in physical units -> (..., D) int64 in 0..255; values beyond the percentiles get the outermost bins."""
        share = (np.clip(self.normalize(values), -1, 1) + 1) / 2
        return np.minimum((share * N_BINS).astype(np.int64), N_BINS - 1)

    def from_bins(self, bins: np.ndarray) -> np.ndarray:
        """The middles of the bins, in physical units."""
        return self.restore((np.asarray(bins) + 0.5) * 2 / N_BINS - 1)


def span(values: np.ndarray) -> dict[str, list[float]]:
    """The least and the greatest of (n, D) values, as the arguments of a `Scale`."""
    return {"low": values.min(0).astype(float).tolist(), "high": values.max(0).astype(float).tolist()}


def number_array(values: object, expected: str) -> np.ndarray:
    """Numbers of any shape as float64. Raises UserError, which begins with what was expected, for text, booleans, ragged lists,
    NaN and infinity."""
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iuf" or has_bool(values):
            raise TypeError
        array = array.astype(np.float64)
    except Exception:  # the conversion methods of an object can raise anything
        raise UserError(f"{expected}, got {described(values)}") from None
    if not np.isfinite(array).all():
        raise UserError(f"{expected}, got NaN or infinity in {described(values)}")
    return array


def has_bool(values: object) -> bool:
    """Whether a list has a boolean in it: numpy would make it a number."""
    if isinstance(values, (list, tuple)):
        return any(has_bool(value) for value in values)
    return isinstance(values, (bool, np.bool_))


def check_states(states: np.ndarray, trained: Scale, name: str = "the state") -> None:
    """Raises UserError for (B, D) states far outside of the training data's range: another unit, or another order of numbers.

    trained: the range. name: of the states in the message. Accepted are MARGIN times its width on both sides, and at least
    MARGIN units, since a robot may start where no demonstration was.
    """
    low, high = np.asarray(trained.low), np.asarray(trained.high)
    margin = MARGIN * np.maximum(high - low, 1)
    for row, number in np.argwhere((states < low - margin) | (states > high + margin)):
        raise UserError(
            f"{name}: number {number + 1} of {states.shape[1]} is {states[row, number]:.6g}, but lay between "
            f"{low[number]:.6g} and {high[number]:.6g} in the training data (accepted: {low[number] - margin[number]:.6g} to "
            f"{high[number] + margin[number]:.6g}): send the same numbers, in the same order and in the same units, "
            "such as radians or degrees, metres or millimetres"
        )


def described(value: object) -> str:
    """The type and shape of a received value, for messages."""
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} of {value.dtype}"
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {len(value)}" + (f" ({', '.join(kinds[:4])})" if kinds else "")
    return "nothing" if value is None else type(value).__name__
