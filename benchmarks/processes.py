"""How much faster two processes train than one: frames a second of the recipe `robot`, without validation and saving.

    python benchmarks/processes.py [--processes 2] [--steps 30] [--rounds 2]

Each has one thread. The data are noise, 128 x 128, since their content costs nothing. The modes run in turn, so that other
load on the machine affects both. On a busy machine compare the processor's time a step, summed over the processes: what they
need more of it than one process is lost; what they wait for each other comes on top.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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


def measure(folder: str, steps: int) -> None:
    """Prints seconds a step and the processor's seconds a step, of all processes."""
    run = Run(Robot(data=f"{folder}/data", out=f"{folder}/run", steps=steps + WARM_UP, device="cpu", threads=1))
    wall, used = [], 0.0
    for step in range(steps + WARM_UP):
        since, before = time.perf_counter(), time.process_time()
        run.take_step()
        if step >= WARM_UP:
            wall.append(time.perf_counter() - since)
            used += (time.process_time() - before) / steps
    (used,) = distributed.sum_numbers(used)
    if distributed.is_first():
        print(json.dumps({"frames": run.recipe.images_per_step, "wall": statistics.median(wall), "processor": used}))


def run_alone(folder: str, processes: int, steps: int) -> dict:
    """`measure` in so many processes."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    words = [sys.executable, *torchrun, __file__, "--worker", folder, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NANOCHAT_CACHE": f"{folder}/cache"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    if ran.returncode:
        sys.exit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def main(args: Args) -> None:
    if args.worker:
        measure(args.worker, args.steps)
        return
    found: dict[int, list[dict]] = {1: [], args.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "data")
        for _ in range(args.rounds):
            for processes, results in found.items():
                results.append(run_alone(folder, processes, args.steps))
    print(
        f"load of the machine {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores; best of {args.rounds} rounds"
    )
    best = {
        n: [min(result[name] for result in results) for name in ("wall", "processor")] for n, results in found.items()
    }
    for n, (wall, processor) in best.items():
        speed = found[n][0]["frames"] / wall
        print(f"{n} process{'es' * (n > 1)}: {speed:6.1f} frames/s, {processor:.3f} s of the processor a step")
    (wall, processor), (walls, processors) = best[1], best[args.processes]
    print(f"{wall / walls:.2f} times as fast; {args.processes * processor / processors:.2f} if nobody waited")


if __name__ == "__main__":
    main(tyro.cli(Args))
