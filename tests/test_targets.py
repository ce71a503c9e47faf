"""Whether the actions of data are absolute targets or relative motions."""

import numpy as np
import pytest

from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import Episode
from nanochat.data.pictures import encode_png
from nanochat.data.targets import find_targets
from tests.data_files import CAMERA, demonstrations


def recorded(
    kind: str, state: str = "observation.state", seed: int = 0, n: int = 4, length: int = 60
) -> Demonstrations:
    """A robot whose three joints and gripper move smoothly; actions of some kind."""
    rng, episodes = np.random.default_rng(seed), []
    for _ in range(n):
        phase, speed, middle = rng.uniform(0, 6, 4), rng.uniform(0.02, 0.2, 4), rng.uniform(-0.3, 0.3, 4)
        states = middle + np.sin(phase + speed * np.arange(length + 1)[:, None])
        motion = np.diff(states, axis=0)
        actions = {
            "targets": states[1:], "now": states[:-1], "noisy": states[1:] + rng.normal(0, 0.2, motion.shape),
            "degrees": np.rad2deg(states[1:]), "motion": motion, "scaled motion": 20 * motion, "velocity": 30 * motion,
            "far pose": states[1:, ::-1] + 5, "noise": rng.normal(size=motion.shape),
        }[kind]  # fmt: skip
        columns = {"action": actions.astype(np.float32)}
        if state:
            columns[state] = states[:-1].astype(np.float32)
        images = {CAMERA: [encode_png(np.zeros((8, 8, 3), np.uint8))] * length}
        episodes.append(Episode("go", columns, images))
    return demonstrations(episodes, 8)


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("targets", "absolute"),
        ("now", "absolute"),
        ("noisy", "absolute"),
        ("degrees", "absolute"),
        ("far pose", "absolute"),
        ("motion", "relative"),
        ("scaled motion", "relative"),
        ("velocity", "relative"),
        ("noise", "relative"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("state", ["observation.state", "observation.joint_positions"])
def test_absolute_targets_are_found(kind, targets, state, seed):
    found, reason = find_targets(recorded(kind, state, seed))
    assert found == targets and reason


def test_without_a_state_zero_must_be_possible():
    assert find_targets(recorded("far pose", ""))[0] == "absolute"
    found, reason = find_targets(recorded("motion", ""))
    assert found == "relative" and reason.startswith("a guess")


def test_short_and_constant_data_is_no_error():
    for n, length in ((1, 1), (2, 2)):
        assert find_targets(recorded("motion", n=n, length=length))[0] in ("relative", "absolute")
    still = recorded("motion")
    still.action[:] = 0
    assert find_targets(still)[0] == "relative"
