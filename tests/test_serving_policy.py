"""SafePolicy between a fake agent and a robot: what it reads and what it sends."""

import logging

import numpy as np
import pytest

from nanochat.serving.policy import SafePolicy, act_on

GOOD = {
    "observation/image": np.zeros((4, 6, 3), np.uint8),
    "observation/state": np.array([0.1, 0.2], np.float32),
    "prompt": "open the door",
}


class Scripted:
    """An agent that answers with prepared chunks and keeps what it was asked. Actions have 4 numbers within -1..0.6."""

    metadata = {"action_head": "continuous", "chunk": 3, "action_dim": 4, "state_dim": 2, "image_size": 64}
    action_range = ([-1.0] * 4, [0.6] * 4)

    def __init__(self, *values):
        self.values, self.calls = iter(values), []

    def act(self, images, states, instructions):
        self.calls.append((images, states, instructions))
        return np.full((1, 3, 4), next(self.values), np.float32)


def test_the_agent_gets_the_parts_of_the_observation():
    agent = Scripted(0.5)
    chunk = act_on(agent, GOOD)
    ((image,), states, instructions) = agent.calls[0]
    np.testing.assert_array_equal(image, GOOD["observation/image"])
    np.testing.assert_array_equal(states, [GOOD["observation/state"]])
    assert states.dtype == np.float32 and instructions == ["open the door"]
    np.testing.assert_array_equal(chunk, np.full((3, 4), 0.5, np.float32))


def test_lerobot_names_and_lists_of_numbers_work_too():
    agent = Scripted(0.5)
    act_on(agent, {"observation.image": GOOD["observation/image"], "observation.state": [0.1, 0.2], "prompt": "open"})
    np.testing.assert_allclose(agent.calls[0][1], [[0.1, 0.2]])


# ---- several cameras


class Cameras(Scripted):
    metadata = Scripted.metadata | {"cameras": ["front", "wrist"]}


class Forgiving(Cameras):
    metadata = Cameras.metadata | {"camera_dropout": 0.1}


FRONT, WRIST = np.full((4, 6, 3), 1, np.uint8), np.full((8, 8, 3), 2, np.uint8)
OTHERS = {"observation/state": GOOD["observation/state"], "prompt": "open the door"}


@pytest.mark.parametrize(
    "front, wrist",
    [
        ("observation/image", "observation/wrist"),
        ("observation/front", "observation/image/wrist"),
        ("observation.images.front", "observation.images.wrist"),
        ("observation.image", "observation/wrist"),
    ],
)
def test_each_camera_is_found_by_its_name(front, wrist):
    agent = Cameras(0.5)
    act_on(agent, OTHERS | {wrist: WRIST, front: FRONT})
    (((shown,), _, _),) = agent.calls
    assert list(shown) == ["front", "wrist"] and shown["front"] is FRONT and shown["wrist"] is WRIST


@pytest.mark.parametrize(
    "seen, message",
    [
        ({"observation/image": FRONT}, '"observation/wrist" must be .* got nothing .this policy needs .* front, wrist'),
        ({"observation/wrist": WRIST}, '"observation/front" must be .* got nothing'),
        ({"observation/image": FRONT, "observation/wrist": WRIST[..., :1]}, '"observation/wrist" must be .* got shape'),
        ({"observation/image": FRONT, "observation/wirst": WRIST}, '"observation/wrist" must be .* got nothing'),
    ],
)
def test_a_camera_that_is_missing_or_wrong_is_named(seen, message):
    with pytest.raises(ValueError, match=message):
        act_on(Cameras(0.5), OTHERS | seen)


def test_a_camera_may_be_missing_if_the_policy_has_learnt_that(caplog):
    agent = Forgiving(0.5, 0.5, 0.5)
    act, seen = SafePolicy(agent).session(), OTHERS | {"observation/image": FRONT, "observation/wirst": WRIST}
    with caplog.at_level(logging.INFO):
        act(seen), act(seen)
    assert [images[0]["wrist"] for images, _, _ in agent.calls] == [None, None]
    assert [record.message for record in caplog.records] == [
        "not read of the observation: 'observation/wirst'",
        "there is no picture of the camera wrist: the policy does without",
    ]
    with pytest.raises(ValueError, match="no picture of any camera; this policy has the cameras front, wrist"):
        act(OTHERS)


