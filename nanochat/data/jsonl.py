"""JSON lines, one row a line: {"image", "question", "answer"} as for DAQUAR, or {"image", "captions": [...]} (also
{"image", "caption"}) as for Flickr8k. Image paths are relative to the folder of the file.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from nanochat.data.sample import DataError, Dataset, cut, find_image, row_sample


def load(path: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Samples of a .jsonl file, or of {split}.jsonl in a folder.

    "fit" and "val" are cut by image from train.jsonl where the folder has no files of these names, and from a file that
    is named otherwise. For every other split name a file is read whole.

    Raises:
        DataError: no such file or split; a malformed row, with file and line; with `strict`, a missing picture.
    """
    file, part = _choose(Path(path).expanduser(), split)
    samples, skipped, tasks = [], 0, set()
    for number, row in _rows(file):
        where = f"{file}:{number}"
        image = find_image(file.parent, row.get("image"), where, strict)
        task, sample = row_sample(row, image, where)
        tasks.add(task)
        if len(tasks) > 1:
            raise DataError(f"{where}: questions and captions in one file; it has to be of one kind")
        if image is None:
            skipped += 1
        else:
            samples.append(sample)
    name = f"{file.parent.resolve().name}/{part or file.stem}"
    return Dataset(name, tasks.pop() if tasks else "vqa", cut(samples, part, file.parent), skipped)


def _choose(path: Path, split: str | None) -> tuple[Path, str | None]:
    """The file to read, and "fit" or "val" if it is to be cut."""
    if path.is_file():
        return path, split if split in ("fit", "val") and split != path.stem else None
    if not path.is_dir():
        raise DataError(f"{path}: there is no such .jsonl file or folder")
    split = split or "train"
    if (path / f"{split}.jsonl").is_file():
        return path / f"{split}.jsonl", None
    if split in ("fit", "val") and (path / "train.jsonl").is_file():
        uncut = split == "fit" and (path / "val.jsonl").is_file()
        return path / "train.jsonl", None if uncut else split
    found = ", ".join(sorted(file.stem for file in path.glob("*.jsonl"))) or "none"
    raise DataError(f"{path}: there is no {split}.jsonl; the splits in this folder: {found}")


def _rows(file: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, row); empty lines are passed over."""
    with open(file, "rb") as lines:  # bytes, so that a line of broken UTF-8 can be named
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}:{number}: not a line of JSON: {error}") from error
            if not text:
                continue
            if not isinstance(row, dict):
                raise DataError(f'{file}:{number}: expected an object with "image" and texts, found {line[:60]!r}')
            yield number, row
