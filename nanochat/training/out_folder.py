"""The checkpoint folder of a run belongs to one process: it is locked, and known to be writable, before any work is done.

The lock is on a file next to the folder (`.NAME.lock`), since the folder itself is replaced at every save. The system releases it
when the process ends, however it ends.
"""

import atexit
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanochat.checkpoint import readable
from nanochat.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # file systems without locks
_held: dict[Path, tuple[int, list[Path]]] = {}  # lock file -> (its descriptor, folders that were made for it)
_process = os.getpid()


def hold_folder(out: Path) -> None:
    """Lock the checkpoint folder for this process, until `release_folder` or the end of the process. Makes its parents.

    A process that has the lock may ask for it again. Raises UserError where another process trains in the folder, OSError
    where nothing can be written there.
    """
    path = lock_path(out)
    if path in _held:
        return
    made = [parent for parent in path.parents if not parent.exists()]  # from the innermost on
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = lock(path, out)
    except OSError as error:
        remove_empty(made)
        # mkdir of a path below a file says that the file exists
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise OSError(f"{out} cannot be written: {reason} ({path.parent}): choose another --out") from error
    _held[path] = handle, made


def lock(path: Path, out: Path) -> int:
    """The descriptor of the locked file. Its content, the number of the process, is for the message to a second one."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(handle, 20, 0).decode(errors="replace").strip()
                raise UserError(
                    f"another process ({owner or 'just started'}) is training in {out}: wait for it, or choose another --out"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)  # also finds a full disk
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner has just finished and removed it


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def release_folder(out: Path) -> None:
    """Undo `hold_folder`. Parents that it made and that are still empty are removed."""
    handle, made = _held.pop(lock_path(out), (None, []))
    if handle is not None:
        lock_path(out).unlink(missing_ok=True)  # before it is unlocked: nobody else can have it
        os.close(handle)
        remove_empty(made)


@atexit.register
def release_all() -> None:
    if os.getpid() != _process:  # a child that was forked
        return
    for path in list(_held):
        handle, _ = _held.pop(path)
        path.unlink(missing_ok=True)
        os.close(handle)


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not empty, or not made
            return


def lock_path(out: Path) -> Path:
    folder = out.absolute().resolve()  # a link to a folder means the folder
    if not folder.name:
        raise UserError(f"{out} cannot be a checkpoint folder: choose another --out")
    return folder.with_name(f".{folder.name}.lock")


def check_new(out: Path, resume: str) -> None:
    """Raises FileExistsError where a new run would replace something. resume: the command that resumes the run in `out`."""
    place = readable(out.absolute())  # a run that was killed while it saved counts as well
    if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
        return
    if place.is_dir():
        raise FileExistsError(f"{out} exists: resume the run in it with: {resume}; or choose another --out")
    if place.exists() or place.is_symlink():
        raise FileExistsError(f"{out} exists and is no folder: choose another --out")


@contextmanager
def released_at_end(out: Path) -> Iterator[None]:
    """The lock of `hold_folder` ends with the block, however the block ends."""
    try:
        yield
    finally:
        release_folder(out)
