"""JSON lines, one row per line: {"image", "question", "answer"} as for DAQUAR, or {"image", "captions": [...]} (also
{"image", "caption"}) as for Flickr8k. Image paths are relative to the folder of the file.
"""

from pathlib import Path

from nanochat.data.sample import Dataset, cut, find_image, row_sample
from nanochat.files import DataError, json_lines


def load(path: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Read a .jsonl file, or {split}.jsonl in a folder.

    "fit" and "val" are split off by image: from train.jsonl if the folder has no file of that name, or from a single file
    of another name. For any other split name a file is read as a whole.

    Raises:
        DataError: there is no such file or split, or a row is malformed (the message names file and line); with `strict`,
            also for a missing image.
    """
    file, part = _choose(Path(path).expanduser(), split)
    samples, skipped, tasks = [], 0, set()
    for where, row in json_lines(file):
        image = find_image(file.parent, row.get("image"), where, strict)
        task, sample = row_sample(row, image, where)
        tasks.add(task)
        if len(tasks) > 1:
            raise DataError(f"{where}: the file has questions and captions: split it into one file for each")
        if image is None:
            skipped += 1
        else:
            samples.append(sample)
    name = f"{file.parent.resolve().name}/{part or file.stem}"
    return Dataset(name, tasks.pop() if tasks else "vqa", cut(samples, part, file.parent), skipped)


def _choose(path: Path, split: str | None) -> tuple[Path, str | None]:
    """The file to read, and "fit" or "val" if that split has to be cut from it."""
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
    raise DataError(f"{path}: there is no {split}.jsonl; the splits in this folder are: {found}")
