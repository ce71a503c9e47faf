"""LLaVA's conversation JSON, read and written: a list of {"id", "image", "conversations": [{"from", "value"}]}, where
"<image>" in a value stands for a picture (Liu et al. 2023, https://github.com/haotian-liu/LLaVA).

Beyond LLaVA, "image" may be a list of pictures, and "references" holds all acceptable answers where there are several.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from nanochat.data.sample import (
    DataError,
    Dataset,
    Sample,
    check_text,
    cut,
    find_image,
    task_of,
    tidy_messages,
    written_whole,
)

IMAGE_TAG = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def load(
    path: str | Path, split: str | None = None, strict: bool = False, image_folder: str | Path | None = None
) -> Dataset:
    """Samples of a LLaVA file; "fit" and "val" are cut from it by image, any other split name reads it whole.

    image_folder: what the image paths are relative to; by default the folder of the file.

    Raises:
        DataError: not a LLaVA file; a malformed row, with its number; with `strict`, a missing picture.
    """
    file = Path(path).expanduser()
    folder = Path(image_folder).expanduser() if image_folder is not None else file.parent
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of LLaVA conversations, found {type(rows).__name__}")

    samples, skipped = [], 0
    for number, row in enumerate(rows):
        where = f"{file}: row {number}"
        if not isinstance(row, dict):
            raise DataError(f'{where}: expected an object with "conversations", found {type(row).__name__}')
        names = row.get("image") if row.get("image") is not None else []
        names = names if isinstance(names, list) else [names]
        messages = _messages(row, len(names), where)
        references = row.get("references", [])
        if not isinstance(references, list):
            raise DataError(f"{where}: 'references' must be a list of texts, found {type(references).__name__}")
        references = tuple(check_text(text, "references", where) for text in references)
        images = tuple(find_image(folder, name, where, strict) for name in names)
        if None in images:
            skipped += 1
        else:
            samples.append(Sample(images, messages, references))
    name = f"{file.stem}/{split}" if split in ("fit", "val") else file.stem
    return Dataset(name, task_of(samples), cut(samples, split, folder), skipped)


def _messages(row: dict, n_images: int, where: str) -> tuple[dict, ...]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: 'conversations' must be a list of objects with 'from' and 'value'")
    raw = []
    for turn in turns:
        speaker, value = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise DataError(f"{where}: 'from' must be one of {', '.join(ROLES)}, found {speaker!r}")
        raw.append({"role": ROLES[speaker], "content": _parts(check_text(value, "value", where))})
    return tidy_messages(raw, n_images, where)


def _parts(value: str) -> list[dict]:
    """[{"type": "image"}, {"type": "text", "text": "What?"}] of "<image>\\nWhat?", the tag between its texts."""
    pieces = value.split(IMAGE_TAG)
    parts = []
    for i, piece in enumerate(pieces):
        if piece.strip():
            parts.append({"type": "text", "text": piece})
        if i < len(pieces) - 1:
            parts.append({"type": "image"})
    return parts


def write(samples: Iterable[Sample], path: str | Path, image_folder: str | Path | None = None) -> None:
    """Write a LLaVA file, all of it or nothing. Pictures stay where they are, below `image_folder`
    (by default the file's folder).

    Raises:
        DataError: a picture that is no file, or one outside of the folder; a text that holds "<image>".
    """
    file = Path(path).expanduser()
    folder = Path(image_folder).expanduser() if image_folder is not None else file.parent
    rows = []
    for number, sample in enumerate(samples):
        where = f"{file}: row {number}"
        row: dict = {"id": str(number)}
        names = [_name(image, folder, where) for image in sample.images]
        if names:
            row["image"] = names[0] if len(names) == 1 else names
        row["conversations"] = [
            {"from": NAMES[message["role"]], "value": _value(message["content"], where)} for message in sample.messages
        ]
        if sample.references != (sample.answer,):
            row["references"] = list(sample.references)
        rows.append(row)
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def _name(image: object, folder: Path, where: str) -> str:
    if not isinstance(image, (str, Path)):
        raise DataError(f"{where}: LLaVA files name pictures by path, this is {type(image).__name__}: save it first")
    name = Path(os.path.relpath(image, folder)).as_posix()
    if name.startswith("../"):
        raise DataError(f"{where}: the picture {image} is not below {folder}, which LLaVA paths are relative to")
    return name


def _value(content: str | list[dict], where: str) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(IMAGE_TAG in part.get("text", "") for part in parts):
        raise DataError(f"{where}: a text holds {IMAGE_TAG!r}, which a LLaVA file would turn into a picture")
    return "\n".join(IMAGE_TAG if part["type"] == "image" else part["text"] for part in parts)
