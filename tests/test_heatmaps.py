"""Drawings of what an answer's words looked at: where a cell lies on a picture, which words are drawn, and --show."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.attention import WordAttention
from nanochat.cli import ask
from nanochat.heatmaps import Drawn, draw_attention, heat, panels, shown_words, with_heat
from nanochat.vision.letterbox import square
from tests.test_cli import PICTURE, QUESTION, picture


def word(text, cell=0, pictures=1):
    weights = torch.zeros(2, 3, pictures, 16)
    weights[..., cell] = 0.2
    weights[..., 0, 5] = 0.4
    return WordAttention(text, weights)


def one_cell(cell, n=16):
    return np.eye(n, dtype=np.float32)[cell]


def place_of_strongest(values):
    rows, columns = np.nonzero(values > 0.9 * values.max())
    return columns.mean() + 0.5, rows.mean() + 0.5  # of pixel centres


def test_a_cell_lies_where_the_encoder_saw_it():
    fit = square(Image.new("RGB", (64, 64)), 64)[1]
    for cell in range(16):
        x, y = place_of_strongest(heat(one_cell(cell), fit, 64, (200, 200)))
        centre = (50 * (cell % 4) + 25, 50 * (cell // 4) + 25)
        edge = [c in (25, 175) for c in centre]  # there the colour reaches the border
        assert all(abs(a - b) < (14 if at else 3) for a, b, at in zip((x, y), centre, edge, strict=True))
    flat = heat(np.full(16, 0.25, np.float32), fit, 64, (30, 20))
    assert flat.shape == (20, 30) and np.allclose(flat, 0.25)


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_the_grey_borders_are_cut_off(size):
    """A picture twice as wide as high fills the middle half of the square: rows 2 and 3 of four rows of cells."""
    wide = size[0] > size[1]
    fit = square(Image.new("RGB", size), 64)[1]
    for row in range(2):
        for column in range(4):
            cell = 4 * (row + 1) + column if wide else 4 * column + row + 1
            x, y = place_of_strongest(heat(one_cell(cell), fit, 64, size))
            along, across = (x, y) if wide else (y, x)
            assert abs(along - (50 * column + 25)) < 14 and abs(across - (50 * row + 25)) < 14
    border = one_cell(0)  # in the border: little of it reaches the picture
    assert heat(border, fit, 64, size).max() <= 0.5


def test_the_light_follows_the_value():
    image = Image.new("RGB", (20, 10), (100, 120, 140))
    values = np.zeros((10, 20), np.float32)
    values[:, 10:] = 1
    drawn = np.asarray(with_heat(image, values)).astype(int)
    assert (drawn[:, 10:] == (100, 120, 140)).all() and (drawn[:, :10] < 20).all()


def test_words_of_content_are_drawn():
    caption = [word(text) for text in "A man on the red bike, with a dog .".split()]
    assert [each.text for each in shown_words(caption)] == ["man", "red", "bike,", "dog"]
    assert [each.text for each in shown_words([word("on"), word("it.")])] == ["on", "it."]
    assert shown_words([]) == []


def test_panels_of_an_answer():
    """The picture, then each word, in lines of seven; several pictures share one scale."""
    images = [Image.new("RGB", (80, 40), "white"), Image.new("RGB", (30, 30), "white")]
    drawn = Drawn.of(images, ["first", "second"], 64, [word(f"w{i}", 9, pictures=2) for i in range(8)])
    assert [image.size for image in drawn.images] == [(360, 180), (360, 360)]
    lines = panels(drawn, 0)
    assert [len(line) for line in lines] == [7, 2]
    assert [title for line in lines for title, _ in line] == ["first", *(f"w{i}" for i in range(8))]
    first, second = (np.asarray(panels(drawn, number)[0][1][1]).astype(int) for number in (0, 1))
    assert first.max() > 250 and 130 < second.max() < 155 and first.min() == second.min() < 40  # 0.4 against 0.2


def test_a_sheet(tmp_path):
    out = tmp_path / "sheet.png"
    images = [Image.new("RGB", size) for size in ((40, 40), (8, 20_000))]
    draw_attention([Drawn.of([image], ["$5 {a"], 64, [word("costs $5", 3)]) for image in images], out)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and 500 < sheet.height < 800 and 400 < sheet.width < 500
    assert list(tmp_path.iterdir()) == [out]


# ---- the flag


def test_show(nanochat, tmp_path):
    out = tmp_path / "out.png"
    model = ("--checkpoint", "shapes")
    plain, printed = (nanochat("ask", picture(0), QUESTION, *model, *words) for words in ((), ("--show", out)))
    assert printed.out == plain.out and f"what the words looked at: {out}" in printed.err
    with Image.open(out) as sheet:
        small = sheet.size
    nanochat("ask", picture(0), picture(1), QUESTION, *model, "--each", "--json", tmp_path / "r.json", "--show", out)
    with Image.open(out) as sheet:
        assert sheet.width == small[0] and sheet.height > 1.5 * small[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["P", QUESTION, "--show", "FOLDER/out.jpg"], "should end in .png"),
        (["P", QUESTION, "--show", "FOLDER/none/out.png"], "there is no folder"),
        (["P", QUESTION, "--show", "P"], "is the picture itself"),
        (["P", "is the gripper open?", "--checkpoint", "robot", "--show", "FOLDER/out.png"], "this model has no cells"),
        (["FOLDER", QUESTION, "--each", "--show", "FOLDER/out.png"], "--show draws up to 2 pictures on one sheet"),
    ],
)
def test_show_that_cannot_be(nanochat, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(ask, "MAX_DRAWN", 2)
    for number in range(3):
        shutil.copy(PICTURE, tmp_path / f"{number}.png")
    at = {"P": str(tmp_path / "0.png")}
    printed = nanochat("ask", *[at.get(each, each.replace("FOLDER", str(tmp_path))) for each in words], code=2)
    assert message in printed.err and printed.out == "" and len(printed.err.strip().splitlines()) == 1
    assert len(list(tmp_path.iterdir())) == 3
