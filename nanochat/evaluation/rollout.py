"""Closed-loop evaluation: a policy drives the simulated arm, and the score is the share of episodes that succeed.

An episode is a task and a number. Its layout of objects comes from a stream of the task's own, so the episodes of all tasks are
independent; the protocol "published" uses the same seeds for every task, as published evaluations do. Worker processes take
jobs of up to ten episodes of one task and run the episodes of a job in lockstep, with one batched pass through the network
for all of them. The policy can be compared, on the same layouts, with its controls (the instruction of another task: shuffled;
no picture: blind), with random actions, and with the scripted expert.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from nanochat.agent import Agent
from nanochat.chunk_player import ChunkPlayer
from nanochat.errors import UserError
from nanochat.evaluation.rollout_figures import Outcome, console, jerk, peak_memory_mb, report, summary
from nanochat.files import atomic_path
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.simulator import ACTION_DIM, CAMERA, MAX_STEPS, Arm, arm_limits
from nanochat.workers import in_processes

EPISODES_PER_JOB = 10  # each has a simulator and a renderer, 100 to 200 MB

# images, states, instructions -> (B, chunk, 4); and (B, d, 4) committed actions, where there are some
Act = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Protocol:
    """How episodes begin and end. first_seed: default number of the first episode. zero_first: one zero action is executed before
    the first observation and not counted as a step. own_layouts: each task has its own stream of layouts; otherwise episode n
    of every task has the simulator's seed n."""

    first_seed: int
    max_steps: int
    zero_first: bool
    own_layouts: bool


PROTOCOLS = {
    "standard": Protocol(first_seed=0, max_steps=MAX_STEPS, zero_first=False, own_layouts=True),
    # as MT50 is evaluated in publications (SmolVLA, Evo-1)
    "published": Protocol(first_seed=4042, max_steps=400, zero_first=True, own_layouts=False),
}


@dataclass(frozen=True)
class Settings:
    """How the arm is driven, alike in all episodes.

    execute: actions that are executed from one observation to the next. delay: how many of them are executed before the chunk of
    the observation is there; those of the chunk before go on meanwhile, and up to `committed` of them are shown to the policy;
    None for as many as it has learnt. ensemble: see `chunk_player.ChunkPlayer`. protocol: see `PROTOCOLS`. max_steps: an episode
    fails after so many; None for the protocol's. gifs: folder for a GIF of every episode.
    """

    execute: int = 5
    delay: int = 0
    committed: int | None = None
    ensemble: float | None = None
    protocol: str = "standard"
    max_steps: int | None = None
    gifs: Path | None = None


@dataclass(frozen=True)
class Job:
    """Episodes of one task. instruction: given to the policy. driver: policy, shuffled, blind, random or expert. seeds: numbers
    of the episodes. settings: with numbers where they leave a choice. image_size, cameras: of the simulator, as the policy
    reads them."""

    task: str
    instruction: str
    driver: str
    seeds: tuple[int, ...]
    settings: Settings
    image_size: int
    cameras: tuple[str, ...] = (CAMERA,)


# ---- running ----


