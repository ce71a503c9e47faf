"""Recordings as they are: names of columns, one to 64 numbers, rates, missing instructions, the length of a chunk."""

import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.columns import number_names
from nanochat.data.demonstration_folder import open_demonstrations
from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import NO_TASK, Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.targets import find_targets
from nanochat.errors import UserError
from nanochat.training.recipes import Robot
from nanochat.training.robot_data import check_rate, chunk_length, describe_columns, read_data
from tests.data_files import CAMERA, SHAPE, demonstrations, encode, make_episode
from tests.test_robot_data import DATA, edit_info, edit_table, replaced

SIZE = 32


def episode_with(columns: dict[str, np.ndarray], seed: int = 0) -> Episode:
    length = len(next(iter(columns.values())))
    picture = encode(np.full(SHAPE, 10 * seed, np.uint8))
    return make_episode(length, seed, columns=columns, images={CAMERA: [picture] * length})


def write(folder, *tables: dict[str, np.ndarray], fps: int = 10, names=None):
    episodes = [episode_with(columns, seed) for seed, columns in enumerate(tables)]
    write_dataset(folder, episodes, fps, "arm", SHAPE, names)
    return folder


def numbers(seed: int, width: int, length: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


# ---- columns


def test_actions_and_state_are_found_by_their_other_names(tmp_path):
    tables = [{"state": numbers(n, 3), "actions": numbers(n + 9, 2)} for n in range(2)]
    source = open_demonstrations(write(tmp_path / "robot", *tables, names={"actions": ["x", "y"]}))
    data = source.read("all", SIZE)
    np.testing.assert_array_equal(data.action, np.concatenate([table["actions"] for table in tables]))
    np.testing.assert_array_equal(data.state, np.concatenate([table["state"] for table in tables]))
    assert data.names_of == {"action": ["x", "y"], "observation.state": []}
    (line,) = describe_columns(source)
    assert line == f"reads camera {CAMERA}, state (3 numbers), actions (2 numbers); leaves out nothing"


def test_the_usual_name_wins_and_another_can_be_chosen(tmp_path):
    table = {
        "action": numbers(0, 2),
        "actions": numbers(1, 3),
        "observation.state": numbers(2, 4),
        "torque": numbers(3, 5),
    }
    folder = write(tmp_path / "robot", table, table)
    usual = open_demonstrations(folder)
    np.testing.assert_array_equal(usual.read("all", SIZE).action[:4], table["action"])
    assert usual.columns == {"action": 2, "actions": 3, "observation.state": 4, "torque": 5}
    chosen = open_demonstrations(folder, action_key="actions", state_key="torque")
    data = chosen.read("all", SIZE)
    np.testing.assert_array_equal(data.action[:4], table["actions"])
    np.testing.assert_array_equal(data.state[:4], table["torque"])
    assert describe_columns(chosen)[0].endswith(
        "torque (5 numbers), actions (3 numbers); leaves out action, observation.state"
    )
    for option, flag in (("action_key", "--action-key"), ("state_key", "--state-key")):
        with pytest.raises(UserError, match=rf"has no column speed \({flag}\): it has action, actions"):
            open_demonstrations(folder, **{option: "speed"})


def test_actions_and_state_may_have_each_others_names(tmp_path):
    table = {"action": numbers(0, 2), "observation.state": numbers(1, 3), "torque": numbers(2, 4)}
    folder = write(tmp_path / "robot", table, table, names={"action": ["x", "y"]})
    for keys in (("observation.state", "action"), ("observation.state", "torque"), ("torque", "action")):
        source = open_demonstrations(folder, action_key=keys[0], state_key=keys[1])
        data = source.read("all", SIZE)
        np.testing.assert_array_equal(data.action[:4], table[keys[0]])
        np.testing.assert_array_equal(data.state[:4], table[keys[1]])
        assert data.names_of["observation.state"] == (["x", "y"] if keys[1] == "action" else [])
        (unread,) = set(table) - set(keys)
        action, state = (f"{key} ({table[key].shape[1]} numbers)" for key in keys)
        assert describe_columns(source)[0].startswith(f"reads camera {CAMERA}, {state}, {action}; leaves out {unread}")


@pytest.mark.parametrize(
    "options", [{"action_key": "observation.state"}, {"state_key": "action"}, {"action_key": "torque", "state_key": "torque"}]
)  # fmt: skip
def test_a_column_is_not_both_actions_and_state(tmp_path, options):
    table = {"action": numbers(0, 2), "observation.state": numbers(1, 3), "torque": numbers(2, 4)}
    folder = write(tmp_path / "robot", table, table)
    column = next(iter(options.values()))
    with pytest.raises(UserError, match=f"robot: {column} cannot be both the actions .--action-key. and the state"):
        open_demonstrations(folder, **options)


def test_a_message_names_a_column_that_has_the_name_of_another(tmp_path):
    table = {"action": numbers(0, 2), "observation.state": numbers(1, 3)}
    folder = write(tmp_path / "robot", table, table)
    values = np.concatenate([table["observation.state"]] * 2)
    values[5, 1] = np.nan
    edit_table(folder / DATA, lambda t: replaced(t, "observation.state", values.tolist()))
    source = open_demonstrations(folder, action_key="observation.state", state_key="action")
    with pytest.raises(UserError, match="episode 1: 'observation.state' of frame 1 has nan as number 2 of 3"):
        source.read_numbers("all")


def test_a_number_that_is_not_finite_has_the_name_of_the_data(tmp_path):
    folder = write(tmp_path / "robot", {"actions": numbers(0, 2)}, {"actions": numbers(1, 2)})
    values = np.concatenate([numbers(0, 2), numbers(1, 2)])
    values[4 + 2, 1] = np.nan
    edit_table(folder / DATA, lambda t: replaced(t, "actions", values.tolist()))
    with pytest.raises(UserError, match="episode 1: 'actions' of frame 2 has nan as number 2 of 2"):
        open_demonstrations(folder).read("all", SIZE)


def test_without_actions_the_flag_is_named(tmp_path):
    folder = write(tmp_path / "robot", {"torque": numbers(0, 2)}, {"torque": numbers(0, 2)})
    for read in (lambda source: source.read("all", SIZE), lambda source: source.read_numbers("all")):
        with pytest.raises(
            UserError, match=r'needs a camera and a column "action" \(--action-key .* the data has torque'
        ):
            read(open_demonstrations(folder))


@settings(max_examples=10)
@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(["float32", "int64"]))
def test_one_to_64_numbers(tmp_path_factory, n_state, n_action, dtype):
    tables = [
        {"observation.state": numbers(n, n_state), "action": (9 * numbers(n + 5, n_action)).astype(dtype)}
        for n in range(2)
    ]
    folder = write(tmp_path_factory.mktemp("data") / "robot", *tables)
    data = open_demonstrations(folder).read_numbers("all")
    assert (data.state.shape, data.action.shape, data.action.dtype) == ((8, n_state), (8, n_action), np.float32)
    np.testing.assert_array_equal(data.action, np.concatenate([table["action"] for table in tables]))
    assert find_targets(data)[0] in ("absolute", "relative")


