"""Memory and start of training on a data set of any length: generated episodes, decoded into the store of frames.

    python benchmarks/frame_store.py [--frames 100000] [--cameras 1] [--steps 20] [--folder DIR]

A policy is trained on them twice, each time in a new process: the first start decodes, the second one finds everything. For
each are told the seconds until the data are read, processor seconds, the seconds of the whole command, and the most
anonymous memory that it and its worker processes had together (RssAnon of Linux, every 50 ms). The memory-mapped store
is not in it: the system may drop these pages at any time.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset

EPISODE = 400  # frames
SHAPE = (128, 128, 3)
PICTURES = 100  # different ones
TRAIN = """
import json, sys, time
from nanochat.training.recipes import Robot
from nanochat.training.robot_data import read_data
from nanochat.training.run import Run
started = time.time()
folder, out, steps = sys.argv[1:]
recipe = Robot(data=folder, out=out, steps=int(steps), vocab_size=300)
if recipe.steps:
    Run(recipe).train()
else:
    fit, val = read_data(recipe)
    print("READ", time.time() - started, len(fit) + len(val))
"""


@dataclass
class Args:
    frames: int = 100_000
    cameras: int = 1
    steps: int = 20
    "Optimiser steps of each start."
    folder: Path | None = None
    "Where data, store and checkpoints are written, and deleted in the end; default a temporary folder."


def episodes(args: Args):
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        buffer = io.BytesIO()
        noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).resize(SHAPE[1::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    for number in range(-(-args.frames // EPISODE)):
        length = min(EPISODE, args.frames - number * EPISODE)
        path = rng.normal(size=(length + 1, 7)).cumsum(0).astype(np.float32)
        shown = [pictures[(number + frame) % PICTURES] for frame in range(length)]
        images = {f"observation.images.camera_{n}": shown for n in range(args.cameras)}
        yield Episode("lift the cube", {"observation.state": path[:-1], "action": path[1:]}, images)


def anonymous(pid: int) -> int:
    """Bytes of a process and its children, which may end meanwhile."""
    total = 0
    try:
        with open(f"/proc/{pid}/status") as status:
            total = sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as children:
                total += sum(anonymous(int(child)) for child in children.read().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def start(args: Args, place: Path, steps: int) -> dict:
    """One run of TRAIN, measured."""
    environment = os.environ | {"NANOCHAT_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    out = tempfile.mkdtemp(dir=place)
    words = [sys.executable, "-c", TRAIN, str(place / "robot"), f"{out}/run", str(steps)]
    began, before, peak = time.time(), os.times(), 0
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))
    reader.start()
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        sys.exit("".join(lines))
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    read = [float(line.split()[1]) for line in lines if line.startswith("READ")]
    return {
        "seconds": round(time.time() - began, 1),
        "processor_seconds": round(cpu, 1),
        "anonymous_gb": round(peak / 1e9, 2),
        **({"read_seconds": round(read[0], 2)} if read else {}),
    }


def main(args: Args) -> None:
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        write_dataset(place / "robot", episodes(args), 30, "arm", SHAPE)
        size = sum(path.stat().st_size for path in (place / "robot").rglob("*.parquet")) / 1e9
        print(f"{args.frames:,} frames of {args.cameras} camera(s), {size:.2f} GB of parquet files")
        print("decoding and training:", json.dumps(start(args, place, args.steps)), flush=True)
        print("training again:", json.dumps(start(args, place, args.steps)), flush=True)
        print("reading alone:", json.dumps(start(args, place, 0)))
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(tyro.cli(Args))
