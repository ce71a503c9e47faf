"""Recording demonstrations: Meta-World's scripted experts solve the tasks; images, states and actions become a LeRobot dataset.

The work is split into blocks of a few episodes of one task, which worker processes take in turn. Each block is written
atomically to a file in a folder next to the output, so that a stopped run can be resumed with the missing blocks. In the end
the blocks are joined to the dataset and deleted.

Noise is added to the executed action, constant for a few steps, and the expert's reaction is recorded (DART, Laskey et al.
2017, arXiv 1703.09327). Without noise, episodes show a straight path to the goal and never how to return to it. Some experts
fail or wander when they are pushed: every second episode of their tasks has less noise. Instead of noise, a policy can drive now
and then (DAgger, Ross et al. 2011, arXiv 1011.0686): the expert's answers to where it leads are recorded.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress

from nanochat.data.language import Asked
from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.files import atomic_path, json_object
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.scene import scene_questions
from nanochat.metaworld.simulator import ACTION_DIM, CAMERA, FPS, MAX_STEPS, Arm
from nanochat.workers import in_processes

CAMERA_KEY = "observation.images.{}"  # of a camera's name
EPISODES_PER_BLOCK = 10
FRAMES_AFTER_SUCCESS = 10  # so that the data shows what a solved task looks like
NOISE = 0.25  # standard deviation, for actions in -1..1
LESS_NOISE = 0.1  # in every second episode of the tasks below
NOISE_STEPS = 10  # steps for which the noise is constant
POLICY_STEPS = 40  # steps for which a policy drives, then the expert
MAX_ATTEMPTS = 20  # seeds to try for an episode until the expert succeeds
SEED_STEP = 10_000  # between the seeds of two attempts

# With NOISE, these experts fail more often in 8 episodes than without noise, or take a quarter more steps (median).
EASILY_DISTURBED = frozenset(
    "assembly basketball bin-picking box-close dial-turn disassemble hand-insert peg-insert-side peg-unplug-side "
    "pick-out-of-hole pick-place pick-place-wall plate-slide-back-side push push-wall shelf-place stick-pull stick-push "
    "sweep-into".split()
)

console = Console()


class Driver(Protocol):
    """A policy that drives now and then, see `evaluation.corrections.Driving`."""

    checkpoint: str

    def begin(self) -> None: ...

    def action(self, images: dict[str, np.ndarray], state: np.ndarray, task: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Block:
    """A unit of work: some episodes of one task. first: the number of its first episode in the task. noise, policy:
    see `record_demonstrations`."""

    task: str
    first: int
    episodes: int
    seed: int
    noise: float | None
    image_size: int
    cameras: tuple[str, ...] = (CAMERA,)
    policy: Driver | None = None

    @property
    def name(self) -> str:
        return f"{self.task}.{self.first:05d}-{self.first + self.episodes:05d}.npz"


def record_demonstrations(
    tasks: list[str],
    episodes: int,
    out: Path,
    seed: int,
    noise: float | None,
    image_size: int,
    processes: int,
    cameras: Sequence[str] = (CAMERA,),
    questions: bool = False,
    policy: Driver | None = None,
) -> None:
    """Write `episodes` successful episodes of each task to the folder `out`, as a LeRobot v3.0 dataset.

    Resumes an earlier call with the same settings that was stopped.

    tasks: names in `INSTRUCTIONS`. seed: of each task's first episode. noise: standard deviation, for actions in -1..1; None is
    NOISE, and LESS_NOISE in every second episode of the tasks that are EASILY_DISTURBED. image_size: side of the square images in
    pixels. cameras: names of Meta-World's, see `simulator.Arm`. questions: write one about the first camera of each frame, see
    `data.language`. policy: drives instead of the noise, by turns with the expert.

    Raises:
        FileExistsError: `out` exists.
        ValueError: a setting is out of range, or differs from that of the stopped call; an expert keeps failing; no such camera.
        SimulatorError: the simulator cannot run on this machine.
    """
    out = out.expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out")
    if episodes < 1 or processes < 1 or seed < 0 or (noise is not None and not 0 <= noise <= 1):
        raise UserError(
            "episodes and processes must be at least 1, seed at least 0 and noise in 0..1, found "
            f"{episodes}, {processes}, {seed} and {noise}"
        )
    if image_size < 32 or image_size % 32:
        raise UserError(f"image_size must be a positive multiple of 32, as the encoder needs it, found {image_size}")
    cameras = tuple(dict.fromkeys(cameras)) or (CAMERA,)
    if questions and cameras[0] != CAMERA:
        raise UserError(
            f"--questions are about places in the picture of {CAMERA}: name it first, --cameras {CAMERA} ..."
        )
    Arm(tasks[0], image_size, cameras)  # raises for a camera that there is not, before anything is written
    work = out.with_name(f".{out.name}.blocks")
    blocks = [
        Block(task, first, min(EPISODES_PER_BLOCK, episodes - first), seed, noise, image_size, cameras, policy)
        for task in tasks
        for first in range(0, episodes, EPISODES_PER_BLOCK)
    ]
    settings = {"seed": seed, "noise": noise, "image_size": image_size, "episodes": episodes, "cameras": list(cameras)}
    settings |= {"policy": policy.checkpoint} if policy else {}
    open_work(work, settings)
    with Progress(console=console) as progress:
        record_blocks(work, blocks, processes, progress)
        bar = progress.add_task("writing the dataset", total=episodes * len(tasks))
        counted = (progress.advance(bar) or episode for episode in read_blocks(work, blocks, questions))
        names = {"observation.state": ["x", "y", "z", "opening"], "action": ["x", "y", "z", "fingers"]}
        write_dataset(out, counted, FPS, "sawyer", (image_size, image_size, 3), names)
    shutil.rmtree(work)


def open_work(work: Path, settings: dict) -> None:
    """Create the folder of blocks. Raises ValueError if it has blocks of other settings."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    if path.exists() and json_object(path.read_bytes(), path) != settings:
        raise UserError(
            f"{work} has blocks of a stopped run with other settings, {path.read_text()}: use these settings to resume it, "
            "or delete that folder"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings))


