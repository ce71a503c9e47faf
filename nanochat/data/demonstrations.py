"""Demonstrations as training reads them: every frame of every episode, its state, its actions and its picture.

What the columns of one simulator mean is not known here; see `nanochat.metaworld.questions`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from nanochat.cameras import short_names
from nanochat.data.bridge import FPS as BRIDGE_FPS
from nanochat.data.bridge import bridge_episodes, other_fields
from nanochat.data.columns import number_names
from nanochat.data.lerobot import Episode, EpisodeInfo, RobotDataset
from nanochat.data.pictures import decoded_square, encode_square, encoded_square
from nanochat.errors import UserError
from nanochat.vision.images import ImageError

SPLITS = ("all", "fit", "val")
VAL_SHARE = 0.04  # of each task's episodes, but at least one
TWO_DIMENSIONAL = ("action", "observation.state")  # LeRobot stores one number per frame as (T,); these become (T, 1)

TaskName = Callable[[Episode | EpisodeInfo], str]


def episode_task(episode: Episode | EpisodeInfo) -> str:
    """The task of an episode: its instruction."""
    return episode.task


class Demonstrations:
    """All frames of some episodes, in memory. n is the number of frames.

    Pictures of all cameras of the episodes are letterboxed to `size` pixels and stay encoded until they are used. With size 0
    there are none, only numbers and tasks.

    state: (n, S) float32; S is 0 for data without the column "observation.state".
    action: (n, A) float32.
    columns: name -> (n, ...) array, for the columns that all episodes have.
    cameras: the names of the cameras, the same in all episodes. pictures: for each camera n encoded squares.
    fps: frames per second; 0 if unknown. names_of: column -> a name for each of its numbers, [] if the data names none.
    episode: (n,) int64, the episode of each frame. first, end: (n,) int64, the range of frames of that episode.
    names: for messages, where each episode comes from. tasks: the task of each episode; several are joined by " / ".
    segment_end: (n,) int64, where the frame's task ends: before the episode does if the episode has several.
    by_task: task, as `task_name` names it -> [(first, end), ...], the ranges of frames of that task, none across episodes.

    Raises:
        ValueError: no episodes, or one without a camera or without the column "action", or with numbers that are not finite.
        ImageError: a picture cannot be decoded. The message names episode, frame and camera.
    """

    def __init__(
        self,
        episodes: Iterable[Episode],
        size: int,
        task_name: TaskName = episode_task,
        fps: float = 0.0,
        names_of: dict[str, list[str]] | None = None,
    ):
        parts: dict[str, list[np.ndarray]] = {}
        pictures: dict[str, list[bytes]] = {}
        self.fps, self.names_of = fps, names_of or {}
        self.names: list[str] = []
        self.tasks: list[str] = []
        frame_tasks: list[str] = []
        lengths = []
        for episode in episodes:
            if "action" not in episode.columns or (size and not episode.images):
                raise missing([*episode.columns, *episode.images])
            self.names.append(episode.name or f"episode {len(lengths)}")
            if pictures and list(pictures) != list(episode.images):
                raise UserError(
                    f"{self.names[-1]} must have the cameras {', '.join(pictures)}, found {', '.join(episode.images)}"
                )
            for camera in episode.images if size else ():
                pictures.setdefault(camera, []).extend(read_pictures(episode, camera, size, self.names[-1]))
            lengths.append(len(episode.columns["action"]))
            frame_tasks += (tasks := tasks_of_frames(episode, lengths[-1], task_name))
            self.tasks.append(" / ".join(dict.fromkeys(tasks)))
            for key, values in episode.columns.items():
                is_vector = values.ndim == 1 and key in TWO_DIMENSIONAL
                parts.setdefault(key, []).append(values[:, None] if is_vector else values)
        if not lengths:
            raise UserError("there are no episodes to learn from")
        self.cameras, self.pictures = tuple(pictures), list(pictures.values())
        self.columns = {key: joined(arrays, key) for key, arrays in parts.items() if len(arrays) == len(lengths)}
        self.names_of = {key: self.names_of.get(key, []) for key in self.columns}
        ends = np.cumsum(lengths)
        self.episode = np.repeat(np.arange(len(lengths)), lengths)
        self.first, self.end = (ends - lengths)[self.episode], ends[self.episode]
        self._read_segments(frame_tasks)
        for key in TWO_DIMENSIONAL:
            self.check_finite(key)
        self.action = self.columns["action"].astype(np.float32)
        self.state = self.columns.get("observation.state", np.zeros((len(self.action), 0))).astype(np.float32)

    def _read_segments(self, frame_tasks: list[str]) -> None:
        """Sets by_task, segment_end and the task of each frame. frame_tasks: n names."""
        tasks = {name: number for number, name in enumerate(dict.fromkeys(frame_tasks))}
        self._task_names, self._frame_task = list(tasks), np.array([tasks[name] for name in frame_tasks])
        changes = (np.diff(self._frame_task) != 0) | (np.diff(self.episode) != 0)
        bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(frame_tasks)]])
        self.segment_end = np.repeat(bounds[1:], np.diff(bounds))
        self.by_task: dict[str, list[tuple[int, int]]] = {}
        for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            self.by_task.setdefault(frame_tasks[first], []).append((first, end))

    def check_finite(self, key: str) -> None:
        """Raises UserError for NaN or infinity in a column, with episode and frame. The column may be missing."""
        column = self.columns.get(key, np.zeros((len(self.episode), 1)))
        if column.ndim != 2:
            raise UserError(f"{key!r} must be a vector of numbers for each frame, found the shape {column.shape[1:]}")
        with np.errstate(over="ignore"):  # a float64 that is too large for float32 becomes infinite
            bad = np.argwhere(~np.isfinite(column.astype(np.float32)))
        if len(bad):
            frame, number = bad[0]
            episode = self.episode[frame]
            raise UserError(
                f"{self.names[episode]}: {key!r} of frame {frame - self.first[frame]} has {column[frame, number]} as number "
                f"{number + 1} of {column.shape[1]} ({len(np.unique(bad[:, 0]))} such frames in all): correct these frames or "
                "remove the episode"
            )

    def __len__(self) -> int:
        return len(self.state)

    def task(self, frame: int) -> str:
        return self._task_names[self._frame_task[frame]]

    def draw(self, n: int, rng: np.random.Generator, last: int | None = None) -> list[int]:
        """n random frames: tasks are equally likely, and so are the episodes of a task. last: only from the last so many
        frames of an episode (of its part with that task)."""
        names, frames = list(self.by_task), []
        for task in rng.integers(len(names), size=n):
            episodes = self.by_task[names[task]]
            first, end = episodes[rng.integers(len(episodes))]
            frames.append(int(rng.integers(max(first, end - last) if last else first, end)))
        return frames

    def images(self, frames: Sequence[int], camera: int = 0) -> np.ndarray:
        """The pictures of the frames, (n, S, S, 3) uint8 RGB. camera: its index in `cameras`."""
        return np.stack([decoded_square(self.pictures[camera][frame]) for frame in frames])

    def chunks(self, frames: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, length, A) float32 actions from each frame on, and (n, length) bool: False after the end of the episode, or of the
        frame's task, where the last action is repeated."""
        index, end = np.asarray(frames)[:, None] + np.arange(length), self.segment_end[frames][:, None]
        inside = index < end
        return self.action[np.where(inside, index, end - 1)], inside


