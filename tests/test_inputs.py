"""Pictures that a command is given: files, folders, globs, the standard input, cameras."""

import io
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat import inputs
from nanochat.errors import UserError
from nanochat.inputs import find_pictures, opened
from nanochat.vision.images import ImageError

PICTURES = Path(__file__).parents[1] / "nanochat/assets/pictures"


@pytest.fixture
def folder(tmp_path):
    """b.png, a.JPG, sub/c.png, notes.txt, hidden files, and a broken picture."""
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(("b.png", "a.JPG", "sub/c.png")):
        shutil.copy(PICTURES / f"{number}.png", tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    return tmp_path


def names(pictures, folder):
    return [os.path.relpath(picture.name, folder) for picture in pictures]


def test_a_folder_has_its_pictures_and_says_what_it_leaves_out(folder, capsys):
    assert names(find_pictures([str(folder)]), folder) == ["a.JPG", "b.png", "broken.png", "sub/c.png"]
    assert capsys.readouterr().err == f"note: {folder}: 4 pictures; other files, left out: 1 (notes.txt)\n"
    (folder / "empty").mkdir()
    with pytest.raises(ImageError, match="empty is a folder without pictures"):
        find_pictures([str(folder / "empty")])


def test_globs(folder):
    assert names(find_pictures([str(folder / "*.png")]), folder) == ["b.png", "broken.png"]
    assert names(find_pictures([str(folder / "**/*.png")]), folder) == ["b.png", "broken.png", "sub/c.png"]
    with pytest.raises(ImageError, match=r"no file matches .*/\*\.webp"):
        find_pictures([str(folder / "*.webp")])
    with pytest.raises(ImageError, match="only 1 folders"):
        find_pictures([str(folder / "s*b")])


def test_a_path_is_not_a_pattern(folder):
    """Files and folders whose names have brackets, stars and question marks, beside others that they would match as globs."""
    for name in ("[1]", "1"):
        (folder / name).mkdir()
        shutil.copy(PICTURES / "0.png", folder / name / "p.png")
    shutil.copy(PICTURES / "0.png", folder / "x*.png")
    shutil.copy(PICTURES / "0.png", folder / "xy.png")
    assert names(find_pictures([str(folder / "[1]/*.png")]), folder) == ["[1]/p.png"]
    assert names(find_pictures([str(folder / "[1]")]), folder) == ["[1]/p.png"]
    assert names(find_pictures([str(folder / "x*.png")]), folder) == ["x*.png"]


def test_a_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert len(find_pictures(["~"])) == 4 and find_pictures(["~/b.png"])[0].source == str(folder / "b.png")


@pytest.mark.parametrize("word", ["gone.png", "", "x" * 300, "a\0b"])
def test_a_missing_file_is_named(word):
    with pytest.raises(ImageError, match="there is no file|empty|cannot be read|not a valid path"):
        find_pictures([word])


def test_a_name_that_is_no_text_can_be_printed(tmp_path, capsys):
    shutil.copy(PICTURES / "0.png", os.fsencode(tmp_path) + b"/\xff\n.png")
    found = find_pictures([str(tmp_path)])
    assert found[0].name == f"{tmp_path}/\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}.png"
    assert len(list(opened(found, "", prints=True))) == 1


def stdin(data: bytes, terminal=False):
    return SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: terminal)


def test_the_standard_input(monkeypatch):
    data = (PICTURES / "0.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", stdin(data))
    picture = find_pictures(["-"])[0]
    assert (picture.name, picture.source, picture.named) == ("-", data, True)
    for wrong, message in ((stdin(b""), "is empty"), (stdin(data, terminal=True), "the keyboard")):
        monkeypatch.setattr(sys, "stdin", wrong)
        with pytest.raises(ImageError, match=message):
            find_pictures(["-"])
    with pytest.raises(UserError, match="once"):
        find_pictures(["-", "-"])
    monkeypatch.setattr(sys, "stdin", stdin(b"text"))
    with pytest.raises(ImageError, match="^-: the image bytes"):
        list(opened(find_pictures(["-"]), "", prints=True))


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[(PICTURES / "0.png").read_bytes()])
    writer.start()
    pictures = find_pictures([str(tmp_path / "pipe"), str(PICTURES / "1.png")])
    writer.join(10)
    assert [image.size for _, image in opened(pictures, "", prints=True)] == [(64, 64), (64, 64)]


def test_broken_pictures_of_a_folder_are_named_and_counted(folder, capsys):
    results = [
        (picture.name, isinstance(image, ImageError))
        for picture, image in opened(find_pictures([str(folder)]), "", True)
    ]
    assert [broken for _, broken in results] == [False, False, True, False]
    error = capsys.readouterr().err
    assert "note: left out: " in error and "broken.png" in error
    assert error.endswith("note: 1 of 4 pictures cannot be opened and are left out\n")
    for name in ("b.png", "a.JPG", "sub/c.png"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(ImageError, match="none of the 4 pictures can be opened"):
        list(opened(find_pictures([str(folder)]), "", True))


def test_a_broken_picture_that_is_named_stops_before_the_first(folder):
    pictures = find_pictures([str(folder / "b.png"), str(folder / "broken.png")])
    with pytest.raises(ImageError, match="broken.png"):
        next(opened(pictures, "", prints=True))


class Camera:
    """A stand-in for cv2.VideoCapture: camera 0 works, 1 is not there, 2 gives no picture."""

    released: list[int] = []

    def __init__(self, number):
        self.number, self.count = number, 0

    def isOpened(self):
        return self.number != 1

    def read(self):
        self.count += 1
        blue = np.full((4, 6, 3), [255, 0, self.count], np.uint8)
        return self.number == 0, blue if self.number == 0 else None

    def release(self):
        self.released.append(self.number)


def test_opencv_prints_nothing_about_a_camera_that_is_not_there(capfd):
    pytest.importorskip("cv2")
    with pytest.raises(ImageError, match="camera 99 cannot be opened"):
        find_pictures([], camera=99)
    assert capfd.readouterr() == ("", "")


def test_a_camera(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Camera, setLogLevel=lambda level: None))
    Camera.released.clear()
    (picture,) = find_pictures([], camera=0)
    assert picture.name == "camera 0" and picture.source.shape == (4, 6, 3)
    assert picture.source[0, 0].tolist() == [inputs.WARM_UP + 1, 0, 255]  # RGB, and not the first frame
    for number, message in ((1, "camera 1 cannot be opened"), (2, "camera 2 is open but gives no picture")):
        with pytest.raises(ImageError, match=message):
            find_pictures([], camera=number)
    assert Camera.released == [0, 1, 2]
    for number in (-1, 10**12):
        with pytest.raises(UserError, match="--camera must be"):
            find_pictures([], camera=number)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="needs OpenCV .* pip install opencv"):
        find_pictures([], camera=0)