def test_a_camera_with_the_name_of_another_key_has_its_longer_keys():
    agent = Scripted(0.5)
    agent.metadata = Scripted.metadata | {"cameras": ["image", "state"]}
    act_on(agent, OTHERS | {"observation/image": FRONT, "observation.images.state": WRIST})
    ((shown,), states, _) = agent.calls[0]
    assert shown["image"] is FRONT and shown["state"] is WRIST
    np.testing.assert_array_equal(states, [GOOD["observation/state"]])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"observation/image": np.zeros((4, 6, 3))},
            r'"observation/image" must be .* got shape \(4, 6, 3\) of float64',
        ),
        ({"observation/image": np.zeros((4, 6, 1), np.uint8)}, '"observation/image" must'),
        ({"observation/image": np.zeros((4, 6), np.uint8)}, '"observation/image" must'),
        ({"observation/image": "a.png"}, '"observation/image" must .* got str'),
        ({"observation/image": None}, '"observation/image" must .* got nothing'),
        ({"observation/state": np.array([0.1, np.nan])}, '"observation/state" must be 2 finite numbers'),
        ({"observation/state": np.zeros(3)}, r'"observation/state" must be 2 finite numbers, got shape \(3,\)'),
        ({"observation/state": np.zeros((1, 2))}, '"observation/state" must'),
        ({"observation/state": None}, '"observation/state" must .* got nothing'),
        ({"observation/state": ["a", "b"]}, '"observation/state" must .* got a list of 2'),
        ({"observation/state": ["1", "2"]}, '"observation/state" must be 2 finite numbers, got a list of 2 .str'),
        ({"observation/state": [True, 0.5]}, '"observation/state" must .* got a list of 2 .bool, float'),
        ({"observation/state": np.array([True, False])}, '"observation/state" must .* of bool'),
        ({"observation/state": [1e300, 0.5]}, '"observation/state" must be 2 finite numbers'),
        ({"observation/state": [10**400, 0.5]}, '"observation/state" must be 2 finite numbers'),
        ({"observation/state": [[1.0], [0.5, 1]]}, '"observation/state" must be 2 finite numbers'),
        ({"observation/state": {"x": 1}}, '"observation/state" must .* got dict'),
        ({"prompt": "  "}, '"prompt" must'),
        ({"prompt": 3}, '"prompt" must'),
        ({"prompt": "x" * 501}, '"prompt" must'),
    ],
)
def test_the_error_names_the_wrong_key(change, message):
    agent = Scripted(0.5)
    with pytest.raises(ValueError, match=message):
        act_on(agent, GOOD | change)
    assert not agent.calls


def test_actions_stay_within_the_range_of_the_training_data():
    act = SafePolicy(Scripted(5.0, -5.0)).session()
    np.testing.assert_allclose(act(GOOD)["actions"], 0.6)
    np.testing.assert_allclose(act(GOOD)["actions"], -1.0)


def test_hold_still_sends_no_motion_and_keeps_the_gripper():
    act = SafePolicy(Scripted(0.5, np.nan), hold="still").session()
    np.testing.assert_allclose(act(GOOD)["actions"], 0.5)
    np.testing.assert_allclose(act(GOOD)["actions"], [[0, 0, 0, 0.5]] * 3)


def test_hold_last_repeats_the_previous_action():
    act = SafePolicy(Scripted(np.nan, 0.5, np.inf), hold="last").session()
    with pytest.raises(ValueError, match="no previous action"):
        act(GOOD)
    for _ in range(2):
        np.testing.assert_allclose(act(GOOD)["actions"], 0.5)


def test_max_change_is_measured_from_the_last_action_that_was_sent():
    policy = SafePolicy(Scripted(0.0, 0.5, -0.5), execute=2, max_change=0.1)
    act = policy.session()
    sent = np.concatenate([act(GOOD)["actions"] for _ in range(3)])
    assert policy.metadata == Scripted.metadata | {"chunk": 2, "committed": 0}
    assert sent.shape == (6, 4) and sent.dtype == np.float32
    np.testing.assert_allclose(sent[:, 0], [0, 0, 0.1, 0.2, 0.1, 0.0], atol=1e-6)


