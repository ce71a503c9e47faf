"""Questions about the pictures of robot datasets, in LeRobot's column `language_events`."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.language import EVENT_TYPE, from_events
from nanochat.data.lerobot import Episode, RobotDataset
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.files import DataError
from nanochat.metaworld.record import Block, frame_questions

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
ASKED = [[(FRONT, "Is it open?", "no"), (WRIST, "What is held?", "nothing")], [], [(FRONT, "Is it open?", "yes")]]


def episode(questions=ASKED, n=3):
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    columns = {"observation.state": np.zeros((n, 2), np.float32), "action": np.ones((n, 2), np.float32)}
    return Episode("open it", columns, {FRONT: [picture] * n, WRIST: [picture] * n}, questions=questions)


def written(folder, *episodes):
    write_dataset(folder, episodes, 10, "arm", (8, 8, 3))
    return RobotDataset(folder)


def test_questions_are_written_as_lerobot_has_them_and_read_back(tmp_path):
    data = written(tmp_path / "asked", episode(), episode(ASKED[::-1]))
    assert data.questions(0) == ASKED and data.questions(1) == ASKED[::-1]
    assert data.features["language_events"] == {"dtype": "language", "shape": [1], "names": None}
    assert data.unreadable() == ["language_events"] and "language_events" not in data.stats
    np.testing.assert_array_equal(data.episode(1).columns["action"], np.ones((3, 2)))
    (path,) = (tmp_path / "asked/data").rglob("*.parquet")
    table = pq.read_table(path)
    assert table.schema.field("language_events").type == EVENT_TYPE
    role, answer = table["language_events"][0].as_py()[:2]
    assert role == {"role": "user", "content": "Is it open?", "style": "vqa", "camera": FRONT, "tool_calls": None}
    assert (answer["role"], answer["content"]) == ("assistant", "no")
    known = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["language_events"]
    assert known["_type"] == "List" and list(known["feature"]) == ["role", "content", "style", "camera", "tool_calls"]


def test_data_without_questions_have_none(tmp_path):
    data = written(tmp_path / "plain", episode([]))
    assert data.questions(0) == [[], [], []] and "language_events" not in data.features


@pytest.mark.parametrize(
    "questions, message",
    [
        (ASKED[:2], "questions must be empty or a list for each frame"),
        ([[("top", "Is it open?", "no")], [], []], "a question of frame 0 is about top, which is no camera"),
        ([[], [(FRONT, "Is it open?", "")], []], "questions of frame 1: 'the answer' must be non-empty text"),
        ([[(FRONT, "a?", "b"), (FRONT, "c?", "d")], [], []], "one question about a frame of a camera"),
    ],
)
def test_questions_that_lerobot_could_not_keep_are_refused(tmp_path, questions, message):
    with pytest.raises(DataError, match=message):
        written(tmp_path / "wrong", episode(questions))


def test_all_episodes_have_questions_or_none(tmp_path):
    with pytest.raises(DataError, match="language_events must be the same as in the first episode"):
        written(tmp_path / "mixed", episode(), episode([]))


def row(role="user", style="vqa", camera=FRONT, content="a"):
    return {"role": role, "content": content, "style": style, "camera": camera, "tool_calls": None}


PLAIN = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", "style", "camera", "tool_calls")]))


def test_rows_of_other_styles_are_left_out():
    said = row("assistant", "interjection", None)
    column = pa.chunked_array([pa.array([[said, row(), row("assistant"), said], None], PLAIN)])
    assert from_events(column, "x") == [[(FRONT, "a", "a")], []]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([row()], "an answer .assistant. after each question"),
        ([row("assistant"), row()], "an answer .assistant. after each question"),
        ([row(), row("assistant", camera=WRIST)], "about the camera of its question"),
        ([row(content=None), row("assistant")], "'the question' must be non-empty text"),
        ([row(camera=None), row("assistant", camera=None)], "'the camera' must be non-empty text"),
    ],
)
def test_damaged_rows_are_refused_by_frame(rows, message):
    with pytest.raises(DataError, match=f"file: language_events of frame 1.*{message}"):
        from_events(pa.chunked_array([pa.array([[], rows], PLAIN)]), "file")
    with pytest.raises(DataError, match="must be a list of rows"):
        from_events(pa.chunked_array([["text"]]), "file")


def test_recorded_frames_are_asked_about_in_the_first_camera():
    """A made-up episode: the hand goes down with its fingers open."""
    state = np.tile(np.linspace(0.1, 0.4, 39), (6, 1))
    columns = {
        "observation.environment_state": state, "observation.success": np.arange(6) > 4,
        "observation.held": np.zeros(6, bool), "action": np.zeros((6, 4), np.float32),
    }  # fmt: skip
    block = Block("door-open", 0, 1, 0, 0.0, 64, ("corner2", "gripperPOV"))
    asked = frame_questions(block, columns, seed=3)
    assert [len(frame) for frame in asked] == [1] * 6 and asked == frame_questions(block, columns, seed=3)
    assert {camera for ((camera, _, _),) in asked} == {"observation.images.corner2"}
    other = frame_questions(replace(block, task="drawer-open"), columns, seed=3)
    assert asked != other
