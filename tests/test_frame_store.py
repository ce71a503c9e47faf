"""The store of decoded frames: what is in it, what it is known by, and what happens to damaged pictures and stopped runs."""

import os
import shutil
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import digests, frame_store
from nanochat.data.demonstration_folder import DemonstrationFolder, open_demonstrations
from nanochat.data.lerobot import RobotDataset
from nanochat.data.lerobot_writer import write_dataset
from nanochat.files import DataError
from nanochat.vision.letterbox import square
from tests.data_files import CAMERA, SHAPE, make_episode
from tests.test_robot_data import DATA, edit_table, replaced
from tests.test_robot_videos import video_dataset, write_video

SIZE = 32


@pytest.fixture
def robot(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(length, length) for length in (5, 3, 4)], 10, "arm", SHAPE)
    return tmp_path / "robot"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def read(folder, cache, **options):
    said = []
    data = open_demonstrations(folder).read("all", SIZE, cache=cache, say=said.append, **options)
    return data, said


def stored(cache) -> list[str]:
    return sorted(path.name for path in (cache / "frames").iterdir())


def never(*args):
    raise AssertionError("decoded again")


def test_the_store_has_the_pixels_of_every_frame(robot, cache):
    data, said = read(robot, cache)
    pictures = [picture for i in range(3) for picture in RobotDataset(robot).episode(i).images[CAMERA]]
    np.testing.assert_array_equal(data.images(range(12)), [square(picture, SIZE)[0] for picture in pictures])
    np.testing.assert_array_equal(data.images([7, 0, 7]), data.images(range(12))[[7, 0, 7]])
    assert isinstance(data.frames.cameras[CAMERA], np.memmap) and type(data.images([0])) is np.ndarray
    assert len(stored(cache)) == 2 and "decoding 12 frames of 1 camera at 32 pixels: 0.00 GB in" in said[0]


def test_a_second_start_decodes_nothing(robot, cache, monkeypatch):
    first, _ = read(robot, cache)
    monkeypatch.setattr(frame_store, "decode", never)
    second, said = read(robot, cache)
    assert said == []
    np.testing.assert_array_equal(first.images(range(12)), second.images(range(12)))


def test_the_store_knows_the_data_by_its_bytes(robot, cache, monkeypatch):
    read(robot, cache)
    moved = robot.with_name("moved")
    shutil.copytree(robot, moved)
    with monkeypatch.context() as patch:
        patch.setattr(frame_store, "decode", never)
        read(moved, cache)
    bright = make_episode(3, 99).images[CAMERA]
    images = [row for i in range(3) for row in RobotDataset(robot).episode(i).images[CAMERA]]
    images = [{"bytes": picture, "path": None} for picture in [*images[:5], *bright, *images[8:]]]
    edit_table(moved / DATA, lambda t: replaced(t, CAMERA, images))
    data, said = read(moved, cache)
    assert said and data.images([5]).tolist() == [square(bright[0], SIZE)[0].tolist()]


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path, monkeypatch):
    path, records = tmp_path / "a.bin", tmp_path / "digests"
    path.write_bytes(b"a" * 100)
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(digests, "SETTLED", -1)
    before = digests.file_digests([path], tmp_path, records)
    time.sleep(0.05)  # the clock of a file system is coarse
    path.write_bytes(b"b" * 100)
    os.utime(path, (1e9, 1e9))
    assert digests.file_digests([path], tmp_path, records)[path] == digests.sha256(path) != before[path]


def test_files_that_have_settled_are_not_read_again(tmp_path, monkeypatch):
    path, records = tmp_path / "a.bin", tmp_path / "digests"
    path.write_bytes(b"a")
    monkeypatch.setattr(digests, "SETTLED", -1)
    found = digests.file_digests([path, path], tmp_path, records)
    monkeypatch.setattr(digests, "sha256", never)
    assert digests.file_digests([path], tmp_path, records) == found
    (record,) = records.iterdir()
    record.write_text("[1, 2")  # damaged: read again, and no error
    monkeypatch.undo()
    assert digests.file_digests([path], tmp_path, records) == found


def test_each_camera_size_split_and_rate_is_an_entry(robot, cache):
    source = open_demonstrations(robot)
    for read_it in (lambda: source.read("val", SIZE, cache=cache), lambda: source.read("val", 64, cache=cache)):
        read_it()
    source.read("fit", SIZE, cache=cache)
    open_demonstrations(robot, fps=5).read("fit", SIZE, cache=cache)
    assert len(stored(cache)) == 8


def test_worker_processes_decode_the_same(robot, cache, tmp_path, monkeypatch):
    here, _ = read(robot, cache)
    monkeypatch.setattr(frame_store, "FEW", 0)
    there, _ = read(robot, tmp_path / "other")
    np.testing.assert_array_equal(here.images(range(12)), there.images(range(12)))


def die(job):
    os._exit(9)


def test_a_stopped_run_leaves_nothing_that_counts(robot, cache, monkeypatch):
    monkeypatch.setattr(frame_store, "FEW", 0)
    with monkeypatch.context() as patch:
        patch.setattr(frame_store, "decode_here", die)
        with pytest.raises(MemoryError, match="worker process died"):
            read(robot, cache)
    assert stored(cache) == []
    (cache / "frames/.abc.npy.123.tmp").write_bytes(b"left by a killed run")
    read(robot, cache)
    assert len(stored(cache)) == 2


