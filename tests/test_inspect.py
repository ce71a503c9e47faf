"""`nanochat inspect`: figures against numpy, and everything that is broken in a folder is listed."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from nanochat.data.inspection import evenly, gaps, inspect_folder, numbers_of
from nanochat.data.lerobot_writer import write_dataset
from nanochat.errors import UserError
from nanochat.evaluation.contents import WIDEST, draw_sheet, number_table
from nanochat.training.recipes import Robot
from nanochat.training.robot_plan import training_plan
from tests.data_files import CAMERA, SHAPE, encode, make_episode, png, write_lines, write_robot
from tests.test_robot_data import DATA, edit_table, replaced
from tests.test_robot_videos import video_dataset, write_video

VIDEO = "videos/{camera}/chunk-000/file-000.mp4"


# ---- figures


@given(arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.floats(width=32)))
def test_numbers_that_are_not_finite_are_counted_and_left_out(values):
    found = numbers_of("x", [], values)
    for column in range(values.shape[1]):
        finite = values[np.isfinite(values[:, column]), column]
        assert found.not_finite[column] == len(values) - len(finite)
        figures = [found.low[column], found.high[column], found.mean[column], found.std[column]]
        if not len(finite):
            assert np.isnan(figures).all()
            continue
        expected = [finite.min(), finite.max(), finite.mean(), finite.std()]
        np.testing.assert_allclose(figures, expected, rtol=1e-6, atol=1e-6 * np.abs(finite).max())


def test_gaps_and_time_stamps_that_do_not_increase_are_named():
    times = np.array([0, 0.1, 0.2, 0.5, 0.5, 0.45, 0.55, np.nan, 0.8])
    found = gaps(times, 10.0, "episode 4")
    assert [line.split(" between frames ")[1][:1] for line in found] == list("23467")
    assert found[0] == "episode 4: 0.300 s between frames 2 and 3, 0.100 s expected"
    assert gaps(np.arange(9) / 29.97, 30.0, "") == [] == gaps(None, 30.0, "")


def test_frames_of_the_sheet_are_evenly_spaced():
    assert list(evenly({0: 3, 4: 2, 5: 4}, 3)) == [(0, 0), (4, 1), (5, 3)]
    assert list(evenly({7: 2}, 8)) == [(7, 0), (7, 1)]


def test_a_dataset_is_described(tmp_path):
    episodes = write_robot(tmp_path / "robot")
    found = inspect_folder(tmp_path / "robot")
    assert (found.kind, found.robot, found.fps, found.has_times) == ("LeRobot v3.0", "sawyer", 10.0, True)
    assert found.lengths == {0: 5, 1: 1, 2: 7} and found.tasks == {"öffne 0": [2, 12], "öffne 1": [1, 1]}
    assert [(c.name, c.kind, c.width, c.height) for c in found.cameras] == [(CAMERA, "image", SHAPE[1], SHAPE[0])]
    assert found.problems == found.gaps == found.unreadable == []
    by_name = {numbers.name: numbers for numbers in found.numbers}
    assert list(by_name) == list(episodes[0].columns) and by_name["action"].names == ["x", "y", "grip"]
    action = np.concatenate([episode.columns["action"] for episode in episodes])
    np.testing.assert_allclose(by_name["action"].high, action.max(0))
    np.testing.assert_allclose(by_name["action"].std, action.astype(np.float64).std(0))


def test_tasks_of_frames_are_counted(tmp_path):
    episode = make_episode(6, 0, frame_tasks=["reach"] * 4 + ["lift"] * 2)
    write_dataset(tmp_path / "robot", [episode, make_episode(3, 1, task="lift")], 10, "arm", SHAPE)
    assert inspect_folder(tmp_path / "robot").tasks == {"reach": [1, 4], "lift": [2, 5]}


def test_bridge_frames_are_described(tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    row = {"image": "0.png", "step": 0, "instruction": "lift", "rephrasings": [], "action": [0.5] * 7, "state": "x"}
    write_lines(tmp_path / "frames.jsonl", row | {"episode": 0}, row | {"episode": 1, "image": "1.png"})
    found = inspect_folder(tmp_path)
    assert (found.lengths, found.unreadable, found.has_times) == ({0: 1, 1: 1}, ["state"], False)
    assert found.problems == [f"{tmp_path / '1.png'} is missing"]
    assert [(camera.width, camera.height) for camera in found.cameras] == [(4, 4)]


# ---- what is broken


def test_numbers_and_time_stamps_that_are_broken_are_listed(tmp_path):
    write_robot(tmp_path / "robot", 4, 5)
    table = tmp_path / "robot" / DATA
    times = [0.0, 0.1, 0.5, 0.6, 0.0, 0.1, 0.2, 0.2, 0.4]
    edit_table(table, lambda t: replaced(t, "timestamp", pa.array(times, pa.float32())))
    action = np.ones((9, 3), np.float32)
    action[[5, 7], 1] = np.nan
    edit_table(table, lambda t: replaced(t, "action", pa.FixedSizeListArray.from_arrays(action.ravel(), 3)))
    found = inspect_folder(tmp_path / "robot")
    assert [line[:40] for line in found.gaps] == [
        "episode 0: 0.400 s between frames 1 and ", "episode 1: 0.000 s between frames 2 and ",
        "episode 1: 0.200 s between frames 3 and ",
    ]  # fmt: skip
    assert found.problems == ["episode 1: action has nan as number 2 of frame 1 (2 such frames in this episode)"]
    assert found.numbers[1].not_finite == [0, 2, 0] and found.numbers[1].low == [1, 1, 1]


def test_an_episode_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    write_robot(tmp_path / "robot", 4, 5)
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, "frame_index", [0, 2, 1, 3, *range(5)]))
    found = inspect_folder(tmp_path / "robot")
    assert found.lengths == {1: 5} and all("episode 0 must have 4 frames" in line for line in found.problems)
    draw_sheet(tmp_path / "robot", found, tmp_path / "a.png")


def test_videos_that_are_missing_short_or_no_videos_are_listed(tmp_path):
    folder = tmp_path / "robot"
    path = video_dataset(folder)
    write_video(path, 10, "10")
    back = folder / VIDEO.format(camera="back")
    found = inspect_folder(folder)
    front, other = found.cameras[-2:]
    assert (front.kind, front.width, front.height, front.codec, front.fps) == ("video", 48, 32, "mpeg4", 10)
    assert (other.kind, other.width) == ("video", 0)
    assert len(found.problems) == 2 and all("the video of back is not at" in line for line in found.problems)
    back.parent.mkdir(parents=True)
    back.write_bytes(b"no video")
    write_video(path, 7, "10")
    found = inspect_folder(folder)
    *broken, short = sorted(found.problems)
    assert short == f"{path}: episode 1: the video ends at 0.70 s, but the last frame is at 0.90 s"
    assert len(broken) == 2 and all(f"{back} cannot be read as a video" in line for line in broken)


def test_without_pyav_the_numbers_are_shown(tmp_path, monkeypatch):
    write_video(video_dataset(tmp_path / "robot"), 10, "10")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    found = inspect_folder(tmp_path / "robot")
    assert len(found.lengths) == 2 and "pip install av" in found.problems[0]


@pytest.mark.parametrize("name, found", [("none", "nothing"), ("file", "a file"), ("pictures", "another folder")])
def test_what_is_no_dataset_is_an_error(tmp_path, name, found):
    (tmp_path / "file").write_text("")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=rf"must be the folder of a LeRobot dataset .* found {found}$"):
        inspect_folder(tmp_path / name)


# ---- what is shown


def test_the_sheet_has_a_row_for_each_camera_and_damaged_pictures_are_grey(tmp_path):
    episodes = [make_episode(6, seed) for seed in range(2)]
    for episode in episodes:
        episode.images["wrist"] = [encode(np.full(SHAPE, 200, np.uint8))] * 6
    write_dataset(tmp_path / "robot", episodes, 10, "arm", SHAPE)
    one = [{"bytes": b"damaged", "path": None}] + [{"bytes": episodes[0].images["wrist"][0], "path": None}] * 11
    edit_table(tmp_path / "robot" / DATA, lambda t: t.set_column(
        t.column_names.index("wrist"), "wrist", pa.array(one, t.schema.field("wrist").type)))  # fmt: skip
    found = inspect_folder(tmp_path / "robot")
    problems = draw_sheet(tmp_path / "robot", found, tmp_path / "a.png")
    assert len(problems) == 1 and problems[0].startswith("camera wrist, episode 0, frame 0:")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    colours = dict((colour, n) for n, colour in image.getcolors(1 << 20))
    assert image.width == 1600 and colours[(200, 200, 200)] > 7 * colours[(211, 211, 211)] / 2 > 1000


def test_a_column_that_nobody_would_read_has_one_line():
    values = np.random.default_rng(0).normal(size=(5, WIDEST + 1))
    table = number_table(numbers_of("x", [], values))
    assert table.row_count == 1 and [list(column.cells)[0] for column in table.columns][:2] == [
        "all of them",
        f"{values.min():.4g}",
    ]
    assert number_table(numbers_of("x", [], values[:, 1:])).row_count == WIDEST


def test_the_command(nanochat, tmp_path):
    write_robot(tmp_path / "robot", 4, 5)
    action = np.ones((9, 3), np.float32)
    action[5, 1] = np.inf
    edit_table(
        tmp_path / "robot" / DATA, lambda t: replaced(t, "action", pa.FixedSizeListArray.from_arrays(action.ravel(), 3))
    )
    out, err = nanochat("inspect", tmp_path / "robot", "-o", tmp_path / "a.png", "--json", tmp_path / "a.json")
    words = " ".join(out.split())
    assert "2 episodes, 9 frames at 10 per second: 1 s; an episode has 4 to 5 frames" in words
    assert "1 problem: episode 1: action has inf as number 2 of frame 1" in words and "no gaps" in words
    assert "NaN or infinity in 1 frame" in words and "constant" in words and "next: nanochat train robot" in err
    assert "nanochat train robot would use: reads camera" in words and "1 held out to validate" in words
    assert "it would be refused: " in words and "'action' of frame 1 has inf" in words
    assert json.loads((tmp_path / "a.json").read_text())["lengths"] == {"0": 4, "1": 5}
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert "should end in .png" in nanochat("inspect", tmp_path / "robot", "-o", tmp_path / "a.jpg", code=2).err


def test_the_plan_is_of_what_the_flags_choose(nanochat, tmp_path):
    write_robot(tmp_path / "robot", 4, 5)
    flags = ("--state-key", "observation.state", "--fps", "5", "--cameras", CAMERA)
    out, err = nanochat("inspect", tmp_path / "robot", *flags)
    words = " ".join(out.split())
    assert "reads 5 of the data's 10 frames per second" in words and "chunks of 5 actions, 1 s" in words
    assert err.endswith(f"--data {tmp_path / 'robot'} --cameras {CAMERA} --state-key observation.state --fps 5.0\n")
    assert "has no column x (--action-key)" in " ".join(
        nanochat("inspect", tmp_path / "robot", "--action-key", "x").out.split()
    )


def test_what_training_would_use(tmp_path):
    write_robot(tmp_path / "robot", 4, 5, 6)
    reads, split, targets, predicts, chunk, pictures = training_plan(Robot(data=str(tmp_path / "robot"), chunk=20))
    assert reads.startswith(f"reads camera {CAMERA}, observation.state (4 numbers), action (3 numbers); leaves out")
    assert split == "2 episodes to learn from, 1 held out to validate with"
    assert targets == "actions are relative (they do not follow observation.state)"
    assert predicts == "the network predicts the actions as they are: they are relative"
    assert (chunk, pictures) == (
        "chunks of 20 actions, 2 s; 300 steps",
        "15 pictures of 128 pixels, 0.00074 GB in the cache",
    )
    (refused,) = training_plan(Robot(data=str(tmp_path / "none")))
    assert refused.startswith("it would be refused: ") and "no such folder" in refused
