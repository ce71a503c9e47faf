"""Writing robot demonstrations as LeRobot v3.0 datasets (Cadene et al. 2024, https://github.com/huggingface/lerobot)."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanochat.data.columns import pa, pq, to_arrow, to_numpy
from nanochat.data.language import EVENTS, FEATURE, HF_FEATURE, check_questions, to_events
from nanochat.data.lerobot import BOOKKEEPING, EPISODE_FIELDS, EPISODES_PATH, IMAGE_TYPE, TASKS_PATH, Episode
from nanochat.data.pictures import check_picture
from nanochat.data.sample import check_text
from nanochat.data.statistics import column_stats, image_stats, pixel_counts
from nanochat.files import DataError

FILE_MB = 100
FILES_PER_CHUNK = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
WRITABLE = (np.dtype("float32"), np.dtype("int64"), np.dtype("bool"))
STATS_FRAMES = 8  # image statistics use this many frames of each episode


def write_dataset(
    folder: str | Path,
    episodes: Iterable[Episode],
    fps: int,
    robot_type: str,
    camera_shape: tuple[int, int, int],
    names: dict[str, list[str]] | None = None,
) -> None:
    """Write a LeRobot v3.0 dataset, with one episode in memory at a time. `folder` appears when it is complete.

    A column (T, 1) is read back as (T,), since the format cannot tell them apart. Statistics are exact for columns; for
    images they are per channel, in 0..1, over 8 frames of each episode.

    camera_shape: (H, W, 3) of all images. names: column -> a name for each of its D numbers.

    Raises:
        FileExistsError: `folder` exists.
        DataError: there are no episodes, or one is malformed or differs from the first (the message names its number).
    """
    folder = Path(folder).expanduser()
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists: choose another folder, or delete it first")
    if not isinstance(fps, int) or fps < 1:
        raise DataError(f"fps must be an integer (frames per second), at least 1, found {fps!r}")
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
        self.pixels: dict[str, list[np.ndarray]] = {}  # camera -> sum of pixel_counts (3, 256), number of images

    def add(self, episode: Episode) -> None:
        where = f"episode {len(self.rows)}"
        length = check_episode(episode, self.camera_shape, where)
        features = features_of(episode, self.camera_shape, self.names)
        self.features = self.features or features
        if differ := [key for key in features | self.features if features.get(key) != self.features.get(key)]:
            raise DataError(f"{where}: {', '.join(differ)} must be the same as in the first episode, found {features}")
        for key, value in episode.extra.items():
            if self.extra_types.setdefault(key, type(value)) is not type(value):
                raise DataError(f"{where}: extra {key!r} is {value!r}, but had another type in an earlier episode")
        table = self.table(episode, length)
        self.open_file(table)
        self.file.write_table(table)  # one row group per episode
        tasks = list(dict.fromkeys(episode.frame_tasks)) or [episode.task]
        row = {"episode_index": len(self.rows), "tasks": tasks, "length": length} | episode.extra
        row |= self.place
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        stats = {
            key: column_stats(to_numpy(table[key])) for key in self.features if key not in (*episode.images, EVENTS)
        }
        stats |= {camera: self.picture_stats(camera, pictures) for camera, pictures in episode.images.items()}
        self.rows.append(row | {f"stats/{key}/{name}": x for key, found in stats.items() for name, x in found.items()})
        self.frames += length

    def table(self, episode: Episode, length: int) -> pa.Table:
        frame = np.arange(length)
        tasks = episode.frame_tasks or [episode.task] * length
        task_index = np.array([self.tasks.setdefault(task, len(self.tasks)) for task in tasks])
        of_frames = ((frame / self.fps).astype(np.float32), frame, frame * 0 + len(self.rows), frame + self.frames)
        bookkeeping = dict(zip(BOOKKEEPING, (*of_frames, task_index), strict=True))  # each (T,)
        arrays = {key: to_arrow(column) for key, column in (episode.columns | bookkeeping).items()}
        if episode.questions:
            arrays[EVENTS] = to_events(episode.questions)
        for camera, pictures in episode.images.items():
            arrays[camera] = pa.array([{"bytes": picture, "path": None} for picture in pictures], IMAGE_TYPE)
        metadata = {"huggingface": json.dumps({"info": {"features": hf_features(self.features)}})}
        return pa.table({key: arrays[key] for key in self.features}, metadata=metadata)

    def open_file(self, table: pa.Table) -> None:
        """Open the next data file if none is open, or if the table would make this one too large."""
        if self.file is None or self.file_bytes + table.nbytes > FILE_MB * 2**20:
            self.close_file()
            chunk, file = divmod(len(self.paths), FILES_PER_CHUNK)
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
        """Statistics of this episode's images, whose pixels are also added to those of the dataset."""
        chosen = sorted({round(i) for i in np.linspace(0, len(pictures) - 1, STATS_FRAMES)})
        found = [sum(pixel_counts(pictures[i]) for i in chosen), np.array(len(chosen))]
        self.pixels[camera] = [a + b for a, b in zip(self.pixels.get(camera, (0, 0)), found, strict=True)]
        return image_stats(*found)

    def finish(self, robot_type: str) -> None:
        if not self.rows:
            raise DataError("a dataset needs at least one episode, found none")
        self.close_file()
        (self.root / EPISODES_PATH).parent.mkdir(parents=True)
        keys = dict.fromkeys(key for row in self.rows for key in row)
        pq.write_table(pa.table({key: [row.get(key) for row in self.rows] for key in keys}), self.root / EPISODES_PATH)
        pq.write_table(tasks_table(self.tasks), self.root / TASKS_PATH)
        stats = {camera: image_stats(*found) for camera, found in self.pixels.items()}
        for key in [key for key in self.features if key not in (*stats, EVENTS)]:
            parts = [to_numpy(pq.ParquetFile(path).read(columns=[key])[key]) for path in self.paths]
            stats[key] = column_stats(np.concatenate(parts))
        (self.root / "meta/stats.json").write_text(json.dumps(stats, indent=4))
        info = {
            "codebase_version": "v3.0", "robot_type": robot_type, "fps": self.fps, "features": self.features,
            "total_episodes": len(self.rows), "total_frames": self.frames, "total_tasks": len(self.tasks),
            "splits": {"train": f"0:{len(self.rows)}"}, "data_path": DATA_PATH, "video_path": None,
            "chunks_size": FILES_PER_CHUNK, "data_files_size_in_mb": FILE_MB, "video_files_size_in_mb": 200,
        }  # fmt: skip
        (self.root / "meta/info.json").write_text(json.dumps(info, indent=4))


