"""Robot data and what training makes of it: tasks of frames, pixels, broken numbers and pictures."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanochat.data.bridge import BridgeFrames
from nanochat.data.demonstration_folder import open_demonstrations
from nanochat.data.lerobot import EPISODES_PATH, NO_TASK, TASKS_PATH, Episode, RobotDataset
from nanochat.data.lerobot_writer import DATA_PATH, write_dataset
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.files import DataError
from nanochat.metaworld.questions import task_name
from nanochat.vision.letterbox import square
from tests.data_files import CAMERA, SHAPE, demonstrations, make_episode, write_lines

DATA = DATA_PATH.format(chunk_index=0, file_index=0)
SIZE = 32


def edit_table(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def replaced(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def edit_info(folder, **changes):
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- the task of a frame


def mixed(seed: int, *tasks: str) -> Episode:
    episode = make_episode(len(tasks), seed)
    return replace(episode, task=tasks[0], frame_tasks=list(tasks))


def test_a_frames_task_is_its_task_index(tmp_path):
    write_dataset(
        tmp_path / "robot", [mixed(0, *"aaabb"), mixed(1, *"bba"), make_episode(4, 2, task="b")], 10, "arm", SHAPE
    )
    dataset = RobotDataset(tmp_path / "robot")
    assert [info.tasks for info in dataset.episodes] == [("a", "b"), ("b", "a"), ("b",)]
    assert dataset.episode(0).frame_tasks == list("aaabb") and dataset.episode(2).frame_tasks == []
    data = open_demonstrations(tmp_path / "robot").read("all", SIZE)
    assert [data.task(frame) for frame in range(12)] == list("aaabbbbabbbb")
    assert data.by_task == {"a": [(0, 3), (7, 8)], "b": [(3, 5), (5, 7), (8, 12)]}
    assert data.first.tolist() == [0] * 5 + [5] * 3 + [8] * 4  # of the episode, whatever its tasks
    drawn = data.draw(2000, np.random.default_rng(0))
    assert np.mean([data.task(frame) == "a" for frame in drawn]) == pytest.approx(2 / (2 + 8 / 3), abs=0.05)
    assert set(data.draw(50, np.random.default_rng(0), last=1)) == {2, 4, 6, 7, 11}
    chunks, inside = data.chunks([1, 3], 4)
    assert inside.tolist() == [[True, True, False, False]] * 2  # no actions of the next task
    np.testing.assert_array_equal(chunks[0, 2:], data.action[[2, 2]])


def test_the_table_of_episodes_may_name_one_task_of_several(tmp_path):
    write_dataset(tmp_path / "robot", [mixed(0, *"aabb"), mixed(1, *"aaab")], 10, "arm", SHAPE)
    edit_table(tmp_path / "robot" / EPISODES_PATH, lambda t: replaced(t, "tasks", [["a"], ["a"]]))
    assert list(open_demonstrations(tmp_path / "robot").read("all", SIZE).by_task) == ["a", "b"]


def test_tasks_of_version_21_and_of_pandas(tmp_path):
    write_dataset(tmp_path / "robot", [mixed(0, *"aabb"), mixed(1, *"aaab")], 10, "arm", SHAPE)
    path = tmp_path / "robot" / TASKS_PATH
    edit_table(path, lambda t: t.rename_columns(["task_index", "__index_level_0__"]))
    assert RobotDataset(tmp_path / "robot").episode(1).frame_tasks == list("aaab")
    path.unlink()
    rows = [{"episode_index": n, "length": 4, "tasks": ["a", "b"]} for n in range(2)]
    write_lines(tmp_path / "robot/meta/episodes.jsonl", *rows)
    write_lines(tmp_path / "robot/meta/tasks.jsonl", {"task_index": 0, "task": "a"}, {"task_index": 1, "task": "b"})
    edit_info(tmp_path / "robot", codebase_version="v2.1", data_path=DATA)
    assert RobotDataset(tmp_path / "robot").episode(1).frame_tasks == list("aaab")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / TASKS_PATH).unlink(), r"episode 0 has 2 tasks, and no column task_index"),
        (
            lambda folder: edit_table(folder / DATA, lambda t: replaced(t, "task_index", [0, 0, 7, 1] * 2)),
            r"episode 0: frame 2 has the task_index 7",
        ),
    ],
)
def test_tasks_that_cannot_be_known(tmp_path, damage, message):
    write_dataset(tmp_path / "robot", [mixed(0, *"aabb"), mixed(1, *"aaab")], 10, "arm", SHAPE)
    damage(tmp_path / "robot")
    with pytest.raises(DataError, match=message):
        RobotDataset(tmp_path / "robot").episode(0)


@pytest.mark.parametrize("texts", [["a", " "], ["a", None], ["a", ""]])
def test_frames_without_an_instruction_have_a_neutral_one(tmp_path, texts):
    write_dataset(tmp_path / "robot", [mixed(0, *"aabb"), mixed(1, *"aaab")], 10, "arm", SHAPE)
    edit_table(tmp_path / "robot" / TASKS_PATH, lambda t: replaced(t, "task", texts))
    assert RobotDataset(tmp_path / "robot").episode(0).frame_tasks == ["a", "a", NO_TASK, NO_TASK]


@pytest.mark.parametrize("tasks", [[[], []], [None, None], [[""], ["  "]]])
def test_episodes_without_an_instruction_have_a_neutral_one(tmp_path, tasks):
    write_dataset(tmp_path / "robot", [make_episode(4, n) for n in range(2)], 10, "arm", SHAPE)
    (tmp_path / "robot" / TASKS_PATH).unlink()
    edit_table(tmp_path / "robot" / EPISODES_PATH, lambda t: replaced(t, "tasks", tasks))
    assert open_demonstrations(tmp_path / "robot").tasks == [NO_TASK, NO_TASK]
    assert list(open_demonstrations(tmp_path / "robot").read("all", SIZE).by_task) == [NO_TASK]


def test_frames_of_bridge_have_their_own_instructions(tmp_path):
    (tmp_path / "0.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
    row = {"image": "0.png", "rephrasings": [], "action": [0] * 7, "state": [0] * 7}
    rows = [row | {"episode": 0, "step": n, "instruction": text} for n, text in enumerate(("lift", "lift", "drop"))]
    write_lines(tmp_path / "frames.jsonl", *rows)
    assert BridgeFrames(tmp_path).episodes[0].frame_tasks == ["lift", "lift", "drop"]
    found = open_demonstrations(tmp_path)
    assert found.read("all", SIZE).by_task == {"lift": [(0, 2)], "drop": [(2, 3)]}
    assert found.unreadable == ["state"]


def test_simulated_episodes_keep_their_name():
    data = demonstrations([replace(make_episode(3, 0), extra={"name": "push"})], SIZE, task_name)
    assert list(data.by_task) == ["push"]


# ---- pixels


def picture_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 4), np.uint8))
    deep = Image.fromarray(np.tile(np.linspace(0, 60000, SIZE).astype(np.uint16), (SIZE, 1)))
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "rgb": (rgb, "PNG", {}), "jpeg": (rgb, "JPEG", {}), "16 bit": (deep, "PNG", {}), "alpha": (alpha, "PNG", {}),
        "grey": (rgb.convert("L"), "PNG", {}),
        "palette": (rgb.quantize(16), "PNG", {}), "grey jpeg": (rgb.convert("L"), "JPEG", {}),
        "exif": (rgb, "JPEG", {"exif": turned}), "exif png": (rgb, "PNG", {"exif": turned}),
        "transparent colour": (rgb, "PNG", {"transparency": rgb.getpixel((3, 3))}), "cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "webp": (alpha, "WEBP", {"lossless": True}), "1 bit": (rgb.convert("1"), "PNG", {}),
    }  # fmt: skip
    files = {}
    for name, (image, kind, options) in images.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[name] = file.getvalue()
    return files


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
@pytest.mark.parametrize("name", list(picture_files()))
def test_training_sees_the_pixels_that_a_policy_sees(name, size):
    picture = picture_files()[name]
    data = demonstrations([replace(make_episode(1, 0), images={CAMERA: [picture]})], size)
    np.testing.assert_array_equal(data.images([0])[0], square(picture, size)[0])


# ---- what is broken is named


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
@pytest.mark.parametrize("name", ["rgb", "jpeg"])
def test_a_broken_picture_is_named(tmp_path, name, size):
    good = picture_files()[name]
    episodes = [make_episode(3, 0, images={CAMERA: [picture_files()["rgb"]] * 3}) for _ in range(3)]
    write_dataset(tmp_path / "robot", episodes, 10, "arm", (SIZE, SIZE, 3))
    images = [{"bytes": good if n != 7 else good[: len(good) // 2], "path": None} for n in range(9)]
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, CAMERA, images))
    with pytest.raises(DataError, match=f"episode 2: frame 1 of the camera {CAMERA}: .*damaged or truncated"):
        open_demonstrations(tmp_path / "robot").read("val", size)


@pytest.mark.parametrize("column", ["observation.state", "action"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_number_that_is_not_finite_is_named(tmp_path, column, value):
    write_dataset(tmp_path / "robot", [make_episode(n, n) for n in (4, 5, 6)], 10, "arm", SHAPE)

    def change(table):
        values = np.array(table[column].to_pylist())
        values[4 + 3, 2] = value
        return replaced(table, column, values.tolist())

    edit_table(tmp_path / "robot" / DATA, change)
    with pytest.raises(ValueError, match=rf"episode 1: '{column}' of frame 3 has .* as number 3 of \d \(1 such frames"):
        open_demonstrations(tmp_path / "robot").read("fit", SIZE)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("action", lambda rows: rows[:7] + [None] + rows[8:], "'action': rows must be lists .* the first in frame 3"),
        ("action", lambda rows: rows[:7] + [[0.5]] + rows[8:], "found 3 numbers in frame 0 and 1 in frame 3"),
        (
            "action",
            lambda rows: rows[:7] + [[0, None, 0]] + rows[8:],
            "episode 1: 'action' of frame 3 has nan as number 2",
        ),
        ("action", lambda rows: [["1", "2", "3"]] * 15, "episode 0: 'action': must be numbers, found string"),
        ("action", lambda rows: [[1e300, 0, 0]] * 15, "'action' of frame 0 has "),
    ],
)
def test_missing_numbers_are_named(tmp_path, name, change, message):
    write_dataset(tmp_path / "robot", [make_episode(n, n) for n in (4, 5, 6)], 10, "arm", SHAPE)
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, name, change(t[name].to_pylist())))
    with pytest.raises(ValueError, match=message):
        open_demonstrations(tmp_path / "robot").read("fit", SIZE)


def test_an_unused_column_may_have_gaps(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(n, n) for n in (4, 5, 6)], 10, "arm", SHAPE)
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, "next.success", [None] * 15))
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, "count", [[1], [2, 3], None] * 5))
    assert len(open_demonstrations(tmp_path / "robot").read("all", SIZE)) == 15


def test_a_missing_picture_file_is_named(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(3, n) for n in range(2)], 10, "arm", SHAPE)
    images = [{"bytes": None, "path": f"{n}.png"} for n in range(6)]
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, CAMERA, images))
    for n in (0, 1, 2, 3, 5):
        (tmp_path / f"robot/{n}.png").write_bytes(picture_files()["rgb"])
    with pytest.raises(DataError, match=f"episode 1: frame 1 of the camera {CAMERA}: .*4.png is missing"):
        open_demonstrations(tmp_path / "robot").read("all", SIZE)


@pytest.mark.parametrize("action", [["1"] * 7, [True] * 7, 3, [0.5] * 6, None])
def test_actions_of_bridge_are_numbers(tmp_path, action):
    (tmp_path / "0.png").write_bytes(picture_files()["rgb"])
    row = {"image": "0.png", "rephrasings": [], "action": action, "episode": 0, "step": 0, "instruction": "go"}
    write_lines(tmp_path / "frames.jsonl", row)
    with pytest.raises(DataError, match="episode 0 must have an instruction, rephrasings, 7-D actions"):
        open_demonstrations(tmp_path)


def test_columns_that_change_their_size_are_named():
    other = make_episode(3, 1)
    other.columns["action"] = other.columns["action"][:, :2]
    with pytest.raises(ValueError, match=r"'action' must have the same size in all episodes, found \(2,\), \(3,\)"):
        demonstrations([make_episode(3, 0), other], SIZE)


def test_a_folder_that_is_missing_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing must be the folder of a LeRobot dataset .* no such folder"):
        open_demonstrations(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="it is a file"):
        open_demonstrations(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"must have meta/info.json .* found a.txt"):
        open_demonstrations(tmp_path)


def test_unread_columns_and_cameras_are_known(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(3, n) for n in range(2)], 10, "arm", SHAPE)
    edit_table(tmp_path / "robot" / DATA, lambda t: t.append_column("note", pa.array(["x"] * 6)))
    found = open_demonstrations(tmp_path / "robot")
    assert found.columns == {"observation.state": 4, "action": 3, "next.success": 1, "count": 2}
    assert found.unreadable == ["note"]


def test_a_name_that_is_no_utf8_is_named(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(3, n) for n in range(2)], 10, "arm", SHAPE)
    path = tmp_path / "robot" / TASKS_PATH
    path.write_bytes(path.read_bytes().replace(b"task_index", b"ta\x9ek_index"))
    with pytest.raises(DataError, match="tasks.parquet cannot be read as parquet: 'utf-8' codec"):
        RobotDataset(tmp_path / "robot")


def not_utf8(texts: list[bytes]) -> pa.Array:
    return pa.array(texts, pa.binary()).view(pa.string())


def test_a_path_that_is_no_utf8_is_named(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(3, n) for n in range(2)], 10, "arm", SHAPE)
    images = pa.StructArray.from_arrays(
        [pa.nulls(6, pa.binary()), not_utf8([b"0.png"] * 4 + [b"\xff.png"] * 2)], ["bytes", "path"]
    )
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, CAMERA, images))
    dataset = RobotDataset(tmp_path / "robot")
    message = f"{DATA}: episode 1: the camera {CAMERA} cannot be read as parquet: 'utf-8' codec"
    for read in (dataset.picture_source, lambda *place: list(dataset.pictures(*place))):
        with pytest.raises(DataError, match=message):
            read(1, CAMERA, [1])


def test_a_number_of_an_episode_that_is_a_text_but_no_utf8_is_named(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(3, n) for n in range(2)], 10, "arm", SHAPE)
    edit_table(tmp_path / "robot" / DATA, lambda t: replaced(t, "episode_index", not_utf8([b"\xff"] * 6)))
    with pytest.raises(DataError, match=f"{DATA} cannot be read as parquet: 'utf-8' codec"):
        RobotDataset(tmp_path / "robot").episode(0)


# ---- several folders


def test_folders_of_one_robot_are_read_as_one(tmp_path):
    days = [make_episode(4 + number, number, task="ab"[number % 2]) for number in range(5)]
    for name, episodes in (("one", days[:2]), ("two", days[2:]), ("both", days)):
        write_dataset(tmp_path / name, episodes, 10, "arm", SHAPE)
    folders = [open_demonstrations(tmp_path / name) for name in ("one", "two")]
    found = folders[0].read("all", SIZE, also=folders[1:])
    expected = open_demonstrations(tmp_path / "both").read("all", SIZE)
    assert found.by_task == expected.by_task and found.tasks == expected.tasks and len(found) == len(expected) == 30
    for name in ("state", "action", "episode", "first", "end", "segment_end"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    shown = [29, 0, 8, 9, 10, 8, 28]  # the first folder has 9 frames
    np.testing.assert_array_equal(found.images(shown), expected.images(shown))
    assert found.names[0] != found.names[2] and str(tmp_path / "two") in found.names[2]
    held_out = folders[0].read("val", SIZE, also=folders[1:])
    assert len(held_out.tasks) == 2  # one of each folder


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fps": 20}, "frames per second: 10.0 and 20.0"),
        ({"action": 2}, "numbers in action"),
        ({"camera": "observation.images.other"}, "cameras"),
    ],
)
def test_folders_of_different_robots_are_refused(tmp_path, change, message):
    write_dataset(tmp_path / "one", [make_episode(4, 0), make_episode(4, 1)], 10, "arm", SHAPE)
    other = [make_episode(4, seed) for seed in (2, 3)]
    if "action" in change:
        other = [replace(each, columns=each.columns | {"action": each.columns["action"][:, :2]}) for each in other]
    write_dataset(tmp_path / "two", other, change.get("fps", 10), "arm", SHAPE)
    if "camera" in change:
        path = tmp_path / "two/meta/info.json"
        path.write_text(path.read_text().replace(CAMERA, change["camera"]))
        edit_table(
            tmp_path / "two" / DATA,
            lambda t: t.rename_columns([n.replace(CAMERA, change["camera"]) for n in t.column_names]),
        )
    folders = [open_demonstrations(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(UserError, match=f"two have different {message}"):
        folders[0].read("fit", SIZE, also=folders[1:])


@pytest.mark.parametrize("key, size", [("action", 3), ("observation.state", 4)])
def test_folders_whose_numbers_have_other_names_are_refused(tmp_path, key, size):
    names = list("abcd"[:size])
    for name, found in (("unnamed", None), ("one", {key: names}), ("two", {key: [*names[:-2], *names[:-3:-1]]})):
        write_dataset(tmp_path / name, [make_episode(4, 0), make_episode(4, 1)], 10, "arm", SHAPE, found)
    folders = [open_demonstrations(tmp_path / name) for name in ("unnamed", "one", "two")]
    assert len(folders[0].read("all", SIZE, also=folders[1:2])) == 16
    message = f"one and .*two have different names of number {size - 1} of {key}: {names[-2]} and {names[-1]}; "
    for first, *others in (folders[1:], folders):  # an unnamed first folder hides no difference between the others
        with pytest.raises(UserError, match=message):
            first.read("all", SIZE, also=others)
