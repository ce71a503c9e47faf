"""The commands that answer in text about pictures: ask and caption."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from nanochat.cli.chat import print_stream
from nanochat.cli.pictures import check_keeps, written_rows
from nanochat.errors import UserError
from nanochat.flags import Beams, Camera, Frames, JsonRows, Pictures, SamplingFlags, check_out

MAX_DRAWN = 30  # pictures on the sheet of --show
Show = Annotated[
    Path | None,
    arg(
        help="Also draw what each word of the answer looked at, as a .png file: its attention to the cells of the pictures, the "
        "mean over all layers and heads. For models that see a grid of cells."
    ),
]


def ask(
    args: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar='IMAGE... "QUESTION"',
            help="Pictures (image files, folders, quoted globs, or - for the standard input) or videos, then the question.",
            help_behavior_hint="",
        ),
    ],
    each: bool = False,
    show: Show = None,
    frames: Frames = None,
    camera: Camera = None,
    json_rows: JsonRows = None,
    sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags(),
) -> None:
    """Ask a question about a picture, about several together, or about a video.

    - nanochat ask a.jpg "what color is the car?"
    - nanochat ask a.jpg b.jpg "what changed?"
    - nanochat ask clip.mp4 "what is the man doing?" --frames 8 --each
    - nanochat ask photos/ "is there a dog?" --each
    - nanochat ask a.jpg "what is on the table?" --show out.png

    Several pictures are one question, unless --each is given. They stand before it in their order, or where it has
    <image>: "is <image> brighter than <image>?" A model answers about as many as it was trained on.

    Args:
        each: Ask the question about each picture separately, instead of once about all of them together.
    """
    images, question = split_question(args, camera)
    answer_pictures(
        images, camera, frames, question, sampling, json_rows,
        to_row=lambda text: {"question": question, "answer": text}, each=each, show=show,
    )  # fmt: skip


def caption(
    images: Pictures,
    beams: Beams = 1,
    show: Show = None,
    frames: Frames = None,
    camera: Camera = None,
    json_rows: JsonRows = None,
    sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags(),
) -> None:
    """Describe each picture in one line. Needs a checkpoint that was trained on captions."""
    from nanochat.data import CAPTION_PROMPT

    if not images and camera is None:
        raise UserError("caption needs at least one picture: nanochat caption IMAGE...")
    answer_pictures(
        images, camera, frames, CAPTION_PROMPT, sampling, json_rows,
        to_row=lambda text: {"caption": text}, each=True, beams=beams, show=show,
    )  # fmt: skip


def split_question(args: Sequence[str], camera: int | None) -> tuple[Sequence[str], str]:
    """(pictures, question). Raises UserError where they are in another order, or the question lacks quotes."""
    usage = 'nanochat ask IMAGE... "QUESTION"'
    if len(args) < (2 if camera is None else 1):
        raise UserError(f"ask needs at least one picture, then a question: {usage}; got {len(args)} arguments")
    *images, question = args
    if not question.strip():
        raise UserError(f"the question is empty: {usage}")
    from nanochat.inputs import is_picture_name, is_video_name

    def is_input_name(word: str) -> bool:
        return is_picture_name(word) or is_video_name(word)

    def is_there(word: str) -> bool:
        is_pattern = glob.has_magic(word) and (not word.endswith("?") or glob.glob(word))  # not a question
        return word == "-" or bool(is_pattern) or os.path.exists(os.path.expanduser(word))

    missing = [word for word in images if not is_there(word) and not is_input_name(word)]
    picture_last = is_input_name(question) and not question.endswith("?")
    if question == "-" or picture_last or (missing and os.path.exists(os.path.expanduser(question))):
        raise UserError(f"the question comes last: {usage}; the last argument is {question!r}, a picture")
    if any(" " in word for word in missing):
        raise UserError(
            f"there is no file {missing[0]!r}; a question is the last argument, and there is only one: {usage}"
        )
    if missing:
        whole = " ".join([*missing, question])
        raise UserError(f'there is no file {missing[0]}; a question of several words needs quotes: "{whole}"')
    return images, question


def answer_pictures(
    words: Sequence[str],
    camera: int | None,
    frames: int | None,
    question: str,
    flags: SamplingFlags,
    out: Path | None,
    *,
    to_row: Callable[[str], dict],
    each: bool,
    beams: int = 1,
    show: Path | None = None,
) -> None:
    """Print or write the answers to a question: one about each picture, or one about all of them together."""
    from nanochat.inputs import find_pictures, note, opened

    with written_rows(out) as add:
        pictures = find_pictures(words, camera, frames)
        sampling, agent = flags.sampling(), flags.agent()
        sheet = None if show is None else Sheet(show, agent, question, pictures)

        def whole() -> Iterator[tuple]:
            for picture, image in opened(pictures, "answering", prints=each and str(out) in ("None", "-")):
                if isinstance(image, Exception):
                    add({"file": picture.name, "error": str(image)})
                else:
                    yield picture, image

        if not each:
            agent.check_images(len(pictures))
        for group in ([one] for one in whole()) if each else [list(whole())]:
            shown, images = zip(*group, strict=True)
            vectors, text = agent.look(list(images)), ""
            answer = agent.ask(question, vectors, flags.max_new_tokens, sampling, beams)
            if out is not None:
                text = "".join(answer)
                add(sources(shown) | to_row(text.strip()))
            else:
                if each and (len(pictures) > 1 or shown[0].time is not None):
                    print(f"{shown[0].label}: ", end="")
                elif any(picture.time is not None for picture in shown):
                    note("about " + ", ".join(picture.label for picture in shown))
                text = print_stream(answer)
            if sheet is not None:
                sheet.add(shown, images, vectors, text.strip())
        if sheet is not None:
            sheet.write()
            note(f"what the words looked at: {show}")


class Sheet:
    """The drawing of --show. Raises UserError or OSError before anything is answered if there could be none."""

    def __init__(self, out: Path, agent, question: str, pictures: Sequence):
        from nanochat.attention import check_has_cells

        check_out(out, ".png")
        check_keeps(out, [picture.source for picture in pictures if isinstance(picture.source, str)])
        check_has_cells(agent.model)
        if len(pictures) > MAX_DRAWN:
            raise UserError(
                f"--show draws up to {MAX_DRAWN} pictures on one sheet, and there are {len(pictures)}: name fewer"
            )
        self.out, self.agent, self.question, self.drawn = out, agent, question, []

    def add(self, pictures: Sequence, images: Sequence, vectors, text: str) -> None:
        """An answer about pictures. vectors: (P, N, D) as the model saw them."""
        from nanochat.agent import question_message
        from nanochat.attention import attention_of_words
        from nanochat.data import CAPTION_PROMPT
        from nanochat.heatmaps import Drawn

        agent = self.agent
        prompt = agent.prompt([question_message(self.question, len(images))])
        found = attention_of_words(agent.model, agent.tokenizer, prompt, text, vectors)
        said = text if self.question == CAPTION_PROMPT else f"{self.question} {text}"
        titles = [f"{os.path.basename(picture.label)}: {said}" for picture in pictures]
        self.drawn.append(Drawn.of(images, titles, agent.model.config.vision_image_size, found))

    def write(self) -> None:
        from nanochat.heatmaps import draw_attention

        draw_attention(self.drawn, self.out)


def sources(pictures: Sequence) -> dict:
    """The pictures behind an answer as they stand in --json: "file" for one, "files" for several; for frames of a video also
    their "time" or "times" in seconds, null for other pictures."""
    names, times = [picture.name for picture in pictures], [picture.time for picture in pictures]
    row = {"file": names[0]} if len(names) == 1 else {"files": names}
    if set(times) != {None}:
        row |= {"time": times[0]} if len(times) == 1 else {"times": times}
    return row
