"""Results as text, as JSON and as a page of the documentation, whose groups are replaced one by one."""

import re
from collections.abc import Sequence
from pathlib import Path

from nanochat.bench.growth import CURVES, exponent
from nanochat.bench.ours import SHAPES
from nanochat.bench.runner import Race, Result
from nanochat.files import atomic_path

INT8_BYTES = 1 + 4 / 64  # of a weight: its own byte, and its share of the scale of 64 of them

HEAD = """# Benchmarks

Written by `nanochat bench`. In each race every contestant has a process of its own, with warm-up, and they take turns: A B A B.
Times are medians in milliseconds, in brackets the 25th and the 75th percentile. "x" is how many times as long a contestant takes
as the first one; "processor" compares the processor's time, all threads together, which other load on the machine disturbs less.
Peers have random weights where only the shape matters.
"""


def race_table(race: Race, results: Sequence[Result]) -> str:
    """A Markdown table of one race."""
    first = results[0]
    lines = [
        f"| {race.name} | {race.unit} | x | processor, {race.unit} | x | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        if result.missing:
            lines.append(f"| {result.label} | not measured: {result.missing.replace('|', '/')} | | | | |")
            continue
        lines.append(
            f"| {result.label} | {number(result.wall)} ({number(result.low)} .. {number(result.high)}) | "
            f"{result.wall / first.wall:.2f} | {number(result.own)} | {result.own / first.own:.2f} | {result.peak / 1e6:.0f} |"
        )
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def roofline_lines(machine: dict, races: dict[str, list[Result]]) -> str:
    """How near decoding comes to the measured bandwidth: a token reads every weight of the layers and of the head once."""
    lines = [
        f"Measured: {machine['bytes'] / 1e9:.1f} GB/s read from memory, {machine['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{machine['bfloat16'] / 1e9:.0f} in bfloat16. Weights that fit into a cache are read faster than from memory.",
    ]
    for name, results in races.items():
        shape = next((shape for shape in SHAPES if f" {shape} " in name), None)
        if shape is None:
            continue
        width, layers, _, vocab = SHAPES[shape]
        weights = 12 * layers * width**2 + vocab * width
        for result in results:
            if not result.missing and "without a cache" not in result.label:
                moved = weights * (INT8_BYTES if "int8" in result.label else 4) / (result.wall / 1e3)
                lines.append(f"- {shape}, {result.label}: {moved / 1e9:.1f} GB/s, {moved / machine['bytes']:.0%}.")
    return "\n".join(lines)


def growth_table(curves: dict[str, list]) -> str:
    lines = [
        "| what | sizes | exponent of the time | of the processor's time | at most | time at the sizes, ms | memory, MB |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, rows in curves.items():
        curve, (sizes, wall, own, peak) = CURVES[name], zip(*rows, strict=True)
        lines.append(
            f"| {curve.name} | {sizes[0]:,} .. {sizes[-1]:,} {curve.what} | {exponent(sizes, wall):.2f} | "
            f"{exponent(sizes, own):.2f} | {curve.most:g} | {', '.join(number(1e3 * value) for value in wall)} | "
            f"{', '.join(f'{value / 1e6:.0f}' for value in peak)} |"
        )
    return "\n".join(lines)


def plot_growth(curves: dict[str, list], path: Path) -> None:
    """The times over the sizes, both logarithmic, each divided by its first one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        sizes, _, own, _ = zip(*rows, strict=True)
        label = f"{CURVES[name].name}, {CURVES[name].what}: exponent {exponent(sizes, own):.2f}"
        axes.plot([size / sizes[0] for size in sizes], [value / own[0] for value in own], "o-", label=label)
    ends = [1, max(row[-1][0] / row[0][0] for row in curves.values())]
    axes.plot(ends, ends, "k:", label="linear")
    axes.set(
        xscale="log", yscale="log", xlabel="size, of the smallest", ylabel="processor's time, of that at the smallest"
    )
    axes.legend(fontsize=7)
    with atomic_path(path) as new:
        figure.savefig(new, format="png", dpi=120)


def write_section(path: Path, group: str, text: str) -> None:
    """Put the section of a group into the page, in place of an older one."""
    page = path.read_text(encoding="utf-8") if path.exists() else HEAD
    parts = re.split(r"(?m)^(?=## )", page)
    body = text.strip("\n")  # a first line that is indented stays so
    section = f"## {group}\n\n{body}\n\n"
    at = next((i for i, part in enumerate(parts) if part.startswith(f"## {group}\n")), None)
    if at is None:
        parts = [*[part.rstrip("\n") + "\n\n" for part in parts], section]
    else:
        parts[at] = section
    with atomic_path(path) as new:
        new.write_text("".join(parts).rstrip("\n") + "\n", encoding="utf-8")
