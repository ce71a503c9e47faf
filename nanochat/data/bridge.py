"""A folder of BridgeData V2 frames (Walke et al. 2023, CC BY 4.0): a WidowX arm at 5 frames per second, 7-D actions."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanochat.data.lerobot import Episode
from nanochat.files import DataError, existing_file, json_lines, path_inside


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
            actions = np.array([row["action"] for row in frames], np.float32).reshape(len(frames), 7)
            task, extra = frames[0]["instruction"], {"rephrasings": "\n".join(frames[0]["rephrasings"])}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} must have an instruction, rephrasings, 7-D actions: {error!r}") from error
        paths = [existing_file(path_inside(folder, row.get("image"), where)) for row in frames]
        images = {"observation.images.image_0": [path.read_bytes() for path in paths]}
        yield Episode(task, {"action": actions}, images, {"name": f"bridge-{number}"} | extra)
