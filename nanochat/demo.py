"""The demo: the shipped robot model describes a picture, answers questions about it, and controls a simulated arm in a layout
that it was not trained on. Writes the episode as an animated GIF, and a contact sheet.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

from nanochat.agent import Agent
from nanochat.data.sample import CAPTION_PROMPT
from nanochat.evaluation.metrics import exact_match
from nanochat.files import atomic_path
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.simulator import MAX_STEPS, Arm, SimulatorError, arm_limits
from nanochat.vision.images import open_image

ASSETS = Path(__file__).parent / "assets" / "demo"  # a picture with questions, and a recorded episode
EXECUTE = 5  # actions of a chunk that are executed before the next observation
SHEET_FRAMES = 8  # frames of the contact sheet
console = Console()


@dataclass
class Frame:
    """A frame of an episode. image: (S, S, 3) uint8. answer: the model's answer whether the task is done. done: the truth."""

    image: np.ndarray
    step: int
    answer: str
    done: bool


@dataclass
class Answer:
    question: str
    text: str
    expected: str

    @property
    def correct(self) -> bool:
        return exact_match(self.text, [self.expected])


def run_demo(out: Path, task: str, seed: int, device="cpu") -> None:
    """Run the demo; write the contact sheet to `out` (.png) and the episode next to it (.gif)."""
    started = time.perf_counter()
    agent = Agent.load("robot", device)
    seconds = sum(run["seconds"] for run in (*agent.training.get("earlier", []), agent.training))
    console.print(
        f"{agent.model.num_parameters():,} parameters, trained in {seconds / 60:.0f} minutes; "
        f"loaded in {time.perf_counter() - started:.1f} s on {agent.model.device}"
    )
    image, answers = answer_questions(agent)
    instruction = INSTRUCTIONS[task][0]
    try:
        arm = Arm(task, agent.metadata["image_size"])
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
    draw_sheet(image, answers, frames, instruction, out)
    console.print(f"wrote {escape(str(gif))} and {escape(str(out))}; {time.perf_counter() - started:.1f} s in total")


def answer_questions(agent: Agent) -> tuple[Image.Image, list[Answer]]:
    """Ask for a description of the bundled picture and all its questions, and print the answers."""
    about = json.loads((ASSETS / "questions.json").read_text())
    image = open_image(ASSETS / about["image"])
    vectors, answers = agent.look(image), []  # the picture is encoded once for all questions
    console.print(f"[dim]{about['source']}, not in the training data[/dim]")
    for question, expected in [(CAPTION_PROMPT, about["description"]), *about["questions"]]:
        answer = Answer(question, "".join(agent.ask(question, vectors)), expected)
        verdict = "[green]correct[/green]" if answer.correct else f"[red]wrong, expected: {escape(expected)}[/red]"
        console.print(f"  {escape(question)}  [bold]{escape(answer.text)}[/bold]  {verdict}")
        answers.append(answer)
    return image, answers


def drive_arm(agent: Agent, arm: Arm, instruction: str) -> list[Frame]:
    """One closed-loop episode, until the task succeeds or the steps are used up. Call `arm.reset` before; closes the arm."""
    scene, limits = arm.scene(success=False), arm_limits()
    frames, network_s = [], 0.0
    with console.status("running") as status:
        while True:
            frames.append(ask_if_done(agent, arm.image(), arm.steps, instruction, scene.success))
            if scene.success or arm.steps >= MAX_STEPS:
                break
            since = time.perf_counter()
            (chunk,) = agent.act([frames[-1].image], scene.state[None], [instruction])
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


def draw_sheet(image: Image.Image, answers: list[Answer], frames: list[Frame], instruction: str, out: Path) -> None:
    """Left, the picture with questions and answers; right, frames of the episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    indices = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)
    figure = plt.figure(figsize=(15, 6.2), layout="constrained")
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
        colour = "#1a7f37" if (frame.answer == "yes") == frame.done else "#cf222e"
        axis.set_title(f"step {frame.step}, done? {frame.answer}", fontsize=9, color=colour)
    with atomic_path(out) as new:
        figure.savefig(new, dpi=90, format="png")
    plt.close(figure)
