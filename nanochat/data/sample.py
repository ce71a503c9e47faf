"""The one sample type of all data sources, and the checks that every source makes with it.

A sample keeps its pictures as they came (a path or encoded bytes); nothing is decoded here. What a source hands in is
either right, or skipped and counted (a picture that does not exist), or a DataError that names file and row.
"""

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nanochat.vision.images import ImageSource

CAPTION_PROMPT = "Describe the image."
VAL_SHARE = 0.1  # of the images, where a source has no validation split of its own


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file and the row."""


@dataclass(frozen=True)
class Sample:
    """Pictures and a conversation about them.

    images: in the order of the {"type": "image"} parts; empty for a sample of text alone.
    messages: {"role", "content"} dicts that end with the assistant's answer. Content is a string, or, where there are
        images in it, a list of {"type": "image"} and {"type": "text", "text": ...} parts, no two texts in a row.
    references: all acceptable last answers, the one in `messages` first. Left out, it is that one.
    """

    images: tuple[ImageSource, ...]
    messages: tuple[dict, ...]
    references: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.references:
            object.__setattr__(self, "references", (self.answer,))

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def question(self) -> str:
        """The text of the turn that is answered, without its images."""
        content = self.messages[-2]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] for part in content if part["type"] == "text")


@dataclass
class Dataset:
    """Samples of one source. `skipped` counts the source's rows that were left out because a picture does not exist."""

    name: str
    task: str  # "vqa" (one right answer, exact match) or "caption" (BLEU and CIDEr against the references)
    samples: list[Sample] = field(repr=False)
    skipped: int = 0

    def __post_init__(self):
        if not self.samples:
            raise DataError(f"{self.name}: no usable rows in it ({self.skipped} left out: their picture is missing)")


def vqa_sample(image: ImageSource, question: str, answer: str) -> Sample:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return Sample((image,), ({"role": "user", "content": content}, {"role": "assistant", "content": answer}))


def caption_sample(image: ImageSource, captions: Sequence[str]) -> Sample:
    """The first caption is the answer, all of them are references."""
    return replace(vqa_sample(image, CAPTION_PROMPT, captions[0]), references=tuple(captions))


def task_of(samples: Iterable[Sample]) -> str:
    """The task where a format does not say it: captions if nothing but CAPTION_PROMPT is asked."""
    return "caption" if all(sample.question == CAPTION_PROMPT for sample in samples) else "vqa"


def one_per_reference(samples: Iterable[Sample]) -> list[Sample]:
    """Every reference once as the answer, for training on all captions of a picture."""
    return [
        Sample(sample.images, (*sample.messages[:-1], {"role": "assistant", "content": reference}), sample.references)
        for sample in samples
        for reference in sample.references
    ]


def limit(samples: Sequence[Sample], n: int, seed: int = 0) -> list[Sample]:
    """A random subset of `n` samples in their order, the same for the same seed; all of them if there are fewer."""
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1, got {n}")
    chosen = random.Random(seed).sample(range(len(samples)), min(n, len(samples)))
    return [samples[i] for i in sorted(chosen)]


def image_key(source: ImageSource) -> str:
    """A cheap identity of a picture, to group the questions about it: its path, or the SHA-1 of its bytes."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, bytes):
        return hashlib.sha1(source).hexdigest()
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().float().numpy()  # float: numpy has no bfloat16
    array = np.asarray(source.convert("RGBA") if isinstance(source, Image.Image) else source)
    return hashlib.sha1(f"{array.shape} {array.dtype}".encode() + array.tobytes()).hexdigest()


def cut(samples: list[Sample], split: str | None, root: Path | None = None) -> list[Sample]:
    """The "val" tenth of the images, or "fit", the others; all samples for any other split name.

    Images are drawn by the hash of their key (of their path below `root`, so that a moved folder is cut as before), and
    all samples of one image fall on the same side.
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


# ---- checks of rows; `where` is "file:line" or "file: row n" and starts every message ----


def text_of(row: dict, name: str, where: str) -> str:
    """The stripped text in a field of a row.

    Raises:
        DataError: the field is missing, empty or not text.
    """
    if name not in row:
        raise DataError(f"{where}: there is no {name!r}, only {', '.join(map(repr, row)) or 'an empty row'}")
    return check_text(row[name], name, where)


def check_text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name!r} must be text that is not empty, found {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: {name!r} is not valid Unicode: {error}") from error
    return value.strip()


def row_sample(row: dict, image: ImageSource | None, where: str) -> tuple[str, Sample]:
    """(task, sample) of a row with question and answer, or with captions. Its texts are checked even without an image.

    Raises:
        DataError: neither is there, or a text is missing or empty.
    """
    if "question" in row or "answer" in row:
        return "vqa", vqa_sample(image, text_of(row, "question", where), text_of(row, "answer", where))
    name = "captions" if "captions" in row else "caption"
    if name in row:
        captions = [row[name]] if isinstance(row[name], str) else row[name]
        if not isinstance(captions, list) or not captions:
            raise DataError(f"{where}: {name!r} must be a text or a list of texts, found {_short(captions)}")
        return "caption", caption_sample(image, [check_text(caption, name, where) for caption in captions])
    raise DataError(
        f"{where}: expected an image with a question and an answer, or with captions, found the fields "
        f"{', '.join(map(repr, row)) or 'of an empty row'}"
    )


def find_image(folder: Path, name: object, where: str, strict: bool) -> Path | None:
    """The picture that a row names relative to `folder`, or None where there is no such file (the caller counts it).

    Links below `folder` are followed: they are its owner's. Names are not allowed to climb out of it.

    Raises:
        DataError: the name is no text, absolute or leads out of the folder; with `strict`, also a missing file.
    """
    check_text(name, "image", where)
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
        raise DataError(f"{where}: the image path {name!r} leads out of the data folder {folder}")
    path = folder / inside
    if os.path.isfile(path):  # not Path.is_file, which raises for names that are too long
        return path
    if strict:
        raise DataError(f"{where}: the image {path} does not exist")
    return None


def tidy_messages(raw: object, n_images: int, where: str) -> tuple[dict, ...]:
    """Messages in the normal form of `Sample.messages`, from content that is text or a list of parts.

    Raises:
        DataError: turns that are not [system], user, assistant, ..., user, assistant; an empty turn; an image in a turn
            that is not the user's; another number of image parts than there are images.
    """
    if not isinstance(raw, (list, tuple)):
        raise DataError(f"{where}: messages must be a list, found {_short(raw)}")
    messages = tuple(_tidy_message(message, where) for message in raw)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"{where}: turns must be [system], user, assistant, ... and end with the assistant, "
            f"found {', '.join(roles) or 'none'}"
        )
    with_images = [message for message in messages if not isinstance(message["content"], str)]
    if any(message["role"] != "user" for message in with_images):
        raise DataError(f"{where}: only the user's turns can hold images")
    n_parts = sum(part["type"] == "image" for message in with_images for part in message["content"])
    if n_parts != n_images:
        raise DataError(f"{where}: the messages have {n_parts} image parts, but the row has {n_images} images")
    return messages


def _tidy_message(message: object, where: str) -> dict:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise DataError(f"{where}: a message must have the role system, user or assistant, found {_short(message)}")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": check_text(content, role, where)}
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{where}: the content of a message must be text or a list of parts, found {_short(content)}")
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
            raise DataError(f"{where}: a part must be of type image or text, found {_short(part)}")
    if not parts:
        raise DataError(f"{where}: a message without content, of role {role}")
    return {"role": role, "content": parts[0]["text"] if [part["type"] for part in parts] == ["text"] else parts}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, which takes its place when the block ends and is gone if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
