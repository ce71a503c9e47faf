"""The demo's photographs: found in other packages, described by the model `photos`, and drawn."""

import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from nanochat import demo_photos
from nanochat.agent import Agent
from nanochat.attention import WordAttention
from nanochat.data.sample import CAPTION_PROMPT
from nanochat.demo import Frame, draw_sheet
from nanochat.demo_photos import (
    ABOUT_ANY,
    PACKAGED,
    WORDS,
    Answer,
    Photograph,
    describe_photographs,
    draw_photographs,
    packaged,
    packaged_photographs,
)
from nanochat.heatmaps import Drawn

HOPPER = packaged("matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg")


def test_photographs_come_with_packages_of_the_demo():
    found = packaged_photographs()
    assert [(name, questions) for name, _, questions in found] == [(name, asked) for name, _, _, asked in PACKAGED]
    for name, file, _ in found:
        assert file.name == name and Image.open(file).size[0] > 200
    assert "nanochat" not in {package for _, package, _, _ in PACKAGED}


def test_packages_are_not_imported(monkeypatch):
    for _, package, _, _ in PACKAGED:
        monkeypatch.setitem(sys.modules, package, None)  # an import of it raises
    assert None not in [packaged(package, path) for _, package, path, _ in PACKAGED]


def test_a_missing_photograph_is_left_out_and_said(capsys, monkeypatch, tmp_path):
    real = distribution

    def of(package):
        if package == "ultralytics":
            raise demo_photos.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(demo_photos, "distribution", of)
    assert [name for name, _, _ in packaged_photographs()] == ["grace_hopper.jpg"]
    out = " ".join(capsys.readouterr().out.split())
    assert "bus.jpg is left out: it comes with the package ultralytics" in out and "zidane.jpg is left out" in out
    assert packaged("matplotlib", "matplotlib/no_such.jpg") is None
    monkeypatch.setattr(demo_photos, "distribution", lambda package: of("ultralytics"))
    assert describe_photographs([]) == []  # and no model is loaded for nothing


def test_only_known_answers_are_judged(capsys):
    answers = [
        Answer("is there a bus?", "yes", "yes"),
        Answer("is there a dog?", "yes", "no"),
        Answer("where?", "[b]", None),
    ]
    assert [answer.correct for answer in answers] == [True, False, None]
    for answer in answers:
        answer.print()
    assert capsys.readouterr().out.splitlines() == [
        "  is there a bus?  yes  correct", "  is there a dog?  yes  wrong, expected: no", "  where?  [b]",
    ]  # fmt: skip
    truths = {truth for _, _, _, questions in PACKAGED for _, truth in questions}
    assert {"yes", "no", None} <= truths and all(truth is None for _, truth in ABOUT_ANY)


@pytest.fixture(scope="module")
def described():
    return describe_photographs([("grace_hopper.jpg", HOPPER, ABOUT_ANY)])


def test_a_photograph_is_described_and_questioned(described):
    (one,) = described
    agent = Agent.load("photos")
    seen = agent.look(HOPPER)
    assert (
        one.description == "".join(agent.ask(CAPTION_PROMPT, seen, beams=3)).strip()
        and len(one.description.split()) > 3
    )
    assert [(a.question, a.text, a.expected) for a in one.answers] == [
        (question, "".join(agent.ask(question, seen)).strip(), None) for question, _ in ABOUT_ANY
    ]
    assert [word.text for word in one.drawn.words] == one.description.split()
    assert one.drawn.words[0].weights.shape == (3, 5, 1, 49)


def panels_of(photographs) -> list[np.ndarray]:
    """The pictures of each axis of the drawn sheet, and None where there is none."""
    figure = Figure()
    draw_photographs(figure, photographs)
    return figure, [axis.images[0].get_array() if axis.images else None for axis in figure.axes]


def fake(name="mine.jpg") -> Photograph:
    """A blue picture; "dog" looked at its top left corner, "runs" at its middle."""
    corner, middle = torch.zeros(2, 2, 1, 49), torch.zeros(2, 2, 1, 49)
    corner[..., 0], middle[..., 24] = 1, 1
    words = [WordAttention("a", middle), WordAttention("dog", corner), WordAttention("runs", middle)]
    drawn = Drawn.of([Image.new("RGB", (70, 70), (0, 0, 255))], [name], 224, words)
    return Photograph(name, "a dog runs", [Answer("is there a $dog$?", "yes", "no")], drawn)


def test_words_are_drawn_where_they_looked():
    figure = Figure()
    draw_photographs(figure, [fake(), fake()])
    shown = [axis.images[0].get_array() if axis.images else None for axis in figure.axes]
    assert (
        len(shown) == 2 * (WORDS + 2) and shown[3] is None and shown[4] is None
    )  # two words of content, then the text
    corner, middle = (np.asarray(image, int)[..., 2] for image in shown[1:3])
    third, dark = len(corner) // 3, round(0.12 * 255)
    assert corner[:third, :third].mean() > 2 * dark and corner[third:].max() == dark
    assert middle[third:-third, third:-third].mean() > 2 * dark and middle[:third].max() == dark
    texts = {text.get_text(): text.get_color() for text in figure.axes[4].texts}
    assert texts["yes"] == demo_photos.WRONG and "is there a $dog$?" in texts
    figure.savefig(Path("/dev/null"), format="png")  # $ is no formula


def test_the_sheet_has_a_line_for_each_photograph(tmp_path):
    frames, heights = [Frame(np.zeros((32, 32, 3), np.uint8), 0, "no", False)], []
    for n in range(3):
        draw_sheet([fake()] * n, Image.new("RGB", (32, 32)), [], frames, "open the door", tmp_path / "d.png")
        heights.append(Image.open(tmp_path / "d.png").height)
    assert np.diff(heights).tolist() == [261, 261]  # 2.9 inches at 90 dpi
    assert [path.name for path in tmp_path.iterdir()] == ["d.png"]


def test_image_names_the_photographs(nanochat, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("nanochat.demo.run_demo", lambda *words: asked.append(words))
    nanochat("demo", "-o", tmp_path / "d.png", "--device", "cpu", "--image", "a b.jpg", "--image", HOPPER)
    ((out, task, seed, device, photographs),) = asked
    assert (out, task, seed, str(device)) == (tmp_path / "d.png", "door-open", 0, "cpu")
    assert photographs == [("a b.jpg", Path("a b.jpg"), ABOUT_ANY), ("grace_hopper.jpg", HOPPER, ABOUT_ANY)]


@pytest.mark.parametrize("bad", ["gone.jpg", "text.jpg"])
def test_a_bad_picture_is_one_line(nanochat, tmp_path, bad):
    (tmp_path / "text.jpg").write_text("no picture")
    error = nanochat("demo", "-o", tmp_path / "d.png", "--image", tmp_path / bad, code=2).err
    assert bad in error and error.count("\n") == 1 and not (tmp_path / "d.png").exists()
