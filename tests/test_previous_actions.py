"""Policies that read the last actions that were sent: what they read of them, what is learnt, and who sends them."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from nanochat.actions import Scale
from nanochat.agent import Agent
from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.chunk_player import ChunkPlayer
from nanochat.data.deltas import from_last
from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import Episode
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.evaluation.open_loop import run_open_loop
from nanochat.evaluation.open_loop_plot import STYLES
from nanochat.evaluation.open_loop_report import number_table
from nanochat.previous_actions import MOTION_STEPS, PREVIOUS, completed, motions
from nanochat.robot_gpt import RobotGPTConfig
from nanochat.serving.policy import SafePolicy
from nanochat.training.recipes import Robot
from nanochat.training.robot_batches import action_batch, noisy_states, previous_actions
from nanochat.training.robot_data import suited
from nanochat.training.robot_models import adopted, fields_of_deltas
from tests.data_files import demonstrations
from tests.tiny_policy import make_policy, make_tokenizer, policy_like

TOKENIZER = make_tokenizer(["lift the cup"])
BLACK = encode_png(np.zeros((32, 32, 3), np.uint8))
SCALE = asdict(Scale([-0.5, -1.0, -2.0, -4.0], [0.5, 1.0, 2.0, 4.0]))
LATE = 0.3  # of the way to its target, an arm gets in a step


def recording(n_episodes=3, length=40, seed=0) -> Demonstrations:
    """An arm of four joints that follows its targets late; the last number's state is noise."""
    episodes = []
    for number in range(n_episodes):
        rng = np.random.default_rng([seed, number])
        action = np.sin(rng.uniform(0, 6, 4) + 0.15 * np.arange(length)[:, None]).astype(np.float32)
        state = action.copy()
        for step in range(1, length):
            state[step] = state[step - 1] + LATE * (action[step - 1] - state[step - 1])
        state[:, 3] = rng.normal(0, 3, length)
        columns = {"observation.state": state, "action": action}
        episodes.append(Episode("lift the cup", columns, {"observation.images.front": [BLACK] * length}))
    return demonstrations(episodes, 32, fps=10.0)


DATA = recording()


@pytest.fixture(scope="module")
def model():
    wide = asdict(Scale([-9.0] * 4, [9.0] * 4))
    fields = dict(
        state_scale=wide, state_range=wide, action_scale=asdict(Scale([-2.0] * 4, [4.0] * 4)), delta_scale=SCALE
    )
    found = policy_like(
        make_policy(TOKENIZER, image_size=32), targets="absolute", deltas=[0, 1, 2], previous=PREVIOUS, **fields
    )
    torch.nn.init.normal_(found.committed_projector.weight, std=0.3)
    return found


def observation(frame=20, n=1):
    return [np.zeros((32, 32, 3), np.uint8)] * n, DATA.state[[frame] * n], ["lift the cup"] * n


# ---- what is read


def test_motions_of_a_robot_that_did_less_than_it_reads_begin_at_rest():
    start = np.array([[5.0, 6.0], [7.0, 8.0], [0.0, 0.0]])
    line = np.arange(40.0).reshape(20, 2)  # by 2 a step
    found = completed([line[:0], line[:3], line], start)
    assert found.shape == (3, PREVIOUS, 2) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], np.repeat(start[:1], PREVIOUS, axis=0))
    np.testing.assert_array_equal(found[1], line[[0] * (PREVIOUS - 2) + [1, 2]])
    np.testing.assert_array_equal(found[2], line[-PREVIOUS:])
    moved = motions(found, np.array([1.0, 0.5]))
    assert not moved[0].any()
    np.testing.assert_array_equal(moved[1], [[min(step, 2) * 2, min(step, 2) * 4] for step in MOTION_STEPS])
    np.testing.assert_array_equal(moved[2], [[step * 2, step * 4] for step in MOTION_STEPS])


def test_a_chunk_goes_on_from_the_last_action_or_from_the_state(model):
    agent, before = Agent(model, TOKENIZER), DATA.before(20, PREVIOUS)
    told, untold = agent.act(*observation(), previous=[before]), agent.act(*observation())
    shifted = agent.act(*observation(), previous=[before + 0.25])
    np.testing.assert_allclose(shifted, told + 0.25, atol=1e-5)  # the same motions from another place
    at_rest = np.array([[*DATA.state[20, :3], 1.0]], np.float32)  # the last number's range has its middle at 1
    np.testing.assert_allclose(agent.act(*observation(), previous=[at_rest]), untold, atol=1e-5)
    resting = agent.act(*observation(), previous=[before[-1:]])
    assert np.abs(resting - told).max() > 1e-3  # motions count
    longer = np.concatenate([np.full((5, 4), 7, np.float32), before])
    np.testing.assert_array_equal(agent.act(*observation(), previous=[longer]), told)


