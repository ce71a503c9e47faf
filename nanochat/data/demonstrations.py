"""Demonstrations as training reads them: every frame of every episode, its state, its actions and its picture.

What the columns of one simulator mean is not known here; see `nanochat.metaworld.questions`.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.data.bridge import bridge_episodes
from nanochat.data.lerobot import Episode, EpisodeInfo, RobotDataset
from nanochat.data.pictures import encoded_square
from nanochat.errors import UserError

VAL_SHARE = 0.04  # of each task's episodes, but at least one
TWO_DIMENSIONAL = ("action", "observation.state")  # LeRobot stores one number per frame as (T,); these become (T, 1)

TaskName = Callable[[Episode | EpisodeInfo], str]


def episode_task(episode: Episode | EpisodeInfo) -> str:
    """The task of an episode: its instruction."""
    return episode.task


class Demonstrations:
    """All frames of some episodes, in memory. n is the number of frames.

    Pictures come from each episode's first camera. They are letterboxed to `size` pixels and stay encoded until they are
    used: at 128 pixels a frame takes 20 kB instead of 50.

    state: (n, S) float32; a robot without "observation.state" has one constant number.
    action: (n, A) float32.
    columns: name -> (n, ...) array, for the columns that all episodes have.
    pictures: n encoded squares.
    episode: (n,) int64, the episode of each frame. first, end: (n,) int64, the range of frames of that episode.
    tasks: the task of each episode, as `task_name` names it. by_task: task -> [(first, end), ...], a range per episode.

    Raises:
        ValueError: no episodes, or one without a camera or without the column "action".
        ImageError: a picture cannot be decoded.
    """

    def __init__(self, episodes: Iterable[Episode], size: int, task_name: TaskName = episode_task):
        parts: dict[str, list[np.ndarray]] = {}
        self.pictures: list[bytes] = []
        self.tasks: list[str] = []
        lengths = []
        for episode in episodes:
            if "action" not in episode.columns or not episode.images:
                found = ", ".join([*episode.columns, *episode.images])
                raise UserError(f'imitation learning needs a camera and a column "action"; the data has {found}')
            self.pictures += [encoded_square(picture, size) for picture in next(iter(episode.images.values()))]
            self.tasks.append(task_name(episode))
            lengths.append(len(episode.columns["action"]))
            for key, values in episode.columns.items():
                is_vector = values.ndim == 1 and key in TWO_DIMENSIONAL
                parts.setdefault(key, []).append(values[:, None] if is_vector else values)
        if not lengths:
            raise UserError("there are no episodes to learn from")
        self.columns = {key: np.concatenate(arrays) for key, arrays in parts.items() if len(arrays) == len(lengths)}
        self.action = self.columns["action"].astype(np.float32)
        self.state = self.columns.get("observation.state", np.zeros((len(self.action), 1))).astype(np.float32)
        ends = np.cumsum(lengths)
        self.episode = np.repeat(np.arange(len(lengths)), lengths)
        self.first, self.end = (ends - lengths)[self.episode], ends[self.episode]
        self.by_task: dict[str, list[tuple[int, int]]] = {}
        for task, end, length in zip(self.tasks, ends.tolist(), lengths, strict=True):
            self.by_task.setdefault(task, []).append((end - length, end))

    def __len__(self) -> int:
        return len(self.state)

    def task(self, frame: int) -> str:
        return self.tasks[self.episode[frame]]

    def draw(self, n: int, rng: np.random.Generator, last: int | None = None) -> list[int]:
        """n random frames: tasks are equally likely, and so are the episodes of a task. last: only from the last so many
        frames of an episode."""
        names, frames = list(self.by_task), []
        for task in rng.integers(len(names), size=n):
            episodes = self.by_task[names[task]]
            first, end = episodes[rng.integers(len(episodes))]
            frames.append(int(rng.integers(max(first, end - last) if last else first, end)))
        return frames

    def images(self, frames: Sequence[int]) -> np.ndarray:
        """The pictures of the frames, (n, S, S, 3) uint8 RGB."""
        return np.stack([np.asarray(Image.open(io.BytesIO(self.pictures[frame])).convert("RGB")) for frame in frames])

    def chunks(self, frames: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, length, A) float32 actions from each frame on, and (n, length) bool: False after the episode's end, where the
        last action is repeated."""
        index = np.asarray(frames)[:, None] + np.arange(length)
        inside = index < self.end[frames][:, None]
        return self.action[np.where(inside, index, self.end[frames][:, None] - 1)], inside


class DemonstrationFolder:
    """A folder of episodes that are not read yet. Made by `open_demonstrations`.

    cameras: the names of all cameras. camera: the one whose pictures are read; empty if there is none.
    tasks: the task of each episode.
    """

    def __init__(self, folder: Path, camera: str, task_name: TaskName):
        self.folder, self.task_name = folder, task_name
        if (folder / "frames.jsonl").is_file():
            episodes: Sequence[Episode | EpisodeInfo] = list(bridge_episodes(folder))
            self.cameras = list(episodes[0].images) if episodes else []
            self._read = episodes.__getitem__
        else:
            dataset = RobotDataset(folder)
            episodes, self.cameras = dataset.episodes, dataset.cameras
            self._read = lambda number: dataset.episode(number, self.cameras and [self.camera])
        self.camera = chosen_camera(self.cameras, camera, folder)
        self.tasks = [task_name(episode) for episode in episodes]

    def numbers(self, split: str) -> list[int]:
        """The episodes of a split: "val" for the held-out ones, "fit" for the others, any other name for all."""
        numbers = list(range(len(self.tasks)))
        if split not in ("fit", "val"):
            return numbers
        kept_back = held_out(self.tasks)
        return [number for number in numbers if (number in kept_back) == (split == "val")]

    def read(self, split: str, size: int, track: Callable[[Sequence[int]], Iterable[int]] = iter) -> Demonstrations:
        """The episodes of a split. track: wraps the episode numbers, to show progress. Raises as `Demonstrations`."""
        episodes = (self._read(number) for number in track(self.numbers(split)))
        return Demonstrations(episodes, size, self.task_name)


def open_demonstrations(
    folder: str | Path, camera: str = "", task_name: TaskName = episode_task
) -> DemonstrationFolder:
    """A LeRobot dataset, or a folder of BridgeData V2 frames (one with frames.jsonl). No LeRobot picture is read yet.

    camera: the one to read; without a name the first. task_name: the name of an episode's task; episodes of one name are grouped.

    Raises:
        FileNotFoundError, DataError: the data is missing or malformed.
        ValueError: no camera of that name.
    """
    return DemonstrationFolder(Path(folder).expanduser(), camera, task_name)


def chosen_camera(cameras: Sequence[str], name: str, folder: Path) -> str:
    """The camera of that name; without a name the first, or "" if there is none. Raises ValueError for an unknown name."""
    if name and name not in cameras:
        raise UserError(f"{folder} has no camera {name}: its cameras are {', '.join(cameras) or 'none'}")
    return name or next(iter(cameras), "")


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
