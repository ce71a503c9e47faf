"""Demonstrations as training reads them: every frame of every episode, its state, its actions and its pictures.

What the columns of one simulator mean is not known here; see `nanochat.metaworld.questions`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanochat.cameras import short_names
from nanochat.data.bridge import CAMERA as BRIDGE_CAMERA
from nanochat.data.bridge import FPS as BRIDGE_FPS
from nanochat.data.bridge import BridgeFrames
from nanochat.data.columns import number_names
from nanochat.data.frame_store import Frames, FrameStore, Track, skipped_line, squared
from nanochat.data.lerobot import Episode, EpisodeInfo, RobotDataset
from nanochat.errors import UserError
from nanochat.files import DataError
from nanochat.vision.images import ImageError

SPLITS = ("all", "fit", "val")
VAL_SHARE = 0.04  # of each task's episodes, but at least one
ACTION, STATE = (
    "action",
    "observation.state",
)  # LeRobot's names; here they stand for what --action-key and --state-key choose
OTHER_NAMES = {ACTION: ("actions",), STATE: ("state",)}
TWO_DIMENSIONAL = (ACTION, STATE)  # LeRobot stores one number per frame as (T,); these become (T, 1)

TaskName = Callable[[Episode | EpisodeInfo], str]


def episode_task(episode: Episode | EpisodeInfo) -> str:
    """The task of an episode: its instruction."""
    return episode.task


class Demonstrations:
    """All frames of some episodes. n is the number of frames.

    Numbers are in memory. Pictures, letterboxed to `size` pixels, are those of a frame store, or without one those of the
    episodes, decoded in memory. With size 0 there are none, only numbers and tasks.

    state: (n, S) float32; S is 0 for data without the column "observation.state".
    action: (n, A) float32.
    columns: name -> (n, ...) array, for the columns that all episodes have.
    cameras: the names of the cameras, the same in all episodes.
    fps: frames per second; 0 if unknown. data_fps: of the recording, some of whose frames may be left out.
    names_of: column -> a name for each of its numbers, [] if the data names none.
    episode: (n,) int64, the episode of each frame. first, end: (n,) int64, the range of frames of that episode.
    names: for messages, where each episode comes from. tasks: the task of each episode; several are joined by " / ".
    segment_end: (n,) int64, where the frame's task ends: before the episode does if the episode has several.
    by_task: task, as `task_name` names it -> [(first, end), ...], the ranges of frames of that task, none across episodes.

    Raises:
        ValueError: no episodes, or one without a camera or without the column "action", or with numbers that are not finite.
        ImageError: a picture of the episodes cannot be decoded. The message names episode, frame and camera.
    """

    def __init__(
        self,
        episodes: Iterable[Episode],
        size: int,
        task_name: TaskName = episode_task,
        fps: float = 0.0,
        names_of: dict[str, list[str]] | None = None,
        frames: Frames | None = None,
        data_fps: float = 0.0,
    ):
        """frames: of a store; None for the pictures of the episodes."""
        parts: dict[str, list[np.ndarray]] = {}
        pictures: dict[str, list[np.ndarray]] = {}
        self.fps, self.data_fps, self.names_of = fps, data_fps or fps, names_of or {}
        self.names: list[str] = []
        self.tasks: list[str] = []
        frame_tasks: list[str] = []
        lengths = []
        for episode in episodes:
            if ACTION not in episode.columns or (size and not (frames or episode.images)):
                raise missing([*episode.columns, *episode.images])
            self.names.append(episode.name or f"episode {len(lengths)}")
            if pictures and list(pictures) != list(episode.images):
                raise UserError(
                    f"{self.names[-1]} must have the cameras {', '.join(pictures)}, found {', '.join(episode.images)}"
                )
            for camera in episode.images if size else ():
                pictures.setdefault(camera, []).append(read_pictures(episode, camera, size, self.names[-1]))
            lengths.append(len(episode.columns[ACTION]))
            frame_tasks += (tasks := tasks_of_frames(episode, lengths[-1], task_name))
            self.tasks.append(" / ".join(dict.fromkeys(tasks)))
            for key, values in episode.columns.items():
                is_vector = values.ndim == 1 and key in TWO_DIMENSIONAL
                parts.setdefault(key, []).append(values[:, None] if is_vector else values)
        if not lengths:
            raise UserError("there are no episodes to learn from")
        if frames is None:
            arrays = {camera: np.concatenate(parts) for camera, parts in pictures.items()}
            frames = Frames(arrays, np.arange(sum(lengths)), {})
        self.cameras, self.frames = tuple(frames.cameras), frames
        self.columns = {key: joined(arrays, key) for key, arrays in parts.items() if len(arrays) == len(lengths)}
        self.names_of = {key: self.names_of.get(key, []) for key in self.columns}
        ends = np.cumsum(lengths)
        self.episode = np.repeat(np.arange(len(lengths)), lengths)
        self.first, self.end = (ends - lengths)[self.episode], ends[self.episode]
        self._read_segments(frame_tasks)
        for key in TWO_DIMENSIONAL:
            self.check_finite(key)
        self.action = self.columns[ACTION].astype(np.float32)
        self.state = self.columns.get(STATE, np.zeros((len(self.action), 0))).astype(np.float32)

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
        self._mean_lengths = np.array([np.diff(episodes).mean() for episodes in self.by_task.values()])

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
        """n random frames. A task is as likely as its episodes are long on average, however many it has: what takes longer has
        more to learn. Episodes of a task are equally likely. last: only from the last so many frames of an episode (of its
        part with that task)."""
        tasks, frames = list(self.by_task.values()), []
        for task in rng.choice(len(tasks), size=n, p=self._mean_lengths / self._mean_lengths.sum()):
            episodes = tasks[task]
            first, end = episodes[rng.integers(len(episodes))]
            frames.append(int(rng.integers(max(first, end - last) if last else first, end)))
        return frames

    def images(self, frames: Sequence[int], camera: int = 0) -> np.ndarray:
        """The pictures of the frames, (n, S, S, 3) uint8 RGB. camera: its index in `cameras`."""
        return np.array(self.frames.cameras[self.cameras[camera]][self.frames.rows[frames]])

    def before(self, frame: int, n: int) -> np.ndarray:
        """(k, A) float32, k <= n: the last n actions before the frame, as many as its episode has."""
        return self.action[max(int(self.first[frame]), frame - n) : frame]

    def chunks(self, frames: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, length, A) float32 actions from each frame on, and (n, length) bool: False after the end of the episode, or of the
        frame's task, where the last action is repeated."""
        index, end = np.asarray(frames)[:, None] + np.arange(length), self.segment_end[frames][:, None]
        inside = index < end
        return self.action[np.where(inside, index, end - 1)], inside