def test_robots_in_one_batch_have_actions_of_their_own(model):
    agent, several = Agent(model, TOKENIZER), [DATA.before(frame, PREVIOUS) for frame in (0, 3, 20)]
    assert [len(actions) for actions in several] == [0, 3, PREVIOUS]
    together = agent.act(*observation(n=3), previous=several)
    for row, actions in enumerate(several):
        np.testing.assert_allclose(agent.act(*observation(), previous=[actions])[0], together[row], atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [[np.zeros((2, 3))], [np.zeros(4)], [[[1, 2, 3, "x"]]], [np.full((1, 4), np.nan)], []]
)
def test_what_are_no_actions_is_refused(model, wrong):
    with pytest.raises(UserError, match="previous actions must be rows of 4 finite numbers"):
        Agent(model, TOKENIZER).act(*observation(), previous=wrong)


def test_a_policy_that_reads_none_refuses_them():
    plain = Agent(make_policy(TOKENIZER, image_size=32), TOKENIZER)
    assert plain.metadata["previous"] == 0
    with pytest.raises(UserError, match="does not read the actions before"):
        plain.act(*observation(), previous=[np.zeros((1, 4))])


def test_a_checkpoint_remembers_and_a_strangers_config_is_checked(model, tmp_path):
    save_checkpoint(tmp_path / "run", model, TOKENIZER, {})
    again = Agent(*load_checkpoint(tmp_path / "run"))
    given = {"previous": [DATA.before(20, PREVIOUS)]}
    np.testing.assert_allclose(
        again.act(*observation(), **given), Agent(model, TOKENIZER).act(*observation(), **given), atol=1e-5
    )
    assert (again.metadata["predict"], again.metadata["previous"]) == ("last", PREVIOUS)
    for change in (dict(previous=3), dict(previous=True), dict(previous="9"), dict(deltas=[], delta_scale={})):
        with pytest.raises(UserError, match="previous must be 0, or 9 with deltas"):
            RobotGPTConfig(**asdict(model.config) | change)
    assert not adopted(model, replace(model.config, committed=1)).committed_projector.weight.any()  # other numbers


# ---- training


def test_what_is_learnt_is_what_comes_out(model):
    """A network that predicts exactly what the batch asks for gives exactly the actions of the data."""
    frames = [0, 1, 20, 45]
    batch = action_batch(DATA, frames, model, TOKENIZER, None)
    offsets, moved = model.starts(DATA.state[frames], [DATA.before(frame, PREVIOUS) for frame in frames])
    np.testing.assert_allclose(offsets[1:, 0], DATA.action[[0, 19, 44]])
    predicted = model.predicted_scale.restore(batch.chunks.numpy())
    np.testing.assert_allclose(predicted + offsets, DATA.chunks(frames, 3)[0], atol=1e-5)
    given = batch.inputs.committed.numpy()
    assert given.shape == (4, len(MOTION_STEPS), 5)
    np.testing.assert_array_equal(given[..., :-1], moved)


def test_training_hides_them_in_a_share_of_the_rows(model):
    found = previous_actions(DATA, [20] * 1000, model, np.random.default_rng(0))
    assert 150 < sum(len(actions) == 0 for actions in found) < 250
    assert len(previous_actions(DATA, [20], model, None)[0]) == PREVIOUS


def test_noise_is_on_the_states_alone(model):
    batch = action_batch(DATA, list(range(100)), model, TOKENIZER, None)
    noisy = noisy_states(batch, 0.5, np.random.default_rng(0))
    added = noisy.inputs.states - batch.inputs.states
    assert added.std().item() == pytest.approx(0.5, rel=0.1) and abs(added.mean().item()) < 0.1
    assert torch.equal(noisy.chunks, batch.chunks) and torch.equal(noisy.inputs.committed, batch.inputs.committed)
    assert noisy_states(batch, 0.0, np.random.default_rng(0)) is batch


