"""Reading robot demonstrations in the format of LeRobot datasets, versions 3.0 and 2.1 (Cadene et al. 2024,
https://github.com/huggingface/lerobot), without the LeRobot library. Cameras may be images or MP4 videos.

Dataset folders are not trusted: nothing is unpickled, lengths and indices are compared with the data, and paths that lead
out of the folder are refused.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat.data.columns import (
    Layout,
    column_names,
    file_layout,
    fill_template,
    is_camera,
    is_feature,
    natural_number,
    pa,
    parquet_errors,
    places_of,
    read_groups,
    read_rows,
    to_numpy,
)
from nanochat.data.language import EVENTS, Asked, from_events
from nanochat.data.pictures import encode_png
from nanochat.data.sample import check_text
from nanochat.data.video import video_pictures
from nanochat.files import DataError, existing_file, json_lines, json_object, path_inside, short_repr

VERSIONS = ("v3.0", "v2.1")
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
TASKS_PATH = "meta/tasks.parquet"
NO_TASK = "do the task"  # the instruction of episodes for which the data has none
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns of every dataset
EPISODE_FIELDS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
READABLE = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the datasets library's type of an image


@dataclass
class Episode:
    """One demonstration of T frames.

    task: the instruction. columns: arrays of float32, int64 or bool, (T,) or (T, D), under LeRobot's names:
        "observation.state", "action", ...
    images: camera -> T encoded RGB images, PNG or JPEG.
    extra: further values, such as {"seed": 7}: text, int or float, each of the same type in all episodes.
    frame_tasks: the instruction of each frame, T texts; empty if it is `task` for all of them.
    name: where the episode comes from, for error messages.
    questions: about the pictures of each frame, (camera, question, answer), T lists; empty if nobody asks. See `language`.
    """

    task: str
    columns: dict[str, np.ndarray]
    images: dict[str, list[bytes]]
    extra: dict = field(default_factory=dict)
    frame_tasks: list[str] = field(default_factory=list)
    name: str = field(default="", compare=False)
    questions: list[list[Asked]] = field(default_factory=list)


@dataclass(frozen=True)
class EpisodeInfo:
    """An episode whose frames are not read yet. tasks: the instructions in it, `task` is the first. row: its row in the table of
    episodes."""

    index: int
    task: str
    tasks: tuple[str, ...]
    length: int
    extra: dict
    path: Path = field(repr=False)
    row: dict = field(repr=False)


class RobotDataset:
    """A LeRobot dataset of version 3.0 or 2.1 in a folder. Frames are read by `episode` and `pictures`.

    fps: frames per second.
    features: column -> {"dtype", "shape", ...}, as in meta/info.json.
    cameras: the columns that are images or videos, without depth maps.
    columns: name -> how many numbers a frame has, for the columns that `episode` reads.
    episodes: an EpisodeInfo for each episode. One without an instruction has NO_TASK.
    tasks: task_index -> instruction; empty if the dataset has no table of them.
    stats: as in meta/stats.json; empty if there is no such file (version 2.1).

    Raises:
        FileNotFoundError: a file of the dataset is missing (the message names it).
        DataError: another version, or files that are broken or contradict each other.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            found = "is a file, expected" if self.folder.exists() else "does not exist: expected"
            raise FileNotFoundError(f"there is no folder {self.folder}: it {found} the folder of a dataset")
        where = self.folder / "meta/info.json"
        self.info = json_object(existing_file(where).read_bytes(), where)
        if self.info.get("codebase_version") not in VERSIONS:
            found, known = self.info.get("codebase_version"), " and ".join(VERSIONS)
            raise DataError(
                f"{where}: the version must be {known}, found {short_repr(found)}: convert it with LeRobot's scripts"
            )
        self.fps, self.features = self.info.get("fps"), self.info.get("features")
        if type(self.fps) not in (int, float) or not 0 < self.fps < 1e6:
            raise DataError(f"{where}: fps must be a number above 0, found {short_repr(self.fps)}")
        if not isinstance(self.features, dict) or not all(map(is_feature, self.features.values())):
            raise DataError(f"{where}: features must be an object of columns, each with a dtype and a shape")
        self.cameras = [key for key, feature in self.features.items() if is_camera(feature)]
        readable = {key: f for key, f in self.features.items() if f["dtype"] in READABLE and key not in BOOKKEEPING}
        self.columns = {key: math.prod(n for n in f["shape"] if type(n) is int) for key, f in readable.items()}
        stats = self.folder / "meta/stats.json"
        self.stats = json_object(stats.read_bytes(), stats) if stats.is_file() else {}
        self.tasks = self._read_tasks()
        self._layouts: dict[Path, Layout] = {}
        self._read: dict[tuple[str, ...], Groups] = {}  # what _rows has read last, by its columns
        self.episodes = [self._episode_info(row, number) for number, row in enumerate(self._episode_rows())]
        found = {"total_episodes": len(self), "total_frames": sum(episode.length for episode in self.episodes)}
        if any(self.info.get(key) != count for key, count in found.items()):
            raise DataError(f"{where} contradicts the table of episodes, which has {found}")

    def unreadable(self) -> list[str]:
        """The columns that `episode` does not read: those that are not numbers, and those in the first file of frames that
        meta/info.json does not describe."""
        files = column_names(self.episodes[0].path) if self.episodes else []
        known = {*self.columns, *self.cameras, *BOOKKEEPING}
        return [key for key in dict.fromkeys([*self.features, *files]) if key not in known]

    def __len__(self) -> int:
        return len(self.episodes)

    def _episode_rows(self) -> list[dict]:
        """The table of episodes, without their statistics."""
        if self.info["codebase_version"] == "v2.1":
            return [row for _, row in json_lines(self.folder / "meta/episodes.jsonl")]
        rows = []
        for path in sorted(self.folder.glob("meta/episodes/*/*.parquet")) or [self.folder / EPISODES_PATH]:
            rows += read_rows(path, [name for name in column_names(path) if not name.startswith("stats/")])
        return rows

    def _episode_info(self, row: dict, number: int) -> EpisodeInfo:
        where = f"{self.folder}: row {number} of the table of episodes"
        length, tasks = natural_number(row, "length", where), row.get("tasks")
        if natural_number(row, "episode_index", where) != number or length == 0 or not isinstance(tasks or [], list):
            raise DataError(
                f"{where} must have episode_index {number}, frames and tasks (a list of texts), found {str(row)[:200]}"
            )
        tasks = tuple(instruction(task, "tasks", where) for task in tasks or [None])
        others = {key: value for key, value in row.items() if key not in EPISODE_FIELDS and "/" not in key}
        extra = {key: value for key, value in others.items() if type(value) in (str, int, float)}
        path = existing_file(self._path(row, "data_path", "data", where))
        return EpisodeInfo(number, tasks[0], tasks, length, extra, path, row)

    def _read_tasks(self) -> dict[int, str]:
        if self.info["codebase_version"] == "v2.1":
            path = self.folder / "meta/tasks.jsonl"
            rows = list(json_lines(path)) if path.is_file() else []
        else:
            path = self.folder / TASKS_PATH
            table = read_rows(path) if path.is_file() else []
            rows = [(f"{path}: row {n}", row) for n, row in enumerate(table)]
        tasks = {}
        for where, row in rows:  # pandas writes an index without a name as __index_level_0__
            text = row.get("task", row.get("__index_level_0__"))
            tasks[natural_number(row, "task_index", where)] = instruction(text, "task", where)
        return tasks

    def _path(self, row: dict, template: str, kind: str, where: str) -> Path:
        """The file of an episode's frames or of its video. It may be missing."""
        if self.info["codebase_version"] == "v2.1":
            index, size = row["episode_index"], max(1, natural_number(self.info, "chunks_size", where))
            values = {"episode_index": index, "episode_chunk": index // size}
        else:
            values = {key: natural_number(row, f"{kind}/{key}", where) for key in ("chunk_index", "file_index")}
        name = fill_template(self.info.get(template), values | {"video_key": kind.removeprefix("videos/")})
        return path_inside(self.folder, name, where)

    def video(self, i: int, camera: str) -> tuple[Path, float]:
        """(file, second at which episode `i` starts in it). Raises FileNotFoundError if the file is missing."""
        where, row = f"{self.folder}: episode {i}", self.episodes[i].row
        start = row.get(f"videos/{camera}/from_timestamp", 0.0)  # missing if each episode has a file of its own
        if type(start) not in (int, float) or not 0 <= start < 1e9:
            raise DataError(f"{where}: the video of {camera!r} must start at 0 s or later, found {short_repr(start)}")
        path = self._path(row, "video_path", f"videos/{camera}", where)
        if not path.is_file():
            raise FileNotFoundError(
                f"{where}: the video of {camera} is not at {path}, where video_path in meta/info.json says it is: copy it "
                "there, or choose another camera"
            )
        return path, start

    def episode(self, i: int, cameras: Sequence[str] | None = None, columns: Sequence[str] | None = None) -> Episode:
        """Read the frames of episode `i`: its numeric columns, and the images of cameras.

        cameras, columns: which of `self.cameras` and `self.columns`; None for all. Pictures of videos are encoded as PNG.

        Raises:
            IndexError: there is no such episode.
            DataError: its files are broken or do not have the frames of the episode.
            ImportError: a camera is a video, and PyAV is not installed.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"there is no episode {i} in {self.folder}, which has {len(self)}")
        info = self.episodes[i]
        where = f"{info.path}: episode {i}"
        columns = list(self.columns) if columns is None else list(columns)
        known = self._layout(info.path).columns
        table = self._rows(i, [*columns, *(key for key in ("timestamp", "task_index") if key in known)])
        images = {}
        for camera in self.cameras if cameras is None else cameras:
            found = self.pictures(i, camera, range(info.length))
            images[camera] = [picture if isinstance(picture, bytes) else encode_png(picture) for picture in found]
        numbers = {key: self._column(table[key], key, f"{where}: {short_repr(key)}") for key in columns}
        frame_tasks = self._frame_tasks(table, info, where)
        return Episode(frame_tasks[0], numbers, images, dict(info.extra), only_if_mixed(frame_tasks), where)

    def questions(self, i: int) -> list[list[Asked]]:
        """The questions about each frame of episode `i`, none where the dataset has no column for them. Raises as `episode`."""
        info = self.episodes[i]
        if EVENTS not in self._layout(info.path).columns:
            return [[] for _ in range(info.length)]
        return from_events(self._rows(i, [EVENTS])[EVENTS], f"{info.path}: episode {i}")

    def pictures(self, i: int, camera: str, frames: Sequence[int]) -> Iterator[bytes | np.ndarray]:
        """The pictures of a camera in frames of episode `i`, in increasing order: encoded, or of a video (H, W, 3) uint8 RGB.
        Raises as `episode`, and FileNotFoundError for a missing file."""
        info = self.episodes[i]
        where = f"{info.path}: episode {i}"
        if self.features[camera]["dtype"] == "video":
            path, start = self.video(i, camera)
            times = self._times(i)[np.asarray(frames)]
            yield from video_pictures(path, start, times, self.fps, f"episode {i}, {camera}")
        else:
            table = self._rows(i, [camera])
            with parquet_errors(f"{where}: the camera {camera}"):
                for frame, row in zip(frames, table[camera].take(pa.array(frames, pa.int64())), strict=True):
                    yield self._still(row.as_py(), f"{where}: frame {frame} of the camera {camera}")

    def picture_source(self, i: int, camera: str, frames: Sequence[int]) -> tuple[list[Path], str]:
        """(the files that these pictures depend on, where the pictures are in them). Raises FileNotFoundError for a missing
        video."""
        if self.features[camera]["dtype"] == "video":
            path, start = self.video(i, camera)
            return [path], f"{start} {self._times(i)[np.asarray(frames)].tolist()}"
        info, names = self.episodes[i], f"{camera}.path"  # pictures may be files that the table names
        files = [info.path]
        if names in self._layout(info.path).leaves - self._layout(info.path).empty:
            column = self._rows(i, [names])[camera]
            with parquet_errors(f"{info.path}: episode {i}: the camera {camera}"):
                rows = column.to_pylist()
            named = [row["path"] for frame in frames if isinstance(row := rows[frame], dict)]
            paths = [path_inside(self.folder, name, str(info.path)) for name in named if isinstance(name, str)]
            files += [path for path in paths if path.is_file()]
        return files, f"{i} {list(frames)}"

    def _rows(self, i: int, columns: Sequence[str]) -> pa.Table:
        """The rows of an episode. Row groups that hold several episodes are read once, if these are asked for one after the
        other. Raises DataError if the frames are not those of the episode."""
        path = self.episodes[i].path
        wanted = tuple(dict.fromkeys(["episode_index", "frame_index", *columns]))
        layout = self._layout(path)
        low, high = layout.spans.T
        source = path, np.flatnonzero((low <= i) & (i <= high)).tolist()
        if wanted not in self._read or self._read[wanted].source != source:
            table = read_groups(*source, list(wanted), layout)
            with parquet_errors(path):
                self._read[wanted] = Groups(source, table, places_of(one_number(table, "episode_index", str(path))))
        table = self._read[wanted].episode(i)
        self._check_frames(table, i)
        return table

    def _layout(self, path: Path) -> Layout:
        if path not in self._layouts:
            self._layouts[path] = file_layout(path)
        return self._layouts[path]

    def _check_frames(self, table: pa.Table, i: int) -> None:
        info = self.episodes[i]
        where = f"{info.path}: episode {i}"
        if len(table) != info.length or (one_number(table, "frame_index", where) != np.arange(info.length)).any():
            raise DataError(f"{where} must have {info.length} frames in order, found {len(table)}, or in another order")

    def _times(self, i: int) -> np.ndarray:
        """(T,) seconds from the episode's start at which its frames were taken: those of the dataset, or T / fps."""
        info = self.episodes[i]
        where = f"{info.path}: episode {i}"
        if "timestamp" not in self._layout(info.path).columns:
            return np.arange(len(self._rows(i, []))) / self.fps
        times = one_number(self._rows(i, ["timestamp"]), "timestamp", where).astype(np.float64)
        times = times - times[0]
        if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise DataError(f"{where}: 'timestamp' must be seconds that increase from frame to frame")
        return times

    def _frame_tasks(self, table: pa.Table, info: EpisodeInfo, where: str) -> list[str]:
        """The instruction of each frame. Raises DataError if it cannot be known."""
        if "task_index" not in table.column_names or not self.tasks:
            if len(info.tasks) > 1:
                raise DataError(
                    f"{where} has {len(info.tasks)} tasks, and no column task_index with a table of tasks in meta/ says which "
                    "frames belong to which: add them, or make an episode of each task"
                )
            return [info.task] * info.length
        numbers = one_number(table, "task_index", where).tolist()
        for frame, number in enumerate(numbers):
            if number not in self.tasks:
                raise DataError(f"{where}: frame {frame} has the task_index {number}, but meta/ has no such task")
        return [self.tasks[number] for number in numbers]

    def _column(self, values: pa.ChunkedArray, key: str, where: str) -> np.ndarray:
        column, shape = to_numpy(values, where), tuple(self.features[key]["shape"])
        if column.shape[1:] != shape and (column.shape[1:], shape) != ((), (1,)):
            raise DataError(f"{where} must be of shape {shape} as in meta/info.json, found {column.shape[1:]}")
        with np.errstate(over="ignore"):  # a number that is too large becomes infinite
            return column.astype(self.features[key]["dtype"], copy=False)

    def _still(self, row: object, where: str) -> bytes:
        """The image in a row of the table, or in the file of the folder that it names."""
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: images must be {IMAGE_TYPE}, found {short_repr(row) if row is not None else 'nothing'}"
            )
        return row.get("bytes") or self._image_file(row.get("path"), where)

    def _image_file(self, name: object, where: str) -> bytes:
        path = path_inside(self.folder, name, where)
        if not path.is_file():
            raise FileNotFoundError(f"{where}: {path} is missing")
        return path.read_bytes()


