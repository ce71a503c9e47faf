"""The sample type that all data sources share, and the checks that they make.

A sample keeps its images as they came, a path or encoded bytes; nothing is decoded here. A row of a source becomes a valid
sample, or is skipped and counted (its image does not exist), or raises a DataError that names file and row.
"""

import hashlib
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.errors import UserError
from nanochat.files import DataError, path_inside, short_repr
from nanochat.vision.images import ImageSource

CAPTION_PROMPT = "Describe the image."
VAL_SHARE = 0.1  # of the images, where a source has no validation split of its own


@dataclass(frozen=True)
class Sample:
    """Images and a conversation about them.

    images: in the order of the {"type": "image"} parts; empty for a sample of text alone.
    messages: {"role", "content"} dicts that end with the assistant's answer. Content is a string, or, if it has images, a
        list of {"type": "image"} and {"type": "text", "text": ...} parts, never two texts in a row.
    references: all acceptable last answers, the one in `messages` first. By default only that one.
    where: "file:line" or "file: row n" of each reference, or of the whole conversation, for messages; empty if not known.
    """

    images: tuple[ImageSource, ...]
    messages: tuple[dict, ...]
    references: tuple[str, ...] = ()
    where: tuple[str, ...] = field(default=(), compare=False)

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
    """Samples of one source. skipped: how many of its rows were left out because an image does not exist."""

    name: str
    task: str  # "vqa" (one right answer, exact match) or "caption" (BLEU and CIDEr against the references)
    samples: list[Sample] = field(repr=False)
    skipped: int = 0

    def __post_init__(self):
        if not self.samples:
            raise DataError(f"{self.name}: no usable rows ({self.skipped} skipped because their image is missing)")


def vqa_sample(image: ImageSource, question: str, answer: str, where: str = "") -> Sample:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": answer})
    return Sample((image,), messages, where=(where,) if where else ())


def caption_sample(image: ImageSource, captions: Sequence[str], where: Sequence[str] = ()) -> Sample:
    """The first caption is the answer, all of them are references. where: of each caption."""
    return replace(vqa_sample(image, CAPTION_PROMPT, captions[0]), references=tuple(captions), where=tuple(where))


def dataset_task(samples: Iterable[Sample]) -> str:
    """The task of samples whose format does not name it: "caption" if CAPTION_PROMPT is the only question, else "vqa"."""
    return "caption" if all(sample.question == CAPTION_PROMPT for sample in samples) else "vqa"


