"""Hugging Face datasets: parquet files, folders written by `save_to_disk`, and names on the hub, with `messages` and `images`
columns (the form that TRL trains on), or with `image` and `question`/`answer` or `caption`.

Rows are read as Arrow data without the library's image decoding, so images stay encoded; all of their bytes are held in
memory. Local files are opened by pyarrow: the datasets library would take a path as a pattern of glob ("set[1]" means set1).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanochat.data.rows import read_rows
from nanochat.data.sample import Dataset
from nanochat.data.splits import choose_split, whole_split
from nanochat.errors import install
from nanochat.files import DataError, json_object

ROWS_AT_ONCE = 100
REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(source: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Read a .parquet file, or a dataset on the hub ("owner/name").

    "fit" and "val" are cut from "train" by image if the source has no validation split.

    Raises:
        ImportError: pyarrow, or for the hub the datasets library, is not installed.
        DataError: the source cannot be read, has no such split, or a row is malformed (the message names its number);
            with `strict`, also for a missing image.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return read_rows(rows(path), path.parent, strict, path.stem, whole_split(path, split, path.stem))
    datasets, name = _datasets(), str(source)
    chosen, part = choose_split(source, hub_splits(name), split)
    try:
        table = datasets.load_dataset(name, split=chosen).with_format("arrow")
    except Exception as error:  # the library raises many types
        raise _unreadable(source, error) from error
    batches = table.iter(ROWS_AT_ONCE)
    # images that are not stored in the rows must be where the library unpacked them
    root = Path(datasets.config.HF_CACHE_HOME)
    shown = name.rpartition("/")[2] + ("" if part else f"/{chosen}")
    return read_rows(_numbered(name, batches), root, strict, shown, part)


def hub_splits(name: str) -> list[str]:
    """The splits of a dataset on the hub. Raises DataError for a name that is no repository, or cannot be read."""
    if not REPO.fullmatch(name):
        raise DataError(
            f"hf:{name}: expected hf:owner/name, or hf: and an existing file or folder; there is none of this name"
        )
    datasets = _datasets()
    try:
        return list(datasets.get_dataset_split_names(name))
    except Exception as error:
        raise _unreadable(name, error) from error


def rows(file: Path) -> Iterator[tuple[str, dict]]:
    """("file: row n", row) of a parquet file."""
    pyarrow = _pyarrow()
    with open(file, "rb") as opened, _arrow_errors(file, "parquet"):
        batches = pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=ROWS_AT_ONCE)
        yield from _numbered(file, batches)


def saved_rows(folder: Path) -> Iterator[tuple[str, dict]]:
    """("folder: row n", row) of a dataset that `save_to_disk` has written."""
    pyarrow = _pyarrow()
    state = folder / "state.json"
    files = json_object(state.read_bytes(), state).get("_data_files")
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and os.path.basename(name) == name for name in names):
        raise DataError(f"{state}: '_data_files' must list the files of the dataset")
    number = 0
    for name in names:
        with _arrow_errors(folder / name, "an Arrow stream"), open(folder / name, "rb") as opened:
            for where, row in _numbered(folder, pyarrow.ipc.open_stream(opened), number):
                yield where, row
                number += 1


def _numbered(source: object, batches, number: int = 0) -> Iterator[tuple[str, dict]]:
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{source}: row {number}", row
            number += 1


@contextmanager
def _arrow_errors(file: Path, kind: str) -> Iterator[None]:
    """Makes a DataError of what pyarrow raises for a damaged file: its own errors, and many of Python's."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"{file}: cannot be read as {kind}: {_one_line(error)}") from error


def _pyarrow():
    """Imported only when used, because the import takes a second."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Hugging Face data needs the library pyarrow: {install('train')}") from error
    return pyarrow


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data on the hub needs the library datasets: {install('train')}") from error
    return datasets


def _unreadable(source: object, error: Exception) -> Exception:
    """What to raise for an error of the datasets library; bugs of Python's own kinds stay what they are."""
    if isinstance(error, (DataError, ImportError, MemoryError)):
        return error
    return DataError(f"{source}: the datasets library cannot read it: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
