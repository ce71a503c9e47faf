"""What is in a folder of demonstrations, as it is: cameras, numbers, tasks, rates, gaps, and what is broken.

Only a folder that is no data set at all is an error. What is broken inside of one is listed, episode by episode, because whoever
mends a recording wants to know all of it. Numbers are read of all episodes, pictures only where they are asked for.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.data.bridge import CAMERA, FPS, BridgeFrames
from nanochat.data.columns import column_names, number_names, places_of, pq, read_parquet, to_numpy
from nanochat.data.lerobot import Episode, RobotDataset
from nanochat.errors import UserError
from nanochat.files import DataError
from nanochat.vision.images import open_image

LATE = 1.5  # times the usual time between two frames: more is a gap


@dataclass
class Camera:
    """kind: video, or image (in the tables or in files). width, height: in pixels, 0 if unknown. codec, fps: of a video; "" and 0
    for images."""

    name: str
    kind: str
    width: int = 0
    height: int = 0
    codec: str = ""
    fps: float = 0.0


@dataclass
class Numbers:
    """A column of D numbers a frame: least, greatest, mean and standard deviation of each over the frames where it is finite (NaN
    if it never is), and in how many frames it is not. names: of the D numbers; [] if the data names none."""

    name: str
    names: list[str]
    low: list[float]
    high: list[float]
    mean: list[float]
    std: list[float]
    not_finite: list[int]


@dataclass
class Contents:
    """kind: the format. robot: as the data names it, or "". fps: frames per second. unreadable: columns that are no numbers.
    lengths: episode -> its frames, of those that can be read. tasks: instruction -> [episodes, frames]. has_times: whether frames
    have time stamps. gaps, problems: a line for each."""

    kind: str
    robot: str
    fps: float
    cameras: list[Camera]
    unreadable: list[str]
    lengths: dict[int, int] = field(default_factory=dict)
    numbers: list[Numbers] = field(default_factory=list)
    tasks: dict[str, list[int]] = field(default_factory=dict)
    has_times: bool = False
    gaps: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect_folder(folder: Path, track: Callable[[range], Iterable[int]] = iter) -> Contents:
    """Read the numbers of all episodes. track: wraps the episode numbers, to show progress.

    Raises FileNotFoundError, DataError: the folder is no data set, or the files that describe it are broken.
    """
    parts = open_parts(folder)
    found = Contents(parts.kind, parts.robot, parts.fps, [], parts.unreadable)
    columns: dict[str, list[np.ndarray]] = {}
    for number in track(range(len(parts))):
        try:
            episode = parts.numbers(number)
            times = parts.times(number)
        except (UserError, OSError) as error:
            found.problems.append(str(error))
            continue
        found.lengths[number] = parts.length(number)
        count_tasks(found.tasks, episode, found.lengths[number])
        found.has_times |= times is not None
        found.gaps += gaps(times, parts.fps, f"episode {number}")
        for key, values in episode.columns.items():
            columns.setdefault(key, []).append(values.reshape(len(values), -1).astype(np.float64))
            found.problems += not_finite(columns[key][-1], f"episode {number}: {key}")
    found.numbers = [numbers_of(key, parts.names_of.get(key, []), np.concatenate(columns[key])) for key in columns]
    for name in parts.cameras:
        camera, problems = parts.camera(name)
        found.cameras.append(camera)
        found.problems += problems
    return found


def numbers_of(name: str, names: list[str], values: np.ndarray) -> Numbers:
    """values: (n, D) float64."""
    finite = np.isfinite(values)
    kept = np.where(finite, values, np.nan)
    counts = finite.sum(0)
    with np.errstate(invalid="ignore"):
        mean = np.nansum(kept, 0) / counts  # NaN of no frames at all
        std = np.sqrt(np.nansum((kept - mean) ** 2, 0) / counts)
    low = np.where(finite, values, np.inf).min(0)
    high = np.where(finite, values, -np.inf).max(0)
    low, high = (np.where(counts > 0, limit, np.nan).tolist() for limit in (low, high))
    return Numbers(name, names, low, high, mean.tolist(), std.tolist(), (len(values) - counts).tolist())


def not_finite(values: np.ndarray, where: str) -> list[str]:
    """A line if any of (T, D) values is NaN or infinite."""
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return []
    frame, number = bad[0]
    return [
        f"{where} has {values[frame, number]} as number {number + 1} of frame {frame} ({len(np.unique(bad[:, 0]))} such "
        "frames in this episode)"
    ]


def gaps(times: np.ndarray | None, fps: float, where: str) -> list[str]:
    """A line for each place where the time stamps, (T,) seconds, jump or do not increase. None: there are no time stamps."""
    if times is None:
        return []
    steps = np.diff(times)
    odd = np.flatnonzero(~((steps > 0) & (steps <= LATE / fps)))  # also where a step is NaN
    return [
        f"{where}: {steps[frame]:.3f} s between frames {frame} and {frame + 1}, {1 / fps:.3f} s expected"
        for frame in odd
    ]


def count_tasks(tasks: dict[str, list[int]], episode: Episode, length: int) -> None:
    """Adds the episode to tasks: instruction -> [episodes, frames]."""
    texts = episode.frame_tasks or [episode.task] * length
    for task in dict.fromkeys(texts):
        count = tasks.setdefault(task, [0, 0])
        count[0] += 1
        count[1] += texts.count(task)


# ---- the two formats


def open_parts(folder: Path) -> "LeRobotParts | BridgeParts":
    if (folder / "frames.jsonl").is_file():
        return BridgeParts(folder)
    if not (folder / "meta").is_dir():
        found = "a file" if folder.is_file() else "another folder" if folder.is_dir() else "nothing"
        raise UserError(
            f"{folder} must be the folder of a LeRobot dataset (meta/info.json) or of BridgeData frames (frames.jsonl), found "
            f"{found}"
        )
    return LeRobotParts(folder)


class LeRobotParts:
    """The parts of a LeRobot dataset, each of which may be broken."""

    def __init__(self, folder: Path):
        self.dataset = dataset = RobotDataset(folder)
        robot = dataset.info.get("robot_type")
        self.kind, self.robot = f"LeRobot {dataset.info['codebase_version']}", robot if isinstance(robot, str) else ""
        self.fps, self.cameras, self.unreadable = float(dataset.fps), dataset.cameras, dataset.unreadable()
        self.names_of = {key: number_names(dataset.features[key], width) for key, width in dataset.columns.items()}
        self._stamps: tuple[Path | None, dict[int, np.ndarray] | None] = (None, None)  # of the last file

    def __len__(self) -> int:
        return len(self.dataset)

    def length(self, number: int) -> int:
        return self.dataset.episodes[number].length

    def numbers(self, number: int) -> Episode:
        """The episode without pictures."""
        return self.dataset.episode(number, [])

    def times(self, number: int) -> np.ndarray | None:
        """(T,) seconds, as they stand in the data; None if there are none."""
        path = self.dataset.episodes[number].path
        if path != self._stamps[0]:  # a file may have a thousand episodes: it is read once
            self._stamps = (path, stamps_by_episode(path))
        return None if self._stamps[1] is None else self._stamps[1].get(number)

    def camera(self, name: str) -> tuple[Camera, list[str]]:
        """(what is known of it, a line for each episode whose video is missing, unreadable or too short)."""
        if self.dataset.features[name]["dtype"] == "image":
            return image_camera(self, name)
        found, problems, headers = Camera(name, "video"), [], {}
        for number, episode in enumerate(self.dataset.episodes):
            try:
                path, start = self.dataset.video(number, name)
                headers[path] = header, seconds = headers.get(path) or video_header(path)
            except ImportError as error:
                return found, [str(error)]
            except (UserError, OSError) as error:
                problems.append(str(error))
                continue
            found, last = replace(header, name=name), start + (episode.length - 1) / self.fps
            if 0 < seconds < last:
                problems.append(
                    f"{path}: episode {number}: the video ends at {seconds:.2f} s, but the last frame is at {last:.2f} s"
                )
        return found, problems

    def picture(self, number: int, frame: int, camera: str) -> Image.Image:
        """Raises UserError, OSError or ImportError if it cannot be read."""
        return open_image(next(self.dataset.pictures(number, camera, [frame])))


class BridgeParts:
    """The same of a folder of BridgeData frames."""

    kind, robot, fps, cameras = "BridgeData V2 frames", "WidowX", FPS, [CAMERA]
    names_of: dict[str, list[str]] = {}

    def __init__(self, folder: Path):
        self.data = BridgeFrames(folder)
        if not self.data.episodes:
            raise DataError(f"{folder}/frames.jsonl has no rows: expected a row for each frame")
        self.unreadable = self.data.unreadable

    def __len__(self) -> int:
        return len(self.data)

    def length(self, number: int) -> int:
        return len(self.data.paths[number])

    def numbers(self, number: int) -> Episode:
        return self.data.episodes[number]

    def times(self, number: int) -> None:
        return None

    def camera(self, name: str) -> tuple[Camera, list[str]]:
        camera, problems = image_camera(self, name)
        missing = [path for paths in self.data.paths for path in paths if not path.is_file()]
        return camera, problems + [f"{path} is missing" for path in missing]

    def picture(self, number: int, frame: int, camera: str) -> Image.Image:
        return open_image(next(self.data.pictures(number, camera, [frame])))


def image_camera(parts: "LeRobotParts | BridgeParts", name: str) -> tuple[Camera, list[str]]:
    """What the first picture of a camera says; a line if it cannot be read."""
    if not len(parts):
        return Camera(name, "image"), []
    try:
        width, height = parts.picture(0, 0, name).size
    except (UserError, OSError) as error:
        return Camera(name, "image"), [f"episode 0, frame 0 of the camera {name}: {error}"]
    return Camera(name, "image", width, height), []


def stamps_by_episode(path: Path) -> dict[int, np.ndarray] | None:
    """Episode -> (T,) time stamps in a file of frames; None if it has none."""
    if not {"timestamp", "episode_index"} <= set(column_names(path)):
        return None
    table = read_parquet(pq.read_table, path, columns=["timestamp", "episode_index"], partitioning=None)
    stamps, episode = (
        to_numpy(table[key], f"{path}: {key!r}").ravel()[: len(table)] for key in ("timestamp", "episode_index")
    )
    return {int(number): stamps[places].astype(np.float64) for number, places in places_of(episode).items()}


def video_header(path: Path) -> tuple[Camera, float]:
    """(a camera without a name, how many seconds the video has, 0 if it does not say). Raises ImportError without PyAV, DataError
    for a file that is no video."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: reading videos needs the library PyAV: pip install av") from error
    try:
        with av.open(str(path.absolute())) as container:  # a relative "concat:a.mp4" would be a protocol of FFmpeg
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError("its codec is unknown")
            codec, rate = stream.codec_context.codec.canonical_name, float(stream.average_rate or 0)
            seconds = float((stream.duration or 0) * stream.time_base)
            return Camera("", "video", stream.width, stream.height, codec, rate), seconds
    except (av.FFmpegError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a video: {' '.join(str(error).split())}") from error


def evenly(lengths: dict[int, int], n: int) -> Iterator[tuple[int, int]]:
    """Up to n evenly spaced frames, as (episode, frame in it). lengths: episode -> its frames."""
    numbers, ends = list(lengths), np.cumsum(list(lengths.values()))
    for place in np.unique(np.linspace(0, ends[-1] - 1, min(n, ends[-1])).round().astype(int)):
        row = int(np.searchsorted(ends, place, side="right"))
        yield numbers[row], int(place - ends[row] + lengths[numbers[row]])
