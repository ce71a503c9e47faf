import gc
import io
import json
import os
import random
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from nanochat.data import columns as tables
from nanochat.data import lerobot
from nanochat.data.lerobot import Episode, RobotDataset, bridge_sample, write_dataset
from nanochat.data.sample import DataError
from tests.conftest import REAL_DATA

CAMERA = "observation.images.corner2"
SHAPE = (6, 8, 3)
needs_bridge = pytest.mark.skipif(
    not (REAL_DATA / "bridge_v2_sample").is_dir(), reason="NANOCHAT_TEST_DATA has no bridge_v2_sample"
)


def picture(pixels: np.ndarray, kind: str = "PNG") -> bytes:
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
    images = {CAMERA: [picture(rng.integers(0, 256, SHAPE, np.uint8)) for _ in range(length)]}
    return Episode(
        **{"task": f"öffne {seed % 2}", "columns": columns, "images": images, "extra": {"seed": seed}} | changes
    )


def write(folder: Path, *lengths: int) -> list[Episode]:
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


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(path: Path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def replaced(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


# ---- round trips ----


@st.composite
def datasets_of_episodes(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    keys = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=8)
    widths = st.sampled_from([(), (1,), (2,), (5,)])
    kinds = st.sampled_from([np.float32, np.int64, np.bool_])
    columns = draw(
        st.dictionaries(keys.filter(lambda k: k not in lerobot.BOOKKEEPING), st.tuples(widths, kinds), max_size=4)
    )
    texts = st.text(min_size=1, max_size=20).filter(str.strip)
    extras = draw(st.dictionaries(keys, st.sampled_from([str, int, float]), max_size=2))
    values = {str: st.text(max_size=9), int: st.integers(-(2**63), 2**63 - 1), float: st.floats(allow_nan=False)}
    episodes = []
    for length in lengths:
        arrays = {
            key: draw(hnp.arrays(kind, (length, *width), elements={} if kind != np.float32 else FINITE))
            for key, (width, kind) in columns.items()
        }
        images = {CAMERA: [picture(np.full(SHAPE, n, np.uint8), "JPEG") for n in range(length)]}
        extra = {key: draw(values[kind]) for key, kind in extras.items() if key not in lerobot.EPISODE_FIELDS}
        episodes.append(Episode(draw(texts), arrays, images, extra))
    return episodes


FINITE = {"allow_nan": False, "allow_infinity": False}


@settings(max_examples=25)
@given(datasets_of_episodes())
def test_what_is_written_is_read_back(episodes):
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "robot", episodes, 30, "arm", SHAPE)
        dataset = RobotDataset(Path(folder) / "robot")
        assert (len(dataset), dataset.fps, dataset.cameras) == (len(episodes), 30, [CAMERA])
        for i, episode in enumerate(episodes):
            info = dataset.episodes[i]
            assert (info.index, info.task, info.extra) == (i, episode.task, episode.extra)
            assert info.length == len(episode.images[CAMERA])
            assert_same(dataset.episode(i), episode)


def test_columns_that_are_read_can_be_changed(tmp_path):
    write(tmp_path / "robot")
    for column in RobotDataset(tmp_path / "robot").episode(0).columns.values():
        assert column.flags.writeable


def test_without_cameras_and_with_two(tmp_path):
    for images in ({}, {"a": make_episode().images[CAMERA], "b": make_episode(seed=1).images[CAMERA]}):
        episode = make_episode(images=images)
        write_dataset(tmp_path / str(len(images)), [episode], 10, "arm", SHAPE)
        dataset = RobotDataset(tmp_path / str(len(images)))
        assert dataset.cameras == list(images)
        assert_same(dataset.episode(0), episode)


def test_an_extra_that_only_some_episodes_have(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(extra={}), make_episode(extra={"note": "ä"})], 10, "arm", SHAPE)
    assert [episode.extra for episode in RobotDataset(tmp_path / "robot").episodes] == [{}, {"note": "ä"}]


