"""Demonstrations in memory: splits, cameras, draws and chunks; and what Meta-World adds to them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nanochat.data.demonstration_folder import held_out, open_demonstrations
from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.questions import (
    draw_asked,
    has_scene,
    object_positions,
    paraphrase,
    question_messages,
    questions,
    task_name,
)
from tests.data_files import demonstrations

SHAPE = (32, 64, 3)


def make_episode(number: int, task: str = "fold the towel", scene: bool = False, length: int = 5, **extra) -> Episode:
    rng = np.random.default_rng(number)
    columns = {"action": rng.normal(size=(length, 3)).astype(np.float32)}
    if scene:
        columns |= {
            "observation.environment_state": rng.uniform(0, 0.6, (length, 39)).astype(np.float32),
            "observation.success": np.arange(length) == length - 1,
            "observation.held": np.zeros(length, bool),
        }
    images = {name: [encode_png(np.full(SHAPE, level, np.uint8))] * length for name, level in (("a", 50), ("b", 90))}
    return Episode(task, columns, images, extra)


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "robot", [make_episode(n, f"task {n % 2}") for n in range(6)], 10, "arm", SHAPE)
    return tmp_path / "robot"


def test_splits_are_disjoint_and_complete(folder):
    found = open_demonstrations(folder)
    assert found.tasks == ["task 0", "task 1"] * 3
    assert (found.numbers("val"), found.numbers("fit"), found.numbers("all")) == (
        [4, 5],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
    )
    shown = []
    data = found.read("val", 32, lambda numbers, description: shown.append((description, list(numbers))) or numbers)
    assert (
        shown[-1] == ("reading episodes", [4, 5])
        and len(data) == 10
        and data.by_task == {"task 0": [(0, 5)], "task 1": [(5, 10)]}
    )
    np.testing.assert_array_equal(data.action[:5], make_episode(4).columns["action"])


@pytest.mark.parametrize(
    "tasks, numbers",
    [
        (["a", "a", "b"], {1}),
        (["a", "b", "c"], {2}),
        (["a"] * 100, {96, 97, 98, 99}),
        (["a", "b"] * 60, {116, 117, 118, 119}),
    ],
)
def test_a_few_episodes_of_each_task_are_held_out(tasks, numbers):
    assert held_out(tasks) == numbers


def test_one_episode_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2 episodes"):
        held_out(["a"])


@pytest.mark.parametrize(
    "asked, cameras, others", [((), "ab", ""), (["b"], "b", "a"), (["b", "a"], "ba", ""), (["a", "a"], "a", "b")]
)
def test_cameras_are_chosen_by_name_and_keep_the_order(folder, asked, cameras, others):
    found = open_demonstrations(folder, asked)
    assert (found.cameras, found.other_cameras) == (tuple(cameras), list(others))
    data = found.read("all", 32)
    assert data.cameras == tuple(cameras) and data.fps == 10
    for number, name in enumerate(cameras):
        (picture,) = data.images([29], number)
        assert picture.shape == (32, 32, 3) and picture[16, 16].tolist() == [{"a": 50, "b": 90}[name]] * 3


def test_a_camera_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="has no camera front: its cameras are a, b"):
        open_demonstrations(folder, ["a", "front"])


def test_without_a_state_there_are_no_numbers(folder):
    assert open_demonstrations(folder).read("all", 32).state.shape == (30, 0)


def test_episodes_without_camera_or_actions_are_refused(folder):
    found = open_demonstrations(folder)
    found.cameras = ()
    with pytest.raises(ValueError, match='needs a camera and a column "action" .*; the data has'):
        found.read("all", 32)
    episode = replace(make_episode(0), columns={"torque": np.zeros(5, np.float32)})
    with pytest.raises(ValueError, match='needs a camera and a column "action" .*; the data has torque'):
        Demonstrations([episode])
    with pytest.raises(ValueError, match="no episodes"):
        Demonstrations([])


def test_a_bridge_folder_is_read_too(tmp_path):
    (tmp_path / "0.png").write_bytes(encode_png(np.full(SHAPE, 7, np.uint8)))
    row = {"image": "0.png", "step": 0, "instruction": "lift", "rephrasings": [], "action": [0] * 7}
    (tmp_path / "frames.jsonl").write_text("\n".join(json.dumps(row | {"episode": n}) for n in range(3)))
    found = open_demonstrations(tmp_path)
    assert (found.cameras, found.fps, found.tasks) == (("observation.images.image_0",), 5.0, ["lift"] * 3)
    assert len(found.read("fit", 32)) == 2 and found.read("val", 32).action.shape == (1, 7)


# ---- Meta-World ----


def test_names_of_known_tasks_are_kept_and_others_are_their_instruction():
    assert task_name(make_episode(0, "press it", name="push")) == "push"
    assert task_name(make_episode(0, "press it", name="fly")) == task_name(make_episode(0, "press it")) == "press it"
    assert paraphrase("push", None) == INSTRUCTIONS["push"][0] and paraphrase("fly", None) == "fly"
    rng = np.random.default_rng(0)
    assert {paraphrase("push", rng) for _ in range(100)} == set(INSTRUCTIONS["push"])


def test_questions_need_the_simulators_state():
    assert not has_scene(demonstrations([make_episode(0)], 32))
    episodes = [make_episode(n, scene=True, name="push", length=40) for n in range(2)]
    data = demonstrations(episodes, 32, task_name)
    assert has_scene(data)
    state = episodes[1].columns["observation.environment_state"]
    np.testing.assert_array_equal(object_positions(data, [41])[0, 3:6], state[1, 4:7])
    assert object_positions(data).shape == (80, 12)
    asked = draw_asked(data, 40, np.random.default_rng(0))
    assert len(asked) == 40 and all(data.end[frame] - frame <= 25 for frame in asked[20:])
    for frames, question in questions(data, 45, np.random.default_rng(0)):
        assert frames[-1] == 45 and len(frames) == question.images
        assert 40 <= frames[0] <= 45  # never a frame of another episode
    done = {
        frame: q.answer
        for frame in (78, 79)
        for _, q in questions(data, frame, np.random.default_rng(0))
        if q.kind == "done"
    }
    assert done == {78: "no", 79: "yes"}


def test_a_question_shows_its_images_first():
    user, answer = question_messages("what changed?", "nothing", 2)
    assert user["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what changed?"}]
    assert answer == {"role": "assistant", "content": "nothing"}
