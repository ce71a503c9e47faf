"""The first thing that a stranger sees: the shipped robot model describes a picture, answers questions about it, and drives a
simulated arm to do a task in a layout that it never saw. A film and a contact sheet are left behind.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

from nanochat.assistant import Assistant
from nanochat.data.sample import CAPTION_PROMPT, written_whole
from nanochat.evaluation.metrics import exact_match
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.simulator import MAX_STEPS, Arm, SimulatorError, arm_limits
from nanochat.policy import Policy
from nanochat.vision.images import open_image

ASSETS = Path(__file__).parent / "assets" / "demo"  # a frame with questions, and a recorded episode
EXECUTE = 5  # steps of a chunk until the policy looks again
SHOWN = 8  # pictures of the contact sheet
console = Console()


@dataclass
class Look:
    """A picture of the film: the step at which it was taken, whether the model says that the task is done, and whether it is."""

    image: np.ndarray
    step: int
    said_done: str
    done: bool


def run(out: Path, task: str, seed: int) -> None:
    """Talk, drive, and write the contact sheet to `out` and the film beside it, as .gif."""
    started = time.perf_counter()
    policy = Policy.load("robot")
    assistant = Assistant(policy.model, policy.tokenizer)
    seconds = sum(run["seconds"] for run in (*policy.training.get("earlier", []), policy.training))
    console.print(
        f"{policy.model.num_parameters():,} parameters, trained in {seconds / 60:.0f} minutes; "
        f"loaded in {time.perf_counter() - started:.1f} s"
    )
    card = talk(assistant)
    instruction = INSTRUCTIONS[task][0]
    try:
        arm = Arm(task, policy.model.config.vision_image_size)
        arm.reset(seed)
        arm.image()
    except SimulatorError as error:
        film, instruction, source = recorded(assistant)
        console.print(f"\n[yellow]{escape(str(error))}[/yellow]\nShowing the frames of {source} instead.")
    else:
        console.print(f'\ntold "{instruction}" ({task}, seed {seed}: a layout that training did not have)')
        film = drive(policy, assistant, arm, instruction)
    write_film(film, out.with_suffix(".gif"))
    draw_sheet(card, film, instruction, out)
    console.print(
        f"film: {escape(str(out.with_suffix('.gif')))}, contact sheet: {escape(str(out))}; "
        f"{time.perf_counter() - started:.1f} s in all"
    )


def talk(assistant: Assistant) -> tuple[Image.Image, list[tuple[str, str, str]]]:
    """Describe the bundled frame and answer its questions aloud. Returns it with (question, answer, truth) of each."""
    described = json.loads((ASSETS / "questions.json").read_text())
    image = open_image(ASSETS / described["image"])
    vectors, said = assistant.look(image), []  # looked at once for all questions
    console.print(f"[dim]{described['source']}, never trained on[/dim]")
    for question, truth in [(CAPTION_PROMPT, described["description"]), *described["questions"]]:
        answer = "".join(assistant.ask(question, vectors))
        right = exact_match(answer, [truth])
        verdict = "[green]right[/green]" if right else f"[red]wrong: {escape(truth)}[/red]"
        console.print(f"  {escape(question)}  [bold]{escape(answer)}[/bold]  {verdict}")
        said.append((question, answer, truth))
    return image, said


def drive(policy: Policy, assistant: Assistant, arm: Arm, instruction: str) -> list[Look]:
    """One episode in closed loop, until the task is done or time is up. The arm has been reset."""
    scene, limits = arm.scene(success=False), arm_limits()
    film, network = [], 0.0
    with console.status("driving") as status:
        while True:
            film.append(look(assistant, arm.image(), arm.steps, instruction, scene.success))
            if scene.success or arm.steps >= MAX_STEPS:
                break
            since = time.perf_counter()
            (chunk,) = policy([film[-1].image], scene.state[None], [instruction])
            network += time.perf_counter() - since
            status.update(f"driving: step {arm.steps} of at most {MAX_STEPS}")
            for action in chunk[:EXECUTE]:
                scene = arm.step(limits(action))
                if scene.success or arm.steps == MAX_STEPS:
                    break
    arm.close()
    verdict = "[green]done[/green]" if scene.success else "[red]not done[/red]"
    console.print(
        f"  {verdict} after {arm.steps} steps; {1e3 * network / max(1, len(film) - 1):.1f} ms a chunk of actions"
    )
    return film


def look(assistant: Assistant, image: np.ndarray, step: int, instruction: str, done: bool) -> Look:
    question = f'is the task "{instruction}" done?'
    return Look(image, step, "".join(assistant.ask(question, assistant.look(image))), done)


def recorded(assistant: Assistant) -> tuple[list[Look], str, str]:
    """(film, instruction, what it is) of the bundled episode, for machines that cannot draw."""
    about = json.loads((ASSETS / "recorded.json").read_text())
    strip = np.asarray(open_image(ASSETS / "recorded.png"))  # frames side by side
    images = np.split(strip, strip.shape[1] // strip.shape[0], axis=1)
    film = [
        look(assistant, image, step, about["instruction"], image is images[-1] and about["success"])
        for image, step in zip(images, about["steps"], strict=True)
    ]
    return film, about["instruction"], about["source"]


def write_film(film: list[Look], path: Path) -> None:
    frames = [Image.fromarray(shot.image).resize((384, 384), Image.Resampling.BICUBIC) for shot in film]
    with written_whole(path) as new:
        frames[0].save(new, format="GIF", save_all=True, append_images=frames[1:], duration=120, loop=0)


def draw_sheet(card, film: list[Look], instruction: str, out: Path) -> None:
    """Left, what was asked; then pictures of the episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    image, said = card
    chosen = [film[i] for i in np.linspace(0, len(film) - 1, min(SHOWN, len(film))).round().astype(int)]
    figure = plt.figure(figsize=(15, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4, 11))
    axis = left.subplots()
    axis.imshow(image)
    axis.axis("off")
    lines = [f"{question}\n   {answer}" + ("" if exact_match(answer, [truth]) else f"   (wrong: {truth})")
             for question, answer, truth in said]  # fmt: skip
    axis.set_title("It says", fontsize=12)
    axis.text(0, -0.03, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=8, wrap=True)
    right.suptitle(f'It acts: "{instruction}". "Done?" is answered by the same model.', fontsize=12)
    axes = right.subplots(2, SHOWN // 2, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, shot in zip(axes.flat, chosen, strict=False):
        axis.imshow(shot.image)
        right_answer = (shot.said_done == "yes") == shot.done
        axis.set_title(
            f"step {shot.step}, done? {shot.said_done}", fontsize=9, color="#1a7f37" if right_answer else "#cf222e"
        )
    with written_whole(out) as new:
        figure.savefig(new, dpi=90, format="png")
    plt.close(figure)
