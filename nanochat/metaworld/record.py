"""Demonstrations: Meta-World's scripted experts drive, and what camera and gripper saw becomes a LeRobot dataset.

Work is cut into blocks of a few episodes of one task, which processes take in turn. A block is a file beside the dataset to
be, complete or not there at all, so that a run that was stopped goes on with the blocks that are missing. Last, the blocks
become the dataset and are deleted.

While an expert drives, somebody pushes: noise that is constant for a moment is added to what is executed, and the expert's
answer to it is what is recorded (DART, Laskey et al. 2017, arXiv 1703.09327). Episodes without it show a straight way to
the goal and never the way back to it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from nanochat.data.columns import png
from nanochat.data.lerobot import Episode, write_dataset
from nanochat.data.sample import written_whole
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.simulator import FPS, MAX_STEPS, Arm
from nanochat.metaworld.workers import in_processes

CAMERA_KEY = "observation.images.corner2"
BLOCK = 10  # episodes
FIRST_SEED = 1_000_000  # far from those of rollouts, so that what is tested was not seen
AFTER_SUCCESS = 10  # frames: what "done" looks like
HOLD_NOISE = 10  # steps
TRIES = 20  # seeds an episode may take until the expert succeeds

console = Console()


@dataclass(frozen=True)
class Block:
    """A unit of work: some episodes of one task."""

    task: str
    first: int
    episodes: int
    seed: int
    noise: float
    image_size: int

    @property
    def name(self) -> str:
        return f"{self.task}.{self.first:05d}-{self.first + self.episodes:05d}.npz"


def record(
    tasks: list[str], episodes: int, out: Path, seed: int, noise: float, image_size: int, processes: int
) -> None:
    """Write `episodes` successful episodes of each task to the folder `out`, in the LeRobot v3.0 layout.

    Goes on where an earlier call with the same settings was stopped. Raises FileExistsError where `out` is already there,
    ValueError for settings that differ from those of the stopped run.
    """
    out = out.expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out")
    if episodes < 1 or processes < 1 or seed < 0 or not 0 <= noise <= 1:
        raise ValueError(
            "episodes and processes must be at least 1, seed at least 0 and noise in 0..1, got "
            f"{episodes}, {processes}, {seed} and {noise}"
        )
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size must be a positive multiple of 32, as the encoder takes it, got {image_size}")
    work = out.with_name(f".{out.name}.blocks")
    blocks = [
        Block(task, first, min(BLOCK, episodes - first), seed, noise, image_size)
        for task in tasks
        for first in range(0, episodes, BLOCK)
    ]
    open_work(work, {"seed": seed, "noise": noise, "image_size": image_size, "episodes": episodes})
    missing = [block for block in blocks if not (work / block.name).exists()]
    with Progress(console=console) as progress:
        done = episodes * len(tasks) - sum(block.episodes for block in missing)
        bar = progress.add_task("recording episodes", total=episodes * len(tasks), completed=done)
        if missing:
            Arm(tasks[0], image_size).image()  # a machine that cannot draw says so once, not in every process
            for count in in_processes(record_block, [(work, block) for block in missing], processes):
                progress.advance(bar, count)
        bar = progress.add_task("writing the dataset", total=episodes * len(tasks))
        found = read_blocks(work, blocks)
        names = {"observation.state": ["x", "y", "z", "opening"], "action": ["x", "y", "z", "fingers"]}
        counted = (progress.advance(bar) or episode for episode in found)
        write_dataset(out, counted, FPS, "sawyer", (image_size, image_size, 3), names)
    shutil.rmtree(work)


def open_work(work: Path, settings: dict) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{work} holds blocks of a stopped run with other settings, {path.read_text()}: say the same ones to go on, or "
            "delete that folder"
        )
    with written_whole(path) as new:
        new.write_text(json.dumps(settings))


def record_block(job: tuple[Path, Block]) -> int:
    """Record one block into its file. Returns the episodes in it."""
    work, block = job
    arm = Arm(block.task, block.image_size)
    episodes = [record_episode(arm, block, number) for number in range(block.first, block.first + block.episodes)]
    images = [picture for episode in episodes for picture in episode.pop("images")]
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0] if key != "seed"}
    arrays["seeds"] = np.array([episode["seed"] for episode in episodes])
    arrays["lengths"] = np.array([len(episode["action"]) for episode in episodes])
    arrays["image_ends"] = np.cumsum([len(picture) for picture in images])
    arrays["images"] = np.frombuffer(b"".join(images), np.uint8)
    with written_whole(work / block.name) as new, open(new, "wb") as file:
        np.savez(file, **arrays)
    arm.close()
    return block.episodes


def record_episode(arm: Arm, block: Block, number: int) -> dict:
    """The first of the episode's seeds that the expert solves. Raises ValueError if none is."""
    for attempt in range(TRIES):
        seed = block.seed + number + 10_000 * attempt
        episode = drive(arm, seed, block.noise)
        if episode is not None:
            return episode | {"seed": seed}
    raise ValueError(f"the expert of {arm.task} failed on {TRIES} seeds in a row: lower the noise ({block.noise})")


def drive(arm: Arm, seed: int, noise: float) -> dict | None:
    """One episode of the expert, or None if it does not succeed. Everything is (T, ...): what is seen, then what is done."""
    rng = np.random.default_rng(seed)
    scene, push, left = arm.reset(seed), np.zeros(4), AFTER_SUCCESS
    frames: dict[str, list] = {key: [] for key in ("images", "state", "environment_state", "action", "success", "held")}
    succeeded = False
    for step in range(MAX_STEPS):
        if step % HOLD_NOISE == 0:  # every other moment, in the mean, nobody pushes; the fingers are never pushed
            push[:3] = rng.normal(0, noise, 3) * rng.integers(0, 2)
        action = arm.expert_action()
        frames["images"].append(png(arm.image()))
        frames["action"].append(action)
        for key in ("state", "environment_state", "success", "held"):
            frames[key].append(getattr(scene, key))
        scene = arm.step(np.clip(action + push, -1, 1))
        succeeded |= scene.success
        left -= succeeded
        if left < 0:
            break
    if not succeeded:
        return None
    return {key: value if key == "images" else np.array(value) for key, value in frames.items()}


def read_blocks(work: Path, blocks: list[Block]) -> Iterator[Episode]:
    """The episodes of all blocks as LeRobot names things."""
    for block in blocks:
        with np.load(work / block.name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        ends, data = arrays["image_ends"], arrays["images"].tobytes()
        starts = np.concatenate([[0], ends[:-1]])
        pictures = [data[a:b] for a, b in zip(starts, ends, strict=True)]
        end = 0
        for seed, length in zip(arrays["seeds"], arrays["lengths"], strict=True):
            rows = slice(end, end := end + int(length))
            columns = {
                "observation.state": arrays["state"][rows],
                "observation.environment_state": arrays["environment_state"][rows],
                "observation.held": arrays["held"][rows],
                "observation.success": arrays["success"][rows],
                "action": arrays["action"][rows],
            }
            extra = {"name": block.task, "seed": int(seed)}
            yield Episode(INSTRUCTIONS[block.task][0], columns, {CAMERA_KEY: pictures[rows]}, extra)


def default_processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
