"""Tables with a header: captions.csv with file,caption or file,question,answer, and other .csv and .tsv files. An image may
have several rows."""

import csv
from collections.abc import Iterator
from pathlib import Path

from nanochat.data.rows import CAPTION_FIELDS, IMAGE_FIELDS, QUESTION_FIELDS, read_rows
from nanochat.data.sample import Dataset
from nanochat.data.splits import whole_split
from nanochat.files import DataError, short_repr

DELIMITERS = ",;\t|"


def load(path: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Read a table. "fit" and "val" are cut from it by image. The captions of an image are the references of one sample;
    each question is a sample.

    Raises:
        DataError: no such split, the header is unknown, or a row is malformed (the message names the line); with `strict`,
            also for a missing image.
    """
    file = Path(path).expanduser()
    usual = file.stem.lower() in ("captions", "metadata")
    name = file.parent.resolve().name if usual else f"{file.parent.resolve().name}/{file.stem}"
    return read_rows(rows(file), file.parent, strict, name, whole_split(file, split, file.stem), merge=True)


def rows(file: Path) -> Iterator[tuple[str, dict]]:
    """("file:line" where the row ends, {column: text}). Empty lines are skipped."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        line = 1
        try:
            first = text.readline(100_000)
            text.seek(0)
            # a space before a quote does not make the quote a part of the text
            reader = csv.reader(text, delimiter=delimiter(first), strict=True, skipinitialspace=True)
            header = [name.strip().lower() for name in next(reader, ())]
            check_header(file, header)
            for cells in reader:
                line = reader.line_num
                if len(cells) not in (0, len(header)):
                    advice = ": quote texts that contain a comma" if len(cells) > len(header) else ""
                    raise DataError(f"{file}:{line}: expected {len(header)} columns, found {len(cells)}{advice}")
                if cells:
                    yield f"{file}:{line}", dict(zip(header, cells, strict=True))
            line = reader.line_num
        except (csv.Error, UnicodeDecodeError) as error:
            line = reader.line_num if isinstance(error, csv.Error) else line
            raise DataError(f"{file}:{line}: not CSV in UTF-8: {error}") from error


def delimiter(header: str) -> str:
    """The character between the columns of a header; a comma if none of the usual ones gives a known column."""
    for character in DELIMITERS:
        if {name.strip(' "\r\n').lower() for name in header.split(character)} & set(IMAGE_FIELDS):
            if character in header:
                return character
    return ","


def check_header(file: Path, header: list[str]) -> None:
    """Raises DataError for a header without a column of images, or without captions or questions and answers."""
    texts = any(name in header for name in CAPTION_FIELDS)
    texts = texts or any(question in header and answer in header for question, answer in QUESTION_FIELDS)
    if not texts or not any(name in IMAGE_FIELDS or name.endswith("_file_name") for name in header):
        raise DataError(
            f"{file}:1: the header must be file,caption or file,question,answer (docs/DATA.md lists other names), found "
            f"{short_repr(','.join(header)) if header else 'nothing'}"
        )
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}:1: the column {twice!r} is there twice")
