"""Reading robot demonstrations in the format of LeRobot datasets, versions 3.0 and 2.1 (Cadene et al. 2024,
https://github.com/huggingface/lerobot), without the LeRobot library. Cameras may be images or MP4 videos.

Dataset folders are not trusted: nothing is unpickled, lengths and indices are compared with the data, and paths that lead
out of the folder are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanochat.data.columns import fill_template, is_feature, natural_number, pa, pc, pq, read_parquet, to_numpy
from nanochat.data.sample import check_text
from nanochat.data.video import video_frames
from nanochat.files import DataError, existing_file, json_lines, json_object, path_inside

VERSIONS = ("v3.0", "v2.1")
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns of every dataset
EPISODE_FIELDS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
READABLE = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the datasets library's type of an image


@dataclass
class Episode:
    """One demonstration of T frames.

    columns: arrays of float32, int64 or bool, (T,) or (T, D), under LeRobot's names: "observation.state", "action", ...
    images: camera -> T encoded RGB images, PNG or JPEG.
    extra: further values, such as {"seed": 7}: text, int or float, each of the same type in all episodes.
    """

    task: str
    columns: dict[str, np.ndarray]
    images: dict[str, list[bytes]]
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeInfo:
    """An episode whose frames are not read yet. videos: camera -> (file, second at which the episode starts in it)."""

    index: int
    task: str
    length: int
    extra: dict
    path: Path = field(repr=False)
    videos: dict[str, tuple[Path, float]] = field(repr=False)


class RobotDataset:
    """A LeRobot dataset of version 3.0 or 2.1 in a folder. Frames are read by `episode`.

    fps: frames per second.
    features: column -> {"dtype", "shape", ...}, as in meta/info.json.
    cameras: the columns that are images or videos.
    episodes: an EpisodeInfo for each episode.
    stats: as in meta/stats.json; empty if there is no such file (version 2.1).

    Raises:
        FileNotFoundError: a file of the dataset is missing (the message names it).
        DataError: another version, or files that are broken or contradict each other.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}")
        where = self.folder / "meta/info.json"
        self.info = json_object(existing_file(where).read_bytes(), where)
        if self.info.get("codebase_version") not in VERSIONS:
            found, known = self.info.get("codebase_version"), " and ".join(VERSIONS)
            raise DataError(f"{where}: the version must be {known}, found {found!r}: convert it with LeRobot's scripts")
        self.fps, self.features = self.info.get("fps"), self.info.get("features")
        if type(self.fps) not in (int, float) or not 0 < self.fps < 1e6:
            raise DataError(f"{where}: fps must be a number above 0, found {self.fps!r}")
        if not isinstance(self.features, dict) or not all(map(is_feature, self.features.values())):
            raise DataError(f"{where}: features must be an object of columns, each with a dtype and a shape")
        self.cameras = [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]
        stats = self.folder / "meta/stats.json"
        self.stats = json_object(stats.read_bytes(), stats) if stats.is_file() else {}
        self.episodes = [self._episode_info(row, number) for number, row in enumerate(self._rows())]
        found = {"total_episodes": len(self), "total_frames": sum(episode.length for episode in self.episodes)}
        if any(self.info.get(key) != count for key, count in found.items()):
            raise DataError(f"{where} contradicts the table of episodes, which has {found}")

    def __len__(self) -> int:
        return len(self.episodes)

    def _rows(self) -> list[dict]:
        """The table of episodes, without their statistics."""
        if self.info["codebase_version"] == "v2.1":
            return [row for _, row in json_lines(self.folder / "meta/episodes.jsonl")]
        rows = []
        for path in sorted(self.folder.glob("meta/episodes/*/*.parquet")) or [self.folder / EPISODES_PATH]:
            names = [name for name in read_parquet(pq.read_schema, path).names if not name.startswith("stats/")]
            rows += read_parquet(pq.read_table, path, columns=names, partitioning=None).to_pylist()
        return rows

    def _episode_info(self, row: dict, number: int) -> EpisodeInfo:
        where = f"{self.folder}: row {number} of the table of episodes"
        length, tasks = natural_number(row, "length", where), row.get("tasks")
        if (
            natural_number(row, "episode_index", where) != number
            or length == 0
            or not isinstance(tasks, list)
            or not tasks
        ):
            raise DataError(f"{where} must have episode_index {number}, frames and tasks, found {str(row)[:200]}")
        check_text(tasks[0], "tasks", where)
        videos = {}
        for camera in (camera for camera in self.cameras if self.features[camera]["dtype"] == "video"):
            start = row.get(f"videos/{camera}/from_timestamp", 0.0)  # missing if each episode has a file of its own
            if type(start) not in (int, float) or not 0 <= start < 1e9:
                raise DataError(f"{where}: the video of {camera!r} must start at 0 s or later, found {start!r}")
            videos[camera] = self._path(row, "video_path", f"videos/{camera}", where), start
        others = {key: value for key, value in row.items() if key not in EPISODE_FIELDS and "/" not in key}
        extra = {key: value for key, value in others.items() if type(value) in (str, int, float)}
        return EpisodeInfo(number, tasks[0], length, extra, self._path(row, "data_path", "data", where), videos)

    def _path(self, row: dict, template: str, kind: str, where: str) -> Path:
        """The file of an episode's frames or of its video. Raises FileNotFoundError if it is missing."""
        if self.info["codebase_version"] == "v2.1":
            index, size = row["episode_index"], max(1, natural_number(self.info, "chunks_size", where))
            values = {"episode_index": index, "episode_chunk": index // size}
        else:
            values = {key: natural_number(row, f"{kind}/{key}", where) for key in ("chunk_index", "file_index")}
        name = fill_template(self.info.get(template), values | {"video_key": kind.removeprefix("videos/")})
        return existing_file(path_inside(self.folder, name, where))

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        """Read the frames of episode `i`: its numeric columns, and the images of `cameras` (all by default).

        Raises:
            IndexError: there is no such episode.
            DataError: its files are broken or do not have the frames of the episode.
            ImportError: a camera is a video, and PyAV is not installed.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"there is no episode {i} in {self.folder}, which has {len(self)}")
        info = self.episodes[i]
        where = f"{info.path}: episode {i}"
        columns = [k for k, f in self.features.items() if f["dtype"] in READABLE and k not in BOOKKEEPING]
        cameras = self.cameras if cameras is None else cameras
        stills = [camera for camera in cameras if camera not in info.videos]
        wanted, only = ["frame_index", *columns, *stills], pc.field("episode_index") == i
        table = read_parquet(pq.read_table, info.path, columns=wanted, filters=only, partitioning=None)
        if len(table) != info.length or (to_numpy(table["frame_index"], where) != np.arange(info.length)).any():
            raise DataError(f"{where} must have {info.length} frames in order, found {len(table)}, or in another order")
        images = {camera: self._stills(table[camera], where) for camera in stills}
        videos = [camera for camera in cameras if camera in info.videos]
        images |= {camera: video_frames(*info.videos[camera], info.length, self.fps) for camera in videos}
        numbers = {key: self._column(table[key], key, f"{where}: {key!r}") for key in columns}
        return Episode(info.task, numbers, {camera: images[camera] for camera in cameras}, dict(info.extra))

    def _column(self, values: pa.ChunkedArray, key: str, where: str) -> np.ndarray:
        column, shape = to_numpy(values, where), tuple(self.features[key]["shape"])
        if column.shape[1:] != shape and (column.shape[1:], shape) != ((), (1,)):
            raise DataError(f"{where} must be of shape {shape} as in meta/info.json, found {column.shape[1:]}")
        return column.astype(self.features[key]["dtype"], copy=False)

    def _stills(self, values: pa.ChunkedArray, where: str) -> list[bytes]:
        """The images in the table, or in the files of the folder that it names."""
        rows = values.to_pylist()
        if not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{where}: images must be {IMAGE_TYPE}, found {values.type}")
        return [row.get("bytes") or self._image_file(row.get("path"), where) for row in rows]

    def _image_file(self, name: object, where: str) -> bytes:
        return existing_file(path_inside(self.folder, name, where)).read_bytes()
