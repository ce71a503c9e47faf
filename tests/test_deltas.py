"""Policies that predict how far absolute targets are from the state: which numbers, what is learnt, and what comes out."""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from nanochat.actions import N_BINS, Scale
from nanochat.agent import Agent
from nanochat.data.deltas import difference_scale, find_deltas, sampled_chunks
from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import Episode
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.robot_gpt import RobotGPT, RobotGPTConfig
from nanochat.serving.policy import SafePolicy
from nanochat.training.recipes import Robot
from nanochat.training.robot_batches import action_batch
from nanochat.training.robot_models import fields_of_deltas
from tests.data_files import demonstrations
from tests.tiny_policy import make_policy, make_tokenizer, policy_like

TOKENIZER = make_tokenizer(["lift the cup"])
DELTAS, DELTA_SCALE = [0, 2], asdict(Scale([-0.1, -3.0, -0.2, -4.0], [0.3, 3.0, 0.2, 4.0]))
BLACK = encode_png(np.zeros((32, 32, 3), np.uint8))


def make_model(head="continuous", **changes):
    """Four numbers of state and action; the first and the third are predicted as differences."""
    fields = dict(targets="absolute", deltas=DELTAS, delta_scale=DELTA_SCALE, action_head=head) | changes
    return policy_like(make_policy(TOKENIZER, image_size=32), **fields)


def recording(n_episodes=6, length=40, seed=0) -> Demonstrations:
    """Joint angles around 2; the targets of the first two are the next angles, of the third a far value that does not follow."""
    episodes = []
    for number in range(n_episodes):
        rng = np.random.default_rng([seed, number])
        path = 2 + np.sin(rng.uniform(0, 6, 3) + 0.1 * np.arange(length + 1)[:, None])
        action = path[1:].copy()
        action[:, 2] = rng.choice([0.0, 5.0], length)
        columns = {"observation.state": path[:-1].astype(np.float32), "action": action.astype(np.float32)}
        episodes.append(Episode("lift the cup", columns, {"observation.images.front": [BLACK] * length}))
    return demonstrations(episodes, 32)


FIT, VAL = recording(), recording(2, seed=1)


# ---- which numbers


def test_numbers_that_follow_the_state_are_predicted_as_differences():
    deltas, target, difference = find_deltas(FIT, VAL, 5)
    assert deltas == [0, 1] and difference < 0.5 * target
    plain = []
    for number in deltas:  # the same by hand: medians of the training data, errors of held-out chunks
        known, unknown = ([], []), ([], [])
        for data, found in ((FIT, known), (VAL, unknown)):
            for frame in range(len(data)):
                for step in range(5):
                    if frame + step < data.end[frame]:
                        found[0].append(data.action[frame + step, number])
                        found[1].append(data.action[frame + step, number] - data.state[frame, number])
        half = np.diff(np.quantile(FIT.action[:, number], (0.01, 0.99)))[0] / 2
        plain.append([np.abs(np.array(u) - np.median(k)).mean() / half for k, u in zip(known, unknown, strict=True)])
    np.testing.assert_allclose([target, difference], np.mean(plain, axis=0), rtol=1e-4)


def test_the_scale_is_that_of_differences_where_these_are_predicted():
    scale, actions = difference_scale(FIT, [0, 1], 5), Scale.fit(FIT.action)
    assert (scale.low[2], scale.high[2]) == (actions.low[2], actions.high[2])
    assert all(scale.half[n] < 0.6 * actions.half[n] for n in (0, 1))
    actions, differences = sampled_chunks(FIT, 1)
    np.testing.assert_allclose(differences, actions - FIT.state, atol=1e-6)


@pytest.mark.parametrize(
    "targets, predict, deltas, line",
    [
        (
            "absolute",
            "auto",
            [0, 1],
            "predicts 2 of 3 numbers as differences from the state .in held-out episodes .* off",
        ),
        ("absolute", "delta", [0, 1], "predicts 2 of 3 numbers as differences"),
        ("absolute", "absolute", [], "predicts the targets as they are .--predict absolute"),
        ("relative", "auto", [], "as they are: they are relative"),
    ],
)
def test_what_the_network_predicts_is_chosen_and_said(targets, predict, deltas, line):
    fields, said = fields_of_deltas(Robot(predict=predict), 5, targets, FIT, VAL)
    assert fields["deltas"] == deltas and bool(fields["delta_scale"]) == bool(deltas)
    assert re.search(line, said)


def test_differences_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="these actions are relative, so they are differences already"):
        fields_of_deltas(Robot(predict="delta"), 5, "relative", FIT, VAL)
    for data in (FIT, VAL):
        assert find_deltas(replaced_state(data, np.zeros((len(data), 0))), replaced_state(data, None), 5)[0] == []
    noise = [replaced_state(d, np.random.default_rng(0).normal(0, 9, d.action.shape)) for d in (FIT, VAL)]
    assert fields_of_deltas(Robot(), 5, "absolute", *noise)[0]["deltas"] == []
    with pytest.raises(UserError, match="--predict delta: no number of the actions follows the state"):
        fields_of_deltas(Robot(predict="delta"), 5, "absolute", *noise)


