"""Drawn pairs: an answer needs both pictures. Whichever one is shown alone leaves several answers equally likely."""

import io
import random
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image

from nanochat.data import image_key, load_dataset, own_splits, pairs
from nanochat.files import DataError

N = 1500


@cache
def made(kind: str) -> list[pairs.Change]:
    rng = random.Random(f"test {kind}")
    return [pairs.KINDS[kind](rng) for _ in range(N)]


def role(answer: str, scene: pairs.Scene) -> int | str:
    """An answer as seen from a scene: the place of the shape that it names in the order of the cells, -1 if it is not there;
    other answers as they are."""
    ordered = sorted(scene, key=lambda shape: shape.cell)
    names = [[shape.name, shape.form] for shape in ordered]
    if answer.split()[-1] not in pairs.SHAPES:
        return answer
    return next((i for i, own in enumerate(names) if answer in own), -1)


def subject_cell(scene: pairs.Scene, question: str):
    return next((shape.cell for shape in scene if shape.name in question), None)


@pytest.mark.parametrize("shown", [0, 1])
@pytest.mark.parametrize("kind", pairs.KINDS)
def test_one_picture_leaves_all_answers_equally_likely(kind, shown):
    """For all that a guess can go by (the number of shapes, their cells, the cell of the shape asked about), the best fixed guess
    is right as often as CHANCE says. What falls near a border is tested below: only its height tells the order."""
    chance = 0.5 if kind == "order" else pairs.CHANCE[kind]
    for view in (
        lambda scene, question: len(scene),
        lambda scene, question: subject_cell(scene, question),
        lambda scene, question: (1, 1) in {shape.cell for shape in scene},
        lambda scene, question: len({shape.color for shape in scene}),
        lambda scene, question: len({shape.form for shape in scene}),
    ):
        seen = defaultdict(Counter)
        for change in made(kind):
            scene, question, answer = change[shown], change[2], change[3]
            seen[view(scene, question)][role(answer, scene)] += 1
        if kind in ("new", "missing") and shown == (kind == "missing"):
            assert all(set(counts) == {-1} for counts in seen.values())  # the shape is not in this picture
            continue
        right = sum(max(counts.values()) for counts in seen.values()) / N
        assert right == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize("shown", [0, 1])
def test_one_picture_tells_the_order_only_near_the_borders(shown):
    """Within a fall of the upper or lower border the order is told, elsewhere both answers are equally likely."""
    seen = defaultdict(Counter)
    for change in made("order"):
        scene, question, answer = change[shown], change[2], change[3]
        height = centre(next(shape for shape in scene if shape.name in question))[1]
        seen[height < pairs.BORDER + pairs.FALL, height > pairs.SIDE - pairs.BORDER - pairs.FALL][answer] += 1
    assert len(seen.pop((True, False))) == len(seen.pop((False, True))) == 1
    ((middle, counts),) = seen.items()
    assert middle == (False, False) and counts["first"] == pytest.approx(counts["second"], rel=0.2)
    told = 1 - counts.total() / N
    assert (1 + told) / 2 == pytest.approx(pairs.CHANCE["order"], abs=0.03)


def centre(shape: pairs.Shape) -> tuple[int, int]:
    x, y = (
        round((cell + 0.5) * pairs.SIDE / pairs.CELLS) + moved
        for cell, moved in zip(shape.cell, shape.shift, strict=True)
    )
    return x, y


@pytest.mark.parametrize(("kind", "shown"), [("new", 0), ("missing", 1)])
def test_a_shape_that_is_not_shown_may_be_any_other(kind, shown):
    counts = Counter()
    for change in made(kind):
        scene, answer = change[shown], change[3]
        others = sorted({f"{c} {f}" for c in pairs.COLORS for f in pairs.SHAPES} - {shape.name for shape in scene})
        counts[others.index(answer)] += 1
    assert len(counts) == 21 and max(counts.values()) < 1.6 * N / 21