def record_blocks(work: Path, blocks: list[Block], processes: int, progress: Progress) -> None:
    """Record the blocks that have no file yet."""
    missing = [block for block in blocks if not (work / block.name).exists()]
    total = sum(block.episodes for block in blocks)
    done = total - sum(block.episodes for block in missing)
    bar = progress.add_task("recording episodes", total=total, completed=done)
    if missing:
        first = missing[0]
        arm = Arm(first.task, first.image_size, first.cameras)  # a machine that cannot render fails here, once
        arm.images()
        arm.close()
        for count in in_processes(record_block, [(work, block) for block in missing], processes):
            progress.advance(bar, count)


def record_block(job: tuple[Path, Block]) -> int:
    """Record one block to its file. Returns the number of episodes. job: (folder of blocks, block)."""
    work, block = job
    arm = Arm(block.task, block.image_size, block.cameras)
    episodes = [record_episode(arm, block, number) for number in range(block.first, block.first + block.episodes)]
    images = [episode.pop("images") for episode in episodes]
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0] if key != "seed"}
    arrays["seeds"] = np.array([episode["seed"] for episode in episodes])
    arrays["lengths"] = np.array([len(episode["action"]) for episode in episodes])
    for camera in block.cameras:
        pictures = [frame[camera] for frames in images for frame in frames]
        arrays[f"{camera} ends"] = np.cumsum([len(picture) for picture in pictures])
        arrays[f"{camera} pictures"] = np.frombuffer(b"".join(pictures), np.uint8)
    with atomic_path(work / block.name) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    arm.close()
    return block.episodes