class Groups(NamedTuple):
    """Row groups of a file. source: its path and their numbers; rows: {episode: the numbers of its rows in the table}."""

    source: tuple[Path, list[int]]
    table: pa.Table
    rows: dict[int, np.ndarray]

    def episode(self, i: int) -> pa.Table:
        rows = self.rows.get(i, np.empty(0, np.int64))
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # nothing is copied
            return self.table.slice(rows[0], len(rows))
        return self.table.take(pa.array(rows))


def instruction(text: object, key: str, where: str) -> str:
    """The text, NO_TASK for a missing or empty one. Raises DataError for what is no text."""
    is_missing = text is None or (isinstance(text, str) and not text.strip())
    return NO_TASK if is_missing else check_text(text, key, where) and text


def one_number(table: pa.Table, key: str, where: str) -> np.ndarray:
    """(T,), a column with one number per frame."""
    column = to_numpy(table[key], f"{where}: {key!r}")
    if column.size != len(table):
        raise DataError(f"{where}: {key!r} must be one number per frame, found the shape {column.shape[1:]}")
    return column.reshape(len(table))


def only_if_mixed(frame_tasks: list[str]) -> list[str]:
    """The same list, or an empty one if all frames have the same task."""
    return frame_tasks if len(set(frame_tasks)) > 1 else []