def missing(names: Sequence[str]) -> UserError:
    return UserError(f'imitation learning needs a camera and a column "action"; the data has {", ".join(names)}')


def read_pictures(episode: Episode, camera: str, size: int, where: str) -> list[bytes]:
    """The encoded squares of one camera of the episode. Raises ImageError that names episode, frame and camera."""
    squares = []
    for frame, picture in enumerate(episode.images[camera]):
        try:
            squares.append(encoded_square(picture, size))
        except ImageError as error:
            raise ImageError(f"{where}: frame {frame} of the camera {camera}: {error}") from error
    return squares


def tasks_of_frames(episode: Episode, length: int, task_name: TaskName) -> list[str]:
    """The task of each of the episode's frames, as `task_name` names it."""
    texts = episode.frame_tasks or [episode.task] * length
    names = {text: task_name(replace(episode, task=text)) for text in dict.fromkeys(texts)}
    return [names[text] for text in texts]


def joined(arrays: list[np.ndarray], key: str) -> np.ndarray:
    """The rows of all episodes. Raises UserError if they differ in size."""
    if len(shapes := {array.shape[1:] for array in arrays}) > 1:
        raise UserError(f"{key!r} must have the same size in all episodes, found {', '.join(map(str, sorted(shapes)))}")
    return np.concatenate(arrays)


