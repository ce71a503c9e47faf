"""The sample type that all data sources share.

A sample keeps its images as they came, a path or encoded bytes; nothing is decoded here.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.conversation import CAPTION_PROMPT as CAPTION_PROMPT  # others import it from here
from nanochat.conversation import user_message
from nanochat.errors import UserError
from nanochat.files import DataError, short_repr
from nanochat.vision.images import ImageSource


@dataclass(frozen=True)
class Sample:
    """Images and a conversation about them.

    images: in the order of the {"type": "image"} parts; empty for a sample of text alone.
    messages: {"role", "content"} dicts that end with the assistant's answer. Content is a string, or, if it has images, a
        list of {"type": "image"} and {"type": "text", "text": ...} parts, never two texts in a row.
    references: all acceptable last answers, the one in `messages` first. By default only that one.
    where: the "file:row" that it comes from, for messages. reference_rows: the same for each reference, if they come from
        different rows.
    kind: the type of the question, such as "color", where the source tells them apart; evaluation reports by it.
    """

    images: tuple[ImageSource, ...]
    messages: tuple[dict, ...]
    references: tuple[str, ...] = ()
    where: str = field(default="", compare=False, repr=False)
    reference_rows: tuple[str, ...] = field(default=(), compare=False, repr=False)
    kind: str = field(default="", compare=False)

    def __post_init__(self):
        if not self.references:
            object.__setattr__(self, "references", (self.answer,))

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def question(self) -> str:
        """The text of the last user message, without its images."""
        content = self.messages[-2]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] for part in content if part["type"] == "text")


@dataclass
class Dataset:
    """Samples of one source. skipped: how many of its rows were left out. notes: lines for the user that say what is read of
    the source, and what is left out and why."""

    name: str
    task: str  # "vqa" (one right answer, exact match) or "caption" (BLEU and CIDEr against the references)
    samples: list[Sample] = field(repr=False)
    skipped: int = 0
    notes: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self):
        if not self.samples:
            reasons = [note for note in self.notes if "left out" in note] or [f"{self.skipped} left out"]
            raise DataError(f"{self.name}: no usable rows: {'; '.join(reasons) if self.skipped else 'there are none'}")


def vqa_sample(image: ImageSource, question: str, answer: str, where: str = "", kind: str = "") -> Sample:
    return question_sample([image], question, answer, where, kind)


def question_sample(
    images: Sequence[ImageSource], question: str, answer: str, where: str = "", kind: str = ""
) -> Sample:
    """One question about all the images, which are shown before it."""
    messages = (user_message(question, len(images)), {"role": "assistant", "content": answer})
    return Sample(tuple(images), messages, where=where, kind=kind)


def caption_sample(image: ImageSource, captions: Sequence[str]) -> Sample:
    """The first caption is the answer, all of them are references."""
    return replace(vqa_sample(image, CAPTION_PROMPT, captions[0]), references=tuple(captions))


def dataset_task(samples: Iterable[Sample]) -> str:
    """The task of samples whose format does not name it: "caption" if CAPTION_PROMPT is the only question, else "vqa"."""
    return "caption" if all(sample.question == CAPTION_PROMPT for sample in samples) else "vqa"


def one_per_reference(samples: Iterable[Sample]) -> list[Sample]:
    """A sample for each reference, with that one as its answer: to train on all captions of an image."""
    return [
        replace(
            sample,
            messages=(*sample.messages[:-1], {"role": "assistant", "content": reference}),
            where=sample.reference_rows[i] if sample.reference_rows else sample.where,
            reference_rows=(),
        )
        for sample in samples
        for i, reference in enumerate(sample.references)
    ]


def limit(samples: Sequence[Sample], n: int, seed: int = 0) -> list[Sample]:
    """A random subset of `n` samples in their order, the same for the same seed; all samples if there are fewer.
    Raises ValueError for n below 1."""
    if n < 1:
        raise UserError(f"the number of samples must be at least 1, got {n}")
    chosen = random.Random(seed).sample(range(len(samples)), min(n, len(samples)))
    return [samples[i] for i in sorted(chosen)]


def image_key(source: ImageSource) -> str:
    """A cheap identity of an image, to group the questions about it: its path, or the SHA-1 of its bytes or pixels."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, bytes):
        return hashlib.sha1(source).hexdigest()
    if hasattr(source, "detach"):  # a torch tensor; torch is not imported here
        source = source.detach().cpu().float().numpy()  # float: numpy has no bfloat16
    array = np.asarray(source.convert("RGBA") if isinstance(source, Image.Image) else source)
    return hashlib.sha1(f"{array.shape} {array.dtype}".encode() + array.tobytes()).hexdigest()


# ---- checks of rows; `where` is "file:line" or "file: row n", the start of every message ----


def text_of(row: dict, name: str, where: str) -> str:
    """The stripped text in a field of a row.

    Raises:
        DataError: the field is missing, empty or not text.
    """
    if name not in row:
        raise DataError(f"{where}: expected the field {name!r}, found {field_names(row)}")
    return check_text(row[name], name, where)


def check_text(value: object, name: str, where: str) -> str:
    """The stripped text. name: of the field, for messages. Raises DataError for what is not text, empty or not Unicode."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name!r} must be non-empty text, found {short_repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON allows half a surrogate pair, tokenizers do not
        raise DataError(f"{where}: {name!r} is not valid Unicode: {error}") from error
    return value.strip()


def field_names(row: dict) -> str:
    """The fields of a row for a message; those without a value are marked."""
    shown = [f"{short_repr(name)}{' (null)' if value is None else ''}" for name, value in row.items()]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"the fields {', '.join(shown[:20])}{more}" if shown else "an empty row"
