"""LLaVA's conversation JSON: a list of {"id", "image", "conversations": [{"from", "value"}]}, where "<image>" in a value
stands for an image (Liu et al. 2023, https://github.com/haotian-liu/LLaVA).

Beyond LLaVA, "image" may be a list of images, and "references" may list all acceptable answers.
"""

import json
from pathlib import Path

from nanochat.data.sample import (
    Dataset,
    Sample,
    check_text,
    cut,
    dataset_task,
    find_image,
    normal_messages,
)
from nanochat.files import DataError

IMAGE_TAG = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def load(
    path: str | Path, split: str | None = None, strict: bool = False, image_folder: str | Path | None = None
) -> Dataset:
    """Read a LLaVA file. "fit" and "val" are split off by image; any other split name reads all samples.

    image_folder: the folder that image paths are relative to; by default the folder of the file.

    Raises:
        DataError: not a LLaVA file, or a malformed row (the message names its number); with `strict`, also for a missing
            image.
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
            samples.append(Sample(images, messages, references, (where,)))
    name = f"{file.stem}/{split}" if split in ("fit", "val") else file.stem
    return Dataset(name, dataset_task(samples), cut(samples, split, folder), skipped)


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
    return normal_messages(raw, n_images, where)


def _parts(value: str) -> list[dict]:
    """The parts of a value: "<image>\\nWhat?" becomes [{"type": "image"}, {"type": "text", "text": "\\nWhat?"}]."""
    pieces = value.split(IMAGE_TAG)
    parts = []
    for i, piece in enumerate(pieces):
        if piece.strip():
            parts.append({"type": "text", "text": piece})
        if i < len(pieces) - 1:
            parts.append({"type": "image"})
    return parts
