"""Robot demonstrations in the layout of LeRobot datasets v3.0 (Cadene et al. 2024, https://github.com/huggingface/lerobot),
written and read with pyarrow, numpy and pillow. Its predecessor v2.1 and cameras that are MP4 files are read too.

Folders from elsewhere are not trusted: nothing is unpickled, lengths and indices are compared with what is there, and paths
that lead out of the folder are refused.
"""

import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.data.columns import (
    column_stats,
    counted_stats,
    fill,
    hf_features,
    inside,
    is_feature,
    json_lines,
    json_object,
    present,
    read_parquet,
    tasks_table,
    to_arrow,
    to_numpy,
    value_counts,
    video_frames,
    whole,
)
from nanochat.data.sample import DataError, check_text

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError("robot datasets need the library pyarrow: pip install 'nanochat-vision[robot]'") from error

VERSIONS = ("v3.0", "v2.1")
FILE_MB = 100
FILES_A_CHUNK = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns that every dataset has
EPISODE_FIELDS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
WRITABLE = (np.dtype("float32"), np.dtype("int64"), np.dtype("bool"))
READABLE = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
STATS_FRAMES = 8  # pictures of an episode that the statistics look at
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the datasets library has it


@dataclass
class Episode:
    """One demonstration of T frames.

    columns: arrays of float32, int64 or bool, (T,) or (T, D), under LeRobot's names: "observation.state", "action", ...
    images: camera -> T encoded RGB pictures, PNG or JPEG.
    extra: what else is known, such as {"seed": 7}: text, int or float, of the same type in all episodes.
    """

    task: str
    columns: dict[str, np.ndarray]
    images: dict[str, list[bytes]]
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeInfo:
    """An episode before its frames are read. videos: camera -> file, and the seconds at which the episode starts in it."""

    index: int
    task: str
    length: int
    extra: dict
    path: Path = field(repr=False)
    videos: dict[str, tuple[Path, float]] = field(repr=False)


# ---- writing ----


def write_dataset(
    folder: str | Path,
    episodes: Iterable[Episode],
    fps: int,
    robot_type: str,
    camera_shape: tuple[int, int, int],
    names: dict[str, list[str]] | None = None,
) -> None:
    """Write a LeRobot v3.0 dataset, one episode in memory at a time. `folder` is there when it is whole, or not at all.

    A column (T, 1) is read back as (T,): the layout knows no difference. Statistics are exact for columns; for pictures
    they are per channel, in 0..1, over 8 frames an episode.

    camera_shape: (H, W, 3) of all pictures. names: column -> a name for each of its D numbers.

    Raises:
        FileExistsError: there is something at `folder`.
        DataError: no episodes, or one that is malformed or unlike the first (named by its number).
    """
    folder = Path(folder).expanduser()
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists: choose another folder, or delete it first")
    if not isinstance(fps, int) or fps < 1:
        raise DataError(f"fps must be a whole number of frames a second, at least 1, found {fps!r}")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    writer = _Writer(temporary, fps, tuple(camera_shape), names or {})
    try:
        for episode in episodes:
            writer.add(episode)
        writer.finish(robot_type)
        os.rename(temporary, folder)
    finally:
        writer.close_file()
        shutil.rmtree(temporary, ignore_errors=True)


