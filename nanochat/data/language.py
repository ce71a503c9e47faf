"""Questions about the pictures of a robot dataset, as LeRobot 0.6 has them: rows of style "vqa" in the column `language_events`.

A frame has a list of rows {role, content, style, camera, tool_calls}; a question is a row of the role "user", followed by its
answer, a row of the role "assistant" about the same camera. There is at most one question about a frame of a camera. The dtype in
meta/info.json is "language", which LeRobot before 0.6 does not know. The answers here are plain text, where LeRobot's own
annotation pipeline writes JSON.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nanochat.data.columns import pa, parquet_errors
from nanochat.data.sample import check_text
from nanochat.files import DataError, short_repr

EVENTS, VQA = "language_events", "vqa"
FEATURE = {"dtype": "language", "shape": [1], "names": None}  # in meta/info.json
JSON = pa.json_() if hasattr(pa, "json_") else pa.string()  # as LeRobot chooses it
EVENT_TYPE = pa.list_(
    pa.struct(
        [
            pa.field("role", pa.string(), nullable=False),
            *(pa.field(name, pa.string()) for name in ("content", "style", "camera")),
            pa.field("tool_calls", pa.list_(JSON)),
        ]
    )
)
TEXT = {"_type": "Value", "dtype": "string"}
HF_FEATURE = {  # as the datasets library describes the column
    "_type": "List",
    "feature": dict.fromkeys(("role", "content", "style", "camera"), TEXT)
    | {"tool_calls": {"_type": "List", "feature": {"_type": "Json"} if JSON != pa.string() else TEXT}},
}

Asked = tuple[str, str, str]  # (camera, question, answer)


def to_events(questions: Sequence[Sequence[Asked]]) -> pa.Array:
    """The column of T frames. questions: of each frame."""
    rows = [
        (role, text, VQA, camera)
        for asked in questions
        for camera, question, answer in asked
        for role, text in (("user", question), ("assistant", answer))
    ]
    ends = np.cumsum([0, *(2 * len(asked) for asked in questions)])
    texts = [pa.array([row[i] for row in rows], pa.string()) for i in range(4)]
    tools = pa.nulls(len(rows), pa.list_(JSON))  # pyarrow converts no objects to JSON
    structs = pa.StructArray.from_arrays([*texts, tools], fields=list(EVENT_TYPE.value_type))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs)


def from_events(column: pa.ChunkedArray, where: str) -> list[list[Asked]]:
    """The questions of each frame; rows of other styles are left out. Raises DataError for a question without an answer, and for
    what is no such row."""
    found = []
    with parquet_errors(where):
        frames = column.to_pylist()
    for frame, rows in enumerate(frames):
        place = f"{where}: {EVENTS} of frame {frame}"
        if not all(isinstance(row, dict) for row in rows or []):
            raise DataError(
                f"{place} must be a list of rows with role, content, style and camera, found {short_repr(rows)}"
            )
        asked = [row for row in rows or [] if row.get("style") == VQA]
        if [row.get("role") for row in asked] != ["user", "assistant"] * (len(asked) // 2):
            raise DataError(
                f"{place} must have an answer (assistant) after each question (user), found {short_repr(asked)}"
            )
        pairs = list(zip(asked[::2], asked[1::2], strict=True))
        if any(question.get("camera") != answer.get("camera") for question, answer in pairs):
            raise DataError(f"{place}: an answer must be about the camera of its question, found {short_repr(asked)}")
        questions = [(one.get("camera"), one.get("content"), other.get("content")) for one, other in pairs]
        check_questions(questions, place)
        found.append(questions)
    return found


def check_questions(asked: Sequence[Asked], where: str) -> None:
    """Raises DataError unless these are texts, at most one question about each camera."""
    for values in asked:
        for name, text in zip(("the camera", "the question", "the answer"), values, strict=True):
            check_text(text, name, where)
    if twice := [camera for camera, n in Counter(camera for camera, _, _ in asked).items() if n > 1]:
        raise DataError(
            f"{where}: LeRobot keeps one question about a frame of a camera, found more about {', '.join(twice)}"
        )
