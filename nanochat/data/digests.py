"""The SHA-256 of files, without reading files again that were read before.

For each folder of data, digests/NAME.json in the cache holds size, time stamps, inode and SHA-256 of its files. A file
whose size, time stamps and inode are still the same is not read again: the system renews a file's change time (ctime) at every
write, and a program cannot set it. git's index knows its files in the same way. A file that changed in the last two seconds is
read at every start, because the clock of a file system is coarse.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from nanochat.cache import make_folder
from nanochat.errors import UserError
from nanochat.files import atomic_path, existing_file, json_object, sha256

SETTLED = 2_000_000_000  # nanoseconds


def file_digests(
    files: Sequence[Path],
    folder: Path,
    records: Path,
    track: Callable[..., Iterable] = lambda files, description: files,
) -> dict[Path, str]:
    """File -> its SHA-256 in hexadecimal digits.

    folder: of the data, which names the record. records: the folder of the records. track: wraps the files that must be
    read, to show progress. Raises FileNotFoundError for a missing file.
    """
    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    record = records / f"{name}.json"
    known = read_record(record)
    files = list(dict.fromkeys(files))
    marks = {path: mark(path) for path in files}
    found = {path: known[str(path)][-1] for path in files if known.get(str(path), [])[:-1] == marks[path]}
    unread = [path for path in files if path not in found]
    for path in track(unread, description="reading files") if unread else ():
        found[path] = sha256(path)
        if mark(path) == marks[path] and time.time_ns() - max(marks[path][1:3]) > SETTLED:
            known[str(path)] = [*marks[path], found[path]]
    if unread:
        with suppress(OSError):  # a cache that cannot be written makes the next start slower, nothing else
            make_folder(records)
            with atomic_path(record) as new:
                new.write_text(json.dumps({"about": f"checksums of the files in {folder.absolute()}", "files": known}))
    return found


def mark(path: Path) -> list[int]:
    """What changes when the content of a file does: [size, modification time, change time, inode]."""
    found = os.stat(existing_file(path))
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def read_record(path: Path) -> dict[str, list]:
    """File -> [*mark, digest]; nothing where the record is missing or damaged."""
    with suppress(OSError, UserError):
        files = json_object(path.read_bytes(), path).get("files")
        if isinstance(files, dict) and all(isinstance(row, list) and len(row) == 5 for row in files.values()):
            return files
    return {}