def test_only_the_episode_that_is_asked_for_is_read(tmp_path):
    write(tmp_path / "robot", 3, 4)
    path = tmp_path / "robot/data/chunk-000/file-000.parquet"
    group = pq.ParquetFile(path).metadata.row_group(1)
    with open(path, "r+b") as file:  # break the other one's pages
        start = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
        file.seek(start)
        file.write(b"\xff" * 40)
    dataset = RobotDataset(tmp_path / "robot")
    assert_same(dataset.episode(0), make_episode(3, 0))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        dataset.episode(1)


# ---- the layout, as others read it ----


def test_layout(tmp_path):
    episodes = write(tmp_path / "robot", 5, 1, 7)
    info = json.loads((tmp_path / "robot/meta/info.json").read_text())
    counts = {"total_episodes": 3, "total_frames": 13, "total_tasks": 2, "splits": {"train": "0:3"}, "fps": 10}
    assert counts.items() <= info.items() and info["codebase_version"] == "v3.0" and info["robot_type"] == "sawyer"
    assert info["features"]["action"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "grip"]}
    image = {"dtype": "image", "shape": [6, 8, 3], "names": ["height", "width", "channels"]}
    assert info["features"][CAMERA] == image
    assert info["features"]["next.success"] == {"dtype": "bool", "shape": [1], "names": None}

    frames = pq.read_table(tmp_path / "robot/data/chunk-000/file-000.parquet")
    assert frames.column_names == list(info["features"])
    assert frames["index"].to_pylist() == list(range(13))
    assert frames["episode_index"].to_pylist() == [0] * 5 + [1] + [2] * 7
    assert frames["task_index"].to_pylist() == [0] * 5 + [1] + [0] * 7
    assert frames["frame_index"].to_pylist() == [*range(5), 0, *range(7)]
    np.testing.assert_array_equal(frames["timestamp"], np.float32([*range(5), 0, *range(7)]) / np.float32(10))
    assert frames.schema.field("action").type == pa.list_(pa.float32(), 3)
    known = json.loads(frames.schema.metadata[b"huggingface"])["info"]["features"]
    assert known[CAMERA] == {"_type": "Image"} and known["next.success"] == {"_type": "Value", "dtype": "bool"}
    assert known["action"] == {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "float32"}, "length": 3}
    assert frames[CAMERA].to_pylist()[5] == {"bytes": episodes[1].images[CAMERA][0], "path": None}

    rows = pq.read_table(tmp_path / "robot/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["tasks"] for row in rows] == [["öffne 0"], ["öffne 1"], ["öffne 0"]]
    assert [(row["dataset_from_index"], row["dataset_to_index"], row["length"]) for row in rows] == [
        (0, 5, 5), (5, 6, 1), (6, 13, 7),
    ]  # fmt: skip
    assert all(row["data/chunk_index"] == row["data/file_index"] == 0 for row in rows)
    np.testing.assert_allclose(rows[2]["stats/action/max"], episodes[2].columns["action"].max(0))


def test_pandas_reads_the_tasks(tmp_path):
    pandas = pytest.importorskip("pandas")
    write(tmp_path / "robot")
    tasks = pandas.read_parquet(tmp_path / "robot/meta/tasks.parquet")
    assert tasks.index.name == "task" and list(tasks.columns) == ["task_index"]
    assert tasks.loc["öffne 1"].task_index == 1 and tasks.iloc[0].name == "öffne 0"


def test_the_datasets_library_decodes_the_frames(tmp_path):
    datasets = pytest.importorskip("datasets")
    episode = write(tmp_path / "robot", 3)[0]
    path = str(tmp_path / "robot/data/chunk-000/file-000.parquet")
    frames = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    assert isinstance(frames.features[CAMERA], datasets.Image) and frames.features["action"].length == 3
    np.testing.assert_array_equal(frames[2][CAMERA], Image.open(io.BytesIO(episode.images[CAMERA][2])))


def test_lerobot_opens_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset", exc_type=ImportError)
    episodes = write(tmp_path / "robot", 5, 1, 7)
    theirs = module.LeRobotDataset("x/y", root=tmp_path / "robot")
    assert (theirs.num_episodes, theirs.num_frames, theirs.meta.camera_keys) == (3, 13, [CAMERA])
    frames = [(i, t) for i, episode in enumerate(episodes) for t in range(len(episode.columns["action"]))]
    for (i, t), item in zip(frames, (theirs[n] for n in range(13)), strict=True):
        assert (item["task"], item["episode_index"], item["frame_index"]) == (episodes[i].task, i, t)
        for key, column in episodes[i].columns.items():
            np.testing.assert_array_equal(item[key], column[t])
        pixels = np.asarray(Image.open(io.BytesIO(episodes[i].images[CAMERA][t])))
        np.testing.assert_allclose(item[CAMERA], pixels.transpose(2, 0, 1) / 255, atol=1e-6)
    assert theirs.meta.stats["action"]["q99"].shape == (3,) and theirs.meta.stats[CAMERA]["mean"].shape == (3, 1, 1)


def test_statistics(tmp_path):
    episodes = write(tmp_path / "robot", 5, 1, 7)
    stats = RobotDataset(tmp_path / "robot").stats
    assert stats.keys() == RobotDataset(tmp_path / "robot").features.keys()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(x))) for e in episodes for x in e.images[CAMERA]]) / 255
    expected = {
        "action": np.concatenate([episode.columns["action"] for episode in episodes]).astype(np.float64),
        "next.success": np.concatenate([episode.columns["next.success"] for episode in episodes])[:, None] * 1.0,
        CAMERA: pixels.reshape(-1, 3),
    }
    for key, values in expected.items():
        found = {
            name: np.squeeze(value, (1, 2)) if np.ndim(value) == 3 else value for name, value in stats[key].items()
        }
        assert found["count"] == [13]
        np.testing.assert_allclose(found["min"], values.min(0))
        np.testing.assert_allclose(found["max"], values.max(0))
        np.testing.assert_allclose(found["mean"], values.mean(0))
        np.testing.assert_allclose(found["std"], values.std(0))
        for name, share in tables.QUANTILES.items():
            method = "lower" if key == CAMERA else "linear"  # a value that a pixel has
            np.testing.assert_allclose(found[name], np.quantile(values, share, axis=0, method=method))


