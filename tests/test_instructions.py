"""Meta-World's instructions: complete, distinct, grouped as published; and the task names that commands accept."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.metaworld.instructions import INSTRUCTIONS, MT10, OBJECTS, TIERS, task_list
from nanochat.metaworld.simulator import SimulatorError, import_metaworld

TEXTS = [text for texts in INSTRUCTIONS.values() for text in texts]
NEAR = {  # a word that the canonical sentence has and its neighbour's has not
    ("push-wall", "push"): "wall",
    ("push-back", "push"): "back",
    ("pick-place-wall", "pick-place"): "wall",
    ("reach-wall", "reach"): "wall",
    ("button-press-wall", "button-press"): "wall",
    ("button-press-topdown", "button-press"): "above",
    ("button-press-topdown-wall", "button-press-topdown"): "wall",
    ("button-press-topdown-wall", "button-press-wall"): "above",
    ("handle-press-side", "handle-press"): "sideways",
    ("handle-pull-side", "handle-pull"): "sideways",
    ("handle-pull", "handle-press"): "up",
    ("plate-slide", "plate-slide-back"): "into",
    ("plate-slide-side", "plate-slide"): "sideways",
    ("plate-slide-back-side", "plate-slide-side"): "out",
    ("plate-slide-back-side", "plate-slide-back"): "sideways",
    ("sweep-into", "sweep"): "hole",
    ("peg-unplug-side", "peg-insert-side"): "unplug",
    ("stick-pull", "stick-push"): "pull",
    ("door-unlock", "door-lock"): "unlock",
}
spelt = st.sampled_from(sorted(INSTRUCTIONS)).flatmap(
    lambda task: st.sampled_from([task, task.upper(), f"{task}-v3", f" {task.title()}-V3 "]).map(
        lambda name: (name, task)
    )
)


@pytest.fixture
def policies():
    """Meta-World's own list. Not by importorskip: whoever imports mujoco first chooses its OpenGL for the whole process."""
    try:
        return import_metaworld()[1]
    except SimulatorError as error:
        pytest.skip(str(error))


def test_every_task_of_the_simulator_has_instructions(policies):
    assert {f"{task}-v3" for task in INSTRUCTIONS} == set(policies)


def test_four_sentences_a_task_all_different():
    assert len(INSTRUCTIONS) == 50 and set(OBJECTS) == set(INSTRUCTIONS)
    assert {len(texts) for texts in INSTRUCTIONS.values()} == {4}
    assert len(set(TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("text", TEXTS)
def test_sentences_are_short_and_plain(text):
    words = text.split(" ")
    assert 4 <= len(words) <= 10 and "" not in words
    assert text == text.lower() and text.isascii() and text[-1].isalpha()


@pytest.mark.parametrize("pair", NEAR)
def test_near_tasks_tell_themselves_apart(pair):
    task, neighbour = pair
    assert NEAR[pair] in re.findall(r"\w+", INSTRUCTIONS[task][0])
    assert NEAR[pair] not in re.findall(r"\w+", INSTRUCTIONS[neighbour][0])


def test_objects_are_nouns_with_an_article():
    assert all(noun.startswith("the ") and len(noun.split()) <= 3 for noun in OBJECTS.values())


def test_tiers_partition_the_tasks():
    assert {tier: len(tasks) for tier, tasks in TIERS.items()} == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}
    assert sorted(task for tasks in TIERS.values() for task in tasks) == sorted(INSTRUCTIONS)


def test_mt10_is_the_simulators(policies):
    from metaworld.env_dict import MT10_V3

    assert {f"{task}-v3" for task in MT10} == set(MT10_V3) and len(MT10) == 10


def test_sets_expand_and_nothing_comes_twice():
    assert task_list(["MT10"]) == list(MT10)
    assert sorted(task_list(["mt50"])) == sorted(INSTRUCTIONS)
    assert task_list(["push", "mt10", "PUSH-v3"]) == ["push", *(task for task in MT10 if task != "push")]


@given(st.lists(spelt, min_size=1, max_size=9))
def test_any_spelling_gives_each_task_once_in_order(names):
    assert task_list([name for name, _ in names]) == list(dict.fromkeys(task for _, task in names))


@pytest.mark.parametrize(
    "name, near", [("puhs", "push"), ("door_open", "door-open"), ("mt1O", "mt10"), ("window-opne-v3", "window-open")]
)
def test_a_wrong_name_is_answered_with_near_ones(name, near):
    with pytest.raises(ValueError, match=rf"{name}.*did you mean [a-z0-9 -]*{near}.*expected mt10, mt50"):
        task_list(["push", name])


@pytest.mark.parametrize("names", [[], [""], ["xyzzy"]])
def test_what_is_near_nothing_lists_what_is_accepted(names):
    with pytest.raises(ValueError, match="expected mt10, mt50") as caught:
        task_list(names)
    assert "did you mean" not in str(caught.value)