def replaced_state(data, state):
    other = recording(1)
    other.__dict__ |= data.__dict__ | {"state": np.zeros((len(data), 0)) if state is None else state.astype(np.float32)}
    return other


# ---- the model


def observation(n=3):
    rng = np.random.default_rng(2)
    pictures = list(rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
    return pictures, rng.uniform(0, 1, (n, 4)).astype(np.float32), ["lift", "lift the cup", "cup"][:n]


def without_differences(model):
    """The same weights, which predict actions of the scale of the differences."""
    plain = RobotGPT(replace(model.config, deltas=[], delta_scale={}, action_scale=DELTA_SCALE))
    plain.attach_encoder(model.vision_encoder)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


@pytest.mark.parametrize("head", ["continuous", "bins"])
def test_what_comes_out_is_absolute(head):
    """The same network without differences predicts the same normalised numbers; the state is added to the first and third."""
    model, (pictures, states, texts) = make_model(head), observation()
    plain = without_differences(model)
    found = Agent(model, TOKENIZER).act(pictures, states, texts)
    expected = Agent(plain, TOKENIZER).act(pictures, states, texts)
    expected[:, :, DELTAS] += states[:, None, DELTAS]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("head", ["continuous", "bins"])
def test_what_is_learnt_is_what_comes_out(head):
    """A network that predicts exactly what the batch asks for gives exactly the actions of the data."""
    data = recording(2)
    data.action = np.concatenate([data.action, data.action[:, :1]], 1)  # four numbers
    data.state = np.concatenate([data.state, data.state[:, :1]], 1)
    scale = asdict(Scale([-9.0] * 4, [9.0] * 4))
    model = make_model(head, state_scale=scale, action_scale=scale, delta_scale=scale)
    frames = [0, 7, 41]
    batch = action_batch(data, frames, model, TOKENIZER, None)
    offsets, _ = model.starts(data.state[frames], [data.action[:0]] * 3)
    if head == "continuous":
        predicted = model.predicted_scale.restore(batch.chunks.numpy())
    else:
        learnt = batch.targets[batch.targets != -1].numpy().reshape(3, 3, 4) - model.config.bin_token_id
        predicted = model.predicted_scale.from_bins(learnt)
    np.testing.assert_allclose(
        predicted + offsets, data.chunks(frames, 3)[0], atol=1e-5 if head == "continuous" else 9 / N_BINS
    )


@pytest.mark.parametrize("head", ["continuous", "bins"])
def test_committed_actions_are_absolute_too(head):
    model, (pictures, states, texts) = make_model(head, committed=2), observation(1)
    known = states[:, None] + np.float32([[[0.05, 1, -0.1, 2]]])
    offsets = np.zeros((1, 1, 4), np.float32)
    offsets[:, 0, DELTAS] = states[:, DELTAS]
    chunk = Agent(model, TOKENIZER).act(pictures, states, texts, known)
    np.testing.assert_allclose(chunk[:, :1], known)
    expected = Agent(without_differences(model), TOKENIZER).act(pictures, states, texts, known - offsets) + offsets
    np.testing.assert_allclose(chunk, expected, atol=1e-5)


def test_the_server_limits_absolute_targets():
    model, (pictures, states, texts) = make_model(action_scale=asdict(Scale([0.4] * 4, [0.5] * 4))), observation(1)
    policy = SafePolicy(Agent(model, TOKENIZER))
    sent = policy.session()({"observation/image": pictures[0], "observation/state": states[0], "prompt": texts[0]})
    assert (sent["actions"] >= 0.4 - 1e-6).all() and (sent["actions"] <= 0.5 + 1e-6).all()
    assert (policy.metadata["targets"], policy.metadata["predict"]) == ("absolute", "delta")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(deltas=[4]), "deltas must be different numbers in 0..3"),
        (dict(deltas=[0, 0]), "deltas must be"),
        (dict(deltas="01"), "deltas must be"),
        (dict(deltas=[True]), "deltas must be"),
        (dict(deltas=[]), "deltas must be"),
        (dict(delta_scale={}), "deltas must be"),
        (dict(state_scale={}), "deltas must be different numbers in 0..-1"),
        (dict(targets="relative"), "deltas are of absolute targets"),
        (dict(delta_scale=asdict(Scale([0.0], [1.0]))), "delta_scale needs 4 numbers"),
        (dict(delta_scale=3), "a scale must be an object"),
    ],
)
def test_a_strangers_deltas_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        RobotGPTConfig(**asdict(make_model().config) | change)
