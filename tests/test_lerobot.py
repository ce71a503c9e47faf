"""LeRobot datasets that others wrote: version 2.1, images in files, videos; broken ones are one clear error."""

import io
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanochat.data.lerobot import EPISODES_PATH, Episode, RobotDataset
from nanochat.data.lerobot_writer import DATA_PATH, write_dataset
from nanochat.files import DataError
from tests.data_files import CAMERA, SHAPE, assert_same, make_episode, write_robot


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(path: Path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def replaced(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


# ---- v2.1 and videos ----


def write_v21(folder: Path, image_dtype: str = "image") -> list[Episode]:
    """As LeRobot wrote it: a parquet file an episode, lists without fixed length."""
    episodes = [make_episode(length, seed) for seed, length in enumerate((5, 1, 7))]
    (folder / "meta").mkdir(parents=True)
    features = {
        "observation.state": {"dtype": "float32", "shape": [4], "names": {"motors": list("abcd")}},
        "action": {"dtype": "float32", "shape": [3], "names": None},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        "count": {"dtype": "int64", "shape": [2], "names": None},
        "note": {"dtype": "string", "shape": [1], "names": None},
        CAMERA: {"dtype": image_dtype, "shape": list(SHAPE), "names": ["height", "width", "channel"]},
        "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    info = {
        "codebase_version": "v2.1", "fps": 10, "total_episodes": 3, "total_frames": 13, "chunks_size": 2, "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps(info))
    lines = []
    for i, episode in enumerate(episodes):
        length = len(episode.columns["action"])
        lines.append({"episode_index": i, "tasks": [episode.task], "length": length, **episode.extra})
        columns = {key: pa.array(column.tolist()) for key, column in episode.columns.items()}
        columns["action"] = columns["action"].cast(pa.list_(pa.float32()))
        columns |= {"frame_index": pa.array(range(length)), "episode_index": pa.array([i] * length)}
        columns |= {"note": pa.array(["text"] * length)}
        if image_dtype == "image":
            columns[CAMERA] = pa.array([{"bytes": x, "path": "x.png"} for x in episode.images[CAMERA]])
        path = folder / f"data/chunk-{i // 2:03d}/episode_{i:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return episodes


def test_v21(tmp_path):
    episodes = write_v21(tmp_path / "robot")
    dataset = RobotDataset(tmp_path / "robot")
    assert [episode.length for episode in dataset.episodes] == [5, 1, 7] and dataset.stats == {}
    for i, episode in enumerate(episodes):
        assert_same(dataset.episode(i), episode)


def test_v21_is_converted(tmp_path):
    episodes = write_v21(tmp_path / "old")
    old = RobotDataset(tmp_path / "old")
    write_dataset(tmp_path / "new", map(old.episode, range(len(old))), old.fps, "arm", SHAPE)
    for i, episode in enumerate(episodes):
        assert_same(RobotDataset(tmp_path / "new").episode(i), episode)


def test_pictures_that_are_files(tmp_path):
    episode = write_robot(tmp_path / "robot", 2)[0]
    (tmp_path / "robot/images").mkdir()
    for n, data in enumerate(episode.images[CAMERA]):
        (tmp_path / f"robot/images/{n}.png").write_bytes(data)
    path = tmp_path / "robot/data/chunk-000/file-000.parquet"
    edit_table(path, lambda t: replaced(t, CAMERA, [{"bytes": None, "path": f"images/{n}.png"} for n in range(2)]))
    assert_same(RobotDataset(tmp_path / "robot").episode(0), episode)
    for name in ("../robot/images/0.png", "/etc/passwd", None):
        edit_table(path, lambda t, name=name: replaced(t, CAMERA, [{"bytes": None, "path": name}] * 2))
        with pytest.raises(
            DataError, match="expected the path of a file below" if name else "images must be|expected the path"
        ):
            RobotDataset(tmp_path / "robot").episode(0)


def write_video(path: Path, pictures: list[np.ndarray], fps: int):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.bit_rate = 10_000_000
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


def gray_levels(pictures: list[bytes]) -> list[int]:
    return [round(np.asarray(Image.open(io.BytesIO(data))).mean()) for data in pictures]


def test_videos(tmp_path):
    pytest.importorskip("av")
    levels = [20 * n for n in range(12)]
    frames = [np.full((32, 48, 3), level, np.uint8) for level in levels]
    write_v21(tmp_path / "v21", "video")
    for i, (start, stop) in enumerate([(0, 5), (5, 6), (0, 7)]):
        write_video(tmp_path / f"v21/videos/chunk-{i // 2:03d}/{CAMERA}/episode_{i:06d}.mp4", frames[start:stop], 10)
    dataset = RobotDataset(tmp_path / "v21")
    np.testing.assert_allclose(gray_levels(dataset.episode(2).images[CAMERA]), levels[:7], atol=3)
    np.testing.assert_allclose(gray_levels(dataset.episode(1).images[CAMERA]), levels[5:6], atol=3)

    write_dataset(tmp_path / "v30", [make_episode(n, n, images={}) for n in (5, 7)], 10, "arm", SHAPE)
    features = json.loads((tmp_path / "v30/meta/info.json").read_text())["features"]
    video = {"dtype": "video", "shape": [32, 48, 3], "names": None}
    template = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    edit_json(tmp_path / "v30/meta/info.json", features=features | {CAMERA: video}, video_path=template)
    columns = {"chunk_index": [0, 0], "file_index": [0, 0], "from_timestamp": [0.0, 0.5]}

    def add(table):
        for name, values in columns.items():
            table = table.append_column(f"videos/{CAMERA}/{name}", pa.array(values))
        return table

    edit_table(tmp_path / "v30" / EPISODES_PATH, add)
    write_video(tmp_path / f"v30/videos/{CAMERA}/chunk-000/file-000.mp4", frames, 10)
    dataset = RobotDataset(tmp_path / "v30")
    np.testing.assert_allclose(gray_levels(dataset.episode(0).images[CAMERA]), levels[:5], atol=3)
    np.testing.assert_allclose(gray_levels(dataset.episode(1).images[CAMERA]), levels[5:], atol=3)
    write_video(tmp_path / f"v30/videos/{CAMERA}/chunk-000/file-000.mp4", frames[:9], 10)
    with pytest.raises(DataError, match="must have 7 frames from 0.5 s on at 10 fps, found 4"):
        dataset.episode(1)
    (tmp_path / f"v30/videos/{CAMERA}/chunk-000/file-000.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="cannot be read as a video"):
        dataset.episode(1)


def test_videos_without_the_library(tmp_path, monkeypatch):
    write_v21(tmp_path / "robot", "video")
    for i in range(3):
        path = tmp_path / f"robot/videos/chunk-{i // 2:03d}/{CAMERA}/episode_{i:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no video")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        RobotDataset(tmp_path / "robot").episode(0)


# ---- what is broken ----


def info_with(**changes):
    return lambda folder: edit_json(folder / "meta/info.json", **changes)


def rows_with(name, *values):
    return lambda folder: edit_table(folder / EPISODES_PATH, lambda table: replaced(table, name, values))


def frames_with(change):
    return lambda folder: edit_table(folder / "data/chunk-000/file-000.parquet", change)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def without(name):
    return lambda folder: (folder / name).unlink()


DATA = "data/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (shutil.rmtree, FileNotFoundError, "there is no folder"),
        (without("meta/info.json"), FileNotFoundError, "info.json is missing"),
        (without(EPISODES_PATH), FileNotFoundError, "file-000.parquet is missing"),
        (without(DATA), FileNotFoundError, "data/chunk-000/file-000.parquet is missing"),
        (text("meta/info.json", "{"), DataError, "info.json: expected a JSON object"),
        (text("meta/info.json", "[" * 100_000), DataError, "info.json: expected a JSON object"),
        (text("meta/info.json", "[]"), DataError, r"expected a JSON object, found \[\]"),
        (text("meta/stats.json", "no"), DataError, "stats.json: expected a JSON object"),
        (text(EPISODES_PATH, "no"), DataError, "cannot be read as parquet"),
        (text(DATA, "no"), DataError, "cannot be read as parquet"),
        (info_with(codebase_version="v9.0"), DataError, "must be v3.0 and v2.1, found 'v9.0'|found 'v9.0'"),
        (info_with(codebase_version=["v3.0"]), DataError, "the version must be"),
        (info_with(fps=0), DataError, "fps must be"),
        (info_with(fps="10"), DataError, "fps must be"),
        (info_with(fps=float("nan")), DataError, "fps must be"),
        (info_with(fps=[0] * 2000), DataError, "fps must be"),
        (info_with(codebase_version="x" * 2000), DataError, "the version must be"),
        (info_with(data_path=[0] * 2000), DataError, "path template"),
        (info_with(features=[]), DataError, "features must be"),
        (info_with(features={"action": {"dtype": "float32"}}), DataError, "features must be"),
        (info_with(total_episodes=2), DataError, "contradicts the table of episodes"),
        (info_with(total_frames=12), DataError, "contradicts the table of episodes"),
        (info_with(data_path=None), DataError, "path template None"),
        (info_with(data_path="{nope}.parquet"), DataError, "path template"),
        (info_with(data_path="{chunk_index.__class__}"), FileNotFoundError, "is missing"),
        (info_with(data_path="../robot/" + DATA_PATH), DataError, "expected the path of a file below"),
        (info_with(data_path="/etc/passwd"), DataError, "expected the path of a file below"),
        (rows_with("length", 5, 1, 8), DataError, "contradicts"),
        (rows_with("length", 4, 2, 7), DataError, "must have 4 frames in order, found 5"),
        (rows_with("length", 5, 0, 8), DataError, "row 1 of the table of episodes must have"),
        (rows_with("length", 5, -1, 9), DataError, "'length' must be an integer"),
        (rows_with("length", 5, 1.0, 7), DataError, "'length' must be an integer"),
        (rows_with("episode_index", 0, 2, 1), DataError, "must have episode_index 1"),
        (rows_with("tasks", [1], [1], [1]), DataError, "'tasks' must be non-empty text"),
        (rows_with("tasks", "a", "b", "c"), DataError, "frames and tasks"),
        (rows_with("data/file_index", 0, 0, -1), DataError, "'data/file_index' must be an integer"),
        (rows_with("data/file_index", 0, 0, 10**12), FileNotFoundError, "is missing"),
        (frames_with(lambda t: t.drop_columns(["action"])), DataError, "action"),
        (frames_with(lambda t: t.slice(1)), DataError, "must have 5 frames in order, found 4"),
        (frames_with(lambda t: t.take([1, 0, *range(2, 13)])), DataError, "in another order"),
        (frames_with(lambda t: replaced(t, "action", [[1.0, 2.0]] * 13)), DataError, r"must be of shape \(3,\)"),
        (frames_with(lambda t: replaced(t, "action", [[1.0]] * 4 + [[1.0, 2.0]] * 9)), DataError, "same length"),
        (frames_with(lambda t: replaced(t, "action", [None] * 13)), DataError, "must be numbers|same length"),
        (frames_with(lambda t: replaced(t, "action", ["text"] * 13)), DataError, "must be numbers"),
        (frames_with(lambda t: replaced(t, CAMERA, ["text"] * 13)), DataError, "images must be"),
        (frames_with(lambda t: replaced(t, CAMERA, [None] * 13)), DataError, "images must be"),
    ],
)
def test_a_broken_folder_is_one_clear_error(tmp_path, damage, error, message):
    write_robot(tmp_path / "robot", 5, 1, 7)
    damage(tmp_path / "robot")
    with pytest.raises(error, match=message) as caught:
        dataset = RobotDataset(tmp_path / "robot")
        dataset.episode(0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"episode_index": 0}', '{"episode_index": 0, "length": true, "tasks": ["a"]}']
)
def test_a_broken_v21_table(tmp_path, line):
    write_v21(tmp_path / "robot")
    (tmp_path / "robot/meta/episodes.jsonl").write_text(line + "\n")
    with pytest.raises(DataError):
        RobotDataset(tmp_path / "robot")


def test_a_length_that_would_fill_the_memory_is_not_believed(tmp_path):
    write_robot(tmp_path / "robot", 5)
    rows_with("length", 10**15)(tmp_path / "robot")
    edit_json(tmp_path / "robot/meta/info.json", total_frames=10**15)
    with pytest.raises(DataError, match="found 5"):
        RobotDataset(tmp_path / "robot").episode(0)


@pytest.mark.parametrize("name", [DATA, EPISODES_PATH])
def test_damaged_bytes_are_an_error_or_harmless(tmp_path, name):
    write_robot(tmp_path / "robot", 2, 3)
    whole, rng = (tmp_path / "robot" / name).read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        (tmp_path / "robot" / name).write_bytes(damaged)
        try:
            found = RobotDataset(tmp_path / "robot").episode(1)
        except (DataError, FileNotFoundError):
            continue
        assert isinstance(found, Episode) and len({len(column) for column in found.columns.values()}) == 1


@pytest.mark.parametrize("i", [-1, 3])
def test_an_episode_that_is_not_there(tmp_path, i):
    write_robot(tmp_path / "robot", 5, 1, 7)
    with pytest.raises(IndexError, match="which has 3"):
        RobotDataset(tmp_path / "robot").episode(i)