class DemonstrationFolder:
    """A folder of episodes that are not read yet. Made by `open_demonstrations`.

    cameras: the names of the cameras whose pictures are read, in order. other_cameras: those that are not read.
    columns: name -> how many numbers a frame has; those that can be read, without LeRobot's bookkeeping. unreadable: the names of
        others, such as text, and columns that meta/info.json does not describe.
    fps: frames per second. names_of: column -> a name for each of its numbers, [] if the data names none.
    tasks: the task of each episode, the first if it has several.
    """

    def __init__(self, folder: Path, cameras: Sequence[str], task_name: TaskName):
        self.folder, self.task_name = folder, task_name
        if not folder.is_dir():
            found = "it is a file" if folder.exists() else "no such folder exists"
            raise FileNotFoundError(
                f"{folder} must be the folder of a LeRobot dataset or of BridgeData frames: {found}"
            )
        if (folder / "frames.jsonl").is_file():
            self._open_bridge(cameras)
        elif (folder / "meta").is_dir():
            self._open_lerobot(cameras)
        else:
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
            raise UserError(
                f"{folder} must have meta/info.json (a LeRobot dataset) or frames.jsonl (BridgeData frames), found {found}"
            )

    def _open_bridge(self, cameras: Sequence[str]) -> None:
        episodes = list(bridge_episodes(self.folder))
        self._choose(list(episodes[0].images) if episodes else [], cameras)
        self.fps, self.names_of = BRIDGE_FPS, {"action": []}
        self.columns = {"action": 7} if episodes else {}
        self.unreadable = other_fields(self.folder)
        self.tasks = [self.task_name(episode) for episode in episodes]
        self._read = lambda number, encode: episodes[number]
        self._read_numbers = lambda number: episodes[number]

    def _open_lerobot(self, cameras: Sequence[str]) -> None:
        dataset = RobotDataset(self.folder)
        self._choose(dataset.cameras, cameras)
        for camera in self.cameras:
            if dataset.features[camera]["dtype"] == "video":
                for number in range(len(dataset)):  # a missing file is found now, not after an hour
                    dataset.video(number, camera)
        self.fps = float(dataset.fps)
        self.names_of = {key: number_names(dataset.features[key], width) for key, width in dataset.columns.items()}
        self.columns, self.unreadable = dataset.columns, dataset.unreadable()
        self.tasks = [self.task_name(episode) for episode in dataset.episodes]
        columns = [key for key in self.columns if key == "action" or key.startswith("observation.")]
        self._read = lambda number, encode: dataset.episode(number, self.cameras, encode, columns)
        self._read_numbers = lambda number: dataset.episode(number, [], columns=columns)

    def _choose(self, found: Sequence[str], asked: Sequence[str]) -> None:
        """Sets cameras and other_cameras. asked: names, short or whole, () for all. Raises UserError for a name that there is
        not."""
        short = short_names(found)
        known = dict(zip(short, found, strict=True)) | {name: name for name in found}
        for name in asked:
            if name not in known:
                raise UserError(f"{self.folder} has no camera {name}: its cameras are {', '.join(short) or 'none'}")
        self.cameras = tuple(dict.fromkeys([known[name] for name in asked] or found))
        self.other_cameras = [name for name in found if name not in self.cameras]

    def numbers(self, split: str) -> list[int]:
        """The episodes of a split: "val" for the held-out ones, "fit" for the others, "all" for both.
        Raises UserError for another name."""
        numbers = list(range(len(self.tasks)))
        if split not in SPLITS:
            raise UserError(f"{self.folder}: there is no split {split!r}; demonstrations have: {', '.join(SPLITS)}")
        if split == "all":
            return numbers
        kept_back = held_out(self.tasks)
        return [number for number in numbers if (number in kept_back) == (split == "val")]

    def read(self, split: str, size: int, track: Callable[[Sequence[int]], Iterable[int]] = iter) -> Demonstrations:
        """The episodes of a split. track: wraps the episode numbers, to show progress. Raises as `Demonstrations`."""
        if "action" not in self.columns or not self.cameras:
            raise missing([*self.columns, *self.cameras])
        # a video's pictures are made small before they are encoded: the same pixels, in a fraction of the time
        episodes = (self._read(number, partial(encode_square, size=size)) for number in track(self.numbers(split)))
        return Demonstrations(episodes, size, self.task_name, self.fps, self.names_of)

    def read_numbers(self, split: str) -> Demonstrations:
        """The episodes of a split without pictures, in a fraction of the time. Raises as `Demonstrations`."""
        if "action" not in self.columns:
            raise missing([*self.columns, *self.cameras])
        episodes = (self._read_numbers(number) for number in self.numbers(split))
        return Demonstrations(episodes, 0, self.task_name, self.fps, self.names_of)


def open_demonstrations(
    folder: str | Path, cameras: Sequence[str] = (), task_name: TaskName = episode_task
) -> DemonstrationFolder:
    """A LeRobot dataset, or a folder of BridgeData V2 frames (one with frames.jsonl). No LeRobot picture is read yet.

    cameras: those to read, in this order; () for all. task_name: the name of an episode's task; episodes of one name are grouped.

    Raises:
        FileNotFoundError, DataError: the data is missing or malformed.
        ValueError: no camera of that name.
    """
    return DemonstrationFolder(Path(folder).expanduser(), cameras, task_name)


def held_out(tasks: Sequence[str]) -> set[int]:
    """The episodes to validate with: the last 4 % of each task that has several episodes, or of all if no task has.
    tasks: the task of each episode. Raises ValueError for fewer than 2 episodes."""
    if len(tasks) < 2:
        raise UserError(f"training takes at least 2 episodes, one of them to validate with, found {len(tasks)}")
    by_task: dict[str, list[int]] = {}
    for number, task in enumerate(tasks):
        by_task.setdefault(task, []).append(number)
    groups = [numbers for numbers in by_task.values() if len(numbers) > 1] or [list(range(len(tasks)))]
    return {number for numbers in groups for number in numbers[-max(1, round(VAL_SHARE * len(numbers))) :]}
