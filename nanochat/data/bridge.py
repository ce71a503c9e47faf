"""A folder of BridgeData V2 frames (Walke et al. 2023, CC BY 4.0): a WidowX arm at 5 frames per second, 7-D actions."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nanochat.data.lerobot import Episode, only_if_mixed
from nanochat.data.sample import check_text
from nanochat.files import DataError, json_lines, path_inside, short_repr

FIELDS = ("image", "episode", "step", "instruction", "rephrasings", "action")
CAMERA = "observation.images.image_0"
FPS = 5.0


class BridgeFrames:
    """The episodes of a folder. Its frames.jsonl has a row per frame, sorted by episode and step: image (a path in the
    folder), episode, step, instruction, rephrasings, action.

    episodes: without pictures. paths: for each episode the files of its pictures, which may be missing. unreadable: the fields
        of the rows that are not read.

    Raises:
        FileNotFoundError: frames.jsonl is missing.
        DataError: a row is malformed (the message names its episode).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.episodes: list[Episode] = []
        self.paths: list[list[Path]] = []
        rows = [row for _, row in json_lines(self.folder / "frames.jsonl")]
        self.unreadable = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in FIELDS]
        for number, group in itertools.groupby(rows, lambda row: row.get("episode")):
            frames, where = list(group), f"{self.folder}/frames.jsonl: episode {number}"
            self.episodes.append(episode_of(frames, number, where))
            self.paths.append([path_inside(self.folder, row.get("image"), where) for row in frames])

    def __len__(self) -> int:
        return len(self.episodes)

    def pictures(self, number: int, camera: str, frames: Sequence[int]) -> Iterator[bytes]:
        """The encoded pictures of frames of an episode. Raises FileNotFoundError for a missing one."""
        for path in self.picture_source(number, camera, frames)[0]:
            yield path.read_bytes()

    def picture_source(self, number: int, camera: str, frames: Sequence[int]) -> tuple[list[Path], str]:
        """(the files that these pictures depend on, where the pictures are in them). Raises as `pictures`."""
        paths = [self.paths[number][frame] for frame in frames]
        for frame, path in zip(frames, paths, strict=True):
            if not os.path.isfile(path):  # Path.is_file raises for names that are too long
                name = short_repr(str(path.relative_to(self.folder)))
                raise FileNotFoundError(f"{self.episodes[number].name}: frame {frame}: the picture {name} is missing")
        return paths, ""


def episode_of(frames: list[dict], number: object, where: str) -> Episode:
    """The episode of these rows, without pictures."""
    if [row.get("step") for row in frames] != list(range(len(frames))):
        raise DataError(f"{where} must have the steps 0 to {len(frames) - 1}, in order")
    try:
        actions = np.array([numbers(row["action"]) for row in frames], np.float32).reshape(len(frames), 7)
        tasks = [row["instruction"] for row in frames]
        extra = {"rephrasings": "\n".join(frames[0]["rephrasings"])}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} must have an instruction, rephrasings, 7-D actions: {error!r}") from error
    for step, task in enumerate(tasks):
        check_text(task, "instruction", f"{where}, step {step}")
    extra = {"name": f"bridge-{number}"} | extra
    return Episode(tasks[0], {"action": actions}, {}, extra, only_if_mixed(tasks), where)


def numbers(action: list) -> list:
    """The same list. Raises TypeError for text and booleans, which numpy would make numbers."""
    if not isinstance(action, list) or not all(type(value) in (int, float) for value in action):
        raise TypeError(f"found {short_repr(action)}")
    return action
