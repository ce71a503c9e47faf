"""Closed loop: a policy drives the simulated arm, and what counts is whether the task is done.

An episode is a task and a seed. Processes take the tasks in turn; each drives up to ten episodes of a task side by side, with
one batched pass through the network for all of them. Beside the policy, the same seeds with another task's words (shuffled),
without a picture (blind), with random actions, and with the scripted expert.
"""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nanochat.data.sample import written_whole
from nanochat.evaluation import metrics
from nanochat.metaworld.instructions import INSTRUCTIONS, TIERS
from nanochat.metaworld.simulator import ACTION_DIM, MAX_STEPS, Arm, arm_limits
from nanochat.metaworld.workers import in_processes
from nanochat.policy import Policy

DRIVERS = ("policy", "shuffled", "blind", "random", "expert")
SIDE_BY_SIDE = 10  # episodes of a job: each has a simulator and a renderer, 100 to 200 MB
console = Console()


@dataclass(frozen=True)
class Job:
    """Episodes of one task. instruction: what the policy is told; execute: steps of a chunk until it looks again."""

    task: str
    instruction: str
    driver: str
    seeds: tuple[int, ...]
    execute: int
    image_size: int
    max_steps: int = MAX_STEPS
    record: str | None = None


@dataclass
class Outcome:
    """How one episode went. looks: passes through the network; seconds: of the whole job, shared by its episodes."""

    task: str
    driver: str
    seed: int
    success: bool
    steps: int
    looks: int
    network_s: float
    seconds: float
    warnings: dict


