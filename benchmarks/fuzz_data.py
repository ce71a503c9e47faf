"""The data sets of fuzz.py: pictures with captions, questions or conversations in every layout, and robot episodes."""

import base64
import json
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz_changes import CHANGES, change_bytes, encoded, times, write_files, write_parquet
from PIL import Image

from nanochat.data import load_dataset
from nanochat.data.columns import pq
from nanochat.data.demonstration_folder import open_demonstrations
from nanochat.data.lerobot import Episode, RobotDataset
from nanochat.data.lerobot_writer import write_dataset
from nanochat.vision.images import open_image

Case = tuple[str, Callable[[], object]]


@dataclass
class Source:
    """files: path -> content of a dataset. read: what a run does with the folder. damaged: the files that are changed."""

    files: dict[str, bytes]
    read: Callable[[Path, str], None]
    damaged: tuple[str, ...]


def read_pictures(name: str) -> Callable[[Path, str], None]:
    def read(folder: Path, split: str) -> None:
        dataset = load_dataset(folder / name if name else folder, split)
        for sample in dataset.samples[:10]:
            assert sample.question and sample.answer and sample.references
            for image in sample.images:
                open_image(image)

    return read


def read_robot(folder: Path, split: str) -> None:
    dataset = RobotDataset(folder)
    for episode in dataset.episodes[:3]:
        dataset.episode(episode.index)
    open_demonstrations(folder).read(split, 32)


def read_bridge(folder: Path, split: str) -> None:
    open_demonstrations(folder).read(split, 32)


class Data:
    def __init__(self, folder: Path):
        self.folder = folder
        self.sources = picture_sources() | robot_sources(folder)
        for name, source in self.sources.items():
            try:
                self.read(source, source.files, "all")
            except Exception as error:
                raise RuntimeError(f"the valid source {name}") from error

    def case(self, rng: random.Random) -> Case:
        name = rng.choice(list(self.sources))
        source = self.sources[name]
        path = rng.choice(source.damaged)
        data, done, change = source.files[path], [], CHANGES.get(Path(path).suffix, change_bytes)
        for _ in times(rng):
            with suppress(Exception):  # after a change that left no valid file
                data, what = change(data, rng)
                done.append(what)
        if rng.random() < 0.25 or not done:
            data, what = change_bytes(data, rng, rng.choice(list(source.files.values())))
            done.append(what)
        split = rng.choice(["all", "fit", "val"])
        return f"{name}, {path}: {'; '.join(done)}", lambda: self.read(source, source.files | {path: data}, split)

    def read(self, source: Source, files: dict[str, bytes], split: str) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            write_files(Path(folder), files)
            source.read(Path(folder), split)


def lines(*rows: dict) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def picture_sources() -> dict[str, Source]:
    png = [encoded(Image.new("RGB", (9, 8), (40 * i, 0, 0)), "PNG") for i in range(4)]
    images = {f"images/{i}.png": content for i, content in enumerate(png)}
    names = list(images)
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    parquet = [
        {"images": [{"bytes": content, "path": None}], "messages": messages, "references": ["red"]} for content in png
    ]
    plain = [
        {"image": {"bytes": content, "path": name}, "question": "what?", "answer": "red"}
        for name, content in images.items()
    ]
    shared = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}]
    url = "data:image/png;base64," + base64.b64encode(png[0]).decode()
    coco = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "caption": "a red one"} for i in range(len(names))],
    }
    contents = {
        "captions.csv": "\n".join(["file,caption", *(f"{name},a red one" for name in names)]).encode(),
        "questions.tsv": "\n".join(["image\tquestion\tanswer", *(f"{name}\twhat?\tred" for name in names)]).encode(),
        "metadata.csv": "\n".join(["file_name;text", *(f'{name};"a red; one"' for name in names)]).encode(),
        "metadata.jsonl": lines(*({"file_name": name, "text": "a red one"} for name in names)),
        "questions.jsonl": lines(*({"image": name, "question": "what?", "answer": "red"} for name in names)),
        "captions.jsonl": lines(*({"image": name, "captions": ["a red one", "red"]} for name in names)),
        "messages.jsonl": lines(*({"images": [name], "messages": shared, "system": "be short"} for name in names)),
        "turns.jsonl": lines(*({"images": [name], "query": "<image>what?", "response": "red"} for name in [*names, url])),
        "instructions.json": json.dumps([{"instruction": "add", "input": "1 1", "output": "2"}] * 3).encode(),
        "llava.json": json.dumps([{"id": name, "image": name, "conversations": turns} for name in names]).encode(),
        "captions_coco.json": json.dumps(coco).encode(), "messages.parquet": write_parquet(parquet),
        "plain.parquet": write_parquet(plain), "images/0.txt": b"a red one\nred",
    }  # fmt: skip
    whole = ("metadata.csv", "metadata.jsonl", "images/0.txt")  # the folder is read; of the others, the file
    return {
        name: Source(images | {name: content}, read_pictures("" if name in whole else name), (name,))
        for name, content in contents.items()
    }


def robot_sources(folder: Path) -> dict[str, Source]:
    rng = np.random.default_rng(0)
    png = encoded(Image.new("RGB", (9, 8)), "PNG")
    episodes = []
    for i in range(3):
        columns = {"observation.state": rng.random((4, 2), np.float32), "action": rng.random((4, 3), np.float32)}
        episodes.append(Episode(f"open {i % 2}", columns, {"observation.images.front": [png] * 4}, {"seed": i}))
    write_dataset(folder / "robot", episodes, 10, "arm", (8, 9, 3))
    v3 = {
        str(path.relative_to(folder / "robot")): path.read_bytes() for path in sorted((folder / "robot").rglob("*.*"))
    }
    info = json.loads(v3["meta/info.json"]) | {"codebase_version": "v2.1"}
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    rows = pq.read_table(folder / "robot/data/chunk-000/file-000.parquet").to_pylist()
    v2 = {f"data/chunk-000/episode_{i:06d}.parquet": write_parquet(rows[4 * i : 4 * i + 4]) for i in range(3)}
    v2["meta/info.json"] = json.dumps(info).encode()
    v2["meta/tasks.jsonl"] = lines(*({"task_index": i, "task": f"open {i}"} for i in range(2)))
    v2["meta/episodes.jsonl"] = lines(
        *({"episode_index": i, "tasks": [f"open {i % 2}"], "length": 4} for i in range(3))
    )
    frame = {"image": "0.png", "instruction": "open", "rephrasings": ["a", "b"], "action": [0.1] * 7}
    frames = lines(*(frame | {"episode": i // 2, "step": i % 2} for i in range(6)))
    return {
        "LeRobot v3.0": Source(v3, read_robot, tuple(path for path in v3)),
        "LeRobot v2.1": Source(v2, read_robot, tuple(path for path in v2)),
        "BridgeData": Source({"0.png": png, "frames.jsonl": frames}, read_bridge, ("frames.jsonl",)),
    }
