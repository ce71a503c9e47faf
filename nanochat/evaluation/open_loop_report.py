"""The open-loop report on the screen and as JSON: see `open_loop` for what is measured."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from nanochat.evaluation.baselines import HOLD, LAST, MEAN, NEAREST
from nanochat.evaluation.metrics import Estimate
from nanochat.evaluation.open_loop import ALONE, BLIND, OTHER_TASK, POLICY, SHUFFLED, OpenLoop

BASELINES = (HOLD, LAST, MEAN, NEAREST)
CONTROLS = (SHUFFLED, BLIND)  # the first that there is decides: another picture says more than none
COLUMNS = 5  # steps of the chunk that the table shows
COMPACT = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}  # the names of joints are long
ADDS = 0.02  # an error that changes by less than this share without the picture does not depend on it


def summary(found: OpenLoop, names: list[str], units: list[str], fps: float) -> dict:
    """All figures, for JSON. names, units: of the A numbers. fps: actions per second; 0 if unknown."""
    numbers = zip(names, units, found.low.tolist(), found.high.tolist(), found.moves.tolist(), strict=True)
    rows = {}
    for row in found.chunks:
        ratio = found.compared(row, HOLD)
        rows[row] = {
            "share_of_range": found.share(row),
            "of_hold": ratio.value,
            "of_hold_ci95": [ratio.low, ratio.high],
            "share_by_step": finite(found.by_step(row)),
            "by_number": finite(found.by_number(row)),
            "by_number_and_step": [finite(errors) for errors in found.by_number_and_step(row)],
        }
    return {
        "frames": len(found.frames),
        "episodes": len(set(found.episode.tolist())),
        "chunk": found.truth.shape[1],
        "fps": fps,
        "numbers": [dict(zip(("name", "unit", "low", "high", "moves"), number, strict=True)) for number in numbers],
        "rows": rows,
        "verdict": verdict(found),
    }


def finite(values: np.ndarray) -> list[float | None]:
    """JSON has no NaN: None at a step of the chunk that no frame has."""
    return [float(value) if np.isfinite(value) else None for value in values]


# ---- in words


def verdict(found: OpenLoop) -> list[str]:
    """What the figures say about the policy, a line each."""
    policy, rows = found.share(POLICY), [row for row in BASELINES if row in found.chunks]
    lines = [against_hold(found.compared(POLICY, HOLD), len(set(found.episode.tolist())))]
    if better := [row for row in rows if row != HOLD and found.share(row) <= policy]:
        lines.append(f"No better than {' and '.join(better)}: without any training.")
    control = next((row for row in CONTROLS if row in found.chunks), None)
    if control and found.share(control) < policy * (1 + ADDS):
        instead = {SHUFFLED: "with pictures of another episode", BLIND: "without a picture"}[control]
        lines.append(f"The picture adds nothing: the error is the same {instead}.")
    if OTHER_TASK in found.chunks and found.share(OTHER_TASK) < policy * (1 + ADDS):
        lines.append("The words add nothing: the error is the same with another task's instruction.")
    return lines


def against_hold(ratio: Estimate, episodes: int) -> str:
    sure = (
        f"95 %: {factor(ratio.low)} .. {factor(ratio.high)}, {episodes} episodes"
        if episodes > 1
        else "one episode, no interval"
    )
    found = f"{factor(ratio.value)} of the error of a robot that holds still ({sure})"
    if ratio.value >= 1:
        return f"DOES NOT BEAT HOLD: {found}. Do not run this policy on a robot: train longer, or on more episodes."
    if ratio.high >= 1:
        return f"Not surely better than hold: {found}. Evaluate it on more episodes, or train it longer."
    return f"Better than hold: {found}."


# ---- tables


def row_table(found: OpenLoop, fps: float) -> Table:
    """A line for the policy, each control and each baseline; columns are steps of the chunk."""
    steps = np.unique(np.linspace(0, found.truth.shape[1] - 1, COLUMNS).round().astype(int)).tolist()
    table = Table(title=f"mean error, % of the range of each number, {len(found.frames):,} frames", **COMPACT)
    table.caption = "the range: 1st to 99th percentile of the training data; columns: that long after the observation"
    for column in ("", "error", "of hold", *(moment(step, fps) for step in steps)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in (POLICY, SHUFFLED, BLIND, OTHER_TASK, ALONE, None, *BASELINES):
        if row is None:
            table.add_section()
        elif row in found.chunks:
            errors = found.by_step(row)
            cells = ["" if np.isnan(errors[step]) else f"{errors[step]:.1%}" for step in steps]
            table.add_row(row, f"{found.share(row):.1%}", factor(found.compared(row, HOLD).value), *cells)
    return table


def factor(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else "> 100"  # also where a recorded robot stands still, and hold has no error


def moment(step: int, fps: float) -> str:
    """When the action of a step is due, after the observation; the first is due at once."""
    return f"{step / fps:.2f} s" if fps else f"step {step + 1}"


def number_table(found: OpenLoop, names: list[str], units: list[str]) -> Table:
    """A line for each number of the action, in its own unit."""
    table = Table(title="mean error of each number over the whole chunk, in its own unit", **COMPACT)
    rows = [POLICY, *(row for row in (ALONE, *BASELINES) if row in found.chunks)]
    errors = {row: found.by_number(row) for row in rows}
    for column in ("number", "range", *rows):
        justify = "left" if column == "number" else "right"
        table.add_column(column.replace(" ", "\n"), justify=justify, overflow="fold", min_width=7)
    for i, (name, unit) in enumerate(zip(names, units, strict=True)):
        label = escape(f"{name} ({unit})" if unit else name)
        width = f"{found.high[i] - found.low[i]:.3g}" if found.moves[i] else "still"
        policy = f"{errors[POLICY][i]:.3g}" + "*" * bool(errors[POLICY][i] >= errors[HOLD][i])
        table.add_row(label, width, policy, *(f"{errors[row][i]:.3g}" for row in rows[1:]))
    table.caption = "* no better than hold; still: hardly moves in the training data, left out of the means above"
    return table
