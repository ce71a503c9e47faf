"""The control conditions: every item gets the picture of another group, and never of its own."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evaluation.controls import CONDITIONS, another_group, commonest_answer, conditions

many_groups = st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda groups: len(set(groups)) > 1)
seeds = st.integers(0, 1000)


@given(many_groups, seeds)
def test_the_partner_is_of_another_group(groups, seed):
    """Fails for the identity, and for a permutation inside a group."""
    partner = another_group(groups, seed)
    assert len(partner) == len(groups)
    assert all(groups[there] != group for group, there in zip(groups, partner, strict=True))


@given(many_groups, seeds)
def test_groups_are_permuted_in_one_circle(groups, seed):
    partner = another_group(groups, seed)
    of_group = {}
    for group, there in zip(groups, partner, strict=True):
        of_group.setdefault(group, set()).add(groups[there])
    assert all(len(found) == 1 for found in of_group.values()), "the items of a group share one partner group"
    follows = {group: found.pop() for group, found in of_group.items()}
    group, visited = groups[0], []
    for _ in follows:
        visited.append(group)
        group = follows[group]
    assert group == groups[0] and sorted(visited) == sorted(set(groups))


@given(many_groups, seeds)
def test_the_items_of_the_partner_group_are_used_evenly(groups, seed):
    partner = another_group(groups, seed)
    sizes = Counter(groups)
    for group in sizes:
        used = Counter(there for own, there in zip(groups, partner, strict=True) if own == group)
        other = sizes[groups[next(iter(used))]]
        assert len(used) == min(sizes[group], other) and max(used.values()) - min(used.values()) <= 1


@given(st.lists(st.integers(), min_size=2, max_size=40, unique=True), seeds)
def test_with_one_item_a_group_every_item_is_used_once(groups, seed):
    partner = another_group(groups, seed)
    assert sorted(partner) == list(range(len(groups)))
    assert partner == another_group(groups, seed)


def test_the_circle_is_random_and_seeded():
    found = {tuple(another_group(range(20), seed)) for seed in range(10)}
    assert len(found) == 10
    assert tuple(another_group(range(20))) == tuple(another_group(range(20), seed=0))


@pytest.mark.parametrize("groups", [[], ["a"], ["a"] * 5])
def test_one_group_has_no_other(groups):
    assert another_group(groups) is None


def test_the_vectors_of_each_condition():
    vectors = torch.arange(1.0, 25.0).view(4, 2, 3)
    groups = ["a", "a", "b", "b"]
    found = conditions(vectors, groups)
    assert tuple(found) == CONDITIONS
    assert torch.equal(found["aligned"], vectors)
    assert torch.equal(found["shuffled"], vectors[[2, 3, 0, 1]])
    assert found["blind"].shape == vectors.shape and not found["blind"].any()
    half = conditions(vectors.bfloat16(), groups)
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.values())


def test_blind_is_zero_even_where_the_vectors_are_not_finite():
    assert not conditions(torch.full((2, 1, 1), float("nan")), [0, 1])["blind"].any()


def test_one_group_has_no_shuffled_condition():
    assert conditions(torch.ones(2, 1, 3), ["a", "a"]).keys() == {"aligned", "blind"}


def test_each_picture_needs_a_group():
    with pytest.raises(ValueError, match="2 pictures but 3 groups"):
        conditions(torch.ones(2, 1, 3), [1, 2, 3])


def test_commonest_answer():
    assert commonest_answer(["red", "Blue ", "blue."]) == "blue"
    assert commonest_answer(["b", "a"]) == commonest_answer(["a", "b"]) == "a"
    with pytest.raises(ValueError, match="at least one"):
        commonest_answer([])


def test_controls_and_metrics_do_not_load_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import nanochat.evaluation.controls, nanochat.evaluation.metrics;"
        "assert nanochat.evaluation.controls.another_group('ab') == [1, 0]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
