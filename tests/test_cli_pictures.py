"""ask, caption, embed and detect with folders, globs, the standard input, cameras and JSON."""

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nanochat.agent import Agent
from nanochat.errors import UserError
from tests.test_cli import PICTURE, QUESTION, SHAPES, picture, weights  # noqa: F401, a fixture
from tests.test_inputs import Camera
from tests.test_yolov9 import PICTURE as SCENE

COLOURS = ["red", "black", "brown"]


@pytest.fixture
def folder(tmp_path):
    """0.png, 1.png, 2.png and a broken picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        shutil.copy(picture(number), folder / f"{number}.png")
    (folder / "x.png").write_bytes(b"\x89PNG\r\n")
    return folder


@pytest.mark.parametrize("pattern", ["", "*.png", "?.png"])
def test_ask_about_a_folder(nanochat, folder, pattern):
    printed = nanochat("ask", *SHAPES, folder / pattern, QUESTION, "--each")
    assert printed.out.splitlines() == [f"{folder}/{number}.png: {colour}" for number, colour in enumerate(COLOURS)]
    assert f"left out: {folder}/x.png" in printed.err and "1 of 4 pictures cannot be opened" in printed.err


def test_ask_about_the_standard_input_and_a_camera(nanochat, monkeypatch):
    data = io.BytesIO(Path(picture(1)).read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data, isatty=lambda: False))
    assert nanochat("ask", *SHAPES, "-", QUESTION).out == "black\n"
    camera = SimpleNamespace(VideoCapture=Camera, setLogLevel=lambda level: None)
    monkeypatch.setitem(sys.modules, "cv2", camera)
    assert nanochat("ask", *SHAPES, "--camera", "0", QUESTION).out.strip()
    assert json.loads(nanochat("caption", "--camera", "0", "--checkpoint", "robot", "--json").out)["file"] == "camera 0"
    assert nanochat("ask", *SHAPES, "--camera", "1", QUESTION, code=2).err.startswith(
        "error: camera 1 cannot be opened"
    )


def test_json_of_answers(nanochat, folder, tmp_path):
    rows = [
        json.loads(line) for line in nanochat("ask", *SHAPES, folder, QUESTION, "--each", "--json").out.splitlines()
    ]
    assert [row.get("answer") for row in rows] == [*COLOURS, None] and "x.png" in rows[3]["error"]
    assert rows[0] == {"file": f"{folder}/0.png", "question": QUESTION, "answer": "red"}
    assert (
        nanochat("ask", *SHAPES, folder, QUESTION, "--each", "--json", tmp_path / "r.json").out
        == f"4 results in {tmp_path}/r.json\n"
    )
    nanochat("ask", *SHAPES, folder, QUESTION, "--each", "--json", tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.json").read_text()) == rows
    assert [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()] == rows
    error = nanochat("ask", *SHAPES, folder, QUESTION, "--each", "--json", tmp_path / "none/r.json", code=2).err
    assert "there is no folder" in error
    frame = Path(PICTURE).parents[1] / "demo/frame.png"
    row = json.loads(nanochat("caption", frame, "--checkpoint", "robot", "--json").out)
    assert set(row) == {"file", "caption"} and "drawer" in row["caption"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (UserError("no more"), 2), (OSError("gone"), 2)]
)
def test_answers_survive_a_stop(nanochat, folder, tmp_path, monkeypatch, suffix, error, code):
    out, look, n_good = tmp_path / f"r{suffix}", Agent.look, 0

    def look_or_stop(agent, images):
        nonlocal n_good
        n_good -= 1
        if n_good < 0:
            raise error
        return look(agent, images)

    monkeypatch.setattr(Agent, "look", look_or_stop)
    out.write_text("older")
    printed = nanochat("ask", *SHAPES, folder, QUESTION, "--each", "--json", out, code=code)
    assert printed.out == "" and out.read_text() == "older"  # no answer yet: as if it never ran
    n_good = 2
    printed = nanochat("ask", *SHAPES, folder, QUESTION, "--each", "--json", out, code=code)
    assert printed.out == f"2 results in {out}, incomplete\n" and (str(error) or "stopped") in printed.err
    text = out.read_text()
    rows = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    assert [row["answer"] for row in rows] == COLOURS[:2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([QUESTION, "P"], "the question comes last"),
        ([QUESTION, "gone.png"], "the question comes last"),
        ([QUESTION, "FOLDER"], "the question comes last"),
        ([QUESTION, "-"], "the question comes last"),
        ([QUESTION, "*.jpg"], "the question comes last"),
        (["P", "P"], "the question comes last"),
        (["P", QUESTION, "P"], "the question comes last"),
        (["P", QUESTION, "is it round?"], "there is only one"),
        (["P", "what", "color", "is", "it?"], 'needs quotes: "what color is it?"'),
        (["P"], "at least one picture, then a question"),
        ([], "at least one picture, then a question"),
        (["P", ""], "the question is empty"),
    ],
)
def test_the_order_of_ask(nanochat, folder, words, message):
    words = [str(folder) if word == "FOLDER" else PICTURE if word == "P" else word for word in words]
    printed = nanochat("ask", *SHAPES, *words, code=2)
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_question_may_be_the_name_of_a_file(nanochat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shape").mkdir()
    assert nanochat("ask", *SHAPES, PICTURE, "shape").out.strip()


def test_embed_a_folder(nanochat, folder, tmp_path):
    options = ("--weights", "shapes", "--layer", "4")
    printed = nanochat("embed", folder, "-o", tmp_path / "e.NPZ", *options)
    assert f"3 x 64 embeddings in {tmp_path}/e.NPZ" in printed.out and "1 of 4 pictures" in printed.err
    assert "next: " in printed.err
    rows = [json.loads(line) for line in nanochat("embed", folder, "--json", *options).out.splitlines()]
    with np.load(tmp_path / "e.NPZ") as saved:
        assert saved["files"].tolist() == [f"{folder}/{number}.png" for number in range(3)]
        for row, vector in zip((row for row in rows if "error" not in row), saved["embeddings"], strict=True):
            assert row["embedding"] == pytest.approx(vector.tolist())
    assert "-o FILE.npz, or --json" in nanochat("embed", folder, *options, code=2).err


def test_detect_in_a_folder(nanochat, folder, tmp_path, weights):  # noqa: F811
    (folder / "sub").mkdir()
    for place in (folder / "0.png", folder / "sub/0.png"):
        SCENE.save(place)
    options = ("--weights", weights, "--image-size", "96")
    printed = nanochat("detect", folder, "-o", tmp_path / "drawn", *options)
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0-2.png", "0.png", "1.png", "2.png"]
    with Image.open(tmp_path / "drawn/0.png") as drawn:
        assert drawn.size == SCENE.size and (np.asarray(drawn) != np.asarray(SCENE)).any()
    assert f"{folder}/sub/0.png: " in printed.out and printed.out.splitlines()[-1].endswith(
        f"written to {tmp_path}/drawn"
    )
    nanochat("detect", folder, "-o", tmp_path / "d.json", *options)
    rows = json.loads((tmp_path / "d.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png", "0.png"]
    printed = nanochat("detect", folder / "0.png", "--json", *options)
    row = json.loads(printed.out)
    assert row["detections"] == rows[0]["detections"] and row["detections"][0].keys() >= {"box", "score", "class_name"}
    only = nanochat("detect", folder / "0.png", *options).out.splitlines()
    assert only[-1] == f"{len(row['detections'])} objects"
    assert "use a folder" in nanochat("detect", folder, "-o", tmp_path / "one.png", *options, code=2).err
    assert ".json" in nanochat("detect", folder, "-o", tmp_path / "one.txt", *options, code=2).err


def test_detect_never_writes_onto_a_file_that_was_there(nanochat, folder, tmp_path, weights):  # noqa: F811
    (folder / "1-2.png").symlink_to(tmp_path / "gone.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.exists()}
    options = ("--weights", weights, "--image-size", "96")
    printed = nanochat("detect", folder, "-o", folder, *options)
    assert {name: (folder / name).read_bytes() for name in before} == before and (folder / "1-2.png").is_symlink()
    assert {path.name for path in folder.iterdir()} - {*before, "1-2.png"} == {"0-2.png", "1-3.png", "2-2.png"}
    assert f"{folder} had files of the same names, which are kept; see 0-2.png, 1-3.png, 2-2.png" in printed.err
    drawn = tmp_path / "drawn"
    assert "kept" not in nanochat("detect", PICTURE, PICTURE, "-o", drawn, *options).err
    assert "see 0-3.png\n" in nanochat("detect", PICTURE, "-o", drawn, *options).err
    assert sorted(path.name for path in drawn.iterdir()) == ["0-2.png", "0-3.png", "0.png"]


@pytest.mark.parametrize("name", ["p.png", "link.png", "p.json"])
def test_detect_refuses_to_replace_its_picture(nanochat, tmp_path, name):
    shutil.copy(PICTURE, tmp_path / ("p.json" if name == "p.json" else "p.png"))
    if name == "link.png":
        (tmp_path / name).symlink_to("p.png")
    pictures = list(tmp_path.iterdir())
    for picture_path in pictures:
        for out in pictures:
            words = ("detect", picture_path, "-o", out, "--weights", "never-read.pt")
            assert nanochat(*words, code=2).err.startswith(f"error: {out} is the picture itself, which would be lost")
    assert (tmp_path / name).read_bytes() == Path(PICTURE).read_bytes()


def test_commands_end_with_the_next_step(nanochat, tmp_path):
    out = tmp_path / "my model"
    printed = nanochat("pack", "shapes", "-o", out)
    assert str(out) in printed.out and printed.err == (
        f"next: nanochat push '{out}' OWNER/NAME, or --checkpoint '{out}' to use it\n"
    )
    (tmp_path / "t.txt").write_text("the quick brown fox\n" * 5)
    printed = nanochat("tokenizer", tmp_path / "t.txt", "-o", tmp_path / "t.json", "--vocab-size", "280")
    assert printed.err == f"next: nanochat train folder --data DATA --tokenizer {tmp_path}/t.json\n"
