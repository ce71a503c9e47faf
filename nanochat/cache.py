"""The cache folder that all runs share. What is in it can be made again, so it may be deleted at any time.

    frames/     pictures of robot data, decoded (data/frame_store.py)
    features/   vision vectors of a frozen encoder (training/features.py)
    teacher/    maps of an encoder that another one learns from (training/teacher.py)
    exports/    models exported for ONNX Runtime (export/)
    digests/    the SHA-256 of large files, so that they are not read again to know them (data/digests.py)

It is --cache, else $NANOCHAT_CACHE, else nanochat/ in $XDG_CACHE_HOME, which is ~/.cache by default.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError
from nanochat.files import json_object

KINDS = {
    "frames": "pictures of robot data, decoded",
    "features": "vision vectors of a frozen encoder",
    "exports": "models exported for ONNX Runtime",
    "digests": "checksums of files",
}


def cache_folder(kind: str, chosen: str | Path | None = None) -> Path:
    """The folder for one kind of things. It may be missing. chosen: the shared folder; None or "" for the default."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or os.environ.get("NANOCHAT_CACHE") or Path(base) / "nanochat").expanduser() / kind


def make_folder(place: Path) -> None:
    """Raises OSError where it cannot be made."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the cache {place} cannot be made: {error.strerror}: choose another --cache") from error


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made in the folder: before the work, not after it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"the cache {folder} cannot be written: {error.strerror}: choose another --cache") from error


@dataclass(frozen=True)
class Entry:
    """One thing in the cache. name: kind/NAME, as `clear` takes it. paths: its files or folders. used: when it was written or
    last used, in seconds since 1970."""

    name: str
    about: str
    paths: tuple[Path, ...]
    size: int
    used: float


def entries(chosen: str | Path | None = None) -> list[Entry]:
    """All that is in the cache, the largest first. Files of one entry have the same name up to the suffix."""
    found = []
    for kind, about in KINDS.items():
        groups: dict[str, list[Path]] = {}
        folder = cache_folder(kind, chosen)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            groups.setdefault(path.name.lstrip(".").split(".")[0], []).append(path)
        found += [entry_of(f"{kind}/{name}", about, tuple(paths)) for name, paths in groups.items()]
    return sorted(found, key=lambda entry: -entry.size)


def entry_of(name: str, about: str, paths: tuple[Path, ...]) -> Entry:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else (path,))]
    size, used = 0, 0.0
    for file in files:
        with suppress(OSError):  # another process may delete it now
            size, used = size + file.stat().st_size, max(used, file.stat().st_mtime)
    for path in paths:
        with suppress(OSError, UserError):
            about = str(json_object(path.read_bytes(), path).get("about", about)) if path.suffix == ".json" else about
    if not any(path.suffix == ".json" or path.is_dir() for path in paths):
        about = "left by a run that was stopped, or being written"
    return Entry(name, about, paths, size, used)


def clear(names: list[str], chosen: str | Path | None = None) -> list[Entry]:
    """Delete entries and return them. names: of entries, whole or their beginning ("frames/3f", "features"), or "all".

    Raises UserError for a name that fits nothing, and then deletes nothing.
    """
    found = entries(chosen)
    chosen_ones: dict[str, Entry] = {}
    for name in names:
        fitting = [entry for entry in found if name == "all" or entry.name.startswith(name)]
        if not fitting and name not in ("all", *KINDS):
            raise UserError(f"nothing in the cache is called {name}: nanochat cache lists the names")
        chosen_ones |= {entry.name: entry for entry in fitting}
    for entry in chosen_ones.values():
        # the JSON first: what it describes does not count without it
        for path in sorted(entry.paths, key=lambda path: path.suffix != ".json"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return list(chosen_ones.values())
