"""examples/so101.py with a simulated arm: no lerobot, and where a server is needed, ours over loopback."""

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("websockets")

from nanochat.chunk_player import ChunkPlayer
from nanochat.errors import UserError
from nanochat.serving.client import ServerGone
from nanochat.serving.policy import SafePolicy
from tests.test_server import serving  # noqa: F401

spec = importlib.util.spec_from_file_location("so101", Path(__file__).parents[1] / "examples" / "so101.py")
so101 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(so101)

JOINTS = [
    f"{name}.pos" for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
]
METADATA = {
    "chunk": 10, "action_dim": 6, "state_dim": 6, "targets": "absolute", "cameras": ["front", "wrist"], "fps": 30,
    "state_names": JOINTS, "action_names": JOINTS, "action_range": ([-100.0] * 6, [100.0] * 6),
    "state_range": ([-100.0] * 6, [100.0] * 6),
}  # fmt: skip


class Arm:
    """Goes where it is sent at once. Its pictures: front is dark, wrist is bright."""

    action_features = dict.fromkeys(JOINTS, float)

    def __init__(self, pose=0.0):
        self.pose, self.sent, self.connected = np.full(6, pose), [], True
        self.hangs = lambda: False

    def get_observation(self):
        if self.hangs():
            raise TimeoutError("front: latest frame is too old")
        picture = np.zeros((48, 64, 3), np.uint8)
        return dict(zip(JOINTS, self.pose.tolist(), strict=True)) | {"front": picture, "wrist": picture + 255}

    def send_action(self, action):
        self.sent.append(dict(action))
        self.pose = np.array([action.get(name, now) for name, now in zip(JOINTS, self.pose, strict=True)])
        return action

    def disconnect(self):
        self.connected = False


