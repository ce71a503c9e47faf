"""How fast a run is: averages for the history, and a progress bar."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat.training.task import StepResult, console


class Meter:
    """Averages over the steps since the last line of the history."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.results: list[StepResult] = []
        self.since = time.monotonic()

    def averages(self, measure: str) -> dict[str, float]:
        seconds = max(time.monotonic() - self.since, 1e-9)
        values = [result.value for result in self.results if math.isfinite(result.value)]
        return {
            measure: sum(values) / len(values) if values else math.nan,
            "tokens_per_s": sum(result.tokens for result in self.results) / seconds,
            "images_per_s": sum(result.images for result in self.results) / seconds,
        }


@contextmanager
def progress_bar(steps: int, done: int) -> Iterator[Callable[[int, dict, str], None]]:
    """Yields a function that shows a step and its averages."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps, completed=done, status="")

        def show(step: int, line: dict[str, float], measure: str) -> None:
            speed = f"{line['tokens_per_s']:,.0f} tokens/s  {line['images_per_s']:.0f} images/s"
            progress.update(bar, completed=step, status=f"{measure} {line[measure]:.3f}  {speed}")

        yield show
