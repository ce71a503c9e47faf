"""Pictures of robot data, decoded once at the size that training needs and kept on disk, so that memory does not limit the data
and a second start decodes nothing.

An entry of the store has the frames of one camera in some episodes, one after the other:

    NAME.npy    (n, S, S, 3) uint8 RGB, letterboxed, numpy's format, memory-mapped when read
    NAME.json   {"format", "about", "frames", "size", "damaged": {episode: why}}

NAME is a SHA-256 over camera, size, and for each episode the SHA-256 of the files that its pictures are in and their places in
them (see digests.py for how large files are known without reading them). So data may be moved, and other numbers in the data
cost nothing. The JSON is written last: an entry is complete or not there. Worker processes decode one episode each and
write it to its place in the file.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nanochat.cache import cache_folder, check_writable, make_folder
from nanochat.data.digests import file_digests
from nanochat.files import DataError, atomic_path, json_object
from nanochat.vision.images import ImageError
from nanochat.vision.letterbox import letterbox, square
from nanochat.workers import default_processes, in_processes

FORMAT = 1  # raise it when the files, or the way from a picture to pixels, change
FEW = 1000  # so many frames are decoded sooner than worker processes start
SHOWN = 3  # episodes that a message about damage names
Track = Callable[..., Iterable]


class PictureSource(Protocol):
    """Where pictures of episodes come from. It is pickled for worker processes."""

    folder: Path

    def pictures(self, number: int, camera: str, frames: Sequence[int]) -> Iterator[bytes | np.ndarray]:
        """The pictures of frames of an episode: encoded, or (H, W, 3) uint8 RGB."""

    def picture_source(self, number: int, camera: str, frames: Sequence[int]) -> tuple[list[Path], str]:
        """(the files that they depend on, where the pictures are in them)."""


@dataclass
class Frames:
    """Pictures of n frames. cameras: name -> (m, S, S, 3) uint8. rows: (n,) int64, where each frame is in these arrays.
    damaged: episode -> why its pictures cannot be read; its frames are not among the n."""

    cameras: dict[str, "np.ndarray | Stacked"]
    rows: np.ndarray
    damaged: dict[int, str]


class Stacked:
    """Arrays (m, ...) of one shape and dtype, read as one after the other. None is copied: they may be files."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays, self.starts = arrays, np.cumsum([0, *map(len, arrays)])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """rows: (n,) int64 -> (n, ...)."""
        found = np.empty((len(rows), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        for array, start, end in zip(self.arrays, self.starts, self.starts[1:], strict=False):
            inside = (rows >= start) & (rows < end)
            found[inside] = array[rows[inside] - start]
        return found


def stacked(parts: Sequence[Frames]) -> Frames:
    """The frames of several data sets with the same cameras, one after the other."""
    if len(parts) == 1:
        return parts[0]
    cameras = {camera: Stacked([part.cameras[camera] for part in parts]) for camera in parts[0].cameras}
    sizes = [len(next(iter(part.cameras.values()))) for part in parts]
    rows = [part.rows + start for part, start in zip(parts, np.cumsum([0, *sizes]), strict=False)]
    return Frames(cameras, np.concatenate(rows), {})


@dataclass(frozen=True)
class Job:
    """An episode of a camera to decode. start: the byte of the file at `path`, which exists, where its first frame goes."""

    path: Path
    camera: str
    number: int
    frames: Sequence[int]
    size: int
    start: int


class FrameStore:
    """The frames of a source in a cache folder.

    cache: the shared cache folder; None for the default. skip_damaged: leave out episodes whose pictures are damaged or
        missing. track: wraps a sequence whose elements are done one after the other, `track(jobs, description="...")`, to show
        progress. say: is told, in a line, what is about to be written and what is left out.
    """

    def __init__(
        self, source: PictureSource, cache: Path | None, skip_damaged: bool, track: Track, say: Callable[[str], None]
    ):
        self.source, self.skip_damaged, self.track, self.say = source, skip_damaged, track, say
        self.folder, self.records = cache_folder("frames", cache), cache_folder("digests", cache)
        self.unreadable: dict[tuple[str, int], str] = {}  # (camera, episode) -> why its files cannot be read

    def read(self, cameras: Sequence[str], episodes: dict[int, Sequence[int]], size: int) -> Frames:
        """The frames of all cameras, decoded now where they are not in the store.

        episodes: number -> which of its frames. size: S.

        Raises:
            DataError: pictures are damaged or missing, and damage is not skipped; or a file of the store is damaged.
            OSError: the store cannot be written. MemoryError: a worker process died.
        """
        names = self.names(cameras, episodes, size)
        missing = [camera for camera in cameras if not (self.folder / f"{names[camera]}.json").is_file()]
        if missing:
            self.write({camera: names[camera] for camera in missing}, episodes, size)
        n, found, damaged = sum(map(len, episodes.values())), {}, {}
        for camera in cameras:
            found[camera], of_camera = self.open(names[camera], n, size)
            damaged |= {number: why for number, why in of_camera.items() if number not in damaged}
        self.check_damage(damaged, len(episodes))
        ends = np.cumsum([len(frames) for frames in episodes.values()])
        spans = zip(episodes, [0, *ends[:-1]], ends, strict=True)
        rows = [np.arange(first, end) for number, first, end in spans if number not in damaged]
        return Frames(found, np.concatenate(rows) if rows else np.arange(0), damaged)

    def names(self, cameras: Sequence[str], episodes: dict[int, Sequence[int]], size: int) -> dict[str, str]:
        """Camera -> the name of its entry."""
        places: dict[tuple[str, int], tuple[list[Path], str]] = {}
        for camera in cameras:
            for number, frames in episodes.items():
                try:
                    places[camera, number] = self.source.picture_source(number, camera, frames)
                except (DataError, FileNotFoundError) as error:
                    self.unreadable[camera, number] = str(error)
                    self.check_damage({number: str(error)}, len(episodes))
                    places[camera, number] = [], "missing"
        files = [path for files, _ in places.values() for path in files]
        digests = file_digests(files, self.source.folder, self.records, self.track)
        names = {}
        for camera in cameras:
            key = hashlib.sha256(json.dumps([FORMAT, camera, size]).encode())
            for number, frames in episodes.items():
                files, place = places[camera, number]
                key.update(json.dumps([len(frames), [digests[path] for path in files], place]).encode())
            names[camera] = key.hexdigest()[:32]
        return names

    def write(self, names: dict[str, str], episodes: dict[int, Sequence[int]], size: int) -> None:
        """Decode the episodes of these cameras into new entries."""
        make_folder(self.folder)
        check_writable(self.folder)
        remove_leftovers(self.folder)
        n = sum(map(len, episodes.values()))
        self.check_space(len(names), n, size)
        with ExitStack() as stack:
            paths = {
                camera: stack.enter_context(atomic_path(self.folder / f"{name}.npy")) for camera, name in names.items()
            }
            for path in paths.values():
                header = np.lib.format.open_memmap(path, "w+", np.uint8, (n, size, size, 3)).offset
                stack.enter_context(locked(path))
            jobs = self.jobs(paths, episodes, size, header)
            damaged: dict[str, dict[int, str]] = {
                camera: {number: why for (c, number), why in self.unreadable.items() if c == camera} for camera in names
            }
            for _, (job, why) in zip(
                self.track(jobs, description="decoding pictures"), self.decoded(jobs), strict=True
            ):
                if why:
                    damaged[job.camera][job.number] = why
                    self.check_damage({job.number: why}, len(episodes))
            if self.names(list(names), episodes, size) != names:
                raise DataError(f"{self.source.folder} was changed while its pictures were decoded: run again")
        for camera, name in names.items():
            about = f"{self.source.folder.absolute()}: {n:,} frames of {camera} at {size} pixels"
            content = {"format": FORMAT, "about": about, "frames": n, "size": size, "damaged": damaged[camera]}
            with atomic_path(self.folder / f"{name}.json") as new:
                new.write_text(json.dumps(content))

    def jobs(self, paths: dict[str, Path], episodes: dict[int, Sequence[int]], size: int, header: int) -> list[Job]:
        """header: bytes before the first frame."""
        found = []
        for camera, path in paths.items():
            start = header
            for number, frames in episodes.items():
                if (camera, number) not in self.unreadable:
                    found.append(Job(path, camera, number, frames, size, start))
                start += len(frames) * size * size * 3
        return found

    def decoded(self, jobs: list[Job]) -> Iterator[tuple[Job, str]]:
        """(job, why its pictures cannot be read, or "") as they are done."""
        if sum(len(job.frames) for job in jobs) <= FEW:
            yield from ((job, decode(self.source, job)) for job in jobs)
        elif jobs:
            yield from in_processes(decode_here, jobs, default_processes(), set_source, (self.source,))

    def check_space(self, n_cameras: int, n: int, size: int) -> None:
        """Says how much is about to be written. Raises OSError where the disk has less room."""
        needed, free = n_cameras * n * size * size * 3 / 1e9, shutil.disk_usage(self.folder).free / 1e9
        cameras = f"{n_cameras} cameras" if n_cameras > 1 else "1 camera"
        self.say(
            f"decoding {n:,} frames of {cameras} at {size} pixels: {needed:,.2f} GB in {self.folder}, which further runs use "
            "(nanochat cache lists and clears it)"
        )
        if needed > free:
            raise OSError(
                f"{self.folder} has {free:,.2f} GB free, and decoded pictures need {needed:,.2f} GB: choose another --cache, a "
                "smaller --image-size, fewer --cameras or a lower --fps, or clear old ones with nanochat cache --clear"
            )

    def open(self, name: str, n: int, size: int) -> tuple[np.ndarray, dict[int, str]]:
        """((n, S, S, 3) uint8, memory-mapped; the damaged episodes) of an entry. Raises DataError where it is damaged."""
        path, array = self.folder / f"{name}.npy", None
        content = json_object(path.with_suffix(".json").read_bytes(), path.with_suffix(".json"))
        with suppress(OSError, ValueError, EOFError):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array is None or (array.shape, array.dtype) != ((n, size, size, 3), np.uint8):
            raise DataError(f"{path} is damaged: nanochat cache --clear frames/{name[:12]} deletes it; then run again")
        with suppress(OSError):  # when it was last used, for `nanochat cache`
            os.utime(path.with_suffix(".json"))
        return array, {int(number): why for number, why in content.get("damaged", {}).items()}

    def check_damage(self, damaged: dict[int, str], n_episodes: int) -> None:
        """Raises DataError for damage unless it is skipped, and if nothing else is left."""
        if damaged and not self.skip_damaged:
            why = next(iter(damaged.values()))
            raise DataError(f"{why} (--skip-damaged leaves out episodes whose pictures are damaged or missing)")
        if damaged and len(damaged) == n_episodes:
            why = next(iter(damaged.values()))
            raise DataError(f"all {n_episodes} episodes have damaged or missing pictures, the first: {why}")


def skipped_line(damaged: dict[int, str], n_episodes: int) -> str:
    """What --skip-damaged left out, as a line for the screen."""
    more = f", and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    named = "; ".join(list(damaged.values())[:SHOWN])
    return f"left out {len(damaged)} of {n_episodes} episodes whose pictures are damaged or missing: {named}{more}"


def decode(source: PictureSource, job: Job) -> str:
    """Decode an episode and write it to its place. Returns why it cannot be read, or ""."""
    done = 0
    try:
        with job.path.open("r+b") as file:
            file.seek(job.start)
            for picture in source.pictures(job.number, job.camera, job.frames):
                file.write(squared(picture, job.size).tobytes())
                done += 1
    except ImageError as error:
        frame = job.frames[done]
        return f"{source.folder}: episode {job.number}: frame {frame} of the camera {job.camera}: {error}"
    except (DataError, FileNotFoundError) as error:
        return str(error)
    return ""


def squared(picture: bytes | np.ndarray, size: int) -> np.ndarray:
    """(S, S, 3) uint8 RGB, letterboxed: the pixels that a policy sees where it runs. Raises ImageError for a damaged picture."""
    return (square(picture, size) if isinstance(picture, bytes) else letterbox(picture, size))[0]


_source: PictureSource  # of a worker process


def set_source(source: PictureSource) -> None:
    global _source
    _source = source


def decode_here(job: Job) -> tuple[Job, str]:
    return job, decode(_source, job)


class locked:
    """A lock on a file while it is written, so that `remove_leftovers` leaves it alone."""

    def __init__(self, path: Path):
        self.file = path.open("rb")

    def __enter__(self) -> None:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        self.file.close()


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs have left: unfinished files that no process has locked."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
