"""How much faster two processes train than one: frames a second of the recipe `robot`, without validation and saving.

    python benchmarks/processes.py [--processes 2] [--images-per-step 64] [--steps 30] [--rounds 2]

Each has one thread. The data are noise, 128 x 128, since their content costs nothing. The modes run in turn, so that other
load on the machine affects both. On a busy machine compare the processor's time a step, summed over the processes: what they
need more of it than one process is lost; what they wait for each other comes on top. As many runs at once that know nothing of
each other are what the machine allows: its cores share caches and memory.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.training import distributed
from nanochat.training.recipes import Robot
from nanochat.training.run import Run

SIZE, LENGTH, EPISODES = 128, 40, 12
WARM_UP = 3  # steps that are not measured


@dataclass
class Args:
    processes: int = 2
    images_per_step: int = Robot.images_per_step
    "Of all processes together. What they exchange costs the same for any number."
    steps: int = 30
    rounds: int = 2
    worker: str = ""
    "Used by the script itself: the folder of the data, in one of several processes."


def write_data(folder: Path) -> None:
    """Episodes of a robot with six joints and two cameras."""
    rng, episodes = np.random.default_rng(0), []
    for _ in range(EPISODES):
        path = np.cumsum(rng.normal(0, 0.05, (LENGTH + 1, 6)), axis=0).astype(np.float32)
        columns = {"observation.state": path[:-1], "action": path[1:]}
        pictures = {
            f"observation.images.{camera}": [
                encode_png(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in range(LENGTH)
            ]
            for camera in ("front", "wrist")
        }
        episodes.append(Episode("pick up the cube", columns, pictures))
    write_dataset(folder, episodes, 30, "toy", (SIZE, SIZE, 3))


def measure(folder: str, images: int, steps: int) -> None:
    """Prints seconds a step and the processor's seconds a step, of all processes."""
    out = f"{folder}/run{os.environ.get('TORCHELASTIC_RUN_ID') or os.getpid()}"  # of all processes of a run
    recipe = Robot(
        data=f"{folder}/data", out=out, images_per_step=images, steps=steps + WARM_UP, device="cpu", threads=1
    )
    run = Run(recipe)
    wall, used = [], 0.0
    for step in range(steps + WARM_UP):
        since, before = time.perf_counter(), time.process_time()
        run.take_step()
        if step >= WARM_UP:
            wall.append(time.perf_counter() - since)
            used += (time.process_time() - before) / steps
    (used,) = distributed.sum_numbers(used)
    if distributed.is_first():
        print(json.dumps({"frames": images, "wall": statistics.median(wall), "processor": used}))


def run_alone(folder: str, processes: int, args: Args) -> dict:
    """`measure` in so many processes."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    words = [sys.executable, *torchrun, __file__, "--worker", folder, "--steps", str(args.steps)]
    words += ["--images-per-step", str(args.images_per_step)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NANOCHAT_CACHE": f"{folder}/cache"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    if ran.returncode:
        sys.exit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def at_once(folder: str, runs: int, args: Args) -> dict:
    """So many runs of one process each, at the same time: the frames of all in the time of a step."""
    with ThreadPoolExecutor(runs) as pool:
        found = list(pool.map(lambda _: run_alone(folder, 1, args), range(runs)))
    return {name: sum(each[name] for each in found) / (runs if name == "wall" else 1) for name in found[0]}


def main(args: Args) -> None:
    if args.worker:
        measure(args.worker, args.images_per_step, args.steps)
        return
    n = args.processes
    modes = {
        "one process": lambda folder: run_alone(folder, 1, args),
        f"one run of {n} processes": lambda folder: run_alone(folder, n, args),
        f"{n} runs at once": lambda folder: at_once(folder, n, args),
    }
    found: dict[str, list[dict]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "data")
        for _ in range(args.rounds):
            for mode, run in modes.items():
                found[mode].append(run(folder))
    print(
        f"load of the machine {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores; best of {args.rounds} rounds"
    )
    speed = {mode: max(each["frames"] / each["wall"] for each in results) for mode, results in found.items()}
    alone = speed["one process"]
    for mode, results in found.items():
        processor = min(each["processor"] / each["frames"] for each in results)
        print(
            f"{mode:24s} {speed[mode]:6.1f} frames/s, {speed[mode] / alone:.2f} times as many; "
            f"{1000 * processor:.2f} ms of the processor a frame"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