def one_per_reference(samples: Iterable[Sample]) -> list[Sample]:
    """A sample for each reference, with that one as its answer: to train on all captions of an image."""
    return [
        Sample(
            sample.images,
            (*sample.messages[:-1], {"role": "assistant", "content": reference}),
            sample.references,
            sample.where[number : number + 1] if len(sample.where) == len(sample.references) else sample.where[:1],
        )
        for sample in samples
        for number, reference in enumerate(sample.references)
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


def cut(samples: list[Sample], split: str | None, root: Path | None = None) -> list[Sample]:
    """The samples of a split: "val", a fixed tenth of the images; "fit", the others; any other name, all samples.

    All samples of an image are in the same split. Images are chosen by the hash of their key, which is their path below
    `root`: a folder that has moved gives the same splits.
    """
    if split not in ("fit", "val"):
        return samples

    def key(sample: Sample) -> str:
        if not sample.images:
            return repr(sample.messages)
        name = image_key(sample.images[0])
        if root is not None and isinstance(sample.images[0], Path):
            name = os.path.relpath(name, root)
        return name

    keys = [key(sample) for sample in samples]
    drawn = sorted(set(keys), key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    held_out = set(drawn[: max(1, round(VAL_SHARE * len(drawn)))])
    return [sample for sample, name in zip(samples, keys, strict=True) if (name in held_out) == (split == "val")]


# ---- checks of rows; `where` is "file:line" or "file: row n", the start of every message ----


def text_of(row: dict, name: str, where: str) -> str:
    """The stripped text in a field of a row.

    Raises:
        DataError: the field is missing, empty or not text.
    """
    if name not in row:
        raise DataError(f"{where}: expected the field {name!r}, found {_fields(row)}")
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


def row_sample(row: dict, image: ImageSource | None, where: str) -> tuple[str, Sample]:
    """(task, sample) of a row with a question and an answer, or with captions. image: None if it is missing; the texts are
    checked all the same.

    Raises:
        DataError: the row has neither, or a text is missing or empty.
    """
    if "question" in row or "answer" in row:
        return "vqa", vqa_sample(image, text_of(row, "question", where), text_of(row, "answer", where), where)
    name = "captions" if "captions" in row else "caption"
    if name in row:
        captions = [row[name]] if isinstance(row[name], str) else row[name]
        if not isinstance(captions, list) or not captions:
            raise DataError(f"{where}: {name!r} must be a text or a list of texts, found {short_repr(captions)}")
        texts = [check_text(caption, name, where) for caption in captions]
        return "caption", caption_sample(image, texts, [where] * len(texts))
    raise DataError(f"{where}: expected an image with a question and an answer, or with captions, found {_fields(row)}")


def find_image(folder: Path, name: object, where: str, strict: bool) -> Path | None:
    """The image file that a row names relative to `folder`, or None if there is no such file.

    Raises:
        DataError: the name is not text, is absolute or leads out of the folder; with `strict`, also for a missing file.
    """
    check_text(name, "image", where)
    path = path_inside(folder, name, where)
    if os.path.isfile(path):  # Path.is_file raises for names that are too long
        return path
    if strict:
        raise DataError(f"{where}: the image {path} does not exist")
    return None


def normal_messages(raw: object, n_images: int, where: str) -> tuple[dict, ...]:
    """Messages in the form of `Sample.messages`. raw: messages whose content is text or a list of parts.

    Raises:
        DataError: the roles are not [system], user, assistant, ..., user, assistant; a message is empty; an image is not in
            a user message; the number of image parts is not `n_images`.
    """
    if not isinstance(raw, (list, tuple)):
        raise DataError(f"{where}: messages must be a list, found {short_repr(raw)}")
    messages = tuple(_normal_message(message, where) for message in raw)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"{where}: the roles must be [system], user, assistant, ... and end with the assistant, "
            f"found {', '.join(roles) or 'no messages'}"
        )
    with_images = [message for message in messages if not isinstance(message["content"], str)]
    if any(message["role"] != "user" for message in with_images):
        raise DataError(f"{where}: only user messages can have images")
    n_parts = sum(part["type"] == "image" for message in with_images for part in message["content"])
    if n_parts != n_images:
        raise DataError(f"{where}: the messages have {n_parts} image parts, but the row has {n_images} images")
    return messages


def _normal_message(message: object, where: str) -> dict:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise DataError(f"{where}: a message must have the role system, user or assistant, found {short_repr(message)}")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": check_text(content, role, where)}
    if not isinstance(content, (list, tuple)):
        raise DataError(
            f"{where}: the content of a message must be text or a list of parts, found {short_repr(content)}"
        )
    parts: list[dict] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text":
            text = check_text(part.get("text"), role, where)
            if parts and parts[-1]["type"] == "text":
                text = f"{parts.pop()['text']}\n{text}"
            parts.append({"type": "text", "text": text})
        else:
            raise DataError(f"{where}: a part must be of type image or text, found {short_repr(part)}")
    if not parts:
        raise DataError(f"{where}: a message of role {role} has no content")
    return {"role": role, "content": parts[0]["text"] if [part["type"] for part in parts] == ["text"] else parts}


def _fields(row: dict) -> str:
    return f"the fields {', '.join(map(repr, row))}" if row else "an empty row"
