"""JSON lines, one row per line. `rows.RowReader` knows the fields. Image paths are relative to the folder of the file."""

from pathlib import Path

from nanochat.data.rows import read_rows
from nanochat.data.sample import Dataset
from nanochat.data.splits import whole_split
from nanochat.files import DataError, json_lines

rows = json_lines


def load(path: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Read a .jsonl file. "fit" and "val" are cut from it by image.

    Raises:
        DataError: there is no such file or split, or a row is malformed (the message names file and line); with `strict`,
            also for a missing image.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{file}: there is no such .jsonl file")
    name = f"{file.parent.resolve().name}/{file.stem}"
    return read_rows(rows(file), file.parent, strict, name, whole_split(file, split, file.stem))