def record_episode(arm: Arm, block: Block, number: int) -> dict:
    """The episode of the first seed on which the expert succeeds. Raises ValueError after MAX_ATTEMPTS seeds."""
    noise = noise_of(block, number)
    for attempt in range(MAX_ATTEMPTS):
        seed = block.seed + number + SEED_STEP * attempt
        episode = run_expert(arm, seed, noise, block.policy)
        if episode is not None:
            return episode | {"seed": seed}
    raise UserError(
        f"the expert of {arm.task} failed on {MAX_ATTEMPTS} seeds in a row with "
        + (
            f"{block.policy.checkpoint} driving: choose another --policy"
            if block.policy
            else f"noise {noise}: lower the noise"
        )
    )


def noise_of(block: Block, number: int) -> float:
    """The noise of an episode: none where a policy disturbs the expert."""
    if block.policy:
        return 0.0
    if block.noise is not None:
        return block.noise
    return LESS_NOISE if block.task in EASILY_DISTURBED and number % 2 else NOISE


def run_expert(arm: Arm, seed: int, noise: float, policy: Driver | None = None) -> dict | None:
    """One episode of the expert, disturbed by noise or a policy, or None if it fails. Row t has what is observed at step t and
    the expert's action there: images (T dicts camera -> encoded PNG), state (T, 4), environment_state (T, 39), action (T, 4),
    success (T,) and held (T,)."""
    rng = np.random.default_rng(seed)
    scene, disturbance, frames_left = arm.reset(seed), np.zeros(ACTION_DIM), FRAMES_AFTER_SUCCESS
    frames: dict[str, list] = {key: [] for key in ("images", "state", "environment_state", "action", "success", "held")}
    succeeded, policy_drives = False, bool(policy) and bool(rng.integers(0, 2))
    for step in range(MAX_STEPS):
        if policy and step % POLICY_STEPS == 0:  # they take turns
            policy_drives = not policy_drives
            policy.begin()
        if step % NOISE_STEPS == 0:  # no noise in half of the intervals, and never on the fingers
            disturbance[:3] = rng.normal(0, noise, 3) * rng.integers(0, 2)
        action, images = arm.expert_action(), arm.images()
        frames["images"].append({camera: encode_png(image) for camera, image in images.items()})
        frames["action"].append(action)
        for key in ("state", "environment_state", "success", "held"):
            frames[key].append(getattr(scene, key))
        executed = policy.action(images, scene.state, arm.task) if policy_drives else action + disturbance
        scene = arm.step(np.clip(executed, -1, 1))
        succeeded |= scene.success
        frames_left -= succeeded
        if frames_left < 0:
            break
    if not succeeded:
        return None
    return {key: value if key == "images" else np.array(value) for key, value in frames.items()}


def read_blocks(work: Path, blocks: list[Block], questions: bool = False) -> Iterator[Episode]:
    """The episodes of all blocks, with LeRobot's column names. questions: see `record_demonstrations`."""
    for block in blocks:
        with np.load(work / block.name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        pictures, end = {camera: pictures_of(arrays, camera) for camera in block.cameras}, 0
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
            images = {CAMERA_KEY.format(camera): own[rows] for camera, own in pictures.items()}
            asked = frame_questions(block, columns, int(seed)) if questions else []
            yield Episode(INSTRUCTIONS[block.task][0], columns, images, extra, questions=asked)


def frame_questions(block: Block, columns: dict[str, np.ndarray], seed: int) -> list[list[Asked]]:
    """One random question about each frame of an episode, of those about one picture."""
    rng, found = np.random.default_rng(seed), []
    arrays = [columns[f"observation.{name}"] for name in ("environment_state", "success", "held")]
    for frame in range(len(columns["action"])):
        one = [asked for asked in scene_questions(block.task, *arrays, frame, frame, rng) if asked.images == 1]
        asked = one[rng.integers(len(one))]
        found.append([(CAMERA_KEY.format(block.cameras[0]), asked.question, asked.answer)])
    return found


def pictures_of(arrays: dict[str, np.ndarray], camera: str) -> list[bytes]:
    """The encoded pictures of a camera in the file of a block."""
    ends, data = arrays[f"{camera} ends"], arrays[f"{camera} pictures"].tobytes()
    return [data[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