def run_rollouts(
    checkpoint: str,
    tasks: list[str],
    settings: Settings,
    *,
    episodes: int = 10,
    seed: int | None = None,
    drivers: Sequence[str] = ("policy",),
    processes: int = 1,
    json_out: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict:
    """Run all episodes, print the tables and return the figures (see `summary`).

    episodes: per task, with the numbers seed, seed + 1, ...; seed None for the protocol's. json_out: a file for the figures.
    Every process loads the checkpoint to `device`.

    Raises:
        ValueError: a number is out of its range, or the checkpoint is not a policy.
        SimulatorError: Meta-World is not installed, or nothing can be rendered here.
    """
    agent = Agent.load(checkpoint)
    agent.check_can_act()
    config, rules = agent.model.config, PROTOCOLS[settings.protocol]
    settings = decided(settings, agent.metadata["committed"])
    seed = rules.first_seed if seed is None else seed
    if episodes < 1 or seed < 0:
        raise UserError(f"--episodes must be at least 1 and --seed at least 0, got {episodes} and {seed}")
    check_settings(settings, config.chunk)
    if settings.gifs is not None:
        settings.gifs.mkdir(parents=True, exist_ok=True)
    size, cameras = config.vision_image_size, tuple(config.cameras) or (CAMERA,)
    Arm(tasks[0], size, cameras).image()  # if rendering fails, it fails once here and not in every process
    drivers = list(dict.fromkeys(drivers))
    jobs = make_jobs(tasks, range(seed, seed + episodes), drivers, settings, size, cameras)
    started, outcomes = time.perf_counter(), []
    with Progress(console=console) as progress:
        bar = progress.add_task("running episodes", total=len(drivers) * len(tasks) * episodes)
        for found in in_processes(run_job_here, jobs, processes, load_here, (checkpoint, str(device))):
            outcomes += found
            progress.advance(bar, len(found))
    seconds = time.perf_counter() - started
    result = summary(outcomes, tasks, rules.own_layouts) | {
        "checkpoint": str(checkpoint), "episodes": episodes, "seed": seed, "execute": settings.execute,
        "delay": settings.delay, "committed": min(settings.delay, settings.committed), "ensemble": settings.ensemble,
        "protocol": settings.protocol, "max_steps": settings.max_steps, "image_size": size, "seconds": seconds,
        "steps_per_s": sum(o.steps for o in outcomes) / seconds, "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip
    report(result, tasks, drivers)
    if json_out is not None:
        with atomic_path(json_out) as new:
            new.write_text(json.dumps(result | {"outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1))
    return result


def decided(settings: Settings, learnt: int) -> Settings:
    """The settings with numbers where they leave a choice. learnt: committed actions that the policy can be shown."""
    max_steps, shown = settings.max_steps, settings.committed
    return replace(
        settings,
        max_steps=PROTOCOLS[settings.protocol].max_steps if max_steps is None else max_steps,
        committed=learnt if shown is None else min(shown, learnt),
    )


def check_settings(settings: Settings, chunk: int) -> None:
    """Raises UserError for a number out of its range, and for a delay at which the arm would run out of actions, or have two
    observations under way. chunk: actions in one of the policy's."""
    execute, delay = settings.execute, settings.delay
    if not 1 <= execute <= chunk:
        raise UserError(f"--execute must be in 1..{chunk}, the policy's chunk, got {execute}")
    limit = MAX_STEPS - PROTOCOLS[settings.protocol].zero_first
    if not 1 <= settings.max_steps <= limit:
        raise UserError(
            f"--max-steps must be in 1..{limit}, where Meta-World ends an episode, got {settings.max_steps}"
        )
    if not 0 <= delay < execute or delay + execute > chunk:
        most = min(execute - 1, chunk - execute)
        raise UserError(
            f"with --execute {execute} and chunks of {chunk} actions, the delay must be in 0..{most}, got {delay}"
        )


def make_jobs(
    tasks: list[str], seeds: range, drivers: Sequence[str], settings: Settings, size: int, cameras: tuple[str, ...] = (CAMERA,)
) -> list[Job]:  # fmt: skip
    """Jobs of up to EPISODES_PER_JOB episodes, driver by driver and task by task."""
    parts = [tuple(seeds[start : start + EPISODES_PER_JOB]) for start in range(0, len(seeds), EPISODES_PER_JOB)]
    return [
        Job(task, instruction_for(tasks, task, driver), driver, part, settings, size, cameras)
        for driver in drivers
        for task in tasks
        for part in parts
    ]


def instruction_for(tasks: list[str], task: str, driver: str) -> str:
    """The instruction of the task. For "shuffled" it is that of the next task in `tasks`, or in all tasks if there is one."""
    if driver != "shuffled":
        return INSTRUCTIONS[task][0]
    names = tasks if len(tasks) > 1 else sorted(INSTRUCTIONS)
    return INSTRUCTIONS[names[(names.index(task) + 1) % len(names)]][0]


def load_here(checkpoint: str, device: str) -> None:
    """Load the checkpoint for this worker process. One thread is the fastest for a small network."""
    global worker_agent
    torch.set_num_threads(1)
    worker_agent = Agent.load(checkpoint, device)


def run_job_here(job: Job) -> list[Outcome]:
    return run_job(job, acting(worker_agent))


def acting(agent: Agent) -> Act:
    """`agent.act`; a policy that was trained without a state does not get the arm's."""
    if agent.metadata["state_dim"]:
        return agent.act
    return lambda images, states, instructions, *committed: agent.act(images, None, instructions, *committed)


class Episode:
    """One episode in progress."""

    def __init__(self, job: Job, seed: int):
        self.job, self.settings, self.seed = job, job.settings, seed
        self.arm, self.limits = Arm(job.task, job.image_size, job.cameras), arm_limits()
        how = job.settings
        rules = PROTOCOLS[how.protocol]
        self.scene = self.arm.reset(layout_seed(job.task, seed) if rules.own_layouts else seed)
        self.last_step = how.max_steps
        if rules.zero_first:
            self.scene = self.arm.step(np.zeros(ACTION_DIM))
            self.last_step += 1
        self.looks, self.film, self.motions = 0, [], []
        self.player = ChunkPlayer(how.execute, how.ensemble, how.committed, rest=np.zeros(ACTION_DIM))
        self.player.delays.append(how.delay)  # known from the start, so that all episodes of a job commit alike

    @property
    def running(self) -> bool:
        return not self.scene.success and self.arm.steps < self.last_step

    def pictures(self) -> dict[str, np.ndarray] | None:
        """camera -> (S, S, 3) uint8; None if neither the driver nor a GIF needs them, because rendering is slow."""
        if not self.settings.gifs and self.job.driver not in ("policy", "shuffled"):
            return None
        images = self.arm.images()
        if self.settings.gifs:
            self.film.append(np.hstack(list(images.values())))
        return images

    def execute(self, chunk: np.ndarray | None) -> None:
        """Execute actions until the next look. chunk: (chunk, 4), which is there after the delay; until the first one is, the
        arm does not move. None: let the expert choose every action."""
        self.looks += 1
        for step in range(self.settings.execute):
            if chunk is not None and step == self.settings.delay:
                self.player.receive(chunk)
            action = self.arm.expert_action() if chunk is None else self.player.play()
            sent = self.limits(np.zeros(ACTION_DIM) if action is None else action)
            self.motions.append(sent[:3])
            self.scene = self.arm.step(sent)
            if not self.running:
                break

    def finish(self, network_s: float, seconds: float) -> Outcome:
        """Write the GIF and close the simulator."""
        job, success = self.job, self.scene.success
        if self.settings.gifs:
            name = f"{job.driver}-{job.task}-{self.seed}-{'success' if success else 'failure'}.gif"
            write_gif(self.settings.gifs / name, [*self.film, np.hstack(list(self.arm.images().values()))])
        steps = self.arm.steps - (self.last_step - self.settings.max_steps)
        self.arm.close()
        return Outcome(
            job.task, job.driver, self.seed, success, steps, self.looks, network_s, seconds, dict(self.limits.counts),
            jerk(np.stack(self.motions)),
        )  # fmt: skip


def layout_seed(task: str, number: int) -> int:
    """The simulator's seed of a task's episode, in 2**31 .. 2**32 - 1: far from the seeds of recorded demonstrations."""
    digest = hashlib.sha256(f"{task} {number}".encode()).digest()
    return 2**31 + int.from_bytes(digest[:4], "big") % 2**31


def run_job(job: Job, act: Act | None = None) -> list[Outcome]:
    """Run all episodes of a job in lockstep. act: the policy, see `Act`; the drivers random and expert need none."""
    started, network = time.perf_counter(), 0.0
    episodes = [Episode(job, seed) for seed in job.seeds]
    rng = np.random.default_rng(job.seeds[0])
    while running := [episode for episode in episodes if episode.running]:
        images = [episode.pictures() for episode in running]
        states = np.stack([episode.scene.state for episode in running])
        since = time.perf_counter()
        known = [episode.player.ask() for episode in running]  # alike in all: they are at the same step
        chunks = choose(job, act, images, states, rng, [] if known[0] is None else [np.stack(known)])
        network += time.perf_counter() - since
        for number, episode in enumerate(running):
            episode.execute(None if chunks is None else chunks[number])
    seconds, looks = time.perf_counter() - started, sum(episode.looks for episode in episodes)
    return [episode.finish(network * episode.looks / looks, seconds) for episode in episodes]


def choose(
    job: Job, act: Act | None, images: list, states: np.ndarray, rng: np.random.Generator, committed: Sequence = ()
) -> np.ndarray | None:
    """Chunks of actions (B, chunk, 4); None for the expert, which chooses an action at every step."""
    if job.driver == "expert":
        return None
    if job.driver == "random":
        length = job.settings.execute + job.settings.delay
        return rng.uniform(-1, 1, (len(states), length, ACTION_DIM)).astype(np.float32)
    if job.driver == "blind":
        images = [None] * len(states)
    return act(images, states, [job.instruction] * len(states), *committed)


def write_gif(path: Path, film: list[np.ndarray]) -> None:
    """film: (S, K * S, 3) uint8 each, K pictures side by side."""
    height, width = film[0].shape[:2]
    size = (256 * width // height, 256)
    frames = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in film]
    with atomic_path(path) as new:
        frames[0].save(new, format="GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
