"""Demonstrations as training reads them: every frame of every episode, its state, its actions and its pictures.

What the columns of one simulator mean is not known here; see `nanochat.metaworld.questions`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from nanochat.data.frame_store import Frames
from nanochat.data.lerobot import Episode, EpisodeInfo
from nanochat.errors import UserError

# LeRobot's names; here they stand for what --action-key and --state-key choose
ACTION, STATE = "action", "observation.state"
TWO_DIMENSIONAL = (ACTION, STATE)  # LeRobot stores one number per frame as (T,); these become (T, 1)

TaskName = Callable[[Episode | EpisodeInfo], str]


def episode_task(episode: Episode | EpisodeInfo) -> str:
    """The task of an episode: its instruction."""
    return episode.task


class Demonstrations:
    """All frames of some episodes. n is the number of frames.

    Numbers are in memory, pictures in a frame store. Without it there are only numbers and tasks.

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

    Raises ValueError for no episodes, for one without the column "action", and for numbers that are not finite.
    """

    def __init__(
        self,
        episodes: Iterable[Episode],
        frames: Frames | None = None,
        task_name: TaskName = episode_task,
        fps: float = 0.0,
        names_of: dict[str, list[str]] | None = None,
        data_fps: float = 0.0,
    ):
        """frames: the pictures of these episodes' frames, in their order."""
        parts: dict[str, list[np.ndarray]] = {}
        self.fps, self.data_fps, self.names_of = fps, data_fps or fps, names_of or {}
        self.names: list[str] = []
        self.tasks: list[str] = []
        frame_tasks: list[str] = []
        lengths = []
        for episode in episodes:
            if ACTION not in episode.columns:
                raise missing(list(episode.columns))
            self.names.append(episode.name or f"episode {len(lengths)}")
            lengths.append(len(episode.columns[ACTION]))
            frame_tasks += (tasks := tasks_of_frames(episode, lengths[-1], task_name))
            self.tasks.append(" / ".join(dict.fromkeys(tasks)))
            for key, values in episode.columns.items():
                is_vector = values.ndim == 1 and key in TWO_DIMENSIONAL
                parts.setdefault(key, []).append(values[:, None] if is_vector else values)
        if not lengths:
            raise UserError("there are no episodes to learn from")
        self.frames = frames or Frames({}, np.arange(0), {})
        self.cameras = tuple(self.frames.cameras)
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
