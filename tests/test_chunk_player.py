"""Playing overlapping chunks: which action a step gets, when an observation is due, and what a request carries."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.chunk_player import ChunkPlayer
from nanochat.errors import UserError


def chunk_of(step, n=6):
    """A chunk that says of each action for which step it is, and from which observation."""
    return np.stack([np.arange(step, step + n), np.full(n, step)], 1).astype(np.float64)


def run(player, steps, delay, n=6):
    """[(step, action or None, what the last request carried)] with an answer after `delay` steps."""
    played, carried, sent = [], None, None
    for step in range(steps):
        if player.due:
            carried, sent = player.ask(), step
        if sent is not None and step - sent == delay:
            player.receive(chunk_of(sent, n))
            sent = None
        played.append((step, player.play(), carried))
    return played


@pytest.mark.parametrize("delay", [0, 2])
def test_a_new_chunk_replaces_the_old_one_when_it_is_there_from_the_action_of_that_step_on(delay):
    played = run(ChunkPlayer(execute=3), 15, delay)
    assert [action for _, action, _ in played[:delay]] == [None] * delay
    for step, action, _ in played[delay:]:
        assert action[0] == step  # never an action of another step
        assert action[1] == (step - delay) // 3 * 3  # of the newest observation whose answer is there


def test_only_one_request_is_under_way_and_a_late_answer_asks_again_at_once():
    player, asked = ChunkPlayer(execute=2), []
    for step in range(12):
        if player.due:
            player.ask()
            asked.append(step)
        if player.asked is not None and step - player.asked == 4:
            player.receive(chunk_of(player.asked, 10))
        player.play()
    assert asked == [0, 5, 10]  # answers come at 4 and 9, and the next request is made in the step after


def test_a_request_is_due_before_the_plan_ends():
    player = ChunkPlayer(execute=50)
    played = run(player, 30, 2)
    assert all(action is not None for _, action, _ in played[2:])


def test_the_robot_holds_where_no_chunk_reaches():
    player = ChunkPlayer()
    player.ask(), player.receive(chunk_of(0, 2))
    player.ask()  # and no answer comes
    assert [player.play() is None for _ in range(4)] == [False, False, True, True]
    assert player.age is None and not player.due
    player.lose()
    assert player.due


def test_a_request_carries_what_will_be_carried_out_until_its_answer():
    player = ChunkPlayer(execute=3, committed=4)
    played = run(player, 20, 2)
    for step, _, carried in played[3:]:
        asked = step // 3 * 3
        np.testing.assert_array_equal(carried, chunk_of(asked - 3)[3:5])  # two steps of delay, of the chunk before
    shorter = run(ChunkPlayer(execute=3, committed=1), 20, 2)
    np.testing.assert_array_equal(shorter[-1][2], played[-1][2][:1])
    assert run(ChunkPlayer(execute=3), 20, 2)[-1][2] is None


def test_the_longest_of_the_last_delays_is_expected():
    player = ChunkPlayer(committed=9)
    for delay in (1, 3, *[2] * 9):
        player.reset()
        player.ask()
        for _ in range(delay):
            player.play()
        player.receive(chunk_of(0))
    assert player.delay == 3
    player.delays.extend([2])
    assert player.delay == 2 and len(player.ask()) == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), min_size=1, max_size=8),
    st.floats(0, 2),
    st.integers(0, 100),
)
def test_ensembling_is_the_formula_of_act(gaps, m, seed):
    """ACT: w_i = exp(-m i) / sum, i = 0 for the oldest prediction of the step."""
    rng, player, made = np.random.default_rng(seed), ChunkPlayer(ensemble=m), []
    for gap, n in gaps:
        for _ in range(gap):
            played = player.play()
            predictions = [
                chunk[player.step - 1 - start] for start, chunk in made if player.step - 1 < start + len(chunk)
            ]
            if not predictions:
                assert played is None
                continue
            weights = [np.exp(-m * i) for i in range(len(predictions))]
            expected = sum(w * p for w, p in zip(weights, predictions, strict=True)) / sum(weights)
            np.testing.assert_allclose(played, expected, rtol=1e-6)
        player.ask()
        made.append((player.step, rng.normal(size=(n, 3))))
        player.receive(made[-1][1])


def test_chunks_that_are_over_are_forgotten():
    player = ChunkPlayer(ensemble=0.01)
    run(player, 200, 1)
    assert len(player.chunks) <= 6


def test_a_new_episode_begins_without_a_plan():
    player = ChunkPlayer(execute=3)
    run(player, 8, 1)
    player.reset()
    assert player.step == 0 and player.due and player.play() is None


@pytest.mark.parametrize(
    "settings", [dict(execute=0), dict(ensemble=-1.0), dict(ensemble=float("nan")), dict(committed=-1)]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} must be"):
        ChunkPlayer(**settings)


@pytest.mark.parametrize("chunk", [np.zeros(4), np.zeros((0, 4)), np.zeros((3, 5)), [["a"] * 4] * 3])
def test_what_is_no_chunk_is_refused(chunk):
    player = ChunkPlayer()
    with pytest.raises(UserError, match="no observation is under way"):
        player.receive(np.zeros((3, 4)))
    player.ask()
    player.receive(np.zeros((3, 4)))
    player.ask()
    with pytest.raises(UserError, match="4 numbers as before"):
        player.receive(chunk)


def test_a_robot_that_rests_commits_its_rest_before_the_first_chunk():
    player = ChunkPlayer(execute=3, committed=4, rest=np.zeros(2))
    assert player.ask() is None  # no delay is known yet
    player.receive(chunk_of(0))
    player.reset()
    player.delays.append(2)
    np.testing.assert_array_equal(player.ask(), np.zeros((2, 2)))
    player.play()
    player.play()
    assert player.previous() is None  # nothing was sent
    player.receive(chunk_of(0))
    assert player.play()[0] == 2