@pytest.mark.parametrize(
    "names, found",
    [
        (["a", "b"], ["a", "b"]), ([["a", "b"]], ["a", "b"]), ({"motors": ["a", "b"]}, ["a", "b"]),
        ({"arm": ["a"], "hand": ["b"]}, ["a", "b"]), ({"a": 0, "b": 1}, ["a", "b"]), (None, []), (["a"], []), ([1, 2], []),
        ("ab", []), ([["a"], "b"], []), ({}, []), ([], []),
    ],
)  # fmt: skip
def test_names_of_numbers_in_all_forms(names, found):
    assert number_names({"names": names}, 2) == found


# ---- version 2.1


def as_version_21(folder) -> None:
    """The same data with a file for each episode and the tables of version 2.1."""
    table = pq.read_table(folder / DATA)
    for number in range(2):
        own = table.filter(pc.equal(table["episode_index"], number))
        pq.write_table(own, folder / f"data/episode_{number:06d}.parquet")
    (folder / DATA).unlink()
    rows = [{"episode_index": n, "length": 4, "tasks": [f"task {n}"]} for n in range(2)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit_info(folder, codebase_version="v2.1", data_path="data/episode_{episode_index:06d}.parquet")


def test_both_versions_give_the_same(tmp_path):
    tables = [{"observation.state": numbers(n, 3), "action": numbers(n + 9, 2)} for n in range(2)]
    new = open_demonstrations(write(tmp_path / "new", *tables)).read("all", SIZE)
    as_version_21(write(tmp_path / "old", *tables))
    old = open_demonstrations(tmp_path / "old").read("all", SIZE)
    for name in ("state", "action", "episode"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
    np.testing.assert_array_equal(new.images(range(8)), old.images(range(8)))


def test_a_pointer_of_git_lfs_is_explained(tmp_path):
    tables = [{"action": numbers(n, 2)} for n in range(2)]
    folder = write(tmp_path / "robot", *tables)
    (folder / DATA).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="is a pointer of git-lfs, not the file: fetch it with git lfs pull"):
        open_demonstrations(folder).read("all", SIZE)


# ---- what a run says and refuses


def test_a_run_says_what_is_missing(tmp_path):
    folder = write(tmp_path / "robot", {"action": numbers(0, 2)}, {"action": numbers(1, 2)}, fps=30)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    edit_table(path, lambda t: t.drop_columns(["tasks"]))
    (folder / "meta/tasks.parquet").unlink()
    reads, state, rate, tasks = describe_columns(open_demonstrations(folder, fps=10))
    assert "no column observation.state or state" in state and "(--state-key takes another column)" in state
    assert rate == "reads 10 of the data's 30 frames per second (--fps)"
    assert tasks == f"2 of 2 episodes have no instruction: theirs is {NO_TASK!r}"


def test_frames_of_motions_are_not_left_out(tmp_path):
    folder = write(tmp_path / "robot", {"action": numbers(0, 2)}, {"action": numbers(1, 2)}, fps=30)
    data, _ = read_data(Robot(data=str(folder), fps=15, image_size=SIZE))
    check_rate(data, "absolute")
    with pytest.raises(UserError, match="--fps 15 leaves out frames of 30 per second, but the actions are relative"):
        check_rate(data, "relative")
    whole, _ = read_data(Robot(data=str(folder), fps=30, image_size=SIZE))
    check_rate(whole, "relative")


def test_frames_of_motions_are_not_left_out_of_further_folders(tmp_path):
    for name, fps in (("slow", 10), ("fast", 30)):
        write(tmp_path / name, {"action": numbers(0, 2)}, {"action": numbers(1, 2)}, fps=fps)
    recipe = Robot(data=str(tmp_path / "slow"), also=(str(tmp_path / "fast"),), fps=10, image_size=SIZE)
    for data in read_data(recipe):
        check_rate(data, "absolute")
        with pytest.raises(
            UserError, match="--fps 10 leaves out frames of 30 per second, but the actions are relative"
        ):
            check_rate(data, "relative")


def of_rate(fps: float, scene: bool = False) -> Demonstrations:
    columns = {"action": numbers(0, 2)}
    if scene:
        columns |= {f"observation.{name}": numbers(1, 1)[:, 0] > 0 for name in ("success", "held")}
        columns["observation.environment_state"] = numbers(2, 39)
    return demonstrations([episode_with(columns)], SIZE, fps=fps)


@pytest.mark.parametrize(
    "recipe, fps, length",
    [
        (Robot(), 30, 30), (Robot(), 29.97, 30), (Robot(), 5, 5), (Robot(chunk=7), 30, 7),
        (Robot(chunk_seconds=0.5), 50, 25), (Robot(chunk_seconds=0.01), 50, 1), (Robot(chunk_seconds=20), 50, 1000),
    ],
)  # fmt: skip
def test_the_length_of_a_chunk(recipe, fps, length):
    assert chunk_length(recipe, of_rate(fps)) == length


def test_chunks_of_a_simulator_have_ten_steps():
    assert chunk_length(Robot(), of_rate(80, scene=True)) == 10
    assert chunk_length(Robot(chunk_seconds=0.5), of_rate(80, scene=True)) == 40


@pytest.mark.parametrize("seconds", [0, -1, 0.001, 21, float("nan"), float("inf")])
def test_a_chunk_has_an_action_at_least(seconds):
    with pytest.raises(UserError, match="--chunk-seconds .* must be 1 to 1000 actions"):
        chunk_length(Robot(chunk_seconds=seconds), of_rate(50))


def test_a_chunk_has_one_length():
    with pytest.raises(UserError, match="--chunk and --chunk-seconds both say how long a chunk is"):
        chunk_length(Robot(chunk=3, chunk_seconds=1), of_rate(50))
