"""A JSON file: a list of rows, such as LLaVA's conversations {"id", "image", "conversations": [{"from", "value"}]} (Liu et al.
2023, https://github.com/haotian-liu/LLaVA), or captions in the form of COCO (see `coco`).

Beyond LLaVA, "image" may be a list of images, and "references" may list all acceptable answers.
"""

from collections.abc import Iterator
from pathlib import Path

from nanochat.data import coco
from nanochat.data.rows import read_rows
from nanochat.data.sample import Dataset
from nanochat.data.splits import whole_split
from nanochat.files import DataError, json_value, short_repr


def load(
    path: str | Path, split: str | None = None, strict: bool = False, image_folder: str | Path | None = None
) -> Dataset:
    """Read a .json file. "fit" and "val" are cut from it by image.

    image_folder: the folder that image paths are relative to; by default the folder of the file.

    Raises:
        DataError: neither a list of rows nor COCO captions, no such split, or a malformed row (the message names its
            number); with `strict`, also for a missing image.
    """
    file = Path(path).expanduser()
    found = read_json(file)
    is_coco = isinstance(found, dict)
    folder = Path(image_folder).expanduser() if image_folder is not None else file.parent
    if is_coco and image_folder is None:
        folder = coco.image_folder(file)
    rows = coco.rows(file, found, folder) if isinstance(found, dict) else list_rows(file, found)
    return read_rows(rows, folder, strict, file.stem, whole_split(file, split, file.stem), merge=is_coco)


def read_json(file: Path) -> list | dict:
    """Raises DataError for what is not JSON, or neither a list nor an object."""
    found = json_value(file.read_bytes(), file, "a list of rows in JSON (one object per line belongs in a .jsonl file)")
    if not isinstance(found, (list, dict)):
        raise DataError(f"{file}: expected a list of rows, such as LLaVA's conversations, found {short_repr(found)}")
    return found


def list_rows(file: Path, found: list) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(found):
        where = f"{file}: row {number}"
        if not isinstance(row, dict):
            raise DataError(
                f'{where}: expected an object, such as {{"image", "conversations"}}, found {short_repr(row)}'
            )
        yield where, row
