"""How the answers about held-out pictures got better in training, a panel for each run: does more training help?

    python benchmarks/curves.py "DAQUAR=runs/daquar" "two pictures=runs/pairs" --out docs/curves.png

Reads metrics.jsonl of checkpoint folders, which `nanochat train` writes. A panel shows the share of answers that are exactly
right, or the loss of a run without answers, for the right picture, another one (shuffled) and none (blind).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tyro.conf import Positional

from nanochat.errors import UserError
from nanochat.evaluation.controls import CONDITIONS
from nanochat.files import atomic_path, json_lines

COLOURS = dict(zip(CONDITIONS, ("#2b6cb0", "#c0392b", "#333333"), strict=True))


@dataclass
class Args:
    runs: Positional[tuple[str, ...]]
    "Runs, each as LABEL=FOLDER."
    out: Path = Path("curves.png")
    "The picture that is written."


def checks_of(run: str) -> tuple[str, list[dict]]:
    """LABEL=FOLDER -> (LABEL, its validations). Raises UserError for a folder without any."""
    label, found, folder = run.partition("=")
    file = Path(folder) / "metrics.jsonl"
    if not found or not file.is_file():
        raise UserError(f"{run!r}: expected LABEL=FOLDER, with a folder of nanochat train, which has metrics.jsonl")
    checks = [line for _, line in json_lines(file) if "aligned" in line]
    if len(checks) < 2:
        raise UserError(f"{file} has {len(checks)} validations, expected 2 or more: train with a smaller --eval-every")
    return label, checks


def measures_of(checks: list[dict]) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """(what is measured, {condition: (step, value) of each validation that has it})."""
    answers = all("aligned_accuracy" in check for check in checks)
    key, scale = ("{}_accuracy", 100) if answers else ("{}", 1)
    found = {
        condition: [
            (check["step"], scale * check[key.format(condition)]) for check in checks if key.format(condition) in check
        ]
        for condition in CONDITIONS
    }
    return "answers exactly right, %" if answers else "loss", {name: points for name, points in found.items() if points}


def draw(panels: list[tuple[str, list[dict]]]) -> Figure:
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, checks) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        unit, measures = measures_of(checks)
        for condition, points in measures.items():
            axes.plot(*zip(*points, strict=True), marker=".", color=COLOURS[condition], label=condition)
        axes.set(title=label, xlabel="step", ylabel=unit, ylim=(0, None))
        axes.legend(fontsize=8)
    return figure


def main(args: Args) -> None:
    if not args.runs:
        raise UserError("curves needs at least one run: LABEL=FOLDER")
    panels = [checks_of(run) for run in args.runs]
    with atomic_path(args.out) as new:
        draw(panels).savefig(new, format="png", dpi=110)
    for label, checks in panels:
        unit, measures = measures_of(checks)
        print(f"{label}: {unit}")
        for condition, points in measures.items():
            print(f"  {condition:9s}", "  ".join(f"{step}: {value:.3g}" for step, value in points))
    print(f"written: {args.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UserError, OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"error: {error}") from None