@pytest.mark.parametrize("turned", [False, True])
def test_both_pictures_give_the_answer(turned):
    def changes(kind):  # of a kind, also made from the other order
        if not turned:
            return made(kind)
        back = {"new": "missing", "missing": "new"}.get(kind, kind)
        found = [pairs.other_way(back, change) for change in made(back)]
        assert {other for other, _ in found} == {kind}
        return [change for _, change in found]

    for first, second, _, answer in changes("moved")[:300]:
        changed = set(first) ^ set(second)
        assert {shape.name for shape in changed} == {answer} and len({shape.cell for shape in changed}) == 2
    for kind in ("new", "missing"):
        for first, second, _, answer in changes(kind)[:300]:
            more, fewer = (second, first) if kind == "new" else (first, second)
            assert [shape.name for shape in set(more) - set(fewer)] == [answer] and set(fewer) < set(more)
    for first, second, _, answer in changes("recolored")[:300]:
        (before,), (after,) = set(first) - set(second), set(second) - set(first)
        assert before.color != after.color and replace(after, color=before.color) == before and before.form == answer
        assert len({shape.form for shape in first}) == len(first)
    for first, second, _, answer in changes("common")[:300]:
        assert {shape.name for shape in first} & {shape.name for shape in second} == {answer}
    for first, second, _, answer in changes("more")[:300]:
        assert answer == {-1: "second", 0: "same", 1: "first"}[np.sign(len(first) - len(second))]
    for first, second, _, answer in changes("same")[:300]:
        assert (first == second) == (answer == "yes") and len(set(first) ^ set(second)) in (0, 2)
    for first, second, question, answer in changes("direction")[:300]:
        (x, y), (to_x, to_y) = subject_cell(first, question), subject_cell(second, question)
        steps = {(0, 0): "nowhere", (1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up"}
        assert answer == steps[np.sign(to_x - x), np.sign(to_y - y)] and (answer == "nowhere") == (first == second)
    for first, second, question, answer in changes("order")[:300]:
        (here,), (there,) = ({*one} - {*other} for one, other in ((first, second), (second, first)))
        assert here.name == there.name and question == f"the {here.name} falls: which picture came first?"
        earlier, later = (centre(shape) for shape in (here, there)[:: 1 if answer == "first" else -1])
        assert later == (earlier[0], earlier[1] + pairs.FALL)


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_scenes_are_valid(kind):
    """No two shapes in one cell or of one name, and all inside the picture."""
    for first, second, _, _ in made(kind)[:300]:
        for scene in (first, second):
            assert len({shape.cell for shape in scene}) == len({shape.name for shape in scene}) == len(scene)
            assert all(0 <= c < pairs.CELLS for shape in scene for c in shape.cell)


def test_what_is_drawn():
    """The colour of a shape at its centre, the same background everywhere else, nothing cut off at the border."""
    scene = (pairs.Shape("red", "circle", (0, 0), (-8, -8)), pairs.Shape("blue", "star", (2, 1), (8, 8)))
    drawn, empty = (np.array(Image.open(io.BytesIO(pairs.draw(own, 7, "x"))).convert("RGB")) for own in (scene, ()))
    assert drawn.shape == (pairs.SIDE, pairs.SIDE, 3)
    for shape in scene:
        x, y = (int((c + 0.5) * pairs.SIDE / pairs.CELLS + s) for c, s in zip(shape.cell, shape.shift, strict=True))
        assert tuple(drawn[y, x]) == pairs.COLORS[shape.color]
    changed = (drawn != empty).any(2)
    assert 0.03 < changed.mean() < 0.1
    assert not (changed[0].any() or changed[-1].any() or changed[:, 0].any() or changed[:, -1].any())
    assert not changed[:, pairs.SIDE // 3 : 2 * pairs.SIDE // 3].any()  # each within its cell


def test_samples(monkeypatch):
    monkeypatch.setattr(pairs, "OWN_SPLITS", {"train": 72, "val": 36})
    train, val = load_dataset("pairs"), load_dataset("pairs", "val")
    assert (train.task, len(train.samples), len(val.samples)) == ("vqa", 144, 72)
    assert Counter(sample.kind for sample in train.samples) == dict.fromkeys(pairs.KINDS, 16)
    assert all(
        len(sample.images) == 2 and sample.messages[0]["content"][1] == {"type": "image"} for sample in val.samples
    )
    for sample, turned in zip(train.samples[::2], train.samples[1::2], strict=True):
        assert sample.images == turned.images[::-1] and (sample.question == turned.question) == (
            sample.kind not in ("new", "missing")
        )
    keys = [image_key(image) for sample in (train.samples + val.samples)[::2] for image in sample.images]
    assert len(set(keys)) == len(keys)  # also of pictures that look the same: controls exchange each of them
    again = load_dataset("pairs", "fit")
    assert [sample.images for sample in again.samples] == [sample.images for sample in train.samples]
    assert own_splits("pairs") == ["train", "val"]
    with pytest.raises(DataError, match="no split 'test'; it has: train, val"):
        load_dataset("pairs", "test")
