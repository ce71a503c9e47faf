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