class _Writer:
    def __init__(self, root: Path, fps: int, camera_shape: tuple, names: dict[str, list[str]]):
        self.root, self.fps, self.camera_shape, self.names = root, fps, camera_shape, names
        self.features: dict[str, dict] = {}  # of the first episode
        self.tasks: dict[str, int] = {}
        self.rows: list[dict] = []  # of the table of episodes
        self.extra_types: dict[str, type] = {}
        self.paths: list[Path] = []
        self.file: pq.ParquetWriter | None = None
        self.file_bytes = self.frames = 0
        self.pixels: dict[str, list[np.ndarray]] = {}  # camera -> (3, 256) counts of values, and how many pictures

    def add(self, episode: Episode) -> None:
        where = f"episode {len(self.rows)}"
        length = check_episode(episode, self.camera_shape, where)
        features = features_of(episode, self.camera_shape, self.names)
        self.features = self.features or features
        if differ := [key for key in features | self.features if features.get(key) != self.features.get(key)]:
            raise DataError(f"{where}: {', '.join(differ)} must be as in the first episode, found {features}")
        for key, value in episode.extra.items():
            if self.extra_types.setdefault(key, type(value)) is not type(value):
                raise DataError(f"{where}: extra {key!r} is {value!r}, and of another type before")
        table = self.table(episode, length)
        self.open_file(table)
        self.file.write_table(table)  # a row group an episode
        row = {"episode_index": len(self.rows), "tasks": [episode.task], "length": length} | episode.extra
        row |= self.place
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        stats = {key: column_stats(to_numpy(table[key])) for key in self.features if key not in episode.images}
        stats |= {camera: self.picture_stats(camera, pictures) for camera, pictures in episode.images.items()}
        self.rows.append(row | {f"stats/{key}/{name}": x for key, found in stats.items() for name, x in found.items()})
        self.frames += length

    def table(self, episode: Episode, length: int) -> pa.Table:
        frame = np.arange(length)
        task_index = self.tasks.setdefault(episode.task, len(self.tasks))
        of_frames = ((frame / self.fps).astype(np.float32), frame, frame * 0 + len(self.rows), frame + self.frames)
        bookkeeping = dict(zip(BOOKKEEPING, (*of_frames, frame * 0 + task_index), strict=True))  # each (T,)
        arrays = {key: to_arrow(column) for key, column in (episode.columns | bookkeeping).items()}
        for camera, pictures in episode.images.items():
            arrays[camera] = pa.array([{"bytes": picture, "path": None} for picture in pictures], IMAGE_TYPE)
        metadata = {"huggingface": json.dumps({"info": {"features": hf_features(self.features)}})}
        return pa.table({key: arrays[key] for key in self.features}, metadata=metadata)

    def open_file(self, table: pa.Table) -> None:
        """Go on to the next data file if there is none yet, or this one would become too large."""
        if self.file is None or self.file_bytes + table.nbytes > FILE_MB * 2**20:
            self.close_file()
            chunk, file = divmod(len(self.paths), FILES_A_CHUNK)
            self.place = {"data/chunk_index": chunk, "data/file_index": file}
            path = self.root / DATA_PATH.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file, self.file_bytes = pq.ParquetWriter(path, table.schema), 0
            self.paths.append(path)
        self.file_bytes += table.nbytes

    def close_file(self) -> None:
        if self.file is not None:
            self.file.close()

    def picture_stats(self, camera: str, pictures: list[bytes]) -> dict[str, list]:
        """Of this episode; its pixels also count for those of the dataset."""
        chosen = sorted({round(i) for i in np.linspace(0, len(pictures) - 1, STATS_FRAMES)})
        found = [sum(value_counts(pictures[i]) for i in chosen), np.array(len(chosen))]
        self.pixels[camera] = [a + b for a, b in zip(self.pixels.get(camera, (0, 0)), found, strict=True)]
        return counted_stats(*found)

    def finish(self, robot_type: str) -> None:
        if not self.rows:
            raise DataError("a dataset needs at least one episode, got none")
        self.close_file()
        (self.root / EPISODES_PATH).parent.mkdir(parents=True)
        keys = dict.fromkeys(key for row in self.rows for key in row)
        pq.write_table(pa.table({key: [row.get(key) for row in self.rows] for key in keys}), self.root / EPISODES_PATH)
        pq.write_table(tasks_table(self.tasks), self.root / "meta/tasks.parquet")
        stats = {camera: counted_stats(*found) for camera, found in self.pixels.items()}
        for key in [key for key in self.features if key not in stats]:
            parts = [to_numpy(pq.ParquetFile(path).read(columns=[key])[key]) for path in self.paths]
            stats[key] = column_stats(np.concatenate(parts))
        (self.root / "meta/stats.json").write_text(json.dumps(stats, indent=4))
        info = {
            "codebase_version": "v3.0", "robot_type": robot_type, "fps": self.fps, "features": self.features,
            "total_episodes": len(self.rows), "total_frames": self.frames, "total_tasks": len(self.tasks),
            "splits": {"train": f"0:{len(self.rows)}"}, "data_path": DATA_PATH, "video_path": None,
            "chunks_size": FILES_A_CHUNK, "data_files_size_in_mb": FILE_MB, "video_files_size_in_mb": 200,
        }  # fmt: skip
        (self.root / "meta/info.json").write_text(json.dumps(info, indent=4))


