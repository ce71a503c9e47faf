"""A folder of BridgeData V2 frames (Walke et al. 2023, CC BY 4.0): a WidowX arm at 5 frames per second, 7-D actions."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanochat.data.lerobot import Episode, only_if_mixed
from nanochat.data.sample import check_text
from nanochat.files import DataError, existing_file, json_lines, path_inside, short_repr

FIELDS = ("image", "episode", "step", "instruction", "rephrasings", "action")
CAMERA = "observation.images.image_0"
FPS = 5.0


def bridge_episodes(folder: str | Path) -> Iterator[Episode]:
    """The episodes of a folder. Its frames.jsonl has a row per frame, sorted by episode and step: image (a path in the
    folder), episode, step, instruction, rephrasings, action.

    Raises:
        FileNotFoundError: frames.jsonl or an image is missing.
        DataError: a row is malformed (the message names its episode).
    """
    folder = Path(folder).expanduser()
    rows = [row for _, row in json_lines(folder / "frames.jsonl")]
    for number, group in itertools.groupby(rows, lambda row: row.get("episode")):
        frames, where = list(group), f"{folder}/frames.jsonl: episode {number}"
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
        paths = [existing_file(path_inside(folder, row.get("image"), where)) for row in frames]
        images = {CAMERA: [path.read_bytes() for path in paths]}
        extra = {"name": f"bridge-{number}"} | extra
        yield Episode(tasks[0], {"action": actions}, images, extra, only_if_mixed(tasks), where)


def numbers(action: list) -> list:
    """The same list. Raises TypeError for text and booleans, which numpy would make numbers."""
    if not isinstance(action, list) or not all(type(value) in (int, float) for value in action):
        raise TypeError(f"found {short_repr(action)}")
    return action


def other_fields(folder: Path) -> list[str]:
    """The fields of the rows that are not read."""
    found = dict.fromkeys(key for _, row in json_lines(folder / "frames.jsonl") for key in row)
    return [key for key in found if key not in FIELDS]
