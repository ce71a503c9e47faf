"""The demo's photographs: the model `photos` describes each of them, answers questions about it, and shows where it looked.

The photographs come with packages that the project needs anyway; none of them is a part of it.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from textwrap import fill

from PIL import Image
from rich.console import Console
from rich.markup import escape

from nanochat.agent import Agent, question_message
from nanochat.attention import attention_of_words
from nanochat.data.sample import CAPTION_PROMPT
from nanochat.evaluation.metrics import exact_match
from nanochat.heatmaps import Drawn, panels
from nanochat.vision.images import open_image

BEAMS = 3
WORDS = 3  # of a description, whose attention is drawn
TEXT_WIDTH = 46  # characters of a line beside a photograph
ROW_INCHES = 2.9  # height of a photograph on the sheet
CORRECT, WRONG = "#1a7f37", "#cf222e"
console = Console()

Questions = tuple[tuple[str, str | None], ...]  # (question, its answer, or None where people may answer differently)
# name, package, path in it, questions
PACKAGED: tuple[tuple[str, str, str, Questions], ...] = (
    (
        "bus.jpg", "ultralytics", "ultralytics/assets/bus.jpg",
        (("is there a bus?", "yes"), ("is there a dog?", "no"), ("what vehicle is in the picture?", "bus"),
         ("where are the people?", None)),
    ),
    (
        "zidane.jpg", "ultralytics", "ultralytics/assets/zidane.jpg",
        (("is there a man?", "yes"), ("is there a horse?", "no"), ("what is the man wearing?", None),
         ("where was this picture taken?", None)),
    ),
    (
        "grace_hopper.jpg", "matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
        (("is there a woman?", "yes"), ("is there a dog?", "no"), ("what is the woman wearing?", None),
         ("what is on the woman's head?", None)),
    ),
)  # fmt: skip
ABOUT_ANY: Questions = (
    ("is there a person?", None), ("is there a dog?", None), ("who is in the picture?", None),
    ("where was this picture taken?", None),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """expected: the right answer, or None where it is not known."""

    question: str
    text: str
    expected: str | None

    @property
    def correct(self) -> bool | None:
        return None if self.expected is None else exact_match(self.text, [self.expected])

    def print(self) -> None:
        verdict = {
            None: "",
            True: "  [green]correct[/green]",
            False: f"  [red]wrong, expected: {escape(self.expected or '')}[/red]",
        }[self.correct]
        console.print(f"  {escape(self.question)}  [bold]{escape(self.text)}[/bold]{verdict}")


@dataclass(frozen=True)
class Photograph:
    """What was said about a photograph. drawn: its description's words, for the sheet."""

    name: str
    description: str
    answers: Sequence[Answer]
    drawn: Drawn


def packaged(package: str, path: str) -> Path | None:
    """A file of an installed package, without an import of it: ultralytics is under a licence that not everyone can use."""
    with suppress(PackageNotFoundError):
        file = Path(str(distribution(package).locate_file(path)))
        return file if file.is_file() else None
    return None


def packaged_photographs() -> list[tuple[str, Path, Questions]]:
    """(name, file, questions) of those that are there. Says which are not."""
    found = []
    for name, package, path, questions in PACKAGED:
        file = packaged(package, path)
        if file is None:
            console.print(
                f"[yellow]{name} is left out: it comes with the package {package}, which is not here[/yellow]"
            )
        else:
            found.append((name, file, questions))
    return found


def describe_photographs(chosen: Sequence[tuple[str, Path, Questions]], device="cpu") -> list[Photograph]:
    """Print what the model says about photographs, given as (name, file, questions)."""
    opened = [(name, open_image(path), questions) for name, path, questions in chosen]  # a broken one stops it at once
    if not opened:
        return []
    agent = Agent.load("photos", device)
    console.print(f"photos: {agent.model.num_parameters():,} parameters on {agent.model.device}")
    return [describe(agent, name, image, questions) for name, image, questions in opened]


def describe(agent: Agent, name: str, image: Image.Image, questions: Questions) -> Photograph:
    console.print(f"[dim]{escape(name)}[/dim]")
    vectors = agent.look(image)  # encoded once for all questions
    description = Answer(CAPTION_PROMPT, "".join(agent.ask(CAPTION_PROMPT, vectors, beams=BEAMS)).strip(), None)
    answers = [Answer(question, "".join(agent.ask(question, vectors)).strip(), truth) for question, truth in questions]
    for answer in (description, *answers):
        answer.print()
    prompt = agent.prompt([question_message(CAPTION_PROMPT, 1)])
    words = attention_of_words(agent.model, agent.tokenizer, prompt, description.text, vectors)
    drawn = Drawn.of([image], [name], agent.model.config.vision_image_size, words)
    return Photograph(name, description.text, answers, drawn)


def draw_photographs(figure, photographs: Sequence[Photograph]) -> None:
    """A line for each: the photograph, where the first words of its description looked, and the answers.

    figure: a (sub)figure of matplotlib."""
    figure.suptitle(
        "Photographs, described by the model. The more a word looked at a place, the brighter it is.", fontsize=12
    )
    axes = figure.subplots(len(photographs), WORDS + 2, squeeze=False, width_ratios=[1] * (WORDS + 1) + [1.5])
    for axis in axes.flat:
        axis.axis("off")
    for line, photograph in zip(axes, photographs, strict=True):
        shown = [panel for row in panels(photograph.drawn, 0) for panel in row]
        for axis, (title, image) in zip(line[:-1], shown, strict=False):
            axis.imshow(image)
            axis.set_title(title if axis is line[0] else f'"{title}"', fontsize=10, parse_math=False)
        write_answers(line[-1], photograph)


def write_answers(axis, photograph: Photograph) -> None:
    text = fill(photograph.description, TEXT_WIDTH)
    axis.text(0, 1, text, transform=axis.transAxes, va="top", fontsize=12, weight="bold", parse_math=False)
    top = 0.88 - 0.1 * text.count("\n")
    for number, answer in enumerate(photograph.answers):
        y = top - 0.17 * number
        colour = {None: "black", True: CORRECT, False: WRONG}[answer.correct]
        axis.text(
            0, y, answer.question, transform=axis.transAxes, va="top", fontsize=9, color="#57606a", parse_math=False
        )
        axis.text(
            0.03, y - 0.07, answer.text, transform=axis.transAxes, va="top", fontsize=10, color=colour, parse_math=False
        )