class Clock:
    """Time that passes only when someone sleeps."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Answers:
    """An asker whose answers take `delay` polls; each is a chunk that stays at `target`. gone: whether the server is."""

    def __init__(self, target=50.0, delay=2, chunk=10, gone=lambda: False, **changes):
        self.target, self.delay, self.chunk, self.gone = target, delay, chunk, gone
        self.metadata, self.asked, self.waits = METADATA | changes, [], 0

    def send(self, observation):
        self.asked.append(observation)
        self.waits = self.delay + 1

    def answer(self):
        self.waits -= 1
        if self.waits != 0:
            return None
        if self.gone():
            raise ServerGone("the server is gone")
        return np.full((self.chunk, 6), self.target, np.float32)


def drive(arm, asker, seconds=3.0, player=None, speed=90.0, clock=None, **settings):
    """Returns (counts, what was said)."""
    said, clock = [], clock or Clock()
    counts = so101.drive(
        arm, so101.Wiring(arm, ["front", "wrist"], asker.metadata), asker, player or ChunkPlayer(5), 30.0, "lift", speed,
        1.0, lambda: False, seconds, clock=clock, say=said.append, **settings,
    )  # fmt: skip
    return counts, said


def test_the_arm_arrives_and_no_joint_is_faster_than_allowed():
    arm, asker = Arm(), Answers()
    counts, said = drive(arm, asker, speed=60.0)
    np.testing.assert_allclose(arm.pose, 50, atol=1e-4)
    path = np.array([[0.0] * 6] + [[sent[name] for name in JOINTS] for sent in arm.sent])
    assert np.abs(np.diff(path, axis=0)).max() <= 60 / 30 + 1e-4
    assert said == ["moving"] and counts["held"] == 2 and counts["rate limited"] > 20


def test_an_arm_outside_of_the_trained_range_is_led_into_it_without_a_jump():
    arm = Arm(pose=170.0)
    drive(arm, Answers(), speed=60.0)
    path = np.array([170.0, *(sent[JOINTS[0]] for sent in arm.sent)])
    assert path[1] == pytest.approx(168) and path[-1] == pytest.approx(50) and np.abs(np.diff(path)).max() <= 2 + 1e-4


def test_the_policy_gets_its_pictures_numbers_and_words():
    arm, asker = Arm(pose=7.0), Answers()
    drive(arm, asker, seconds=1)
    first = asker.asked[0]
    assert set(first) == {"observation.images.front", "observation.images.wrist", "observation/state", "prompt"}
    assert first["observation.images.front"].max() == 0 and first["observation.images.wrist"].min() == 255
    np.testing.assert_array_equal(first["observation/state"], np.full(6, 7, np.float32))
    assert first["prompt"] == "lift"


def test_a_policy_that_knows_committed_actions_gets_them():
    arm, asker = Arm(), Answers()
    drive(arm, asker, player=ChunkPlayer(5, committed=4))
    assert "observation/committed" not in asker.asked[0]
    np.testing.assert_array_equal(asker.asked[-1]["observation/committed"], np.full((2, 6), 50, np.float32))


def test_the_arm_holds_while_the_server_is_gone_and_moves_again_when_it_is_back():
    arm, clock = Arm(), Clock()
    asker = Answers(target=1000.0, gone=lambda: 1 < clock.now < 4)  # a target that is never reached
    poses, sleep = [], clock.sleep
    clock.sleep = lambda seconds: (poses.append((clock.now, arm.pose[0])), sleep(seconds))
    _, said = drive(arm, asker, seconds=6, speed=6, clock=clock, player=ChunkPlayer(5))
    assert said == [
        "moving", "the server is gone; trying again", "holding the pose: no fresh actions", "moving",
    ]  # fmt: skip
    while_gone = [pose for now, pose in poses if 2 < now < 4]
    assert len(set(while_gone)) == 1 and poses[-1][1] > while_gone[0] > 0


def test_a_server_that_is_gone_is_asked_once_a_second():
    asker = Answers(delay=0, gone=lambda: True)
    drive(Arm(), asker, seconds=4.5)
    assert len(asker.asked) == 5


def test_after_a_step_that_took_too_long_the_arm_does_not_hurry():
    """A burst of the steps that were missed would move it much faster than allowed."""
    arm, clock, times, looks = Arm(), Clock(), [], []
    look, send = arm.get_observation, arm.send_action

    def slow_once():
        looks.append(clock.now)
        clock.now += 1.0 if len(looks) == 4 else 0.0
        return look()

    arm.get_observation = slow_once
    arm.send_action = lambda action: (times.append(clock.now), send(action))
    counts, _ = drive(arm, Answers(), seconds=4, clock=clock)
    assert counts["late"] == 1
    assert (np.diff(times) < 0.9 / 30).sum() <= 1  # the step after the slow one comes at once, the others in their time


def test_the_policy_is_told_the_actions_that_were_sent():
    """Not those that it wanted: the joints are limited to 2 units a step."""
    arm, asker, sent = Arm(), Answers(), []
    ask = asker.send
    asker.send = lambda observation: (sent.append(arm.sent[-2:]), ask(observation))
    drive(arm, asker, seconds=0.5, speed=60.0, player=ChunkPlayer(5, previous=2))
    assert len(sent) > 2 and "observation/previous" not in asker.asked[0]
    for observation, actions in zip(asker.asked[1:], sent[1:], strict=True):
        expected = [[action[name] for name in JOINTS] for action in actions]
        np.testing.assert_allclose(observation["observation/previous"], expected, rtol=1e-5)


def test_old_actions_are_not_carried_out():
    """A chunk of ten seconds, of which the first one is allowed."""
    arm = Arm()
    counts, said = drive(arm, Answers(delay=0, chunk=300, gone=lambda: len(arm.sent) > 0), seconds=5)
    assert counts["moved"] == len(arm.sent) == 31 and said[-1] == "holding the pose: no fresh actions"


def test_a_hanging_camera_is_named_and_the_arm_holds():
    arm, clock = Arm(), Clock()
    arm.hangs = lambda: clock.now > 1
    counts, said = drive(arm, Answers(), seconds=4, clock=clock)
    assert said == ["moving", "front: latest frame is too old; trying again", "holding the pose: no fresh actions"]
    assert counts["held"] > 60


def test_a_dry_run_sends_nothing():
    arm, said = Arm(), []
    counts, said = drive(arm, Answers(), dry_run=True)
    assert not arm.sent and counts["moved"] > 80
    assert said[1].startswith("shoulder_pan.pos -> ")


def test_numbers_are_matched_by_their_names():
    arm, names = Arm(), JOINTS[::-1]
    arm.pose = np.arange(6.0)
    wiring = so101.Wiring(
        arm, ["front", "wrist"], METADATA | {"state_names": names, "action_names": names[:2], "action_dim": 2}
    )
    seen = wiring.observation(arm.get_observation(), "lift", None)
    np.testing.assert_array_equal(seen["observation/state"], np.arange(6.0)[::-1])
    np.testing.assert_array_equal(wiring.pose(arm.get_observation()), [5, 4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "relative"}, "--targets absolute"),
        (
            {"cameras": ["front", "top"]},
            "needs the camera top .* the arm has front, wrist: name it with --camera top=0",
        ),
        ({"cameras": []}, "one camera without a name"),
        ({"state_names": ["a.pos"] * 6}, "the policy's state has a.pos, .* but the arm's joints are shoulder_pan.pos"),
        ({"action_names": [], "action_dim": 7}, "the policy's action has 7 numbers, the arm 6 joints"),
    ],
)
def test_a_policy_that_does_not_fit_the_arm_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        so101.Wiring(Arm(), ["front", "wrist"], METADATA | changes)


def test_a_policy_that_learnt_to_do_without_a_camera_does_so():
    for metadata in (
        METADATA | {"camera_dropout": 0.1},
        METADATA | {"camera_dropout": 0.1, "cameras": ["front", "top"]},
    ):
        assert so101.Wiring(Arm(), ["front"], metadata).pictures == {"front": "observation.images.front"}
    with pytest.raises(UserError, match="needs the camera front, wrist"):
        so101.Wiring(Arm(), [], METADATA | {"camera_dropout": 0.1})


def test_signals_only_count():
    before = signal.getsignal(signal.SIGINT)
    with so101.StopKeys().listening() as stop:
        assert stop() == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == 2
    assert signal.getsignal(signal.SIGINT) is before


# ---- the whole program, over a real connection


class Lifting:
    """An agent whose actions are 30 for every joint."""

    metadata = METADATA
    action_range = METADATA["action_range"]

    def act(self, images, states, instructions):
        return np.full((1, 10, 6), 30, np.float32)


class Stop(so101.StopKeys):
    """Stops when the arm has arrived."""

    def __init__(self, arrived):
        super().__init__()
        self.arrived = arrived

    def __call__(self):
        return self.count + self.arrived()

    def wait(self):
        self.waited = True


WORDS = ["--task", "lift", "--port", "none", "--id", "mine", "--camera", "front=0", "wrist=/dev/video2", "--fps", "200"]


class OneCamera(Lifting):
    """As older policies, which name nothing."""

    metadata = METADATA | {"cameras": [], "state_names": [], "action_names": []}


def test_the_whole_program_with_a_server(serving, capsys):  # noqa: F811
    arm, address = Arm(), f"127.0.0.1:{serving(SafePolicy(OneCamera()))}"
    stop = Stop(lambda: bool(np.allclose(arm.pose, 30)))
    words = [word for word in WORDS if not word.startswith("wrist")]
    assert so101.main([*words, "--server", address, "--speed", "1000"], lambda args: arm, stop) == 0
    assert stop.waited and not arm.connected  # only then are the motors switched off
    assert "200 steps a second, shoulder_pan.pos" in capsys.readouterr().out


def test_an_error_holds_the_pose_before_the_motors_are_switched_off(serving, capsys):  # noqa: F811
    arm, stop = Arm(pose=5000.0), Stop(lambda: False)  # a pose that the server refuses
    words = [
        *[word for word in WORDS if not word.startswith("wrist")],
        "--server",
        f"127.0.0.1:{serving(SafePolicy(OneCamera()))}",
    ]
    assert so101.main(words, lambda args: arm, stop) == 2
    assert stop.waited and not arm.sent and "the training data (accepted" in capsys.readouterr().err


def test_without_a_server_or_lerobot_the_arm_is_not_touched(serving, capsys, monkeypatch):  # noqa: F811
    touched = []
    assert so101.main([*WORDS, "--server", "127.0.0.1:1"], touched.append) == 2
    assert "no policy server answers" in capsys.readouterr().err and not touched
    monkeypatch.setitem(sys.modules, "lerobot", None)
    assert so101.main([*WORDS, "--server", f"127.0.0.1:{serving(SafePolicy(Lifting()))}"]) == 2
    assert "pip install 'lerobot[core_scripts,feetech]==0.6.1'" in capsys.readouterr().err


def test_the_asker_connects_again_but_not_to_another_policy():
    class Client:
        def __init__(self, metadata):
            self.metadata, self.fails = metadata, True

        def infer(self, observation):
            if self.fails:
                raise ServerGone("gone")
            return observation

        def close(self):
            pass

    clients = [Client(METADATA), Client(METADATA), Client(METADATA | {"chunk": 3})]
    clients[1].fails, opened = False, iter(clients)
    asker = so101.Asker(lambda: next(opened))

    def ask(observation):
        asker.send(observation)
        return asker.pending and next(found for found in iter(asker.answer, ()) if found is not None)

    with pytest.raises(ServerGone):
        ask(1)
    assert asker.answer() is None and ask(2) == 2
    clients[1].fails = True
    for error in (ServerGone, UserError):
        with pytest.raises(error):
            ask(3)
    asker.close()


@pytest.mark.parametrize("words", [["--camera", "front"], ["--speed", "0"], ["--execute", "-1"]])
def test_settings_that_cannot_be_meant_are_refused(words):
    with pytest.raises(SystemExit):
        so101.read_args([*WORDS, *words])


def test_cameras_are_numbers_or_paths():
    assert so101.read_args(WORDS).camera == [("front", 0), ("wrist", Path("/dev/video2"))]
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=NUMBER"):
        so101.camera("=0")


def test_from_a_recording_to_a_moving_arm(tmp_path, serving):  # noqa: F811
    """A recording as lerobot-record writes it, a policy trained on it with --committed, the server, and the arm."""
    from nanochat.agent import Agent
    from nanochat.data.lerobot import Episode
    from nanochat.data.lerobot_writer import write_dataset
    from nanochat.data.pictures import encode_png
    from nanochat.training.recipes import Robot
    from nanochat.training.run import Run
    from tests.test_robot_train import SIZE, TINY

    def episode(number):
        path = 40 * np.sin(number + 0.1 * np.arange(31)[:, None] + np.arange(6)).astype(np.float32)
        pictures = {f"observation.images.{name}": [encode_png(np.full((SIZE, SIZE, 3), shade, np.uint8))] * 30
                    for name, shade in (("front", 0), ("wrist", 255))}  # fmt: skip
        return Episode("lift", {"observation.state": path[:-1], "action": path[1:]}, pictures)

    names = {"observation.state": JOINTS, "action": JOINTS}
    write_dataset(tmp_path / "cube", map(episode, range(4)), 30, "so101_follower", (SIZE, SIZE, 3), names)
    settings = TINY | dict(chunk=6, committed=2, steps=2, units="degrees")
    run = Run(Robot(data=str(tmp_path / "cube"), out=str(tmp_path / "run"), **settings)).train()
    agent, arm = Agent.load(str(run)), Arm()
    known, act = [], agent.act
    agent.act = lambda *asked, **given: (known.extend(given.values()), act(*asked, **given))[1]
    words = [word for word in WORDS if word not in ("--fps", "200")]  # the policy knows the rate of its data
    words += ["--server", f"127.0.0.1:{serving(SafePolicy(agent))}", "--execute", "3"]
    assert so101.main(words, lambda args: arm, Stop(lambda: len(arm.sent) > 20 and len(known) > 0)) == 0
    low, high = agent.action_range
    for name, least, most in zip(JOINTS, low, high, strict=True):
        sent = [action[name] for action in arm.sent]
        assert min(least, 0) - 1e-3 <= min(sent) and max(sent) <= max(most, 0) + 1e-3
    assert known[0].shape[0] == 1 and 1 <= known[0].shape[1] <= 2 and known[0].shape[2] == 6
