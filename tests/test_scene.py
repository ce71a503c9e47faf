"""Questions about the robot's camera: the camera against MuJoCo's, and answers that turn when the state turns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.metaworld.instructions import INSTRUCTIONS, OBJECTS
from nanochat.metaworld.scene import (
    CAMERA_AXES,
    CAMERA_POSITION,
    FOCAL_LENGTH,
    GRIPPED,
    PHRASES,
    project,
    scene_questions,
)

# cam_quat of "corner2" in Meta-World 3.1.1
CORNER2_QUATERNION = (-0.39503823, 0.26266734, -0.43493704, 0.76536295)
TABLE = np.array([[0.0, 0.6, 0.02], [0.1, 0.87, 0.02], [-0.1, 0.8, 0.2], [0.3, 0.5, 0.05], [-0.2, 0.4, 0.3]])


def episode(**changes):
    """Two frames, the same but for what is named, in the second: hand, object (xyz), opening, success, held."""
    state = np.zeros((2, 39), np.float32)
    state[:, :3], state[:, 3], state[:, 4:7] = (0.0, 0.6, 0.2), 1.0, (0.1, 0.6, 0.02)
    success, held = np.zeros(2, bool), np.zeros(2, bool)
    for name, value in changes.items():
        if name in ("success", "held"):
            {"success": success, "held": held}[name][1] = value
        else:
            state[1, {"hand": slice(0, 3), "opening": 3, "object": slice(4, 7)}[name]] = value
    return state, success, held


def answers(task="push", seed=0, t=1, **changes):
    questions = scene_questions(task, *episode(**changes), t, 0, np.random.default_rng(seed))
    assert len({question.kind for question in questions}) == len(questions)
    return {question.kind: question.answer for question in questions}


def mujoco_pixel(point, size=1000):
    """The textbook way: quaternion to camera axes (x right, y up, looking along -z), perspective, a picture turned by 180."""
    w, x, y, z = CORNER2_QUATERNION
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    seen = rotation.T @ (point - np.array([0.75, 0.075, 0.7]))
    half = np.tan(np.pi / 6) * -seen[2]
    column, row = size / 2 * (1 + seen[0] / half), size / 2 * (1 - seen[1] / half)
    return np.array([size - column, size - row]) / size


def test_projection_is_mujocos():
    assert np.allclose(project(TABLE), [mujoco_pixel(point) for point in TABLE], atol=1e-6)


def test_the_picture_is_upright_and_the_robot_at_its_left():
    base, far, near, above = project(np.array([[0.0, 0.0, 0.0], [0.0, 0.8, 0.0], [0.3, 0.4, 0.0], [0.0, 0.8, 0.3]]))
    assert base[0] < far[0]
    assert above[1] < far[1] < near[1]


def test_axes_are_a_rotation():
    assert np.allclose(CAMERA_AXES @ CAMERA_AXES.T, np.eye(3), atol=1e-8) and np.linalg.det(CAMERA_AXES) > 0


def test_nothing_behind_the_camera_is_in_the_picture():
    assert np.isnan(project(CAMERA_POSITION - CAMERA_AXES[2:] * 0.5)).all()


@given(st.floats(0.0, 0.999), st.floats(0.0, 0.999), st.floats(0.3, 2.0))
def test_cells_follow_the_picture(x, y, depth):
    offset = np.array([(x - 0.5) / FOCAL_LENGTH, (y - 0.5) / FOCAL_LENGTH, 1.0]) * depth
    point = CAMERA_POSITION + offset @ CAMERA_AXES
    if min(abs(x * 8 - round(x * 8)), abs(y * 8 - round(y * 8))) > 1e-4:  # off the lines, for float32
        assert answers(object=point)["cell"] == f"row {int(y * 8) + 1} column {int(x * 8) + 1}"


def test_no_cell_outside_the_picture():
    assert "cell" not in answers(object=(0.0, -3.0, 0.0))


def test_yes_turns_to_no():
    assert answers(success=True)["done"] == "yes" and answers(success=False)["done"] == "no"
    assert answers(held=True)["held"] == "yes" and answers(held=False)["held"] == "no"
    assert answers(opening=0.95)["gripper"] == "yes" and answers(opening=0.45)["gripper"] == "no"
    assert "gripper" not in answers(opening=0.8)


def test_frames_are_told_apart():
    assert answers(t=0, success=True)["done"] == "no"


def test_held_is_asked_where_something_is_gripped():
    assert GRIPPED < set(INSTRUCTIONS)
    assert "held" not in answers("handle-press-side", held=True)


def test_sides_are_the_pictures():
    hand = np.array([0.0, 0.6, 0.2])
    assert answers(hand=hand, object=hand + [0, 0.2, -0.1])["side"] == "right"
    assert answers(hand=hand, object=hand - [0, 0.2, 0.1])["side"] == "left"
    assert "side" not in answers(hand=hand, object=hand - [0, 0, 0.1])


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({}, "nothing"),
        ({"hand": (0.0, 0.7, 0.2)}, "only the arm moved"),
        ({"opening": 0.4}, "the gripper closed"),
        ({"object": (0.1, 0.75, 0.02), "hand": (0.0, 0.7, 0.2)}, "the object moved right"),
        ({"object": (0.1, 0.45, 0.02)}, "the object moved left"),
        ({"object": (0.1, 0.6, 0.2)}, "the object moved up"),
        ({"object": (0.1, 0.6, 0.2), "opening": 0.4}, None),
        ({"hand": (0.0, 0.63, 0.2)}, None),
        ({"opening": 0.85}, None),
    ],
)
def test_changes(changes, answer):
    assert answers(**changes).get("change") == answer


def test_changes_run_from_the_earlier_frame_to_this_one():
    state, success, held = episode(object=(0.1, 0.75, 0.02), opening=1.0)
    back = scene_questions("push", state, success, held, 0, 1, np.random.default_rng(0))
    assert [q.answer for q in back if q.kind == "change"] == ["the object moved left"]
    state, success, held = episode(opening=0.4)
    back = scene_questions("push", state, success, held, 0, 1, np.random.default_rng(0))
    assert [(q.answer, q.images) for q in back if q.kind == "change"] == [("the gripper opened", 2)]


@pytest.mark.parametrize("task", INSTRUCTIONS)
def test_what_is_asked_of_every_frame(task):
    far = {"hand": (9.0, 9.0, 9.0), "object": (9.0, -9.0, 9.0), "opening": 0.8}
    found = answers(task, **far)
    assert set(found) == {"describe", "task", "object", "done"} | ({"held"} if task in GRIPPED else set())
    assert (found["task"], found["object"]) == (INSTRUCTIONS[task][0], OBJECTS[task])


def test_the_generator_chooses_the_wording_and_never_the_answers():
    asked = [scene_questions("stick-pull", *episode(), 1, 0, np.random.default_rng(seed)) for seed in range(60)]
    for kind in {question.kind for question in asked[0]}:
        texts = {question.question for row in asked for question in row if question.kind == kind}
        assert len(texts) >= len(PHRASES[kind])
        assert not any("{" in text for text in texts)
    assert len({tuple((q.kind, q.answer) for q in row) for row in asked}) == 1
    again = scene_questions("stick-pull", *episode(), 1, 0, np.random.default_rng(7))
    assert again == asked[7]
    done = [q.question for row in asked for q in row if q.kind == "done"]
    assert all(any(text in question for text in INSTRUCTIONS["stick-pull"]) for question in done)


@pytest.mark.parametrize(
    "task, rows, t, message",
    [
        ("fold the towel", 2, 1, "not a task"),
        ("push", 3, 1, r"\(2, 39\), \(3,\)"),
        ("push", 2, 2, r"0\.\.1, found 2"),
        ("push", 2, -1, "found -1"),
    ],
)
def test_what_cannot_be_asked_about(task, rows, t, message):
    state, _, held = episode()
    with pytest.raises(ValueError, match=message):
        scene_questions(task, state, np.zeros(rows, bool), held, t, 0, np.random.default_rng(0))


@pytest.mark.parametrize("task, channel", [("push", 1), ("pick-place", 2), ("shelf-place", 1)])
def test_the_goal_ball_is_drawn_where_it_is_projected(task, channel):
    from nanochat.metaworld.simulator import Arm, SimulatorError

    try:
        arm = Arm(task, 128)
        scene = arm.reset(5)
        picture = arm.image().astype(int)
        arm.close()
    except SimulatorError as error:
        pytest.skip(str(error))
    rest = np.delete(picture, channel, axis=2).max(axis=2)
    rows, columns = np.nonzero(picture[..., channel] - rest > 90)
    (expected,) = project(scene.environment_state[None, 36:39]) * 128
    assert len(rows) > 3
    assert np.abs(np.array([columns.mean(), rows.mean()]) + 0.5 - expected).max() < 1
