"""The simulated arm, and recording demonstrations with it. Skipped where Meta-World or OpenGL is missing."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nanochat.agent import Agent
from nanochat.data.lerobot import RobotDataset
from nanochat.evaluation.corrections import Driving
from nanochat.metaworld import simulator
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.record import (
    CAMERA_KEY,
    EASILY_DISTURBED,
    POLICY_STEPS,
    Block,
    open_work,
    read_blocks,
    record_block,
    record_demonstrations,
    record_episode,
    run_expert,
)
from nanochat.metaworld.simulator import Arm, SimulatorError


def can_draw() -> str:
    """Empty, or why not."""
    try:
        arm = Arm("reach", 32)
        arm.reset(0)
        arm.image()
    except SimulatorError as error:
        return str(error)
    return ""


WHY_NOT = can_draw()
needs_simulator = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@needs_simulator
def test_a_seed_is_a_layout():
    arm = Arm("push", 64)
    one, picture = arm.reset(3).environment_state, arm.image()
    other = arm.reset(4).environment_state
    again, same = arm.reset(3).environment_state, arm.image()
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(picture, same)
    assert np.abs(one[36:39] - other[36:39]).max() > 0.01  # another goal
    np.testing.assert_array_equal(Arm("push", 64).reset(3).environment_state, one)  # in another arm as well


@needs_simulator
def test_the_state_is_the_robots_own():
    scene = Arm("pick-place", 64).reset(0)
    assert scene.state.shape == (4,) and scene.environment_state.shape == (39,)
    np.testing.assert_array_equal(scene.state, scene.environment_state[:4])


@needs_simulator
@pytest.mark.parametrize("task", ["drawer-open", "window-close", "dial-turn"])
def test_nothing_jumps_at_the_first_step(task):
    arm = Arm(task, 32)
    before = arm.reset(5).environment_state
    after = arm.step(np.zeros(4)).environment_state
    assert np.abs(after[4:7] - before[4:7]).max() < 0.01


@needs_simulator
def test_pictures_are_upright_and_show_the_arm():
    arm = Arm("reach", 96)
    arm.reset(0)
    image = arm.image()
    assert image.shape == (96, 96, 3) and image.dtype == np.uint8
    red = (image[..., 0] > 100) & (image[..., 1] < 80)
    assert red.mean() > 0.05
    # the arm stands on the left, its foot in the lower half, and nothing of it is in the lower right corner
    assert red[:, :48].sum() > 2 * red[:, 48:].sum() and red[48:, :32].sum() > 2 * red[48:, 64:].sum()


@needs_simulator
def test_the_expert_does_the_task_and_holds_the_object():
    arm = Arm("pick-place", 32)
    scene, held = arm.reset(0), False
    assert not scene.success and not scene.held
    while not scene.success and arm.steps < 300:
        scene = arm.step(arm.expert_action())
        held |= scene.held
    assert scene.success and held


@needs_simulator
@pytest.mark.parametrize("action", [[2, 0, 0, 0], [0, 0, 0], [np.nan, 0, 0, 0], [[0, 0, 0, 0]]])
def test_what_is_no_action_is_refused(action):
    arm = Arm("reach", 32)
    arm.reset(0)
    with pytest.raises(ValueError, match="4 numbers in -1..1"):
        arm.step(np.array(action, dtype=float))


@needs_simulator
def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="no task 'fly'"):
        Arm("fly")


@needs_simulator
def test_large_pictures():
    arm = Arm("reach", 320)
    arm.reset(0)
    assert arm.image().shape == (320, 320, 3)


@needs_simulator
def test_training_after_drawing_does_not_crash():
    """Mesa's LLVM and triton's crash when loaded together, unless triton's comes first. In a process of its own."""
    code = (
        "from nanochat.metaworld.simulator import Arm; a = Arm('reach', 32); a.reset(0); a.image(); import torch._dynamo, torch; "
        "torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_machine_that_cannot_draw_says_what_to_install(monkeypatch):
    class NoGL:
        class Renderer:
            def __init__(self, *args):
                raise RuntimeError("an OpenGL platform library has not been loaded")

    arm = Arm.__new__(Arm)
    arm.mujoco, arm.image_size, arm.renderer, arm.cameras = NoGL, 32, None, ("corner2",)
    arm.env = type("Env", (), {"model": None})
    with pytest.raises(SimulatorError, match="apt-get install libegl1"):
        arm.image()


def test_a_machine_without_metaworld_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(SimulatorError, match=r'pip install "\.\[robot\]" in the folder'):
        simulator.import_metaworld()


# ---- recording ----


@needs_simulator
def test_what_is_recorded_is_the_experts_answer_to_what_is_seen():
    episode = run_expert(Arm("reach", 32), 1_000_000, noise=0.0)
    n = len(episode["action"])
    assert n == len(episode["images"]) == len(episode["state"])
    assert not episode["success"][0] and episode["success"][-1]
    assert 5 <= episode["success"].sum() <= 11
    arm = Arm("reach", 32)  # played again, the actions lead to the same states
    scene = arm.reset(1_000_000)
    for action, state in zip(episode["action"], episode["state"], strict=True):
        np.testing.assert_allclose(scene.state, state, atol=1e-5)
        scene = arm.step(action)


@needs_simulator
def test_noise_moves_the_arm_but_not_the_recorded_actions():
    from metaworld.policies import ENV_POLICY_MAP

    calm, noisy = (run_expert(Arm("door-open", 32), 1_000_000, noise) for noise in (0.0, 0.3))
    n = min(len(calm["state"]), len(noisy["state"]), 60)
    np.testing.assert_array_equal(calm["state"][0], noisy["state"][0])
    assert np.abs(calm["state"][:n] - noisy["state"][:n]).max() > 0.003
    policy = ENV_POLICY_MAP[
        "door-open-v3"
    ]()  # the recorded action is the expert's own for this state, without the noise
    for seen, action in zip(noisy["environment_state"], noisy["action"], strict=True):
        answer = np.clip(policy.get_action(seen.astype(np.float64)), -1, 1)
        np.testing.assert_allclose(action, answer, atol=1e-3)


@needs_simulator
def test_a_task_whose_expert_is_easily_disturbed_has_less_noise_in_every_second_episode(monkeypatch):
    found = []
    monkeypatch.setattr(
        "nanochat.metaworld.record.run_expert", lambda arm, seed, noise, policy: found.append(noise) or {}
    )
    for task in ("reach", "shelf-place"):
        for noise in (None, 0.3):
            for number in (0, 1):
                record_episode(Arm(task, 32), Block(task, 0, 2, 0, noise, 32), number)
    assert found == [0.25, 0.25, 0.3, 0.3, 0.25, 0.1, 0.3, 0.3]
    assert set(INSTRUCTIONS) > EASILY_DISTURBED


@needs_simulator
def test_the_expert_corrects_a_policy_that_drives_now_and_then():
    """A policy that only goes forward: the arm follows it in whole stretches, and what is recorded is the expert's answer."""
    from metaworld.policies import ENV_POLICY_MAP

    class Forward:
        begun, asked = 0, 0

        def begin(self):
            self.begun += 1

        def action(self, images, state, task):
            self.asked += 1
            assert images["corner2"].shape == (32, 32, 3) and state.shape == (4,) and task == "door-open"
            return np.array([0, 1.2, 0, 0], np.float32)  # is clipped

    policy = Forward()
    episode = run_expert(Arm("door-open", 32), 1_000_003, 0.0, policy)
    n = len(episode["action"])
    turns = [min(POLICY_STEPS, n - first) for first in range(0, n, POLICY_STEPS)]
    assert policy.asked in (sum(turns[::2]), sum(turns[1::2])) and policy.begun == len(turns) and episode["success"][-1]
    path, calm = (found["state"][:, 1] for found in (episode, run_expert(Arm("door-open", 32), 1_000_003, 0.0)))
    assert path.max() > calm.max() + 0.02
    expert = ENV_POLICY_MAP["door-open-v3"]()
    for seen, action in zip(episode["environment_state"], episode["action"], strict=True):
        np.testing.assert_allclose(action, np.clip(expert.get_action(seen.astype(np.float64)), -1, 1), atol=1e-3)


@needs_simulator
def test_a_policy_drives_as_in_a_rollout():
    arm, driving = Arm("door-open", 128), Driving("robot", execute=3)
    scene = arm.reset(5)
    images = arm.images()
    agent = Agent.load("robot")
    chunk = agent.act([images["corner2"]], scene.state[None], [INSTRUCTIONS["door-open"][0]])[0]
    driving.begin()
    images["gripperPOV"] = images["corner2"]  # is recorded, but not the policy's
    for step in range(3):  # the picture is looked at once
        np.testing.assert_array_equal(
            driving.action(images if step == 0 else {}, scene.state, "door-open"), chunk[step]
        )
    driving.action(images, scene.state, "door-open")
    driving.begin()
    np.testing.assert_array_equal(driving.action(images, scene.state, "door-open"), chunk[0])


@needs_simulator
def test_a_stopped_recording_goes_on(tmp_path, monkeypatch):
    out, work = tmp_path / "demos", tmp_path / ".demos.blocks"
    block = Block("reach", 0, 2, 1_000_000, 0.0, 32)
    settings = {"seed": 1_000_000, "noise": 0.0, "image_size": 32, "episodes": 2, "cameras": ["corner2"]}
    open_work(work, settings)
    record_block((work, block))
    stamp = (work / block.name).stat().st_mtime_ns
    with pytest.raises(ValueError, match="other settings"):
        record_demonstrations(["reach"], 3, out, 1_000_000, 0.0, 32, 1)
    seen = []
    monkeypatch.setattr(
        "nanochat.metaworld.record.read_blocks",
        lambda folder, *rest: seen.append((folder / block.name).stat().st_mtime_ns) or read_blocks(folder, *rest),
    )
    record_demonstrations(["reach"], 2, out, 1_000_000, 0.0, 32, 1)
    assert seen == [stamp]  # the block was there already
    dataset = RobotDataset(out)
    assert [info.extra["seed"] for info in dataset.episodes] == [1_000_000, 1_000_001]
    episode = dataset.episode(1)
    assert len(episode.images[CAMERA_KEY.format("corner2")]) == len(episode.columns["action"])
    assert json.loads((out / "meta" / "info.json").read_text())["fps"] == 80
    with pytest.raises(FileExistsError, match="choose another"):
        record_demonstrations(["reach"], 2, out, 1_000_000, 0.0, 32, 1)


@needs_simulator
def test_the_gripper_sees_what_it_holds():
    """The red puck of pick-place: from the gripper it grows until it fills the middle of the picture; the other camera sees
    another picture, which does not depend on how many cameras there are."""
    arm, alone = Arm("pick-place", 64, ("corner2", "gripperPOV")), Arm("pick-place", 64)
    arm.reset(0), alone.reset(0)
    np.testing.assert_array_equal(arm.images()["corner2"], alone.image())
    shares = []
    for _ in range(45):
        picture = arm.image("gripperPOV").astype(int)
        red = (picture[..., 0] > 60) & (picture[..., 1:].max(-1) < 25)
        shares.append(red.mean())
        scene = arm.step(arm.expert_action())
    assert scene.held and shares[0] < 0.03 < shares[-1]
    with pytest.raises(ValueError, match="Meta-World has no camera wrist: its cameras are topview, .*gripperPOV"):
        Arm("reach", 32, ("wrist",))


@needs_simulator
def test_two_cameras_are_recorded(tmp_path):
    cameras = ("corner2", "gripperPOV")
    record_demonstrations(["reach"], 2, tmp_path / "demos", 1_000_000, 0.0, 32, 1, cameras)
    dataset = RobotDataset(tmp_path / "demos")
    assert dataset.cameras == [CAMERA_KEY.format(camera) for camera in cameras]
    arm = Arm("reach", 32, cameras)
    arm.reset(1_000_001)
    for picture, image in zip(dataset.episode(1).images.values(), arm.images().values(), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture[0]))), image)
    with pytest.raises(ValueError, match="no camera front"):
        record_demonstrations(["reach"], 2, tmp_path / "other", 1_000_000, 0.0, 32, 1, ("front",))
    assert not list(tmp_path.glob("*other*"))