def test_sessions_do_not_share_their_last_action():
    policy = SafePolicy(Scripted(0.5, np.nan), hold="last")
    first, second = policy.session(), policy.session()
    first(GOOD)
    with pytest.raises(ValueError, match="no previous action"):
        second(GOOD)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(execute=0), "execute must lie in 1..3"),
        (dict(execute=4), "execute must lie in 1..3"),
        (dict(max_change=0), "max_change must be more than 0"),
        (dict(hold="middle"), "hold must be one of auto, still, last"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SafePolicy(Scripted(), **settings)


class Absolute(Scripted):
    metadata = Scripted.metadata | {"targets": "absolute"}


def test_a_policy_of_absolute_targets_never_sends_zeros_instead_of_an_action():
    policy = SafePolicy(Absolute(0.5, np.nan))
    act = policy.session()
    assert policy.hold == "last"
    for _ in range(2):
        np.testing.assert_allclose(act(GOOD)["actions"], 0.5)
    with pytest.raises(ValueError, match="no previous action"):
        SafePolicy(Absolute(np.nan)).session()(GOOD)
    with pytest.raises(ValueError, match="absolute targets, and the robot would jump"):
        SafePolicy(Absolute(), hold="still")


def test_relative_actions_are_replaced_by_no_motion():
    agent = Scripted()
    assert SafePolicy(agent).hold == "still"  # older checkpoints do not say what their actions are
    agent.metadata = Scripted.metadata | {"targets": "relative"}
    assert SafePolicy(agent).hold == "still" and SafePolicy(agent, hold="last").hold == "last"


def test_a_policy_without_a_state_asks_for_none(caplog):
    agent = Scripted(0.5, 0.5)
    agent.metadata = Scripted.metadata | {"state_dim": 0}
    act_on(agent, {key: value for key, value in GOOD.items() if key != "observation/state"})
    act_on(agent, GOOD)
    assert [states for _, states, _ in agent.calls] == [None, None]
    with caplog.at_level(logging.INFO):
        agent.values = iter([0.5, 0.5])
        act = SafePolicy(agent).session()
        act(GOOD), act(GOOD)
    assert [record.message for record in caplog.records] == [
        "this policy reads no state: the one that was sent is not read"
    ]


class Committed(Scripted):
    """Continues up to two committed actions with its prepared values."""

    metadata = Scripted.metadata | {"committed": 2}

    def act(self, images, states, instructions, committed=None):
        chunk = super().act(images, states, instructions)
        if committed is not None:
            self.calls[-1] = (*self.calls[-1], committed)
            chunk[:, : committed.shape[1]] = committed
        return chunk


def test_committed_actions_reach_the_agent_and_the_answer_goes_on_from_them():
    agent = Committed(0.5, 0.5)
    act = SafePolicy(agent, max_change=0.1).session()
    given = np.array([[0.1] * 4, [0.2] * 4])
    actions = act(GOOD | {"observation/committed": given})["actions"]
    np.testing.assert_array_equal(agent.calls[0][3], given[None].astype(np.float32))
    np.testing.assert_allclose(
        actions[:, 0], [0.1, 0.2, 0.3], atol=1e-6
    )  # the change is measured from the last of them
    assert actions.dtype == np.float32
    for nothing in (None, [], np.zeros((0, 4))):
        agent.values = iter([0.0])
        act(GOOD | {"observation/committed": nothing})
        assert len(agent.calls[-1]) == 3


def test_committed_actions_leave_the_range_of_the_training_data_no_more_than_others():
    act = SafePolicy(Committed(5.0)).session()
    np.testing.assert_allclose(act(GOOD | {"observation/committed": [[3.0] * 4]})["actions"], 0.6)


def test_one_action_of_an_answer_at_least_is_new():
    assert SafePolicy(Committed(), execute=2).metadata["committed"] == 1
    with pytest.raises(ValueError, match="up to 1 actions of 4 finite numbers, got"):
        SafePolicy(Committed(0.5), execute=2).session()(GOOD | {"observation/committed": np.zeros((2, 4))})


@pytest.mark.parametrize(
    "wrong", [np.zeros(4), np.zeros((1, 3)), np.zeros((3, 4)), np.full((1, 4), np.nan), "text", [["a"] * 4], {}]
)
def test_what_is_no_committed_action_is_named(wrong):
    agent = Committed(0.5)
    with pytest.raises(ValueError, match='"observation/committed" must be up to 2 actions of 4 finite numbers, got'):
        SafePolicy(agent).session()(GOOD | {"observation/committed": wrong})
    assert not agent.calls
    with pytest.raises(ValueError, match="leave it out: this policy takes none"):
        SafePolicy(Scripted(0.5)).session()(GOOD | {"observation/committed": np.zeros((1, 4))})