def run(
    checkpoint: str, tasks: list[str], episodes: int, seed: int, drivers: list[str], execute: int, max_steps: int,
    processes: int, record: Path | None, json_out: Path | None, device: torch.device,
) -> None:  # fmt: skip
    """Drive, print the tables, and write the figures to `json_out`."""
    policy = Policy.load(checkpoint)
    if not 1 <= execute <= policy.model.config.chunk:
        raise ValueError(f"execute must lie in 1..{policy.model.config.chunk}, the policy's chunk, got {execute}")
    if episodes < 1 or seed < 0:
        raise ValueError(f"episodes must be at least 1 and seed at least 0, got {episodes} and {seed}")
    if not 1 <= max_steps <= MAX_STEPS:
        raise ValueError(f"max_steps must lie in 1..{MAX_STEPS}, where Meta-World ends an episode, got {max_steps}")
    if record is not None:
        record.mkdir(parents=True, exist_ok=True)
    size = policy.model.config.vision_image_size
    Arm(tasks[0], size).image()  # a machine that cannot draw says so once, not in every process
    drivers, last = list(dict.fromkeys(drivers)), seed + episodes
    jobs = [
        Job(task, told(tasks, task, driver), driver, seeds, execute, size, max_steps, str(record) if record else None)
        for driver in drivers
        for task in tasks
        for first in range(seed, last, SIDE_BY_SIDE)
        for seeds in [tuple(range(first, min(first + SIDE_BY_SIDE, last)))]
    ]
    started, outcomes = time.perf_counter(), []
    with Progress(console=console) as progress:
        bar = progress.add_task("driving", total=len(drivers) * len(tasks) * episodes)
        for found in in_processes(drive, jobs, processes, open_policy, (checkpoint, str(device))):
            outcomes += found
            progress.advance(bar, len(found))
    seconds = time.perf_counter() - started
    result = summary(outcomes, tasks) | {
        "checkpoint": str(checkpoint), "episodes": episodes, "seed": seed, "execute": execute, "max_steps": max_steps,
        "image_size": size, "seconds": seconds, "steps_per_s": sum(o.steps for o in outcomes) / seconds,
        "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip
    report(result, tasks, drivers)
    if json_out is not None:
        with written_whole(json_out) as new:
            new.write_text(json.dumps(result | {"outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1))


def told(tasks: list[str], task: str, driver: str) -> str:
    """The instruction: the task's own, or for "shuffled" that of the next task of the list (of all tasks, if there is one)."""
    if driver != "shuffled":
        return INSTRUCTIONS[task][0]
    names = tasks if len(tasks) > 1 else sorted(INSTRUCTIONS)
    return INSTRUCTIONS[names[(names.index(task) + 1) % len(names)]][0]


def open_policy(checkpoint: str, device: str) -> None:
    """Each process has its own: the network is small, and one thread is the fastest for it."""
    global policy
    torch.set_num_threads(1)
    policy = Policy.load(checkpoint, device)


def drive(job: Job) -> list[Outcome]:
    """All episodes of a job side by side."""
    started, network = time.perf_counter(), 0.0
    arms = [Arm(job.task, job.image_size) for _ in job.seeds]
    scenes = [arm.reset(seed) for arm, seed in zip(arms, job.seeds, strict=True)]
    limits = [arm_limits() for _ in arms]
    done, looks = [False] * len(arms), [0] * len(arms)
    films: list[list[np.ndarray]] = [[] for _ in arms]
    rng = np.random.default_rng(job.seeds[0])
    while running := [i for i, arm in enumerate(arms) if not done[i] and arm.steps < job.max_steps]:
        images = dict.fromkeys(running)
        if job.record or job.driver in ("policy", "shuffled"):
            images = {i: arms[i].image() for i in running}
        if job.record:
            for i in running:
                films[i].append(images[i])
        since = time.perf_counter()
        chunks = choose(job, [images[i] for i in running], np.stack([scenes[i].state for i in running]), rng)
        network += time.perf_counter() - since
        for number, i in enumerate(running):
            looks[i] += 1
            for step in range(job.execute):
                action = arms[i].expert_action() if job.driver == "expert" else chunks[number, step]
                scenes[i] = arms[i].step(limits[i](action))
                done[i] = scenes[i].success
                if done[i] or arms[i].steps == job.max_steps:
                    break
    if job.record:
        for arm, film, seed, success in zip(arms, films, job.seeds, done, strict=True):
            name = f"{job.driver}-{job.task}-{seed}-{'success' if success else 'failure'}.gif"
            write_gif(Path(job.record) / name, [*film, arm.image()])
    seconds = time.perf_counter() - started
    outcomes = []
    for i, arm in enumerate(arms):
        share = network * looks[i] / sum(looks)
        outcomes.append(
            Outcome(
                job.task, job.driver, job.seeds[i], done[i], arm.steps, looks[i], share, seconds, dict(limits[i].counts)
            )
        )
        arm.close()
    return outcomes


def choose(job: Job, images: list, states: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Chunks of actions (B, chunk, 4); None for the expert, who decides anew at every step."""
    if job.driver == "expert":
        return None
    if job.driver == "random":
        return rng.uniform(-1, 1, (len(states), job.execute, ACTION_DIM)).astype(np.float32)
    if job.driver == "blind":
        images = [None] * len(states)
    return policy(images, states, [job.instruction] * len(states))


def write_gif(path: Path, film: list[np.ndarray]) -> None:
    frames = [Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC) for image in film]
    with written_whole(path) as new:
        frames[0].save(new, format="GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)


# ---- figures ----


def summary(outcomes: list[Outcome], tasks: list[str]) -> dict:
    """{"drivers": {driver: {"tasks": {task: rate}, "pooled", "pooled_ci95", "ms_per_chunk", "warnings", and for all 50 tasks
    "tiers", "macro", "macro_ci95"}}}; rates are shares."""
    result = {}
    for driver in dict.fromkeys(outcome.driver for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.driver == driver]
        by_task = {task: [o.success for o in own if o.task == task] for task in tasks}
        looks = sum(o.looks for o in own)
        row = {
            "tasks": {task: float(np.mean(successes)) for task, successes in by_task.items()},
            "pooled": float(np.mean([o.success for o in own])),
            "pooled_ci95": metrics.wilson(sum(o.success for o in own), len(own)),
            "ms_per_chunk": 1e3 * sum(o.network_s for o in own) / max(1, looks),
            "warnings": sum(sum(o.warnings.values()) for o in own),
        }
        if set(tasks) == set(INSTRUCTIONS):
            row |= tier_rates(by_task)
        result[driver] = row
    return {"drivers": result}


def tier_rates(by_task: dict[str, list[bool]], n_draws: int = 2000) -> dict:
    """The tiers' rates, their mean, and its interval: episodes of each task are drawn anew, tasks are not."""
    tiers = {tier: float(np.mean([s for task in names for s in by_task[task]])) for tier, names in TIERS.items()}
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(n_draws):
        again = {task: rng.choice(successes, len(successes)).mean() for task, successes in by_task.items()}
        draws.append(np.mean([np.mean([again[task] for task in names]) for names in TIERS.values()]))
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    return {"tiers": tiers, "macro": float(np.mean(list(tiers.values()))), "macro_ci95": [low, high]}


def peak_memory_mb() -> float:
    """Of the largest of the driving processes, where they have ended."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


def report(result: dict, tasks: list[str], drivers: list[str]) -> None:
    rows = result["drivers"]
    table = Table(title=f"success, {result['episodes']} episodes a task from seed {result['seed']}")
    table.add_column("task")
    for driver in drivers:
        table.add_column(driver, justify="right")
    for task in tasks:
        table.add_row(task, *(f"{rows[driver]['tasks'][task]:.0%}" for driver in drivers))
    table.add_section()
    for tier in rows[drivers[0]].get("tiers", {}):
        table.add_row(tier, *(f"{rows[driver]['tiers'][tier]:.1%}" for driver in drivers))
    for name, label in (("macro", "mean of the tiers"), ("pooled", "all episodes")):
        if name in rows[drivers[0]]:
            low_high = [" .. ".join(f"{v:.1%}" for v in rows[driver][f"{name}_ci95"]) for driver in drivers]
            cells = [
                f"{rows[driver][name]:.1%}\n{interval}" for driver, interval in zip(drivers, low_high, strict=True)
            ]
            table.add_row(label, *cells)
    console.print(table)
    asked = [driver for driver in drivers if driver in ("policy", "shuffled", "blind")]
    network = f"{rows[asked[0]]['ms_per_chunk']:.1f} ms of network a chunk and episode (batched), " if asked else ""
    console.print(
        f"{network}{result['steps_per_s']:.0f} steps/s, peak memory {result['peak_memory_mb']:.0f} MB a process, "
        f"{result['seconds'] / 60:.1f} min"
    )
