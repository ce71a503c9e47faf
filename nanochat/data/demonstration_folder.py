"""Folders of demonstrations: LeRobot datasets and BridgeData frames, with the cameras, columns and rate that are asked for."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import numpy as np

from nanochat.cameras import short_names
from nanochat.data.bridge import CAMERA as BRIDGE_CAMERA
from nanochat.data.bridge import FPS as BRIDGE_FPS
from nanochat.data.bridge import BridgeFrames
from nanochat.data.columns import number_names
from nanochat.data.demonstrations import ACTION, STATE, Demonstrations, TaskName, episode_task, missing
from nanochat.data.frame_store import Frames, FrameStore, Track, skipped_line, stacked
from nanochat.data.lerobot import Episode, RobotDataset
from nanochat.errors import UserError
from nanochat.files import DataError

SPLITS = ("all", "fit", "val")
VAL_SHARE = 0.04  # of each task's episodes, but at least one
OTHER_NAMES = {ACTION: ("actions",), STATE: ("state",)}


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
        ones. Raises UserError for a name that there is not, and for one column as both."""
        chosen: dict[str, str] = {}
        for name, asked in keys.items():
            if asked and asked not in self.columns:
                flag = "--action-key" if name == ACTION else "--state-key"
                raise UserError(f"{self.folder} has no column {asked} ({flag}): it has {', '.join(self.columns)}")
            usual = [key for key in (name, *OTHER_NAMES[name]) if key in self.columns]
            chosen[name] = asked or next(iter(usual), name)
        if chosen[ACTION] == chosen[STATE]:
            raise UserError(
                f"{self.folder}: {chosen[ACTION]} cannot be both the actions (--action-key) and the state (--state-key), which a "
                f"policy would copy: choose another column for one of them, of {', '.join(self.columns)}"
            )
        self.renamed = {name: key for name, key in chosen.items() if key != name}
        name_here = {key: name for name, key in chosen.items()}
        left = [name for name in chosen if name in self.columns and name not in name_here]  # another has its name
        self.unreadable += left
        self.columns, self.names_of = (
            {name_here.get(key, key): value for key, value in table.items() if key not in left}
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
        also: Sequence["DemonstrationFolder"] = (),
    ) -> Demonstrations:
        """The episodes of a split, with pictures of `size` pixels from the store of frames in `cache` (None for the default
        folder). What is not in the store is decoded now. track, skip_damaged, say: see `FrameStore`. also: further folders
        of the same robot, read as one with this. Raises as `FrameStore`, as `Demonstrations`, and as `check_alike`."""
        folders = (self, *also)
        for one, other in combinations(folders, 2):
            check_alike(one, other)
        found = [folder.decoded(split, size, cache, skip_damaged, track, say) for folder in folders]
        episodes = chain.from_iterable(
            folder.episodes(numbers, track) for folder, (numbers, _) in zip(folders, found, strict=True)
        )
        data_fps = max(folder.data_fps for folder in folders)  # more than fps where any leaves out frames
        return self.demonstrations(episodes, stacked([frames for _, frames in found]), data_fps)

    def decoded(
        self, split: str, size: int, cache: Path | None, skip_damaged: bool, track: Track, say: Callable[[str], None]
    ) -> tuple[list[int], Frames]:
        """The episodes of a split that can be read, and their pictures. See `read`."""
        if ACTION not in self.columns or not self.cameras:
            raise missing([*self.columns, *self.cameras])
        if not (numbers := self.numbers(split)):
            raise UserError(f"{self.folder}: there are no episodes to learn from")
        store = FrameStore(self.source, cache, skip_damaged, track, say)
        frames = store.read(self.cameras, {number: self._kept(number) for number in numbers}, size)
        if frames.damaged:
            say(skipped_line(frames.damaged, len(numbers)))
        return [number for number in numbers if number not in frames.damaged], frames

    def read_numbers(self, split: str) -> Demonstrations:
        """The episodes of a split without pictures, in a fraction of the time. Raises as `Demonstrations`."""
        if ACTION not in self.columns:
            raise missing([*self.columns, *self.cameras])
        return self.demonstrations(self.episodes(self.numbers(split)))

    def episodes(self, numbers: list[int], track: Track = lambda sequence, description: sequence) -> Iterator[Episode]:
        """Episodes without pictures."""
        columns = {
            self.renamed.get(key, key): key for key in self.columns if key == ACTION or key.startswith("observation.")
        }
        return (self._sampled(number, columns) for number in track(numbers, description="reading episodes"))

    def demonstrations(
        self, episodes: Iterable[Episode], frames: Frames | None = None, data_fps: float = 0.0
    ) -> Demonstrations:
        """Episodes as this folder has them, as one. data_fps: of all their folders; 0 for that of this one. Raises as
        `Demonstrations`, with the names that columns have here."""
        try:
            return Demonstrations(episodes, frames, self.task_name, self.fps, self.names_of, data_fps or self.data_fps)
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


def check_alike(first: DemonstrationFolder, other: DemonstrationFolder) -> None:
    """Raises UserError for folders that differ in cameras, in frames per second, in the sizes of states and actions, or in the
    names of their numbers, where both have names."""
    names = [
        (f"names of number {place} of {key}", here, there)
        for key in (ACTION, STATE)
        for place, (here, there) in enumerate(
            zip(first.names_of.get(key, ()), other.names_of.get(key, ()), strict=False), 1
        )
    ]
    for what, here, there in (
        ("cameras", list(first.cameras), list(other.cameras)),
        ("frames per second", first.fps, other.fps),
        *((f"numbers in {key}", first.columns.get(key), other.columns.get(key)) for key in (ACTION, STATE)),
        *names,
    ):
        if here != there:
            raise UserError(
                f"{first.folder} and {other.folder} have different {what}: {here} and {there}; folders that are learnt "
                "together must be of the same robot"
            )


def with_names(message: str, renamed: dict[str, str]) -> str:
    """A message with the names that columns have in the data."""
    names = "|".join(map(re.escape, (ACTION, STATE)))  # in one pass: each may have the other's name
    return re.sub(f"'({names})'", lambda found: repr(renamed.get(found[1], found[1])), message)


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
        ValueError: no camera or column of that name; one column as actions and state; a rate above that of the data.
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
