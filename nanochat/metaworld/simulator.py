"""Meta-World (Yu et al. 2019, arXiv 1910.10897) as a robot sees it: a camera picture, the gripper's own state, and success.

The only file that imports metaworld and mujoco, and only when an arm is built. Shadows, reflections and multisampling are
off, since the software renderer spends nine tenths of its time on them; edges are smoothed by drawing at twice the size.
"""

import os
import sys
import warnings
import weakref
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from nanochat.safety import SafeActions, hold_still

CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)  # nearer than Meta-World's own, as published evaluations move it
FPS = 80  # control steps in a second of simulated time
MAX_STEPS = 500
ACTION_DIM = 4  # motion of the hand along x, y, z and of the fingers, each in -1..1
STATE_DIM = 4  # hand x, y, z in metres, opening of the fingers; what follows in the observation tells where things are
OVERSAMPLING = 2


class SimulatorError(ImportError):
    """Meta-World or OpenGL is missing; the text says what to install."""


@dataclass
class Scene:
    """What is known after a step. state: (4,) float32, the robot's own. environment_state: (39,) float32, all that Meta-World
    knows: for experts and questions, never for a policy. held: the same body touches both fingers."""

    state: np.ndarray
    environment_state: np.ndarray
    success: bool
    held: bool


class Arm:
    """One simulated Sawyer arm before one task ("door-open", without Meta-World's version).

    Raises SimulatorError where the simulator cannot run here, ValueError for a task that it does not have.
    """

    def __init__(self, task: str, image_size: int = 128):
        environments, policies, self.mujoco = import_metaworld()
        if f"{task}-v3" not in policies:
            raise ValueError(f"Meta-World has no task {task!r}: see nanochat demos --help for the names")
        self.task, self.image_size = task, image_size
        self.make_policy = policies[f"{task}-v3"]
        self.env = environments[f"{task}-v3-goal-observable"]()
        # reset(seed=...) is ignored by Meta-World: the layout is drawn from the environment's own generator
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        model = self.env.model
        model.cam(CAMERA).pos[:] = CAMERA_POSITION
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = OVERSAMPLING * image_size
        self.fingers = [model.geom(f"{side}pad_geom").id for side in ("left", "right")]
        self.renderer = None

    def reset(self, seed: int) -> Scene:
        """A new layout of the scene, the same for the same seed."""
        self.env.seed(int(seed))
        self.env.reset()
        # Meta-World moves doors and goals after its last look: without this, they jump at the first step
        self.mujoco.mj_forward(self.env.model, self.env.data)
        self.observation = self.env._get_obs()
        self.expert, self.steps = self.make_policy(), 0
        return self.scene(success=False)

    def step(self, action: np.ndarray) -> Scene:
        """action: (4,) in -1..1. Raises ValueError for one that is not, or after MAX_STEPS."""
        action = np.asarray(action, np.float32)
        if action.shape != (ACTION_DIM,) or not np.all(np.abs(action) <= 1):
            raise ValueError(f"an action is {ACTION_DIM} numbers in -1..1, got {action}")
        self.observation, _, _, _, info = self.env.step(action)
        self.steps += 1
        return self.scene(success=bool(info["success"]))

    def scene(self, success: bool) -> Scene:
        everything = self.observation.astype(np.float32)
        return Scene(everything[:STATE_DIM].copy(), everything, success, self.holds())

    def holds(self) -> bool:
        """Whether some body other than the arm pushes against both fingers."""
        model, data = self.env.model, self.env.data
        robot = model.body_rootid[model.geom_bodyid[self.fingers[0]]]
        touched = [set(), set()]
        for contact in data.contact:
            for side, finger in enumerate(self.fingers):
                if finger in (contact.geom1, contact.geom2) and data.efc_force[contact.efc_address] > 0:
                    other = contact.geom2 if contact.geom1 == finger else contact.geom1
                    touched[side].add(int(model.body_rootid[model.geom_bodyid[other]]))
        return bool((touched[0] & touched[1]) - {robot})

    def expert_action(self) -> np.ndarray:
        """What Meta-World's scripted policy, which sees all, would do now: (4,) float32 in -1..1."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its gains are high on purpose; the environment clips as we do
            action = self.expert.get_action(self.observation)
        return np.clip(action, -1, 1).astype(np.float32)

    def image(self) -> np.ndarray:
        """The camera's picture now, (S, S, 3) uint8 RGB. Turned upright: the camera hangs upside down."""
        size, n = self.image_size, OVERSAMPLING
        if self.renderer is None:
            self.renderer = self.open_renderer()
        self.renderer.update_scene(self.env.data, camera=CAMERA)
        large = self.renderer.render()[::-1, ::-1].reshape(size, n, size, n, 3)
        return large.mean((1, 3)).round().astype(np.uint8)

    def open_renderer(self):
        side = OVERSAMPLING * self.image_size
        try:
            renderer = self.mujoco.Renderer(self.env.model, side, side)
        except Exception as error:  # of OpenGL, each platform its own
            raise no_gl(error) from error
        for flag in (self.mujoco.mjtRndFlag.mjRND_SHADOW, self.mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0
        # also at Python's exit: left to its own __del__, it complains when OpenGL has gone first
        self.closing = weakref.finalize(self, renderer.close)
        return renderer

    def close(self) -> None:
        if self.renderer is not None:
            self.closing()
            self.renderer = None


def arm_limits() -> SafeActions:
    """What may be sent to an `Arm`."""
    return SafeActions([-1] * ACTION_DIM, [1] * ACTION_DIM, hold_still(ACTION_DIM))


def import_metaworld():
    """(environments, scripted policies, mujoco)."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # no display needed; read when mujoco is imported
        # Mesa draws with an LLVM of its own. Triton's, which torch imports when an optimiser is made, crashes if it comes second.
        with suppress(ImportError):
            import triton  # noqa: F401
    try:
        import mujoco
        from metaworld import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        if "OpenGL" in str(error) or "EGL" in str(error):
            raise no_gl(error) from error
        raise SimulatorError(
            f"the simulator needs Meta-World ({error}): pip install 'nanochat-vision[robot]'"
        ) from error
    except (AttributeError, RuntimeError) as error:  # how PyOpenGL says that there is no libEGL
        raise no_gl(error) from error
    return ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE, ENV_POLICY_MAP, mujoco


def no_gl(error: Exception) -> SimulatorError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SimulatorError(
        f"the simulator cannot draw here ({reason[:200]}): on Debian or Ubuntu, apt-get install libegl1 libgl1-mesa-dri, "
        "and set MUJOCO_GL=egl"
    )
