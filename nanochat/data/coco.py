"""Captions in the form of COCO (Chen et al. 2015, arXiv 1504.00325): {"images": [{"id", "file_name"}], "annotations":
[{"image_id", "caption"}]}."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nanochat.data.sample import field_names
from nanochat.files import DataError, short_repr


def image_folder(file: Path) -> Path:
    """The folder with the pictures of a file: COCO keeps them next to the folder annotations/."""
    return file.parent.parent if file.absolute().parent.name == "annotations" else file.parent


def rows(file: Path, found: dict, folder: Path) -> Iterator[tuple[str, dict]]:
    """("file: annotation n", {"image", "caption"}). Pictures are looked for in `folder` and in the folders in it.

    Raises:
        DataError: it is another kind of JSON object, or an annotation is malformed or names no image.
    """
    images, annotations = found.get("images"), found.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise DataError(
            f'{file}: expected a list of rows, or captions as in COCO ({{"images", "annotations"}}), found an object with '
            f"{field_names(found)}"
        )
    names = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise DataError(f"{file}: image {number} must have 'id' and 'file_name', found {short_repr(image)}")
        names[as_id(image.get("id"))] = image["file_name"]
    names.pop(None, None)
    folders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    folders = [
        name for name in folders if name in re.split(r"[\W_]+", file.stem)
    ] or folders  # train2017 of captions_train2017.json
    for number, row in enumerate(annotations):
        where = f"{file}: annotation {number}"
        if not isinstance(row, dict) or "caption" not in row:
            kind = field_names(row) if isinstance(row, dict) else short_repr(row)
            raise DataError(f"{where}: expected a caption (boxes and masks are not read), found {kind}")
        name = names.get(as_id(row.get("image_id")))
        if name is None:
            raise DataError(f"{where}: there is no image with the id {short_repr(row.get('image_id'))}")
        yield where, {"image": located(folder, name, folders, where), "caption": row["caption"]}


def as_id(value: object) -> str | None:
    """7 and "7" are one id; None for what is none."""
    return str(value) if isinstance(value, (int, str)) else None


def located(folder: Path, name: str, folders: list[str], where: str) -> str:
    """The path of a picture below `folder`: as it is named, or in one of the folders there.

    Raises:
        DataError: it is in several of them.
    """
    if os.path.isfile(folder / name):
        return name
    found = [f"{inner}/{name}" for inner in folders if os.path.isfile(folder / inner / name)]
    if len(found) > 1:
        raise DataError(f"{where}: found both {' and '.join(found[:2])}: write the folder into 'file_name'")
    return found[0] if found else name
