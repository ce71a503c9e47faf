"""Statistics of columns and images, as LeRobot datasets store them in meta/stats.json."""

import io

import numpy as np
from PIL import Image

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATS_PIXELS = 150  # image statistics use about this many rows and columns


def column_stats(column: np.ndarray) -> dict[str, list]:
    """(T,) or (T, D) -> min, max, mean, std and quantiles, each of length D (or 1), and the count, [T]."""
    x = column.reshape(len(column), -1).astype(np.float64)
    stats = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0), "count": np.array([len(x)])}
    stats |= dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0), strict=True))
    return {name: value.tolist() for name, value in stats.items()}


def pixel_counts(picture: bytes) -> np.ndarray:
    """(3, 256): how often each channel of an encoded image has each value, in evenly spaced rows and columns."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)))  # (H, W, 3)
    step = max(1, min(pixels.shape[:2]) // STATS_PIXELS)
    return np.stack([np.bincount(pixels[::step, ::step, channel].reshape(-1), minlength=256) for channel in range(3)])


def image_stats(counts: np.ndarray, n_images: np.ndarray) -> dict[str, list]:
    """The statistics of `column_stats`, for pixels in 0..1. counts: (3, 256), sums of `pixel_counts`. Each statistic is
    (3, 1, 1); the count is the number of images."""
    values, below, total = np.arange(256) / 255, counts.cumsum(1), counts.sum(1)  # (256,), (3, 256), (3,)
    mean = counts @ values / total
    stats = {"mean": mean, "std": np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / total)}
    for name, share in ({"min": 0.0, "max": 1.0} | QUANTILES).items():
        stats[name] = values[(below > share * (total[:, None] - 1)).argmax(1)]
    return {name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()} | {"count": [int(n_images)]}
