"""A folder of images with captions.csv: columns file,caption or file,question,answer; an image may have several rows."""

import csv
from collections.abc import Iterator
from pathlib import Path

from nanochat.data.sample import Dataset, caption_sample, cut, find_image, text_of, vqa_sample
from nanochat.files import DataError

HEADERS = (("file", "caption"), ("file", "question", "answer"))


def load(path: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Read a folder. "fit" and "val" are split off by image; any other split name reads all samples.

    The captions of an image are the references of one sample; each question is a sample.

    Raises:
        DataError: there is no captions.csv, its header is unknown, or a row is malformed (the message names the line);
            with `strict`, also for a missing image.
    """
    folder = Path(path).expanduser()
    file = folder / "captions.csv"
    if not file.is_file():
        raise DataError(f"{folder}: expected a file captions.csv in this folder")
    samples, skipped = [], 0
    captions: dict[Path, list[tuple[str, str]]] = {}  # image -> (text, its row)
    for where, row in _rows(file):
        image = find_image(folder, row["file"], where, strict)
        texts = {name: text_of(row, name, where) for name in row if name != "file"}
        if image is None:
            skipped += 1
        elif "caption" in texts:
            captions.setdefault(image, []).append((texts["caption"], where))
        else:
            samples.append(vqa_sample(image, texts["question"], texts["answer"], where))
    task = "caption" if captions else "vqa"
    samples += [caption_sample(image, *zip(*rows, strict=True)) for image, rows in captions.items()]
    name = f"{folder.resolve().name}/{split}" if split in ("fit", "val") else folder.resolve().name
    return Dataset(name, task, cut(samples, split, folder), skipped)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file:line" where the row ends, {column: text}). Empty lines are skipped."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = tuple(name.strip().lower() for name in next(reader, ()))
            if header not in HEADERS:
                expected = " or ".join(map(",".join, HEADERS))
                raise DataError(f"{file}:1: the header must be {expected}, found {','.join(header) or 'nothing'}")
            for cells in reader:
                if len(cells) not in (0, len(header)):
                    raise DataError(f"{file}:{reader.line_num}: expected {len(header)} columns, found {len(cells)}")
                if cells:
                    yield f"{file}:{reader.line_num}", dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{file}:{reader.line_num}: not CSV in UTF-8: {error}") from error