def missing(names: Sequence[str]) -> UserError:
    return UserError(
        f'imitation learning needs a camera and a column "action" (--action-key for another name); the data has '
        f"{', '.join(names) or 'nothing'}"
    )


def read_pictures(episode: Episode, camera: str, size: int, where: str) -> np.ndarray:
    """(T, S, S, 3) of one camera of the episode. Raises ImageError that names episode, frame and camera."""
    squares = np.empty((len(episode.images[camera]), size, size, 3), np.uint8)
    for frame, picture in enumerate(episode.images[camera]):
        try:
            squares[frame] = squared(picture, size)
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
    columns: name -> how many numbers a frame has; those that can be read, without LeRobot's bookkeeping. "action" and
        "observation.state" are the chosen ones. renamed: their names in the data, where these differ.
    unreadable: the names of other columns: text, columns that meta/info.json does not describe.
    fps: frames per second that are read. data_fps: that there are. names_of: column -> a name for each of its numbers, [] if the
        data names none.
    tasks: the task of each episode, the first if it has several.
    """

    def __init__(
        self, folder: Path, cameras: Sequence[str], task_name: TaskName, keys: dict[str, str], fps: float | None
    ):
        self.folder, self.task_name = folder, task_name
        if not folder.is_dir():
            found = "it is a file" if folder.exists() else "no such folder exists"
            raise FileNotFoundError(
                f"{folder} must be the folder of a LeRobot dataset or of BridgeData frames: {found}"
            )
        if (folder / "frames.jsonl").is_file():
            self._open_bridge()
        elif (folder / "meta").is_dir():
            self._open_lerobot()
        else:
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
            raise UserError(
                f"{folder} must have meta/info.json (a LeRobot dataset) or frames.jsonl (BridgeData frames), found {found}"
            )
        self._choose_cameras(cameras)
        self._choose_columns(keys)
        self.fps = self.data_fps if fps is None else float(fps)
        if not 0 < self.fps <= self.data_fps:
            raise UserError(f"--fps must be more than 0 and at most the data's {self.data_fps:g}, got {self.fps:g}")

    def _open_bridge(self) -> None:
        self.source = data = BridgeFrames(self.folder)
        self.all_cameras = [BRIDGE_CAMERA] if len(data) else []
        self.columns = {ACTION: 7} if len(data) else {}
        self.data_fps, self.names_of, self.unreadable = BRIDGE_FPS, {}, list(data.unreadable)
        self.tasks = [self.task_name(episode) for episode in data.episodes]
        self._lengths = [len(paths) for paths in data.paths]
        self._episode = lambda number, columns: data.episodes[number]

    def _open_lerobot(self) -> None:
        self.source = data = RobotDataset(self.folder)
        self.all_cameras, self.columns = list(data.cameras), dict(data.columns)
        self.data_fps, self.unreadable = float(data.fps), data.unreadable()
        self.names_of = {key: number_names(data.features[key], width) for key, width in data.columns.items()}
        self.tasks = [self.task_name(episode) for episode in data.episodes]
        self._lengths = [episode.length for episode in data.episodes]
        self._episode = lambda number, columns: data.episode(number, [], columns)

    def _choose_cameras(self, asked: Sequence[str]) -> None:
        """asked: names, short or whole, () for all. Raises UserError for a name that there is not."""
        found = self.all_cameras
        short = short_names(found)
        known = dict(zip(short, found, strict=True)) | {name: name for name in found}
        for name in asked:
            if name not in known:
                raise UserError(f"{self.folder} has no camera {name}: its cameras are {', '.join(short) or 'none'}")
        self.cameras = tuple(dict.fromkeys([known[name] for name in asked] or found))
        self.other_cameras = [name for name in found if name not in self.cameras]

    def _choose_columns(self, keys: dict[str, str]) -> None:
        """Gives the columns of actions and states LeRobot's names. keys: ACTION and STATE -> the asked name, "" for the usual
        ones. Raises UserError for a name that there is not."""
        self.renamed: dict[str, str] = {}
        for name, asked in keys.items():
            if asked and asked not in self.columns:
                flag = "--action-key" if name == ACTION else "--state-key"
                raise UserError(f"{self.folder} has no column {asked} ({flag}): it has {', '.join(self.columns)}")
            usual = [key for key in (name, *OTHER_NAMES[name]) if key in self.columns]
            chosen = asked or next(iter(usual), name)
            if chosen != name:
                self.renamed[name] = chosen
        swapped = {chosen: name for name, chosen in self.renamed.items()}
        self.unreadable += [key for key in self.renamed if key in self.columns]
        self.columns, self.names_of = (
            {swapped.get(key, key): value for key, value in table.items() if key not in self.renamed}
            for table in (self.columns, self.names_of)
        )

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

    def read(
        self,
        split: str,
        size: int,
        track: Track = lambda sequence, description: sequence,
        cache: Path | None = None,
        skip_damaged: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> Demonstrations:
        """The episodes of a split, with pictures of `size` pixels from the store of frames in `cache` (None for the default
        folder). What is not in the store is decoded now. track, skip_damaged, say: see `FrameStore`. Raises as it does, and as
        `Demonstrations`."""
        if ACTION not in self.columns or not self.cameras:
            raise missing([*self.columns, *self.cameras])
        if not (numbers := self.numbers(split)):
            raise UserError(f"{self.folder}: there are no episodes to learn from")
        store = FrameStore(self.source, cache, skip_damaged, track, say)
        frames = store.read(self.cameras, {number: self._kept(number) for number in numbers}, size)
        if frames.damaged:
            say(skipped_line(frames.damaged, len(numbers)))
        return self._read([number for number in numbers if number not in frames.damaged], size, track, frames)

    def read_numbers(self, split: str) -> Demonstrations:
        """The episodes of a split without pictures, in a fraction of the time. Raises as `Demonstrations`."""
        if ACTION not in self.columns:
            raise missing([*self.columns, *self.cameras])
        return self._read(self.numbers(split), 0)

    def _read(
        self,
        numbers: list[int],
        size: int,
        track: Track = lambda sequence, description: sequence,
        frames: Frames | None = None,
    ) -> Demonstrations:
        columns = {
            self.renamed.get(key, key): key for key in self.columns if key == ACTION or key.startswith("observation.")
        }
        episodes = (self._sampled(number, columns) for number in track(numbers, description="reading episodes"))
        try:
            return Demonstrations(episodes, size, self.task_name, self.fps, self.names_of, frames, self.data_fps)
        except DataError:
            raise
        except UserError as error:  # its columns have LeRobot's names
            raise UserError(with_names(str(error), self.renamed)) from error

    def _kept(self, number: int) -> list[int]:
        """The frames of an episode that are nearest to multiples of 1 / fps."""
        step = self.data_fps / self.fps
        times = np.arange(int((self._lengths[number] - 1) / step + 1e-6) + 1) * step
        return np.floor(times + 0.5 - 1e-6).astype(int).tolist()

    def _sampled(self, number: int, columns: dict[str, str]) -> Episode:
        """The kept frames of an episode, without pictures. columns: name in the data -> name here."""
        episode, kept = self._episode(number, list(columns)), self._kept(number)
        found = {columns[key]: values[kept] for key, values in episode.columns.items()}
        return replace(
            episode, columns=found, frame_tasks=[episode.frame_tasks[i] for i in kept if episode.frame_tasks]
        )


def with_names(message: str, renamed: dict[str, str]) -> str:
    """A message with the names that columns have in the data."""
    for name, own in renamed.items():
        message = message.replace(f"{name!r}", f"{own!r}")
    return message


def open_demonstrations(
    folder: str | Path,
    cameras: Sequence[str] = (),
    task_name: TaskName = episode_task,
    *,
    action_key: str = "",
    state_key: str = "",
    fps: float | None = None,
) -> DemonstrationFolder:
    """A LeRobot dataset, or a folder of BridgeData V2 frames (one with frames.jsonl). No picture is read yet.

    cameras: those to read, in this order; () for all. task_name: the name of an episode's task; episodes of one name are grouped.
    action_key, state_key: the columns of actions and states; "" for "action" or "actions", and "observation.state" or "state".
    fps: frames per second to read, at most those of the data; None for all. Where it does not divide the data's rate, the nearest
        frames are taken.

    Raises:
        FileNotFoundError, DataError: the data is missing or malformed.
        ValueError: no camera or column of that name; a rate above that of the data.
    """
    keys = {ACTION: action_key, STATE: state_key}
    return DemonstrationFolder(Path(folder).expanduser(), cameras, task_name, keys, fps)


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