# ---- streaming, files, atomicity ----


def test_several_files_and_one_episode_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "FILE_MB", 0.001)
    monkeypatch.setattr(lerobot, "FILES_A_CHUNK", 2)
    alive = []

    def episodes():
        for seed in range(9):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1
            episode = make_episode(3, seed)
            alive.append(weakref.ref(episode))
            yield episode
            del episode

    write_dataset(tmp_path / "robot", episodes(), 10, "arm", SHAPE)
    files = sorted(str(path.relative_to(tmp_path / "robot/data")) for path in tmp_path.glob("robot/data/*/*"))
    assert len(files) > 3 and files[:3] == [
        "chunk-000/file-000.parquet",
        "chunk-000/file-001.parquet",
        "chunk-001/file-000.parquet",
    ]
    dataset = RobotDataset(tmp_path / "robot")
    for i in range(9):
        assert_same(dataset.episode(i), make_episode(3, i))


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    def episodes():
        yield make_episode()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "robot", episodes(), 10, "arm", SHAPE)
    with pytest.raises(DataError, match="at least one episode"):
        write_dataset(tmp_path / "robot", [], 10, "arm", SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path / "robot")
    (tmp_path / "file").write_text("mine")
    for name in ("robot", "file"):
        with pytest.raises(FileExistsError, match="choose another folder"):
            write(tmp_path / name)
    assert_same(RobotDataset(tmp_path / "robot").episode(0), make_episode())
    assert sorted(os.listdir(tmp_path)) == ["file", "robot"]


