"""The demo: the model `photos` describes photographs; then the model `robot` describes a picture, answers questions about it, and
controls a simulated arm in a layout that it was not trained on. Writes the episode as an animated GIF, and a contact sheet.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.markup import escape

from nanochat.agent import Agent
from nanochat.data.sample import CAPTION_PROMPT
from nanochat.demo_photos import (
    CORRECT,
    ROW_INCHES,
    WRONG,
    Answer,
    Photograph,
    console,
    describe_photographs,
    draw_photographs,
    packaged_photographs,
)
from nanochat.files import atomic_path
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.simulator import CAMERA, MAX_STEPS, Arm, SimulatorError, arm_limits
from nanochat.vision.images import open_image

ASSETS = Path(__file__).parent / "assets" / "demo"  # a picture with questions, and a recorded episode
EXECUTE = 5  # actions of a chunk that are executed before the next observation
SHEET_FRAMES = 8  # frames of the contact sheet
ARM_INCHES = 6.2  # height of the arm's part of the contact sheet


@dataclass
class Frame:
    """A frame of an episode. image: (S, S, 3) uint8. answer: the model's answer whether the task is done. done: the truth."""

    image: np.ndarray
    step: int
    answer: str
    done: bool


def run_demo(out: Path, task: str, seed: int, device="cpu", photographs: Sequence = ()) -> None:
    """Run the demo; write the contact sheet to `out` (.png) and the episode next to it (.gif).

    photographs: (name, file, questions) of those to describe instead of `demo_photos.packaged_photographs`."""
    started = time.perf_counter()
    described = describe_photographs(photographs or packaged_photographs(), device)
    loading = time.perf_counter()
    agent = Agent.load("robot", device)
    seconds = sum(run["seconds"] for run in (*agent.training.get("earlier", []), agent.training))
    console.print(
        f"\nrobot: {agent.model.num_parameters():,} parameters, trained in {seconds / 60:.0f} minutes; "
        f"loaded in {time.perf_counter() - loading:.1f} s on {agent.model.device}"
    )
    image, answers = answer_questions(agent)
    instruction = INSTRUCTIONS[task][0]
    try:
        arm = Arm(task, agent.metadata["image_size"], agent.metadata["cameras"] or (CAMERA,))
        arm.reset(seed)
        arm.image()
    except SimulatorError as error:
        frames, instruction, source = recorded_episode(agent)
        console.print(f"\n[yellow]{escape(str(error))}[/yellow]\nShowing {source} instead.")
    else:
        console.print(f'\ninstruction "{instruction}" ({task}, layout of seed {seed}, not in the training data)')
        frames = drive_arm(agent, arm, instruction)
    gif = out.with_suffix(".gif")
    write_gif(frames, gif)
    draw_sheet(described, image, answers, frames, instruction, out)
    console.print(f"wrote {escape(str(gif))} and {escape(str(out))}; {time.perf_counter() - started:.1f} s in total")


def answer_questions(agent: Agent) -> tuple[Image.Image, list[Answer]]:
    """Ask for a description of the bundled picture and all its questions, and print the answers."""
    about = json.loads((ASSETS / "questions.json").read_text())
    image = open_image(ASSETS / about["image"])
    vectors, answers = agent.look(image), []  # the picture is encoded once for all questions
    console.print(f"[dim]{about['source']}, not in the training data[/dim]")
    for question, expected in [(CAPTION_PROMPT, about["description"]), *about["questions"]]:
        answer = Answer(question, "".join(agent.ask(question, vectors)), expected)
        answer.print()
        answers.append(answer)
    return image, answers


