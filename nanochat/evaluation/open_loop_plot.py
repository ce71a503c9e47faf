"""A drawing of the open-loop report: errors over the chunk, and an episode with predicted chunks over what was recorded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.evaluation.baselines import HOLD, LAST, MEAN, NEAREST
from nanochat.evaluation.open_loop import ALONE, BLIND, OTHER_TASK, POLICY, SHUFFLED, OpenLoop
from nanochat.files import atomic_path

MOST_NUMBERS = 32  # panels
PER_LINE = 4
LEAST_SHOWN = 1 / 3  # of a number's range: in less, a joint that rests would look as busy as one that moves
PANEL_INCHES = (3.4, 1.7)
CURVES_INCHES = 3.0
STYLES = {POLICY: ("tab:red", "-"), SHUFFLED: ("tab:red", "--"), BLIND: ("tab:red", ":"), OTHER_TASK: ("tab:red", "-."),
          ALONE: ("tab:orange", "-"), HOLD: ("black", "-"), LAST: ("tab:gray", "--"), MEAN: ("tab:gray", ":"),
          NEAREST: ("tab:blue", "-")}  # fmt: skip


@dataclass
class Played:
    """A recorded episode of L frames with chunks that were predicted at some of its frames.

    name: where it comes from. truth: (L, A) recorded actions. starts: (n,) in 0..L-1; chunks: (n, T, A) predicted there.
    """

    name: str
    truth: np.ndarray
    starts: np.ndarray
    chunks: np.ndarray


def typical_episode(found: OpenLoop) -> int:
    """The episode whose error is the median: neither the best nor the worst."""
    errors = found.by_episode(POLICY)
    return sorted(errors, key=errors.get)[(len(errors) - 1) // 2]


def draw_open_loop(found: OpenLoop, played: Played, names: list[str], units: list[str], fps: float, out: Path) -> None:
    """Write a PNG file, atomically. names, units: of the A numbers. fps: 0 if unknown; then time is in steps."""
    from matplotlib.figure import Figure  # not pyplot, which keeps state and may open windows

    shown = liveliest(played.truth, found)
    lines = -(-len(shown) // PER_LINE)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(PER_LINE * width, CURVES_INCHES + lines * height + 0.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(CURVES_INCHES, lines * height + 0.6))
    draw_curves(top.subplots(), found, fps)
    left_out = f"; {len(shown)} of {len(names)} numbers, those that move the most" if len(shown) < len(names) else ""
    bottom.suptitle(f"{played.name}: recorded actions (black) and predicted chunks (red, a dot where each starts){left_out}",
                    fontsize=10)  # fmt: skip
    axes = bottom.subplots(lines, PER_LINE, squeeze=False, sharex=True)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, number in zip(axes.flat, shown, strict=False):
        draw_number(axis, played, number, fps)
        unit = f" ({units[number]})" if units[number] else ""
        axis.set_title(f"{names[number]}{unit}", fontsize=8, parse_math=False)
        widen(axis, LEAST_SHOWN * (found.high - found.low)[number])
    for axis in axes.flat[max(0, len(shown) - PER_LINE) : len(shown)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("seconds" if fps else "steps", fontsize=8)
    with atomic_path(out) as new:
        figure.savefig(new, dpi=100, format="png")


def liveliest(truth: np.ndarray, found: OpenLoop) -> list[int]:
    """The numbers to draw, in their order: all, or those that move the most of their range in the episode."""
    moved = np.where(found.moves, np.ptp(truth, axis=0) / np.maximum(found.high - found.low, 1e-9), -1)
    return sorted(np.argsort(-moved, kind="stable")[:MOST_NUMBERS].tolist())


def draw_curves(axis, found: OpenLoop, fps: float) -> None:
    """The error at each step of the chunk, a curve for each row of the report."""
    times, episodes = np.arange(found.truth.shape[1]) / (fps or 1), len(np.unique(found.episode))
    for row, (colour, style) in STYLES.items():
        if row in found.chunks:
            axis.plot(times, 100 * found.by_step(row), color=colour, linestyle=style, label=row)
    axis.set_ylim(bottom=0)
    axis.set_title(f"mean error, {len(found.frames):,} frames of {episodes} episode{'s' * (episodes > 1)}", fontsize=10)
    axis.set_xlabel("seconds after the observation" if fps else "step of the chunk", fontsize=8)
    axis.set_ylabel("% of each number's range", fontsize=8)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.tick_params(labelsize=7)


def widen(axis, least: float) -> None:
    """Make the range of the vertical axis at least so wide."""
    low, high = axis.get_ylim()
    more = max(0.0, least - (high - low)) / 2
    axis.set_ylim(low - more, high + more)


def draw_number(axis, played: Played, number: int, fps: float) -> None:
    times, rate = np.arange(len(played.truth)), fps or 1
    axis.plot(times / rate, played.truth[:, number], color="black", linewidth=1)
    for start, chunk in zip(played.starts, played.chunks[..., number], strict=True):
        chunk = chunk[: len(times) - start]  # an episode ends before its last chunk does
        axis.plot((start + np.arange(len(chunk))) / rate, chunk, color="tab:red", linewidth=1)
        axis.plot(start / rate, chunk[0], ".", color="tab:red", markersize=4)
    axis.tick_params(labelsize=7)
