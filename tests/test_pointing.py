"""Pointing accuracy: which cells are on an object, what is chosen where, and a model whose attention is known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks import pointing as benchmark
from nanochat.agent import Agent
from nanochat.attention import attention_to_images
from nanochat.conversation import user_message
from nanochat.errors import UserError
from nanochat.evaluation.pointing import (
    CRITERIA,
    Pointed,
    Pointing,
    answer_weights,
    around,
    best_view,
    cells_on_box,
    foreground_box,
    point,
    pointing_score,
    simulated_box,
)
from nanochat.vision.letterbox import Letterbox, square
from tests.test_cli import PICTURE, picture

SQUARE = Letterbox(1.0, 0, 0, 64, 64)


def cells(*args):
    return set(np.flatnonzero(cells_on_box(*args)).tolist())


def test_cells_on_a_box():
    assert cells((0, 0, 64, 64), SQUARE, 64, 16) == set(range(16))
    assert cells((16, 0, 48, 16), SQUARE, 64, 16) == {1, 2}
    assert cells((20, 4, 28, 12), SQUARE, 64, 16) == {1}  # no centre but (24, 8) in it
    assert cells((17, 1, 22, 6), SQUARE, 64, 16) == {1}  # smaller than a cell: the one that holds it
    assert cells((8, 8, 25, 25), SQUARE, 64, 16) == {0, 1, 4, 5}  # from its first pixel to before its last edge
    assert cells((9, 9, 24, 24), SQUARE, 64, 16) == {5}
    assert cells((60, 60, 64, 64), SQUARE, 64, 4) == {3}


def test_cells_that_touch_a_box():
    for box, expected in (
        ((0, 0, 64, 64), set(range(16))),
        ((17, 1, 22, 6), {1}),
        ((16, 16, 32, 32), {5}),  # borders alone are not shared
        ((15, 16, 33, 32), {4, 5, 6}),
        ((60, 31, 64, 33), {7, 11}),
    ):
        assert cells(box, SQUARE, 64, 16, "touching") == expected
        assert cells(box, SQUARE, 64, 16) <= expected


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_box_outside_of_the_picture_has_no_cells(criterion):
    for low, high in ((-60, -30), (-12, -4), (70, 90)):
        for box in ((low, 20, high, 30), (20, low, 30, high), (low, low, high, high)):
            assert not cells(box, SQUARE, 64, 16, criterion)


def test_a_box_that_is_partly_in_the_picture_has_the_cells_with_their_centre_in_it():
    assert cells((-30, 0, 10, 16), SQUARE, 64, 16) == {0}
    assert cells((-30, 0, 4, 16), SQUARE, 64, 16) == set()
    assert cells((40, 60, 80, 64), SQUARE, 64, 16) == {15}


def test_cells_of_a_letterboxed_picture():
    """128 x 64 pixels in a square of 64: rows 16..48 of the square, so the second and third of four rows of cells."""
    fit = square(Image.new("RGB", (128, 64)), 64)[1]
    assert (fit.pad_x, fit.pad_y) == (0, 16)
    assert cells((0, 0, 128, 64), fit, 64, 16) == set(range(4, 12))
    assert cells((96, 32, 128, 64), fit, 64, 16) == {11}


@pytest.mark.parametrize("touches_a_corner", [False, True])
def test_the_box_of_a_drawing(touches_a_corner):
    image = Image.new("RGB", (40, 30), (250, 240, 255))
    box = (0, 0, 9, 9) if touches_a_corner else (12, 7, 20, 19)
    ImageDraw.Draw(image).rectangle(box, fill=(250, 240, 254))
    assert foreground_box(image) == (box[0], box[1], box[2] + 1, box[3] + 1)
    with pytest.raises(UserError, match="one colour"):
        foreground_box(Image.new("RGB", (8, 8)))


def test_the_box_of_a_simulated_object():
    """The cube's centre is in it, it grows when the object comes nearer to the camera, at (0.75, 0.075, 0.7)."""
    from nanochat.metaworld.scene import project

    far, near = np.array([0.0, 0.6, 0.05]), np.array([0.3, 0.4, 0.3])
    for place in (far, near):
        x1, y1, x2, y2 = simulated_box(place, 128)
        (x, y) = project(place[None])[0] * 128
        assert x1 < x < x2 and y1 < y < y2
    sides = [np.subtract(box[2:], box[:2]) for box in (simulated_box(far, 128), simulated_box(near, 128))]
    assert (sides[1] > 1.3 * sides[0]).all() and (8 < sides[0]).all() and (sides[0] < 24).all()


