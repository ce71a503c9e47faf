"""LeRobot datasets that are written: read back the same, laid out as other libraries expect, complete or absent."""

import gc
import io
import json
import os
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

from nanochat.data import lerobot, lerobot_writer
from nanochat.data.columns import read_groups
from nanochat.data.lerobot import BOOKKEEPING, EPISODE_FIELDS, Episode, RobotDataset
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.statistics import QUANTILES
from nanochat.files import DataError
from tests.data_files import CAMERA, SHAPE, assert_same, encode, make_episode, write_robot

# ---- round trips ----


@st.composite
def datasets_of_episodes(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    keys = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=8)
    widths = st.sampled_from([(), (1,), (2,), (5,)])
    kinds = st.sampled_from([np.float32, np.int64, np.bool_])
    columns = draw(st.dictionaries(keys.filter(lambda k: k not in BOOKKEEPING), st.tuples(widths, kinds), max_size=4))
    texts = st.text(min_size=1, max_size=20).filter(str.strip)
    extras = draw(st.dictionaries(keys, st.sampled_from([str, int, float]), max_size=2))
    values = {str: st.text(max_size=9), int: st.integers(-(2**63), 2**63 - 1), float: st.floats(allow_nan=False)}
    episodes = []
    for length in lengths:
        arrays = {
            key: draw(hnp.arrays(kind, (length, *width), elements={} if kind != np.float32 else FINITE))
            for key, (width, kind) in columns.items()
        }
        images = {CAMERA: [encode(np.full(SHAPE, n, np.uint8), "JPEG") for n in range(length)]}
        extra = {key: draw(values[kind]) for key, kind in extras.items() if key not in EPISODE_FIELDS}
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
    write_robot(tmp_path / "robot")
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
    write_robot(tmp_path / "robot", 3, 4)
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


def test_the_footer_of_a_file_is_read_once(tmp_path):
    """It grows with the number of episodes, so reading it for each of them would take quadratic time."""
    write_robot(tmp_path / "robot", 3, 4)
    dataset = RobotDataset(tmp_path / "robot")
    assert_same(dataset.episode(0), make_episode(3, 0))
    with open(tmp_path / "robot/data/chunk-000/file-000.parquet", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)
    assert_same(dataset.episode(1), make_episode(4, 1))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        RobotDataset(tmp_path / "robot").episode(1)


@pytest.mark.parametrize("order", ["one after the other", "mixed"])
def test_a_row_group_of_several_episodes_is_read_once(tmp_path, monkeypatch, order):
    """For every set of columns that is asked for, also in turns; reading it for each episode would take quadratic time."""
    write_robot(tmp_path / "robot", 3, 4, 2)
    path = tmp_path / "robot/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    if order == "mixed":  # the frames of an episode stay in their order
        table = table.sort_by([("frame_index", "ascending"), ("episode_index", "descending")])
    pq.write_table(table, path)
    reads = []
    monkeypatch.setattr(lerobot, "read_groups", lambda *given: reads.append(given[2]) or read_groups(*given))
    dataset = RobotDataset(tmp_path / "robot")
    for i, n in enumerate((3, 4, 2)):
        expected = make_episode(n, i)
        assert_same(dataset.episode(i), expected)
        assert list(dataset.pictures(i, CAMERA, [0, n - 1])) == [expected.images[CAMERA][k] for k in (0, n - 1)]
    assert len(reads) == len(set(map(tuple, reads))) == 2


# ---- the layout, as others read it ----


def test_layout(tmp_path):
    episodes = write_robot(tmp_path / "robot", 5, 1, 7)
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
    write_robot(tmp_path / "robot")
    tasks = pandas.read_parquet(tmp_path / "robot/meta/tasks.parquet")
    assert tasks.index.name == "task" and list(tasks.columns) == ["task_index"]
    assert tasks.loc["öffne 1"].task_index == 1 and tasks.iloc[0].name == "öffne 0"


def test_the_datasets_library_decodes_the_frames(tmp_path):
    datasets = pytest.importorskip("datasets")
    episode = write_robot(tmp_path / "robot", 3)[0]
    path = str(tmp_path / "robot/data/chunk-000/file-000.parquet")
    frames = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    assert isinstance(frames.features[CAMERA], datasets.Image) and frames.features["action"].length == 3
    np.testing.assert_array_equal(frames[2][CAMERA], Image.open(io.BytesIO(episode.images[CAMERA][2])))


def test_lerobot_opens_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset", exc_type=ImportError)
    episodes = write_robot(tmp_path / "robot", 5, 1, 7)
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
    episodes = write_robot(tmp_path / "robot", 5, 1, 7)
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
        for name, share in QUANTILES.items():
            method = "lower" if key == CAMERA else "linear"  # a value that a pixel has
            np.testing.assert_allclose(found[name], np.quantile(values, share, axis=0, method=method))


# ---- streaming, files, atomicity ----


def test_several_files_and_one_episode_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_writer, "FILE_MB", 0.001)
    monkeypatch.setattr(lerobot_writer, "FILES_PER_CHUNK", 2)
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
    write_robot(tmp_path / "robot")
    (tmp_path / "file").write_text("mine")
    for name in ("robot", "file"):
        with pytest.raises(FileExistsError, match="choose another folder"):
            write_robot(tmp_path / name)
    assert_same(RobotDataset(tmp_path / "robot").episode(0), make_episode())
    assert sorted(os.listdir(tmp_path)) == ["file", "robot"]


GRAY = encode(np.zeros((6, 8), np.uint8))
LARGE = encode(np.zeros((9, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": " "}, "'task' must be non-empty text"),
        ({"task": "half \ud800"}, "not valid Unicode"),
        ({"columns": {}, "images": {}}, "same number of frames"),
        ({"columns": {"action": np.zeros((4, 3), np.float32)}}, "same number of frames"),
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
        ({"extra": {"length": 3}}, "under a name that is not reserved"),
        ({"extra": {"a/b": 3}}, "under a name that is not reserved"),
        ({"extra": {"list": [3]}}, "must be text, int or float"),
        ({"extra": {"big": 2**63}}, "must be text, int or float"),
        ({"extra": {"seed": "text"}}, "had another type in an earlier episode"),
        ({"columns": {"action": np.zeros((5, 4), np.float32)}}, "must be the same as in the first episode"),
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
        ({"names": {"action": ["x"]}}, "1 names for 'action'"),
        ({"names": {"nope": []}}, "not a column"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    settings = {"fps": 10, "robot_type": "arm", "camera_shape": SHAPE} | settings
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "robot", [make_episode()], **settings)
