"""What rollouts come to: success rates of tasks and tiers with their intervals, how smooth the arm moved, and the speed."""

import resource
import sys
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from nanochat.evaluation import metrics
from nanochat.metaworld.instructions import INSTRUCTIONS, TIERS

NETWORK_DRIVERS = ("policy", "shuffled", "blind")
MOTION_MM = 10  # of an action 1, a step: Meta-World's scale
console = Console()


@dataclass
class Outcome:
    """The result of one episode. looks: chunks that the driver chose, each after a new observation. network_s: the episode's
    share of the time in the network. seconds: the time of the whole job, which its episodes share. warnings: counts of
    corrected actions, see `safety.SafeActions`. jerk: of the motions that were sent, see `jerk`."""

    task: str
    driver: str
    seed: int
    success: bool
    steps: int
    looks: int
    network_s: float
    seconds: float
    warnings: dict
    jerk: float = 0.0


def jerk(motions: np.ndarray) -> float:
    """How much an arm that did exactly as told would shake: the mean length of the second differences of motions (T, 3), the
    third differences of its path. In mm per step^3, for motions in units of MOTION_MM; 0 below 3 of them.

    The simulated hand itself is soft, and shaken more by what it touches than by what it is told."""
    seconds = np.diff(motions, n=2, axis=0)
    return MOTION_MM * float(np.linalg.norm(seconds, axis=1).mean()) if len(seconds) else 0.0


def summary(outcomes: list[Outcome], tasks: list[str], own_layouts: bool = True) -> dict:
    """{"drivers": {driver: {"tasks": {task: rate}, "pooled", "pooled_ci95", "ms_per_chunk", "warnings", and for all 50 tasks
    "tiers", "macro", "macro_ci95"}}}; rates are 0..1.

    Intervals are 95 % bootstrap intervals over what is independent: the episodes of each task or, where episodes with the same
    number share a layout (own_layouts is False), those numbers. With independent episodes, "pooled_ci95" is Wilson's.
    """
    result = {}
    for driver in dict.fromkeys(outcome.driver for outcome in outcomes):
        own = sorted((outcome for outcome in outcomes if outcome.driver == driver), key=lambda outcome: outcome.seed)
        by_task = {task: [o.success for o in own if o.task == task] for task in tasks}
        looks = sum(o.looks for o in own)
        row = {
            "tasks": {task: float(np.mean(successes)) for task, successes in by_task.items()},
            "pooled": float(np.mean([o.success for o in own])),
            "pooled_ci95": metrics.wilson(sum(o.success for o in own), len(own)),
            "ms_per_chunk": 1e3 * sum(o.network_s for o in own) / max(1, looks),
            "warnings": sum(sum(o.warnings.values()) for o in own),
            "jerk": float(np.mean([o.jerk for o in own])),
        }
        if not own_layouts:
            row["pooled_ci95"] = interval(by_task, [list(by_task)], own_layouts)
        if set(tasks) == set(INSTRUCTIONS):
            row["tiers"] = {
                tier: float(np.mean([row["tasks"][task] for task in names])) for tier, names in TIERS.items()
            }
            row["macro"] = float(np.mean(list(row["tiers"].values())))
            row["macro_ci95"] = interval(by_task, list(TIERS.values()), own_layouts)
        result[driver] = row
    return {"drivers": result}


def interval(
    by_task: dict[str, list[bool]], groups: list[list[str]], own_layouts: bool, resamples: int = 2000
) -> list[float]:
    """[low, high]: 95 % bootstrap interval of the mean, over groups of tasks, of their success rates. Tasks are not resampled.

    by_task: successes of each task, as many for all, in the order of their numbers.
    """
    successes = np.array([by_task[task] for task in by_task], float)  # (tasks, episodes)
    weights = np.zeros(len(by_task))
    for names in groups:
        weights[[list(by_task).index(task) for task in names]] = 1 / (len(groups) * len(names))
    rng, n = np.random.default_rng(0), successes.shape[1]
    shape = (resamples, len(by_task), n) if own_layouts else (resamples, 1, n)
    drawn = np.broadcast_to(rng.integers(n, size=shape), (resamples, len(by_task), n))
    rates = np.take_along_axis(np.broadcast_to(successes, drawn.shape), drawn, axis=2).mean(2)  # (resamples, tasks)
    return np.quantile(rates @ weights, (0.025, 0.975)).tolist()


def peak_memory_mb() -> float:
    """The peak memory of the largest worker process that has ended."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


def report(result: dict, tasks: list[str], drivers: list[str]) -> None:
    """Print the success rates, a column per driver, and the speed."""
    rows = [result["drivers"][driver] for driver in drivers]
    table = Table(
        title=f"success rate, {result['episodes']} episodes per task from seed {result['seed']}, protocol {result['protocol']}"
    )
    table.add_column("task")
    for driver in drivers:
        table.add_column(driver, justify="right")
    for task in tasks:
        table.add_row(task, *(f"{row['tasks'][task]:.0%}" for row in rows))
    table.add_section()
    for tier in rows[0].get("tiers", {}):
        table.add_row(tier, *(f"{row['tiers'][tier]:.1%}" for row in rows))
    for name, label in (("macro", "mean of the tiers"), ("pooled", "all episodes")):
        if name in rows[0]:
            intervals = [" .. ".join(f"{value:.1%}" for value in row[f"{name}_ci95"]) for row in rows]
            table.add_row(
                label, *(f"{row[name]:.1%}\n{low_high}" for row, low_high in zip(rows, intervals, strict=True))
            )
    table.add_row("jerk, mm/step³", *(f"{row['jerk']:.2f}" for row in rows))
    console.print(table)
    with_network = [driver for driver in drivers if driver in NETWORK_DRIVERS]
    network = ""
    if with_network:
        ms = result["drivers"][with_network[0]]["ms_per_chunk"]
        network = f"{ms:.1f} ms of network per chunk and episode (batched), "
    console.print(
        f"{network}{result['steps_per_s']:.0f} steps/s, peak memory {result['peak_memory_mb']:.0f} MB per process, "
        f"{result['seconds'] / 60:.1f} min"
    )