def check_episode(episode: Episode, camera_shape: tuple, where: str) -> int:
    """The number of frames. Raises DataError for what cannot be written."""
    check_text(episode.task, "task", where)
    lengths = {key: len(values) for key, values in (episode.columns | episode.images).items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"{where}: all columns and cameras must have as many frames, at least 1, found {lengths}")
    for key in lengths:
        if key in BOOKKEEPING or "/" in key or (key in episode.columns and key in episode.images):
            raise DataError(f"{where}: {key!r} cannot name a column: it is taken, or has a / in it")
    for key, column in episode.columns.items():
        if column.dtype not in WRITABLE or column.ndim not in (1, 2) or not column.size:
            found = f"{column.dtype} of shape {column.shape}"
            raise DataError(f"{where}: {key!r} must be float32, int64 or bool of shape (T,) or (T, D), found {found}")
        if not np.isfinite(column).all():
            raise DataError(f"{where}: {key!r} has numbers that are not finite")
    for key, value in episode.extra.items():
        is_scalar = type(value) in (str, float) or (type(value) is int and -(2**63) <= value < 2**63)
        if key in EPISODE_FIELDS or "/" in key or not is_scalar:
            raise DataError(f"{where}: extra {key!r} must be text, int or float under a free name, found {value!r}")
    for camera, pictures in episode.images.items():
        for number, picture in enumerate(pictures):
            check_picture(picture, camera_shape, f"{where}: frame {number} of {camera!r}")
    return next(iter(lengths.values()))


def check_picture(picture: bytes, camera_shape: tuple, where: str) -> None:
    try:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
            mode, shape = image.mode, (image.height, image.width, 3)
            image.verify()
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} must be the bytes of a PNG or JPEG file: {error}") from error
    if (mode, shape) != ("RGB", camera_shape):
        raise DataError(f"{where} must be RGB of shape {camera_shape}, found {mode} of {shape[0]} x {shape[1]}")


