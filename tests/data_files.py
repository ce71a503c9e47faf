"""Small data files that tests write."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.data.demonstrations import Demonstrations
from nanochat.data.frame_store import Frames, squared
from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset

# ---- images and rows ----


def png(colour=(255, 0, 0)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


def write_pictures(folder: Path) -> Path:
    """Writes images/0.png .. images/19.png in a folder and returns the folder."""
    (folder / "images").mkdir()
    for i in range(20):
        (folder / f"images/{i}.png").write_bytes(png((i, 0, 0)))
    return folder


def write_lines(file: Path, *rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# ---- robot episodes ----

CAMERA = "observation.images.corner2"
SHAPE = (6, 8, 3)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_episode(length: int = 5, seed: int = 0, **changes) -> Episode:
    rng = np.random.default_rng(seed)
    columns = {
        "observation.state": rng.normal(size=(length, 4)).astype(np.float32),
        "action": rng.normal(size=(length, 3)).astype(np.float32),
        "next.success": rng.random(length) < 0.5,
        "count": rng.integers(-9, 9, (length, 2)),
    }
    images = {CAMERA: [encode(rng.integers(0, 256, SHAPE, np.uint8)) for _ in range(length)]}
    return Episode(
        **{"task": f"öffne {seed % 2}", "columns": columns, "images": images, "extra": {"seed": seed}} | changes
    )


def demonstrations(episodes: Iterable[Episode], size: int, *rest, **options) -> Demonstrations:
    """Those of episodes in memory, with their pictures letterboxed to `size` pixels as a frame store has them."""
    episodes = list(episodes)
    cameras = {
        camera: np.stack([squared(picture, size) for episode in episodes for picture in episode.images[camera]])
        for camera in episodes[0].images
    }
    n = sum(len(episode.columns["action"]) for episode in episodes)
    return Demonstrations(episodes, Frames(cameras, np.arange(n), {}), *rest, **options)


def write_robot(folder: Path, *lengths: int) -> list[Episode]:
    episodes = [make_episode(length, seed) for seed, length in enumerate(lengths or (5, 1, 7))]
    write_dataset(folder, episodes, 10, "sawyer", SHAPE, {"action": ["x", "y", "grip"]})
    return episodes


def assert_same(found: Episode, expected: Episode):
    assert (found.task, found.images, found.extra) == (expected.task, expected.images, expected.extra)
    assert list(found.columns) == list(expected.columns)
    for key, column in expected.columns.items():
        column = column[:, 0] if column.shape[1:] == (1,) else column
        assert found.columns[key].dtype == column.dtype
        np.testing.assert_array_equal(found.columns[key], column)