GRAY = picture(np.zeros((6, 8), np.uint8))
LARGE = picture(np.zeros((9, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": " "}, "'task' must be text"),
        ({"task": "half \ud800"}, "not valid Unicode"),
        ({"columns": {}, "images": {}}, "as many frames"),
        ({"columns": {"action": np.zeros((4, 3), np.float32)}}, "as many frames"),
        ({"columns": {"action": np.zeros((0, 3), np.float32)}, "images": {}}, "at least 1"),
        ({"columns": {"action": np.zeros((5, 3))}}, "found float64"),
        ({"columns": {"action": np.zeros((5, 2, 2), np.float32)}}, r"found float32 of shape \(5, 2, 2\)"),
        ({"columns": {"action": np.zeros((5, 0), np.float32)}}, r"of shape \(5, 0\)"),
        ({"columns": {"action": np.zeros(5, ">f4")}}, "must be float32"),
        ({"columns": {"action": np.full(5, np.nan, np.float32)}}, "not finite"),
        ({"columns": {"index": np.zeros(5, np.float32)}}, "cannot name a column"),
        ({"columns": {"a/b": np.zeros(5, np.float32)}}, "cannot name a column"),
        ({"columns": {CAMERA: np.zeros(5, np.float32)}}, "cannot name a column"),
        ({"images": {CAMERA: [b"no picture"] * 5}}, "frame 0 .*must be the bytes of a PNG or JPEG"),
        ({"images": {CAMERA: [make_episode().images[CAMERA][0][:-30]] * 5}}, "must be the bytes of a PNG or JPEG"),
        ({"images": {CAMERA: [None] * 5}}, "must be the bytes of a PNG or JPEG"),
        ({"images": {CAMERA: [GRAY] * 5}}, "must be RGB of shape .* found L"),
        ({"images": {CAMERA: [LARGE] * 5}}, "must be RGB of shape .* found RGB of 9 x 8"),
        ({"extra": {"length": 3}}, "under a free name"),
        ({"extra": {"a/b": 3}}, "under a free name"),
        ({"extra": {"list": [3]}}, "must be text, int or float"),
        ({"extra": {"big": 2**63}}, "must be text, int or float"),
        ({"extra": {"seed": "text"}}, "of another type before"),
        ({"columns": {"action": np.zeros((5, 4), np.float32)}}, "must be as in the first episode"),
    ],
)
def test_an_episode_that_cannot_be_written(tmp_path, changes, message):
    with pytest.raises(DataError, match=f"episode 1: .*{message}"):
        write_dataset(tmp_path / "robot", [make_episode(), make_episode(**changes)], 10, "arm", SHAPE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fps": 0}, "fps"),
        ({"fps": 0.5}, "fps"),
        ({"names": {"action": ["x"]}}, "1 names"),
        ({"names": {"nope": []}}, "no column"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    settings = {"fps": 10, "robot_type": "arm", "camera_shape": SHAPE} | settings
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "robot", [make_episode()], **settings)


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
    episode = write(tmp_path / "robot", 2)[0]
    (tmp_path / "robot/images").mkdir()
    for n, data in enumerate(episode.images[CAMERA]):
        (tmp_path / f"robot/images/{n}.png").write_bytes(data)
    path = tmp_path / "robot/data/chunk-000/file-000.parquet"
    edit_table(path, lambda t: replaced(t, CAMERA, [{"bytes": None, "path": f"images/{n}.png"} for n in range(2)]))
    assert_same(RobotDataset(tmp_path / "robot").episode(0), episode)
    for name in ("../robot/images/0.png", "/etc/passwd", None):
        edit_table(path, lambda t, name=name: replaced(t, CAMERA, [{"bytes": None, "path": name}] * 2))
        with pytest.raises(
            DataError, match="is not the path of a file in" if name else "pictures must be|is not the path"
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

    edit_table(tmp_path / "v30" / lerobot.EPISODES_PATH, add)
    write_video(tmp_path / f"v30/videos/{CAMERA}/chunk-000/file-000.mp4", frames, 10)
    dataset = RobotDataset(tmp_path / "v30")
    np.testing.assert_allclose(gray_levels(dataset.episode(0).images[CAMERA]), levels[:5], atol=3)
    np.testing.assert_allclose(gray_levels(dataset.episode(1).images[CAMERA]), levels[5:], atol=3)
    write_video(tmp_path / f"v30/videos/{CAMERA}/chunk-000/file-000.mp4", frames[:9], 10)
    with pytest.raises(DataError, match="must have 7 frames from 0.5 s on at 10 a second, found 4"):
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
    return lambda folder: edit_table(folder / lerobot.EPISODES_PATH, lambda table: replaced(table, name, values))


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
        (without(lerobot.EPISODES_PATH), FileNotFoundError, "file-000.parquet is missing"),
        (without(DATA), FileNotFoundError, "data/chunk-000/file-000.parquet is missing"),
        (text("meta/info.json", "{"), DataError, "info.json must be a JSON object"),
        (text("meta/info.json", "[" * 100_000), DataError, "info.json must be a JSON object"),
        (text("meta/info.json", "[]"), DataError, "must be a JSON object, found list"),
        (text("meta/stats.json", "no"), DataError, "stats.json must be a JSON object"),
        (text(lerobot.EPISODES_PATH, "no"), DataError, "cannot be read as parquet"),
        (text(DATA, "no"), DataError, "cannot be read as parquet"),
        (info_with(codebase_version="v9.0"), DataError, "must be v3.0 and v2.1, found 'v9.0'|found 'v9.0'"),
        (info_with(codebase_version=["v3.0"]), DataError, "the version must be"),
        (info_with(fps=0), DataError, "fps must be"),
        (info_with(fps="10"), DataError, "fps must be"),
        (info_with(fps=float("nan")), DataError, "fps must be"),
        (info_with(features=[]), DataError, "features must be"),
        (info_with(features={"action": {"dtype": "float32"}}), DataError, "features must be"),
        (info_with(total_episodes=2), DataError, "disagrees with the table of episodes"),
        (info_with(total_frames=12), DataError, "disagrees with the table of episodes"),
        (info_with(data_path=None), DataError, "path template None"),
        (info_with(data_path="{nope}.parquet"), DataError, "path template"),
        (info_with(data_path="{chunk_index.__class__}"), FileNotFoundError, "is missing"),
        (info_with(data_path="../robot/" + lerobot.DATA_PATH), DataError, "is not the path of a file in"),
        (info_with(data_path="/etc/passwd"), DataError, "is not the path of a file in"),
        (rows_with("length", 5, 1, 8), DataError, "disagrees"),
        (rows_with("length", 4, 2, 7), DataError, "must have 4 frames in order, found 5"),
        (rows_with("length", 5, 0, 8), DataError, "row 1 of the table of episodes must have"),
        (rows_with("length", 5, -1, 9), DataError, "'length' must be a whole number"),
        (rows_with("length", 5, 1.0, 7), DataError, "'length' must be a whole number"),
        (rows_with("episode_index", 0, 2, 1), DataError, "must have episode_index 1"),
        (rows_with("tasks", ["a"], [], ["b"]), DataError, "must have episode_index 1, frames and tasks"),
        (rows_with("tasks", [1], [1], [1]), DataError, "'tasks' must be text"),
        (rows_with("tasks", "a", "b", "c"), DataError, "frames and tasks"),
        (rows_with("data/file_index", 0, 0, -1), DataError, "'data/file_index' must be a whole number"),
        (rows_with("data/file_index", 0, 0, 10**12), FileNotFoundError, "is missing"),
        (frames_with(lambda t: t.drop_columns(["action"])), DataError, "action"),
        (frames_with(lambda t: t.slice(1)), DataError, "must have 5 frames in order, found 4"),
        (frames_with(lambda t: t.take([1, 0, *range(2, 13)])), DataError, "in another order"),
        (frames_with(lambda t: replaced(t, "action", [[1.0, 2.0]] * 13)), DataError, r"must be of shape \(3,\)"),
        (frames_with(lambda t: replaced(t, "action", [[1.0]] * 4 + [[1.0, 2.0]] * 9)), DataError, "same length"),
        (frames_with(lambda t: replaced(t, "action", [None] * 13)), DataError, "must be numbers|same length"),
        (frames_with(lambda t: replaced(t, "action", ["text"] * 13)), DataError, "must be numbers"),
        (frames_with(lambda t: replaced(t, CAMERA, ["text"] * 13)), DataError, "pictures must be"),
        (frames_with(lambda t: replaced(t, CAMERA, [None] * 13)), DataError, "pictures must be"),
    ],
)
def test_a_broken_folder_is_one_clear_error(tmp_path, damage, error, message):
    write(tmp_path / "robot", 5, 1, 7)
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
    write(tmp_path / "robot", 5)
    rows_with("length", 10**15)(tmp_path / "robot")
    edit_json(tmp_path / "robot/meta/info.json", total_frames=10**15)
    with pytest.raises(DataError, match="found 5"):
        RobotDataset(tmp_path / "robot").episode(0)


@pytest.mark.parametrize("name", [DATA, lerobot.EPISODES_PATH])
def test_damaged_bytes_are_an_error_or_harmless(tmp_path, name):
    write(tmp_path / "robot", 2, 3)
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
    write(tmp_path / "robot", 5, 1, 7)
    with pytest.raises(IndexError, match="which has 3"):
        RobotDataset(tmp_path / "robot").episode(i)


# ---- BridgeData V2 ----


@needs_bridge
def test_the_bridge_sample_is_converted(tmp_path):
    write_dataset(tmp_path / "bridge", bridge_sample(REAL_DATA / "bridge_v2_sample"), 5, "widowx", (256, 256, 3))
    dataset = RobotDataset(tmp_path / "bridge")
    assert len(dataset) == 9 and sum(episode.length for episode in dataset.episodes) == 336
    for i, episode in enumerate(bridge_sample(REAL_DATA / "bridge_v2_sample")):
        assert episode.columns["action"].shape[1] == 7
        assert_same(dataset.episode(i), episode)


def bridge_row(**changes) -> dict:
    return {
        "image": "0.png",
        "episode": 4,
        "step": 0,
        "instruction": "öffne",
        "rephrasings": ["a", "b"],
        "action": [0] * 7,
    } | changes


def test_bridge_rows(tmp_path):
    (tmp_path / "0.png").write_bytes(b"kept as it is")
    rows = [bridge_row(), bridge_row(step=1, action=[1] * 7), bridge_row(episode=6)]
    (tmp_path / "frames.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = bridge_sample(tmp_path)
    assert first.task == "öffne" and first.extra == {"name": "bridge-4", "rephrasings": "a\nb"}
    np.testing.assert_array_equal(first.columns["action"], np.float32([[0] * 7, [1] * 7]))
    assert second.images == {"observation.images.image_0": [b"kept as it is"]}


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"step": 1}, DataError),
        ({"action": [1, 2]}, DataError),
        ({"action": "x"}, DataError),
        ({"rephrasings": None}, DataError),
        ({"image": "../0.png"}, DataError),
        ({"image": "/0.png"}, DataError),
        ({"image": "1.png"}, FileNotFoundError),
    ],
)
def test_a_bridge_row_that_is_malformed(tmp_path, changes, error):
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "frames.jsonl").write_text(json.dumps(bridge_row(**changes)))
    with pytest.raises(error):
        list(bridge_sample(tmp_path))