def features_of(episode: Episode, camera_shape: tuple, names: dict[str, list[str]]) -> dict[str, dict]:
    """The columns as meta/info.json has them. Raises DataError for names that do not fit a column."""
    features = {
        key: {"dtype": column.dtype.name, "shape": list(column.shape[1:]) or [1], "names": names.get(key)}
        for key, column in episode.columns.items()
    }
    for key, given in names.items():
        if key not in features or [len(given)] != features[key]["shape"]:
            raise DataError(f"there are {len(given)} names for {key!r}, which is {features.get(key, 'no column')}")
    image = {"dtype": "image", "shape": list(camera_shape), "names": ["height", "width", "channels"]}
    features |= dict.fromkeys(episode.images, image)
    for key in BOOKKEEPING:
        features[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    return features


# ---- reading ----


class RobotDataset:
    """A LeRobot dataset of version 3.0 or 2.1 in a folder. Frames are read only when asked for.

    fps: frames a second. features: column -> {"dtype", "shape", ...}, as in meta/info.json. cameras: the keys of those that
    are pictures. episodes: an EpisodeInfo each. stats: as in meta/stats.json, empty if there is none (2.1).

    Raises:
        FileNotFoundError: a file of the dataset is missing (named).
        DataError: another version, or files that are broken or disagree.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder} to read a dataset from")
        where = self.folder / "meta/info.json"
        self.info = json_object(present(where).read_bytes(), where)
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
            raise DataError(f"{where} disagrees with the table of episodes, which has {found}")

    def __len__(self) -> int:
        return len(self.episodes)

    def _rows(self) -> list[dict]:
        """The table of episodes, without their statistics."""
        if self.info["codebase_version"] == "v2.1":
            return json_lines(self.folder / "meta/episodes.jsonl")
        rows = []
        for path in sorted(self.folder.glob("meta/episodes/*/*.parquet")) or [self.folder / EPISODES_PATH]:
            names = [name for name in read_parquet(pq.read_schema, path).names if not name.startswith("stats/")]
            rows += read_parquet(pq.read_table, path, columns=names, partitioning=None).to_pylist()
        return rows

    def _episode_info(self, row: dict, number: int) -> EpisodeInfo:
        where = f"{self.folder}: row {number} of the table of episodes"
        length, tasks = whole(row, "length", where), row.get("tasks")
        if whole(row, "episode_index", where) != number or length == 0 or not isinstance(tasks, list) or not tasks:
            raise DataError(f"{where} must have episode_index {number}, frames and tasks, found {str(row)[:200]}")
        check_text(tasks[0], "tasks", where)
        videos = {}
        for camera in (camera for camera in self.cameras if self.features[camera]["dtype"] == "video"):
            start = row.get(f"videos/{camera}/from_timestamp", 0.0)  # where every episode has its own, it has none
            if type(start) not in (int, float) or not 0 <= start < 1e9:
                raise DataError(f"{where}: the video of {camera!r} must start at 0 s or later, found {start!r}")
            videos[camera] = self._path(row, "video_path", f"videos/{camera}", where), start
        free = {key: value for key, value in row.items() if key not in EPISODE_FIELDS and "/" not in key}
        extra = {key: value for key, value in free.items() if type(value) in (str, int, float)}
        return EpisodeInfo(number, tasks[0], length, extra, self._path(row, "data_path", "data", where), videos)

    def _path(self, row: dict, template: str, kind: str, where: str) -> Path:
        """The file of an episode's frames or of its video; it has to be there."""
        if self.info["codebase_version"] == "v2.1":
            index, size = row["episode_index"], max(1, whole(self.info, "chunks_size", where))
            values = {"episode_index": index, "episode_chunk": index // size}
        else:
            values = {key: whole(row, f"{kind}/{key}", where) for key in ("chunk_index", "file_index")}
        name = fill(self.info.get(template), values | {"video_key": kind.removeprefix("videos/")})
        return inside(self.folder, name, where)

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        """Read the frames of episode `i`. Columns that are no numbers are left out, and cameras that are not asked for.

        Raises:
            IndexError: there is no such episode.
            DataError: its files are broken, or have other frames than the episode.
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
            raise DataError(f"{where} must be of shape {shape} by meta/info.json, found {column.shape[1:]}")
        return column.astype(self.features[key]["dtype"], copy=False)

    def _stills(self, values: pa.ChunkedArray, where: str) -> list[bytes]:
        """Pictures that are in the table, or files in the folder which it names."""
        rows = values.to_pylist()
        if not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{where}: pictures must be {IMAGE_TYPE}, found {values.type}")
        return [row.get("bytes") or inside(self.folder, row.get("path"), where).read_bytes() for row in rows]


def bridge_sample(folder: str | Path) -> Iterator[Episode]:
    """The episodes of a folder of BridgeData V2 frames (Walke et al. 2023): a WidowX arm at 5 frames a second, 7-D actions.

    frames.jsonl has a row a frame, sorted: image (a path in the folder), episode, step, instruction, rephrasings, action.

    Raises:
        FileNotFoundError, DataError: the file is missing; a row or its picture is (named).
    """
    folder = Path(folder).expanduser()
    rows = json_lines(folder / "frames.jsonl")
    for number, group in itertools.groupby(rows, lambda row: row.get("episode")):
        frames, where = list(group), f"{folder}/frames.jsonl: episode {number}"
        if [row.get("step") for row in frames] != list(range(len(frames))):
            raise DataError(f"{where} must have the steps 0 to {len(frames) - 1} in order")
        try:
            actions = np.array([row["action"] for row in frames], np.float32).reshape(len(frames), 7)
            task, extra = frames[0]["instruction"], {"rephrasings": "\n".join(frames[0]["rephrasings"])}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} must have an instruction, rephrasings, 7-D actions: {error!r}") from error
        paths = [inside(folder, row.get("image"), where) for row in frames]
        images = {"observation.images.image_0": [path.read_bytes() for path in paths]}
        yield Episode(task, {"action": actions}, images, {"name": f"bridge-{number}"} | extra)