def drive_arm(agent: Agent, arm: Arm, instruction: str) -> list[Frame]:
    """One closed-loop episode, until the task succeeds or the steps are used up. Call `arm.reset` before; closes the arm."""
    scene, limits = arm.scene(success=False), arm_limits()
    frames, network_s = [], 0.0
    with console.status("running") as status:
        while True:
            images = arm.images()
            frames.append(ask_if_done(agent, images[arm.cameras[0]], arm.steps, instruction, scene.success))
            if scene.success or arm.steps >= MAX_STEPS:
                break
            since = time.perf_counter()
            (chunk,) = agent.act([images], scene.state[None], [instruction])
            network_s += time.perf_counter() - since
            status.update(f"step {arm.steps} of at most {MAX_STEPS}")
            for action in chunk[:EXECUTE]:
                scene = arm.step(limits(action))
                if scene.success or arm.steps == MAX_STEPS:
                    break
    arm.close()
    verdict = "[green]success[/green]" if scene.success else "[red]no success[/red]"
    n_chunks = max(1, len(frames) - 1)
    console.print(f"  {verdict} after {arm.steps} steps; {1e3 * network_s / n_chunks:.1f} ms per chunk of actions")
    return frames


def ask_if_done(agent: Agent, image: np.ndarray, step: int, instruction: str, done: bool) -> Frame:
    question = f'is the task "{instruction}" done?'
    return Frame(image, step, "".join(agent.ask(question, agent.look(image))), done)


def recorded_episode(agent: Agent) -> tuple[list[Frame], str, str]:
    """(frames, instruction, description) of the bundled episode, for machines that cannot render the simulator."""
    about = json.loads((ASSETS / "recorded.json").read_text())
    strip = np.asarray(open_image(ASSETS / "recorded.png"))  # (S, n * S, 3): frames side by side
    images = np.split(strip, strip.shape[1] // strip.shape[0], axis=1)
    frames = [
        ask_if_done(agent, image, step, about["instruction"], image is images[-1] and about["success"])
        for image, step in zip(images, about["steps"], strict=True)
    ]
    return frames, about["instruction"], about["source"]


def write_gif(frames: list[Frame], path: Path) -> None:
    images = [Image.fromarray(frame.image).resize((384, 384), Image.Resampling.BICUBIC) for frame in frames]
    with atomic_path(path) as new:
        images[0].save(new, format="GIF", save_all=True, append_images=images[1:], duration=120, loop=0)


def draw_sheet(
    photographs: Sequence[Photograph],
    image: Image.Image,
    answers: list[Answer],
    frames: list[Frame],
    instruction: str,
    out: Path,
) -> None:
    """At the top, photographs with what was said about them; below, the arm."""
    from matplotlib.figure import Figure  # not pyplot, which keeps state and may open windows

    height = ROW_INCHES * len(photographs)
    figure = Figure(figsize=(15, height + ARM_INCHES), layout="constrained")
    if not photographs:
        arm = figure
    else:
        top, arm = figure.subfigures(2, 1, height_ratios=(height, ARM_INCHES))
        draw_photographs(top, photographs)
    draw_arm(arm, image, answers, frames, instruction)
    with atomic_path(out) as new:
        figure.savefig(new, dpi=90, format="png")


def draw_arm(figure, image: Image.Image, answers: list[Answer], frames: list[Frame], instruction: str) -> None:
    """Left, the picture with questions and answers; right, frames of the episode. figure: a (sub)figure of matplotlib."""
    indices = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)
    left, right = figure.subfigures(1, 2, width_ratios=(4, 11))
    axis = left.subplots()
    axis.imshow(image)
    axis.axis("off")
    axis.set_title("Questions and answers", fontsize=12)
    lines = [
        f"{answer.question}\n   {answer.text}" + ("" if answer.correct else f"   (wrong, expected: {answer.expected})")
        for answer in answers
    ]
    axis.text(0, -0.03, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=8, wrap=True)
    right.suptitle(f'Instruction: "{instruction}". The same model acts and answers "done?".', fontsize=12)
    axes = right.subplots(2, SHEET_FRAMES // 2, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, frame in zip(axes.flat, [frames[i] for i in indices], strict=False):
        axis.imshow(frame.image)
        colour = CORRECT if (frame.answer == "yes") == frame.done else WRONG
        axis.set_title(f"step {frame.step}, done? {frame.answer}", fontsize=9, color=colour)
