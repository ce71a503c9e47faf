"""Do LeRobot's own loader and ours read the same from a dataset, whoever wrote it?

    python3.12 -m venv /tmp/lerobot && /tmp/lerobot/bin/pip install "lerobot[dataset]>=0.6" .     # needs Python 3.12
    nanochat record --tasks door-open reach --episodes 2 --questions --cameras corner2 gripperPOV --out demos
    /tmp/lerobot/bin/python benchmarks/lerobot_loader.py demos              # what `nanochat record` wrote
    /tmp/lerobot/bin/python benchmarks/lerobot_loader.py theirs --write     # LeRobot writes a small dataset first, with videos

Every frame is compared: numbers, pictures, instructions, and the rows of `language_events`. Ends with code 1 where
anything differs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from rich.progress import track
from tyro.conf import Positional

from nanochat.data.language import EVENTS, VQA
from nanochat.data.lerobot import RobotDataset
from nanochat.vision.images import open_image

VIDEO = 3  # grey levels by which two decoders may differ on average
SIZE, FPS = 64, 30  # of what --write writes: pixels, and frames a second


@dataclass
class Args:
    folder: Positional[Path]
    "A LeRobot v3.0 dataset."
    write: bool = False
    "Let LeRobot write it first: two episodes, a camera as video and one as images."


def write(folder: Path) -> None:
    """Smooth pictures that move, so that a frame that is taken for its neighbour differs."""
    camera = {"shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    joints = {"dtype": "float32", "shape": (3,), "names": ["pan", "lift", "grip"]}
    features = {
        "observation.state": joints, "action": joints,
        "observation.images.front": camera | {"dtype": "video"}, "observation.images.wrist": camera | {"dtype": "image"},
    }  # fmt: skip
    dataset = LeRobotDataset.create("local/theirs", FPS, features, root=folder, use_videos=True)
    wave = np.sin(np.linspace(0, 6, SIZE))
    for episode, task in enumerate(("pick up the cup", "wave")):
        for frame in range(20 + 5 * episode):
            shade = (np.add.outer(wave, np.roll(wave, 3 * frame))[..., None] + [0, 0.5, 1]) * 40 + 100
            state = np.array([frame, episode, 0.5], np.float32)
            pictures = dict.fromkeys(("observation.images.front", "observation.images.wrist"), shade.astype(np.uint8))
            dataset.add_frame({"observation.state": state, "action": state + 1, **pictures, "task": task})
        dataset.save_episode()
    dataset.finalize()


def compare(folder: Path) -> list[str]:
    """One line for each value that the two loaders read differently."""
    ours, theirs = RobotDataset(folder), LeRobotDataset("local/compared", root=folder)
    wrong, row, events = [], 0, 0
    if len(theirs) != sum(episode.length for episode in ours.episodes):
        return [f"{len(theirs)} frames, ours has {sum(episode.length for episode in ours.episodes)}"]
    for number in track(range(len(ours)), description="comparing episodes"):
        episode, asked = ours.episode(number), ours.questions(number)
        for frame in range(ours.episodes[number].length):
            found, place = theirs[row], f"episode {number}, frame {frame}"
            row += 1
            for key, values in episode.columns.items():
                if not np.array_equal(found[key].numpy().ravel(), np.ravel(values[frame])):
                    wrong.append(f"{place}: {key} is {found[key]}, ours {values[frame]}")
            for key, images in episode.images.items():
                picture = found[key].permute(1, 2, 0).numpy() * 255
                off = np.abs(picture - np.asarray(open_image(images[frame]), float)).mean()
                if off > (VIDEO if ours.features[key]["dtype"] == "video" else 1e-3):
                    wrong.append(f"{place}: {key} differs by {off:.1f} grey levels on average")
            task = episode.frame_tasks[frame] if episode.frame_tasks else episode.task
            if found["task"] != task:
                wrong.append(f"{place}: task is {found['task']!r}, ours {task!r}")
            rows = [event for event in found.get(EVENTS) or [] if event["style"] == VQA]
            texts = [
                (user["camera"], user["content"], said["content"])
                for user, said in zip(rows[::2], rows[1::2], strict=True)
            ]
            events += len(texts)
            if texts != asked[frame]:
                wrong.append(f"{place}: questions are {texts}, ours {asked[frame]}")
    print(
        f"{row} frames, {len(ours)} episodes, {len(ours.cameras)} cameras, {events} questions: {len(wrong)} values differ"
    )
    return wrong


def main(args: Args) -> None:
    if args.write:
        write(args.folder)
    wrong = compare(args.folder)
    for line in wrong[:20]:
        print(line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