def test_recordings_of_an_arm_that_follows_late_go_on_from_the_last_action():
    follows, scale, last, still = from_last(DATA, 5)
    assert follows == [0, 1, 2] and last < 0.8 * still
    frames = [frame for frame in range(len(DATA)) if frame > DATA.first[frame]]
    actions, inside = DATA.chunks(frames, 5)
    off = np.abs(actions - DATA.action[np.array(frames) - 1][:, None])[inside]
    assert last == pytest.approx((off.mean(0) / Scale.fit(DATA.action).half)[:3].mean(), rel=1e-5)
    fields, line = fields_of_deltas(Robot(), 5, "absolute", DATA, DATA)
    assert fields == {"deltas": follows, "delta_scale": asdict(scale), "previous": PREVIOUS}
    assert "differences from the last action sent" in line and "--predict delta" in line
    for recipe in (Robot(predict="absolute"), Robot(action_head="bins")):
        assert fields_of_deltas(recipe, 5, "absolute", DATA, DATA)[0]["previous"] == 0


@pytest.mark.parametrize(
    "recipe, targets, message",
    [
        (Robot(predict="last"), "relative", "--predict last is for absolute targets"),
        (Robot(predict="last", action_head="bins"), "absolute", "the action head bins cannot"),
    ],
)
def test_where_there_is_nothing_to_go_on_from_that_is_said(recipe, targets, message):
    with pytest.raises(UserError, match=message):
        fields_of_deltas(recipe, 5, targets, DATA, DATA)


def test_a_short_recording_gets_fewer_steps_and_is_not_learnt_by_heart():
    short, asked = suited(Robot(), DATA), suited(Robot(steps=7, blind_share=0.2), DATA)
    assert (short.steps, short.blind_share, short.dropout, short.weight_decay, short.state_noise) == (
        300,
        0.9,
        0.1,
        0.1,
        0.6,
    )
    assert (asked.steps, asked.blind_share, asked.dropout) == (7, 0.2, 0.1)
    assert suited(Robot(images_per_step=1), DATA).steps == 13 * len(DATA)
    long = suited(Robot(images_per_step=1), recording(9, 60))
    assert (long.steps, long.blind_share, long.dropout, long.weight_decay, long.state_noise) == (
        4500,
        0.03,
        0.0,
        0.0,
        0.0,
    )


# ---- who sends them


def test_the_report_shows_the_recorded_ones_and_a_row_without(model):
    frames = np.array([0, 5, 60])
    found = run_open_loop(Agent(model, TOKENIZER), DATA, frames, 2, DATA, lambda starts, description: starts)
    agent, alone = Agent(model, TOKENIZER), found.chunks["no last actions"]
    told = agent.act(list(DATA.images(frames)), DATA.state[frames], ["lift the cup"] * 3,
                     previous=[DATA.before(frame, PREVIOUS) for frame in frames])  # fmt: skip
    np.testing.assert_allclose(found.chunks["policy"], told, atol=1e-5)
    np.testing.assert_allclose(alone[0], told[0], atol=1e-5)  # the first frame has none
    assert np.abs(alone[1:] - told[1:]).max() > 1e-2
    assert set(found.chunks) <= set(STYLES)  # the plot has a curve for each
    table = number_table(found, list("abcd"), [""] * 4)
    assert [str(column.header).replace("\n", " ") for column in table.columns][2:4] == ["policy", "no last actions"]


def test_a_client_sends_them_along(model, caplog):
    policy = SafePolicy(Agent(model, TOKENIZER))
    pictures, states, (text,) = observation()
    sent = {"observation/image": pictures[0], "observation/state": states[0], "prompt": text}
    before, (low, high) = DATA.before(20, PREVIOUS), policy.agent.action_range
    told = policy.session()(sent | {"observation/previous": before.tolist()})["actions"]
    expected = policy.agent.act(pictures, states, [text], previous=[before])[0]
    np.testing.assert_allclose(told, np.clip(expected, low, high), atol=1e-5)
    with caplog.at_level("INFO"):
        policy.session()(sent)
    assert '"observation/previous" is not sent' in caplog.text
    with pytest.raises(UserError, match='"observation/previous" must be up to 1000 actions of 4 finite numbers'):
        policy.session()(sent | {"observation/previous": [[1.0, 2.0]]})


def test_the_player_remembers_what_was_carried_out():
    player = ChunkPlayer(execute=2, previous=3)
    assert player.previous() is None
    player.ask()
    player.receive(np.arange(10.0).reshape(5, 2))
    for _ in range(4):
        player.play()
    np.testing.assert_array_equal(player.previous(), [[2, 3], [4, 5], [6, 7]])
    player.correct(np.array([5.5, 6.5]))  # the arm was slower
    np.testing.assert_array_equal(player.previous()[-1], [5.5, 6.5])
    player.reset()
    assert player.previous() is None and ChunkPlayer().previous() is None
    with pytest.raises(UserError, match="previous must be at least 0"):
        ChunkPlayer(previous=-1)
