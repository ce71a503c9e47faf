"""Cameras that are videos: pictures by time stamps, gaps and damage are named."""

import io
import json
import sys
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from nanochat.data.demonstration_folder import open_demonstrations
from nanochat.data.lerobot import EPISODES_PATH, RobotDataset
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.video import video_pictures
from nanochat.files import DataError
from nanochat.vision.letterbox import square
from tests.data_files import SHAPE, encode, make_episode
from tests.test_robot_data import DATA, SIZE, edit_info, edit_table, replaced


def write_video(path, n: int, fps: str, skip: tuple[int, ...] = (), noise: bool = False):
    """A video of n pictures; each is a little brighter than the one before, or all are noise."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.width, stream.height, stream.bit_rate = 48, 32, 10_000_000
        for number in range(n):
            pixels = np.full((32, 48, 3), round(10 + 240 * number / n), np.uint8)
            if noise:
                pixels = np.random.default_rng(number).integers(0, 256, pixels.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = number
            if number not in skip:
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shown(pictures: Iterable[bytes], n: int) -> list[int]:
    """The numbers of the pictures in a video of n."""
    return [round((np.asarray(Image.open(io.BytesIO(data))).mean() - 10) * n / 240) for data in pictures]


@pytest.mark.parametrize(
    "of_video, of_data", [("30000/1001", 30), ("30", 30000 / 1001), ("24000/1001", 24), ("30", 29.97)]
)
def test_videos_are_read_by_time_stamps(tmp_path, of_video, of_data):
    write_video(tmp_path / "a.mp4", 120, of_video)
    pictures = video_pictures(tmp_path / "a.mp4", 0.0, np.arange(120) / of_data, of_data, "episode 0")
    found = shown(map(encode, pictures), 120)
    np.testing.assert_allclose(found, np.arange(120), atol=1)


def test_a_dropped_picture_is_replaced_by_its_neighbour_and_a_gap_is_named(tmp_path):
    write_video(tmp_path / "a.mp4", 20, "10", skip=(7,))
    pictures = video_pictures(tmp_path / "a.mp4", 0.0, np.arange(20) * 0.1 + 0.03, 10, "episode 0")
    found = shown(map(encode, pictures), 20)
    assert found[:7] == list(range(7)) and found[8:] == list(range(8, 20))
    write_video(tmp_path / "b.mp4", 20, "10", skip=(7, 8, 9))
    with pytest.raises(
        DataError, match=r"b.mp4: episode 4, front: must have 20 frames .* found 7: .* no picture at 0.700 s"
    ):
        list(video_pictures(tmp_path / "b.mp4", 0.0, np.arange(20) * 0.1, 10, "episode 4, front"))


def video_dataset(folder, times=None):
    """Two episodes of 6 and 4 frames with a video in one file."""
    episodes = [make_episode(n, n, images={}) for n in (6, 4)]
    write_dataset(folder, episodes, 10, "arm", SHAPE)
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    video = {"dtype": "video", "shape": [32, 48, 3], "names": None}
    template = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    edit_info(folder, features=features | {"front": video, "back": video}, video_path=template)
    columns = {"chunk_index": [0, 0], "file_index": [0, 0], "from_timestamp": [0.0, 0.6]}
    path = folder / EPISODES_PATH
    for camera in ("front", "back"):
        for name, values in columns.items():
            edit_table(path, lambda t, n=f"videos/{camera}/{name}", v=values: t.append_column(n, pa.array(v)))
    if times is not None:
        edit_table(folder / DATA, lambda t: replaced(t, "timestamp", times))
    return folder / "videos/front/chunk-000/file-000.mp4"


@pytest.mark.parametrize("key, about", [("info", {"video.is_depth_map": True}), ("video_info", {"is_depth_map": True})])
def test_depth_maps_are_no_cameras(tmp_path, key, about):
    video_dataset(tmp_path / "robot")
    features = json.loads((tmp_path / "robot/meta/info.json").read_text())["features"]
    edit_info(tmp_path / "robot", features=features | {"back": features["back"] | {key: about}})
    found = open_demonstrations(tmp_path / "robot")
    assert (found.cameras, found.other_cameras, found.unreadable) == (("front",), [], ["back"])


def test_time_stamps_of_the_data_are_used(tmp_path):
    path = video_dataset(tmp_path / "robot", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0, 0.1, 0.3, 0.5])
    write_video(path, 12, "10")
    dataset = RobotDataset(tmp_path / "robot")
    assert shown(dataset.episode(0, ["front"]).images["front"], 12) == [0, 1, 2, 3, 4, 5]
    assert shown(dataset.episode(1, ["front"]).images["front"], 12) == [6, 7, 9, 11]
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, "timestamp", [0.0] * 10))
    with pytest.raises(DataError, match="episode 1: 'timestamp' must be seconds that increase"):
        RobotDataset(tmp_path / "robot").episode(1, ["front"])


def test_only_the_video_that_is_read_must_be_there(tmp_path):
    path = video_dataset(tmp_path / "robot")
    with pytest.raises(DataError, match="episode 0: the video of front is not at .*file-000.mp4, where video_path in"):
        open_demonstrations(tmp_path / "robot", ["front"]).read("all", SIZE)
    write_video(path, 10, "10")
    assert open_demonstrations(tmp_path / "robot", ["front"]).read("all", SIZE).images([9]).shape == (1, SIZE, SIZE, 3)


def test_pictures_of_videos_are_letterboxed_as_others_are(tmp_path):
    path = video_dataset(tmp_path / "robot")
    write_video(path, 10, "10")
    whole = RobotDataset(tmp_path / "robot").episode(1, ["front"]).images["front"]
    small = open_demonstrations(tmp_path / "robot", ["front"]).read("all", SIZE).images([6, 9])
    np.testing.assert_array_equal(small, [square(whole[n], SIZE)[0] for n in (0, 3)])


def test_a_broken_video_is_named(tmp_path):
    path = video_dataset(tmp_path / "robot")
    write_video(path, 10, "10")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as a video: episode 1, front, after 0.00 s"):
        RobotDataset(tmp_path / "robot").episode(1, ["front"])


def test_a_damaged_picture_of_a_video_is_named(tmp_path):
    path, rng = video_dataset(tmp_path / "robot"), np.random.default_rng(0)
    write_video(path, 10, "10", noise=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = rng.integers(0, 256, 200, np.uint8).tobytes()
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"file-000.mp4: episode 0, front, frame [2345]: the picture is damaged"):
        RobotDataset(tmp_path / "robot").episode(0, ["front"])


def test_a_damaged_last_picture_is_named(tmp_path):
    write_video(tmp_path / "a.mp4", 10, "10", noise=True)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    end = data.index(b"moov") - 4  # of the last picture
    data[end - 1500 : end - 500] = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    (tmp_path / "a.mp4").write_bytes(data)
    times = np.arange(10) * 0.1
    for late in (0, 1e-6):  # a time stamp that is rounded up lies behind the last picture
        with pytest.raises(DataError, match="a.mp4: episode 0, frame 9: the picture is damaged"):
            list(video_pictures(tmp_path / "a.mp4", 0.0, times + late, 10, "episode 0"))


def test_a_missing_pyav_names_the_command(tmp_path, monkeypatch):
    path = video_dataset(tmp_path / "robot")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="reading videos needs the library PyAV: pip install av"):
        RobotDataset(tmp_path / "robot").episode(0, ["front"])


@pytest.mark.parametrize("key", ["timestamp", "task_index", "frame_index"])
def test_bookkeeping_is_one_number_per_frame(tmp_path, key):
    write_video(video_dataset(tmp_path / "robot"), 10, "10")
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, key, [[0, 0]] * 10))
    with pytest.raises(DataError, match=rf"'{key}' must be one number per frame, found the shape \(2,\)"):
        RobotDataset(tmp_path / "robot").episode(0, ["front"])