def test_files_that_are_being_written_are_left_alone(tmp_path):
    for name in (".a.npy.1.tmp", ".b.npy.2.tmp"):
        (tmp_path / name).write_bytes(b"x")
    with frame_store.locked(tmp_path / ".b.npy.2.tmp"):
        frame_store.remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".b.npy.2.tmp"]
    frame_store.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_store_is_named(robot, cache, damage):
    read(robot, cache)
    (path,) = (cache / "frames").glob("*.npy")
    damage(path)
    with pytest.raises(DataError, match=f"{path.name} is damaged: nanochat cache --clear frames/{path.name[:12]}"):
        read(robot, cache)


def test_a_full_disk_is_said_before_anything_is_decoded(robot, cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match="has 0.00 GB free, and decoded pictures need 0.00 GB: choose another --cache"):
        read(robot, cache)
    assert stored(cache) == []


def test_a_cache_that_cannot_be_made_is_named(robot, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be made: .*: choose another --cache"):
        read(robot, tmp_path / "file")


def test_data_that_change_meanwhile_are_not_stored(robot, cache, monkeypatch):
    decode = frame_store.decode

    def changing(source, job):
        why = decode(source, job)
        if job.number == 2:  # the last one
            edit_table(robot / DATA, lambda t: replaced(t, "count", [[7, 7]] * len(t)))
        return why

    monkeypatch.setattr(frame_store, "decode", changing)
    with pytest.raises(DataError, match="robot was changed while its pictures were decoded: run again"):
        read(robot, cache)
    assert stored(cache) == []


# ---- damage


def break_picture(robot, number: int) -> None:
    images = [picture for i in range(3) for picture in RobotDataset(robot).episode(i).images[CAMERA]]
    images = [{"bytes": p[:20] if n == number else p, "path": None} for n, p in enumerate(images)]
    edit_table(robot / DATA, lambda t: replaced(t, CAMERA, images))


def test_damaged_episodes_are_refused_or_left_out(robot, cache):
    whole, _ = read(robot, cache)
    break_picture(robot, 6)
    with pytest.raises(DataError, match="episode 1: frame 1 of the camera .*--skip-damaged leaves out"):
        read(robot, cache)
    for _ in range(2):  # decoded, and from the store
        data, said = read(robot, cache, skip_damaged=True)
        assert said[-1].startswith("left out 1 of 3 episodes whose pictures are damaged or missing: ")
        np.testing.assert_array_equal(data.action, whole.action[[0, 1, 2, 3, 4, 8, 9, 10, 11]])
        np.testing.assert_array_equal(data.images(range(9)), whole.images([0, 1, 2, 3, 4, 8, 9, 10, 11]))
    with pytest.raises(DataError, match="episode 1: frame 1 of the camera .*--skip-damaged leaves out"):
        read(robot, cache)


def test_data_without_a_whole_episode_is_refused(robot, cache):
    edit_table(robot / DATA, lambda t: replaced(t, CAMERA, [{"bytes": b"no picture", "path": None}] * 12))
    with pytest.raises(DataError, match="all 3 episodes have damaged or missing pictures, the first: .*episode 0"):
        read(robot, cache, skip_damaged=True)


def test_a_video_that_comes_later_is_read(tmp_path, cache):
    path = video_dataset(tmp_path / "robot")
    write_video(path, 10, "10")
    source = open_demonstrations(tmp_path / "robot", ["front", "back"])
    with pytest.raises(
        DataError, match="all 2 episodes have damaged or missing pictures, the first: .*video of back is not"
    ):
        source.read("all", SIZE, cache=cache, skip_damaged=True)
    write_video(tmp_path / "robot/videos/back/chunk-000/file-000.mp4", 10, "10")
    data = source.read("all", SIZE, cache=cache)
    assert data.cameras == ("front", "back")
    np.testing.assert_array_equal(data.images([3], 0), data.images([3], 1))


# ---- rates


@given(length=st.integers(1, 200), data_fps=st.sampled_from([5.0, 10.0, 29.97, 30.0, 50.0]), share=st.floats(0.02, 1.0))
def test_the_nearest_frames_are_kept(length, data_fps, share):
    folder = object.__new__(DemonstrationFolder)
    folder.data_fps, folder.fps, folder._lengths = data_fps, data_fps * share, [length]
    kept = np.array(folder._kept(0))
    assert kept[0] == 0 and (np.diff(kept) > 0).all() and kept[-1] < length
    wanted = np.arange(len(kept)) / folder.fps  # seconds
    assert np.abs(kept / data_fps - wanted).max() <= 0.5 / data_fps + 1e-6
    assert (len(kept) / folder.fps) * data_fps > length - 1  # as far as the end


def test_a_lower_rate_takes_every_third_frame(tmp_path, cache):
    episodes = [make_episode(7, n) for n in range(2)]
    write_dataset(tmp_path / "robot", episodes, 30, "arm", SHAPE)
    whole = open_demonstrations(tmp_path / "robot").read("all", SIZE, cache=cache)
    data = open_demonstrations(tmp_path / "robot", fps=10).read("all", SIZE, cache=cache)
    assert (whole.fps, data.fps, len(data)) == (30, 10, 6)
    rows = [0, 3, 6, 7, 10, 13]
    np.testing.assert_array_equal(data.action, whole.action[rows])
    np.testing.assert_array_equal(data.state, whole.state[rows])
    np.testing.assert_array_equal(data.images(range(6)), whole.images(rows))
    for fps in (0, -1, 31, float("nan")):
        with pytest.raises(ValueError, match="--fps must be more than 0 and at most the data's 30, got"):
            open_demonstrations(tmp_path / "robot", fps=fps)