def check_episode(episode: Episode, camera_shape: tuple, where: str) -> int:
    """The number of frames. Raises DataError for an episode that cannot be written."""
    for task in {episode.task, *episode.frame_tasks}:
        check_text(task, "task", where)
    lengths = {key: len(values) for key, values in (episode.columns | episode.images).items()}
    if episode.frame_tasks and {len(episode.frame_tasks)} != set(lengths.values()):
        raise DataError(
            f"{where}: frame_tasks must be empty or have a task for each frame, found {len(episode.frame_tasks)}"
        )
    if episode.questions and {len(episode.questions)} != set(lengths.values()):
        raise DataError(f"{where}: questions must be empty or a list for each frame, found {len(episode.questions)}")
    for frame, asked in enumerate(episode.questions):
        check_questions(asked, f"{where}: questions of frame {frame}")
        if unknown := [camera for camera, _, _ in asked if camera not in episode.images]:
            raise DataError(
                f"{where}: a question of frame {frame} is about {unknown[0]}, which is no camera of the episode"
            )
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(
            f"{where}: all columns and cameras must have the same number of frames, at least 1, found {lengths}"
        )
    for key in lengths:
        if key in (*BOOKKEEPING, EVENTS) or "/" in key or (key in episode.columns and key in episode.images):
            raise DataError(f"{where}: {key!r} cannot name a column: the name is reserved, used twice, or contains a /")
    for key, column in episode.columns.items():
        if column.dtype not in WRITABLE or column.ndim not in (1, 2) or not column.size:
            found = f"{column.dtype} of shape {column.shape}"
            raise DataError(f"{where}: {key!r} must be float32, int64 or bool of shape (T,) or (T, D), found {found}")
        if not np.isfinite(column).all():
            raise DataError(f"{where}: {key!r} has values that are not finite")
    for key, value in episode.extra.items():
        is_scalar = type(value) in (str, float) or (type(value) is int and -(2**63) <= value < 2**63)
        if key in EPISODE_FIELDS or "/" in key or not is_scalar:
            raise DataError(
                f"{where}: extra {key!r} must be text, int or float, under a name that is not reserved, found {value!r}"
            )
    for camera, pictures in episode.images.items():
        for number, picture in enumerate(pictures):
            check_picture(picture, camera_shape, f"{where}: frame {number} of {camera!r}")
    return next(iter(lengths.values()))


def features_of(episode: Episode, camera_shape: tuple, names: dict[str, list[str]]) -> dict[str, dict]:
    """The columns as meta/info.json describes them. Raises DataError for names that do not match a column."""
    features = {
        key: {"dtype": column.dtype.name, "shape": list(column.shape[1:]) or [1], "names": names.get(key)}
        for key, column in episode.columns.items()
    }
    for key, given in names.items():
        if key not in features or [len(given)] != features[key]["shape"]:
            raise DataError(f"found {len(given)} names for {key!r}, which is {features.get(key, 'not a column')}")
    image = {"dtype": "image", "shape": list(camera_shape), "names": ["height", "width", "channels"]}
    features |= dict.fromkeys(episode.images, image)
    features |= {EVENTS: FEATURE} if episode.questions else {}
    for key in BOOKKEEPING:
        features[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    return features


def hf_features(features: dict[str, dict]) -> dict[str, dict]:
    """The columns as the datasets library describes them, in the metadata of parquet files."""
    found = {}
    for key, feature in features.items():
        value = {"_type": "Value", "dtype": feature["dtype"]}
        rows = {"_type": "Sequence", "feature": value, "length": feature["shape"][0]}
        if key == EVENTS:
            found[key] = HF_FEATURE
            continue
        found[key] = {"_type": "Image"} if feature["dtype"] == "image" else value if feature["shape"] == [1] else rows
    return found


def tasks_table(tasks: dict[str, int]) -> pa.Table:
    """The table of tasks, which pandas reads as a frame with the column task_index and the instructions as its index."""
    index = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [index]}
    arrays = {"task_index": pa.array(tasks.values()), "task": pa.array(tasks)}
    return pa.table(arrays, metadata={"pandas": json.dumps(pandas)})
