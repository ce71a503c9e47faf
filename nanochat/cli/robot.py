"""The commands of robots: demo, inspect, record and rollout."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from nanochat.errors import UserError
from nanochat.flags import (
    Checkpoint,
    Device,
    JsonOut,
    Out,
    check_out,
    next_step,
    say_where,
)
from nanochat.training.recipe import flag
from nanochat.training.recipes import Recording, Robot


def demo(
    out: Out = Path("out/demo.png"),
    image: UseAppendAction[
        Annotated[tuple[Path, ...], arg(metavar="FILE", help="A photograph of yours; repeat the flag for several.")]
    ] = (),
    task: str = "door-open",
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """The model photos describes photographs and answers questions about them; then robot controls a simulated arm. Writes a
    contact sheet, and an animated GIF of the arm.

    The photographs are yours (--image), or some that come with other packages. The sheet also shows which cells of a
    photograph the words of its description looked at.

    Args:
        task: A Meta-World task, such as door-open. An unknown name lists all 50.
        seed: Seed of the layout of objects; the model was not trained on small seeds.
    """
    from nanochat.demo import run_demo
    from nanochat.demo_photos import ABOUT_ANY
    from nanochat.devices import pick_device
    from nanochat.metaworld.instructions import task_list

    out.parent.mkdir(parents=True, exist_ok=True)
    check_out(out, ".png")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, got {seed}")
    if len(names := task_list([task])) != 1:
        raise UserError(f"demo runs one task, but {task} is {len(names)} tasks: use nanochat rollout for several")
    run_demo(out, names[0], seed, pick_device(device), [(path.name, path, ABOUT_ANY) for path in image])
    next_step('nanochat ask PICTURE "QUESTION", or nanochat train folder --data YOUR_PICTURES')


def inspect_data(
    dataset: Annotated[Positional[Path], arg(metavar="DATASET")],
    recording: OmitArgPrefixes[Recording],
    out: Annotated[
        Path | None,
        arg(aliases=["-o"], help="Write a contact sheet to this .png file: a row of frames for each camera."),
    ] = None,
    json_out: JsonOut = None,
) -> None:
    """Show what is in a folder of robot demonstrations: cameras, rates, numbers with their ranges, tasks, gaps, what is broken;
    and what `nanochat train robot` would use of it, given the same flags.

    Args:
        dataset: Folder of a LeRobot dataset, v2.1 or v3.0, or of BridgeData frames (frames.jsonl).
    """
    from nanochat.evaluation.contents import show_contents
    from nanochat.training.robot_plan import training_plan

    if out is not None:
        check_out(out, ".png")
    if json_out is not None:
        check_out(json_out, ".json")
    show_contents(dataset, out, json_out)
    print("nanochat train robot would use:")
    for line in training_plan(Robot(data=str(dataset), **vars(recording))):
        print(f"  {line}")
    say_where(out)
    say_where(json_out)
    words = ["--data", dataset]
    for name, value in vars(recording).items():
        if value:
            words += [flag(name), *(value if isinstance(value, tuple) else [value])]
    next_step(shlex.join(map(str, ["nanochat", "train", "robot", *words])))


def record(
    out: Out,
    tasks: tuple[str, ...] = ("mt10",),
    episodes: int = 50,
    seed: int = 1_000_000,
    noise: float | None = None,
    image_size: int = 128,
    cameras: tuple[str, ...] = ("corner2",),
    questions: bool = False,
    policy: str = "",
    processes: int | None = None,
) -> None:
    """Record demonstrations of Meta-World's scripted experts as a LeRobot v3.0 dataset. Re-run the command to resume.

    Args:
        tasks: mt10, mt50, or task names such as door-open.
        episodes: Episodes per task; only successful ones are kept.
        seed: Seed of the first episode; evaluation uses small seeds, so that its layouts are not in the training data.
        noise: Standard deviation of the noise that is added to the executed actions (in -1..1); the expert corrects it.
            Default 0.25, and 0.1 in every second episode of tasks whose experts fail or wander when they are disturbed.
        image_size: Side of the recorded images in pixels, a multiple of 32.
        cameras: Meta-World's cameras: corner2 looks at the whole scene, gripperPOV past the fingers at what they hold; also
            topview, corner, corner3, corner4, behindGripper.
        questions: Also write a question about each frame with its answer, as LeRobot 0.6's column language_events; older versions
            of LeRobot do not open such data. Training here makes its questions itself and needs none.
        policy: Checkpoint of a policy that drives half of the time, instead of the noise; the expert's answers to what it does
            are recorded (DAgger).
        processes: Parallel processes; default one per CPU core.
    """
    from nanochat.metaworld.instructions import task_list
    from nanochat.metaworld.record import record_demonstrations

    n_processes = checked_processes(processes)
    driver = None if not policy else driving_policy(policy, noise, cameras)
    record_demonstrations(
        task_list(tasks), episodes, out, seed, noise, image_size, n_processes, cameras, questions, driver
    )
    next_step(f"nanochat train robot --data {shlex.quote(str(out))}")


def driving_policy(checkpoint: str, noise: float | None, cameras: tuple[str, ...]):
    """The policy that drives while the expert corrects it. Raises UserError for one that cannot."""
    from nanochat.agent import Agent
    from nanochat.evaluation.corrections import Driving
    from nanochat.metaworld.simulator import CAMERA

    if noise is not None:
        raise UserError("--policy drives instead of the noise: give one of --policy and --noise")
    agent = Agent.load(checkpoint)
    agent.check_can_act()
    read = agent.model.config.cameras or [CAMERA]  # older policies name none
    missing = [camera for camera in read if camera not in cameras]
    if missing:
        raise UserError(f"{checkpoint} looks through {', '.join(missing)}, which is not recorded: add it to --cameras")
    return Driving(checkpoint, tuple(read))


def checked_processes(processes: int | None) -> int:
    """What --processes says, else one per CPU core. Raises UserError for less than one."""
    from nanochat.workers import default_processes

    if processes is not None and processes < 1:
        raise UserError(f"--processes must be at least 1, got {processes}; leave it out for one per CPU core")
    return default_processes() if processes is None else processes


def rollout(
    checkpoint: Checkpoint,
    tasks: tuple[str, ...] = ("mt10",),
    episodes: int = 10,
    seed: int | None = None,
    protocol: Literal["standard", "published"] = "standard",
    drivers: tuple[Literal["policy", "shuffled", "blind", "random", "expert"], ...] = ("policy",),
    execute: int = 5,
    delay: int = 0,
    ensemble: float | None = None,
    committed: bool = True,
    max_steps: int | None = None,
    processes: int | None = None,
    gifs: Annotated[Path | None, arg(aliases=["--record"])] = None,
    json_out: JsonOut = None,
    device: Device = "auto",
) -> None:
    """Let a policy control the simulated arm, and report the share of successful episodes per task.

    Args:
        tasks: mt10, mt50, or task names such as door-open.
        episodes: Episodes per task.
        seed: Number of the first episode; default 0, or 4042 with --protocol published.
        protocol: standard: every task has its own stream of layouts, 500 steps. published: as published MT50 results: the same
            seeds for every task, 400 steps, one zero action before the first observation.
        drivers: Who chooses the actions: the policy; the policy with the instruction of another task (shuffled) or without an
            image (blind); random actions; or Meta-World's scripted expert, which sees the full state.
        execute: Actions that are executed from one observation of the policy to the next.
        delay: Steps until the actions for an observation are there, as on a robot that does not wait for its network.
        ensemble: Temporal ensembling: execute the mean of all chunks for a step, weighted by exp(-ENSEMBLE * i), i = 0 for the
            oldest; 0.01 as in ACT, with --execute 1.
        committed: With a delay, the policy is told the actions that are executed meanwhile, and goes on from them.
        max_steps: An episode fails after this many steps; default that of the protocol.
        processes: Parallel processes; default one per CPU core.
        gifs: Write a GIF of every episode to this folder.
    """
    from nanochat.devices import pick_device
    from nanochat.evaluation.rollout import Settings, run_rollouts
    from nanochat.metaworld.instructions import task_list

    n_processes = checked_processes(processes)
    if json_out is not None:
        check_out(json_out)
    settings = Settings(
        execute=execute,
        delay=delay,
        committed=None if committed else 0,  # None: as many as the policy has learnt
        ensemble=ensemble,
        protocol=protocol,
        max_steps=max_steps,
        gifs=gifs,
    )
    run_rollouts(
        checkpoint,
        task_list(tasks),
        settings,
        episodes=episodes,
        seed=seed,
        drivers=drivers,
        processes=n_processes,
        json_out=json_out,
        device=pick_device(device),
    )
    say_where(json_out)
    say_where(gifs)
