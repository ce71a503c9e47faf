"""What `nanochat inspect` shows of a folder of demonstrations: tables, and a contact sheet of its cameras."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import fill

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from nanochat.data.inspection import Contents, Numbers, evenly, inspect_folder, open_parts
from nanochat.errors import UserError
from nanochat.files import atomic_path

SHOWN = 5  # gaps, problems or tasks of one kind that are listed; the others are counted
WIDEST = 64  # numbers of a column that get a line each
SHEET_COLUMNS = 8
TITLE_WIDTH = 30  # characters of a line above a picture
console = Console()


def show_contents(folder: Path, sheet: Path | None, json_out: Path | None) -> None:
    """Print what is in the folder. sheet: a PNG file for pictures of all cameras. json_out: a file for all figures."""
    found = inspect_folder(folder, partial(track, description="reading numbers", console=console))
    if sheet is not None and found.cameras and found.lengths:
        found.problems += draw_sheet(folder, found, sheet)
    print_contents(folder, found)
    if json_out is not None:
        with atomic_path(json_out) as new:
            new.write_text(json.dumps(without_nan(asdict(found)), indent=1))


def without_nan(value):
    """The same for JSON, which has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


# ---- tables


def print_contents(folder: Path, found: Contents) -> None:
    lengths, frames = list(found.lengths.values()), sum(found.lengths.values())
    robot = f", robot {found.robot}" if found.robot else ""
    console.print(f"{folder}: {found.kind}{robot}", markup=False)
    if lengths:
        console.print(
            f"{plural(len(lengths), 'episode')}, {plural(frames, 'frame')} at {found.fps:g} per second: "
            f"{duration(frames / found.fps)}; an episode has {min(lengths):,} to {max(lengths):,} frames, median "
            f"{int(np.median(lengths)):,}"
        )
    for camera in found.cameras:
        size = f", {camera.width} x {camera.height}" if camera.width else ""
        rate = f", {camera.codec}, {camera.fps:.4g} pictures per second" if camera.codec else ""
        console.print(f"camera {camera.name}: {camera.kind}{size}{rate}", markup=False)
    tasks = sorted(found.tasks.items(), key=lambda task: -task[1][1])  # those with the most frames first
    print_lines(
        plural(len(tasks), "task"), [f"{plural(n, 'episode')}, {plural(m, 'frame')}: {task}" for task, (n, m) in tasks]
    )
    for numbers in found.numbers:
        console.print(number_table(numbers))
    if found.unreadable:
        console.print(f"columns that are no numbers: {', '.join(found.unreadable)}", markup=False)
    gaps = "no gaps in the time stamps" if found.has_times else "no time stamps: frames count as evenly spaced"
    print_lines(f"{plural(len(found.gaps), 'gap')} in the time stamps" if found.gaps else gaps, found.gaps)
    print_lines(plural(len(found.problems), "problem") if found.problems else "no problems found", found.problems)


def print_lines(title: str, lines: list[str]) -> None:
    """The title and the first lines, indented; the others are counted."""
    console.print(title + (":" if lines else ""), markup=False)
    for line in lines[:SHOWN]:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"  and {len(lines) - SHOWN:,} more (--json FILE has all)")


def plural(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s" if minutes else f"{rest} s"


def number_table(numbers: Numbers) -> Table:
    """A line for each number; one line for all if they are more than anybody would read."""
    width = len(numbers.low)
    table = Table(title=f"{escape(numbers.name)}, {plural(width, 'number')}", box=SIMPLE_HEAD, title_justify="left")
    for column in ("number", "least", "greatest", "mean", "std", ""):
        table.add_column(column, justify="left" if column in ("number", "") else "right")
    rows = list(zip(numbers.low, numbers.high, numbers.mean, numbers.std, numbers.not_finite, strict=True))
    names = numbers.names or [str(place) for place in range(1, width + 1)]
    if width > WIDEST:
        low, high, mean, std, bad = (np.array(values) for values in zip(*rows, strict=True))
        rows, names = [(low.min(), high.max(), mean.mean(), std.mean(), int(bad.max()))], ["all of them"]
    for name, (low, high, mean, std, bad) in zip(names, rows, strict=True):
        notes = [f"NaN or infinity in {plural(bad, 'frame')}"] * (bad > 0) + ["constant"] * bool(low == high)
        table.add_row(escape(name), *(f"{value:.4g}" for value in (low, high, mean, std)), ", ".join(notes))
    return table


# ---- the contact sheet


def draw_sheet(folder: Path, found: Contents, out: Path) -> list[str]:
    """Write a PNG file, atomically: a row of evenly spaced frames for each camera. Returns a line for each picture that cannot be
    read; its place on the sheet is grey."""
    from matplotlib.figure import Figure  # not pyplot, which keeps state and may open windows

    parts, problems = open_parts(folder), []
    frames = list(evenly(found.lengths, SHEET_COLUMNS))
    height = max(1.2, 2 * max((c.height / c.width for c in found.cameras if c.width), default=0.75)) + 0.45
    figure = Figure(figsize=(2 * len(frames), height * len(found.cameras)), layout="constrained")
    axes = figure.subplots(len(found.cameras), len(frames), squeeze=False)
    for row, camera in zip(axes, found.cameras, strict=True):
        for axis, (episode, frame) in zip(row, frames, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"episode {episode}, {frame / found.fps:.1f} s", fontsize=8)
            try:
                axis.imshow(parts.picture(episode, frame, camera.name))
            except (UserError, OSError, ImportError) as error:
                axis.set_facecolor("lightgray")
                problems.append(f"camera {camera.name}, episode {episode}, frame {frame}: {error}")
        row[0].set_ylabel(fill(camera.name, TITLE_WIDTH), fontsize=8, parse_math=False)
    with atomic_path(out) as new:
        figure.savefig(new, dpi=100, format="png")
    return problems