# ---- scores


def made(n, heads, seed=0, wrong=0):
    """n questions about pictures of 64 x 64 with one object each; 1 layer, 16 cells. heads: what each head attends to, "object"
    or a cell. In the last `wrong` items it is the cell opposite of the object's."""
    rng = np.random.default_rng(seed)
    at = rng.integers(16, size=n)
    items = [Pointed("", "q", "a", box_of(cell), f"picture {i}", "kind " + "ab"[i % 2]) for i, cell in enumerate(at)]
    weights = np.zeros((n, 1, len(heads), 16), np.float32)
    for number, head in enumerate(heads):
        target = at.copy() if head == "object" else np.full(n, head)
        if wrong and head == "object":
            target[-wrong:] = 15 - at[-wrong:]
        weights[np.arange(n), 0, number, target] = 0.5 + number / 10
    return Pointing(items, ["a"] * (n - 1) + ["b"], weights, [SQUARE] * n, 64)


def box_of(cell):
    row, column = divmod(int(cell), 4)
    return (16 * column + 2, 16 * row + 2, 16 * column + 14, 16 * row + 14)


def test_the_head_is_chosen_on_other_pictures():
    chosen_on, held_out = made(80, [3, "object", 3]), made(60, [3, "object", 3], seed=1, wrong=6)
    assert best_view(chosen_on) == "layer 1, head 2"
    result = pointing_score(chosen_on, held_out)
    assert result["n"] == 60 and result["answers"] == pytest.approx(59 / 60)
    row = result["cell"]["inside"]
    assert (
        result["cell"]["view"] == "layer 1, head 2" and result["cell"]["touching"] == row
    )  # each box lies within one cell
    assert row["attention"] == pytest.approx(54 / 60) and row["ci95"][0] < 54 / 60 < row["ci95"][1]
    where = np.array([int(on.argmax()) for on in held_out.on_object("inside")])
    assert row["mean_view"] == pytest.approx(np.mean(where == 3))  # two of three heads look there
    assert row["shuffled"] < 0.25
    assert list(row["kinds"]) == ["kind a", "kind b"]
    assert np.mean(list(row["kinds"].values())) == pytest.approx(54 / 60)
    controls = result["controls"]["inside"]
    assert controls["random_cell"] == pytest.approx(1 / 16)
    assert controls["centre_cell"] == pytest.approx(np.isin(where, (5, 6, 9, 10)).mean() / 4)
    usual = np.bincount([int(on.argmax()) for on in chosen_on.on_object("inside")], minlength=16).argmax()
    assert controls["fixed_cell"] == pytest.approx((where == usual).mean())


def test_a_ring_points_at_its_middle():
    maps = np.zeros((1, 8, 8))
    maps[0, 2:5, 3:6] = 1
    maps[0, 3, 4], maps[0, 7, 0] = 0, 1.5  # a hole in the middle, and a stray cell in a corner
    flat = maps.reshape(1, 64)
    assert flat.argmax() == 56 and around(flat).argmax() == 8 * 3 + 4 and around(flat).max() == 8
    assert around(flat)[0, 63] == 0 and around(flat)[0, 49] == 1.5


def test_one_picture_has_no_shuffled_row():
    one = made(1, ["object"])
    assert pointing_score(one, one)["around"]["inside"]["shuffled"] is None
    with pytest.raises(UserError, match="needs questions"):
        pointing_score(one, Pointing([], [], np.zeros((0, 1, 1, 16)), [], 64))


