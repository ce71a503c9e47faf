"""Safe use of files: atomic writes, paths that stay inside their folder, JSON that is checked. Imports nothing of the project."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochat.errors import UserError


class DataError(UserError):
    """Data that cannot be used; the message names the file and the row."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, to write the new content of `path` to.

    At the end of the block it is synced to disk and renamed to `path`. If the block fails, it is deleted and `path` stays
    as it was. Raises OSError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def existing_file(path: Path) -> Path:
    """The same path. Raises FileNotFoundError if there is no such file."""
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise FileNotFoundError(f"{path} is missing: the dataset is incomplete or of another kind")
    return path


def path_inside(folder: Path, name: object, where: str) -> Path:
    """The path that `name` has below `folder`; the file may be missing. Symbolic links in the folder are followed, since they
    are its owner's. where: "file:line", the start of the error message.

    Raises:
        DataError: `name` is not text, is absolute, or leads out of the folder.
    """
    path = os.path.normpath(name) if isinstance(name, str) else ".."
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise DataError(f"{where}: expected the path of a file below {folder}, found {short_repr(name)}")
    return folder / path


def json_value(text: bytes | str, where: object, expected: str = "JSON") -> Any:
    """The JSON in `text`, of any type. All JSON from outside is read here. expected: for the error message.

    Raises DataError for text that is not JSON, bytes that are not UTF-8, and JSON that is nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise DataError(f"{where}: expected {expected}, found brackets nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: expected {expected}: {error}") from error


def json_object(text: bytes | str, where: object) -> dict:
    """The JSON object in `text`. Raises DataError for other JSON and as `json_value` does."""
    found = json_value(text, where, "a JSON object")
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a JSON object, found {short_repr(found)}")
    return found


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of a file with one JSON object per line. Empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line is not a JSON object in UTF-8.
    """
    with open(existing_file(path), "rb") as lines:  # bytes, so that the message can name a line that is not UTF-8
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, json_object(line, where)


def short_repr(value: object) -> str:
    """repr(value), cut to 80 characters for messages."""
    try:
        text = repr(value)
    except RecursionError:  # JSON of a thousand levels can be read, but not shown
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