def test_pointing_of_the_shipped_model():
    agent, question = Agent.load("shapes"), "what color is the shape?"
    pictures = [picture(n) for n in range(4)]
    found = point(agent, [Pointed(shown, question, "", foreground_box(shown), shown) for shown in pictures])
    assert found.answers[0] == "red"
    prompt = agent.prompt([user_message(question, 1)])
    for shown, answer, weights in zip(pictures, found.answers, found.weights, strict=True):
        whole = attention_to_images(agent.model, [*prompt, *agent.tokenizer.encode(answer)], agent.look(shown))
        says_it = whole[:, :, len(prompt) - 1 : -1, 0]  # each token of the answer follows from the position before it
        np.testing.assert_allclose(weights, says_it.mean(2), atol=1e-6)
    on, n = found.on_object("inside"), np.arange(4)
    heads = [on[n, found.weights[:, layer, head].argmax(1)].mean() for layer in range(2) for head in range(4)]
    assert max(heads) > on.mean(0).max()  # the best constant cell
    with pytest.raises(UserError, match="no cells"):
        point(Agent.load("robot"), [Pointed(PICTURE, "is the gripper open?", "", (0, 0, 9, 9), "")])


# ---- the benchmark


def test_items_of_a_folder_of_frames(tmp_path):
    row = {
        "image": "a.png",
        "question": "q",
        "answer": "row 1 column 2",
        "kind": "cell",
        "box": [1, 2, 3, 4],
        "layout": "x",
    }
    rows = [row, row | {"box": None}, row | {"kind": "object"}, row | {"layout": "y"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = benchmark.frame_items(tmp_path, "test", 10)
    assert sorted(item.group for item in found) == ["x", "y"]
    assert found[0].image == str(tmp_path / "a.png") and found[0].box == (1, 2, 3, 4)
    assert len(benchmark.frame_items(tmp_path, "test", 1)) == 1


def test_what_is_taught_is_the_answer_and_attention_to_the_box():
    """Against the attention of a plain pass without gradients, and the loss of the answer's tokens."""
    agent, item = Agent.load("photos"), Pointed(PICTURE, "what color is it?", "red", (8, 8, 40, 40), "")
    vectors, prompt = agent.look(item.image)[0], agent.prompt([user_message(item.question, 1)])
    tokens = [*agent.tokenizer.encode("red"), agent.tokenizer.special("<|assistant_end|>")]
    ids = torch.tensor([[*prompt, *tokens]])
    weights = attention_to_images(agent.model, ids[0, :-1].tolist(), vectors[None])[:, :, len(prompt) - 1 :, 0]
    fit = square(item.image, agent.model.config.vision_image_size)[1]
    on_box = cells_on_box(item.box, fit, agent.model.config.vision_image_size, 49)
    assert 0 < on_box.sum() < 49
    look = -weights[..., on_box].sum(-1).log().mean()
    with torch.no_grad():
        targets = torch.tensor([[-1] * (len(prompt) - 1) + tokens])
        answer = agent.model(ids[:, :-1], vision_embeddings=[vectors], targets=targets)
        found = benchmark.taught_loss(agent, item, vectors)
    assert found.item() == pytest.approx((answer + benchmark.LOOK_WEIGHT * look).item(), rel=1e-4)


def test_attention_is_taught(tmp_path):
    shown = [picture(n) for n in range(4)]
    question = {"question": "what is it?", "answer": "red", "kind": "cell"}
    rows = [
        {"image": path, "box": foreground_box(path), "layout": f"x-{i}", **question} for i, path in enumerate(shown)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark.teach("photos", tmp_path, tmp_path / "taught", steps=4)
    agents = [Agent.load(name) for name in ("photos", str(tmp_path / "taught"))]
    on_object = [
        np.mean(
            [
                answer_weights(agent, agent.prompt([user_message("what is it?", 1)]), "red", agent.look(item.image)[0])[
                    ..., cells_on_box(item.box, square(item.image, 224)[1], 224, 49)
                ].sum(-1)
                for item in benchmark.frame_items(tmp_path, "train", 4)
            ]
        )
        for agent in agents
    ]
    assert on_object[1] > on_object[0] + 0.1
    was, becomes = (agent.model.vision_encoder.state_dict() for agent in agents)
    assert all(torch.equal(was[name], becomes[name]) for name in was)
    with pytest.raises(UserError, match="no cross-attention"):
        benchmark.teach("shapes", tmp_path, tmp_path / "no")
