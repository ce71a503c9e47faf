"""Meta-World (Yu et al. 2019, arXiv 1910.10897) as a robot: a camera image, the gripper's own state, and success.

Only this module imports metaworld and mujoco, and only when an arm is built. Shadows, reflections and multisampling are off,
because they take 90 % of the software renderer's time; edges are smoothed by rendering at twice the size.
"""

import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from nanochat.errors import UserError, install
from nanochat.metaworld.scene import CAMERA_POSITION
from nanochat.safety import SafeActions, hold_still

CAMERA = "corner2"
UPSIDE_DOWN = (CAMERA,)  # mounted so: its pictures are rotated by 180 degrees
FPS = 80  # control steps per second of simulated time
MAX_STEPS = 500
ACTION_DIM = 4  # motion of the hand along x, y, z and of the fingers, each in -1..1
STATE_DIM = 4  # hand x, y, z in metres, opening of the fingers; the rest of the observation is about objects
OVERSAMPLING = 2


class SimulatorError(ImportError):
    """Meta-World or OpenGL is missing; the message says what to install."""


@dataclass
class Scene:
    """The observation after a step.

    state: (4,) float32, the robot's own state.
    environment_state: (39,) float32, Meta-World's whole observation: for experts and questions, never for a policy.
    success: the task is solved in this step.
    held: the same body presses against both fingers.
    """

    state: np.ndarray
    environment_state: np.ndarray
    success: bool
    held: bool


class Arm:
    """A simulated Sawyer arm with one task, such as "door-open" (Meta-World's name without its version).

    image_size: side of the square camera images in pixels. cameras: their names; gripperPOV looks past the fingers.

    Raises:
        SimulatorError: the simulator cannot run on this machine.
        ValueError: Meta-World has no such task or camera.
    """

    def __init__(self, task: str, image_size: int = 128, cameras: Sequence[str] = (CAMERA,)):
        environments, policies, self.mujoco = import_metaworld()
        if f"{task}-v3" not in policies:
            raise UserError(f"Meta-World has no task {task!r}: nanochat record --help lists the names")
        self.task, self.image_size, self.cameras = task, image_size, tuple(cameras)
        self.make_policy = policies[f"{task}-v3"]
        self.env = environments[f"{task}-v3-goal-observable"]()
        # Meta-World ignores reset(seed=...): the layout comes from the environment's own generator
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        model = self.env.model
        names = [model.cam(number).name for number in range(model.ncam)]
        if unknown := [name for name in self.cameras if name not in names]:
            raise UserError(f"Meta-World has no camera {', '.join(unknown)}: its cameras are {', '.join(names)}")
        model.cam(CAMERA).pos[:] = CAMERA_POSITION
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = OVERSAMPLING * image_size
        self.fingers = [model.geom(f"{side}pad_geom").id for side in ("left", "right")]
        self.renderer = None

    def reset(self, seed: int) -> Scene:
        """Start an episode. The seed determines the layout of the scene."""
        self.env.seed(int(seed))
        self.env.reset()
        # Meta-World moves doors and goals after its last observation; without this they would jump at the first step
        self.mujoco.mj_forward(self.env.model, self.env.data)
        self.observation = self.env._get_obs()
        self.expert, self.steps = self.make_policy(), 0
        return self.scene(success=False)

    def step(self, action: np.ndarray) -> Scene:
        """Execute one action, (4,) in -1..1. Raises ValueError for another action, or after MAX_STEPS."""
        action = np.asarray(action, np.float32)
        if action.shape != (ACTION_DIM,) or not np.all(np.abs(action) <= 1):
            raise UserError(f"an action must be {ACTION_DIM} numbers in -1..1, found {action}")
        self.observation, _, _, _, info = self.env.step(action)
        self.steps += 1
        return self.scene(success=bool(info["success"]))

    def scene(self, success: bool) -> Scene:
        everything = self.observation.astype(np.float32)
        return Scene(everything[:STATE_DIM].copy(), everything, success, self.holds())

    def holds(self) -> bool:
        """Whether one body that is not the arm presses against both fingers."""
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
        """The action of Meta-World's scripted policy, which reads the whole state: (4,) float32 in -1..1."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about its high gains, which are intended; the environment clips actions too
            action = self.expert.get_action(self.observation)
        return np.clip(action, -1, 1).astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        """What each camera sees now, see `image`."""
        return {camera: self.image(camera) for camera in self.cameras}

    def image(self, camera: str | None = None) -> np.ndarray:
        """The current image of a camera, by default the first: (S, S, 3) uint8 RGB, upright. Raises SimulatorError if nothing can
        be rendered on this machine."""
        camera = camera or self.cameras[0]
        size, n = self.image_size, OVERSAMPLING
        if self.renderer is None:
            self.renderer = self.open_renderer()
        self.renderer.update_scene(self.env.data, camera=camera)
        large = self.renderer.render()
        large = large[::-1, ::-1] if camera in UPSIDE_DOWN else large
        return large.reshape(size, n, size, n, 3).mean((1, 3)).round().astype(np.uint8)

    def open_renderer(self):
        side = OVERSAMPLING * self.image_size
        try:
            renderer = self.mujoco.Renderer(self.env.model, side, side)
        except Exception as error:  # each OpenGL platform has its own exceptions
            raise no_gl(error) from error
        for flag in (self.mujoco.mjtRndFlag.mjRND_SHADOW, self.mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0
        # also runs at Python's exit, before OpenGL is unloaded: the renderer's own __del__ would be too late
        self.closing = weakref.finalize(self, renderer.close)
        return renderer

    def close(self) -> None:
        if self.renderer is not None:
            self.closing()
            self.renderer = None


def arm_limits() -> SafeActions:
    """The limits of the actions that may be sent to an `Arm`."""
    return SafeActions([-1] * ACTION_DIM, [1] * ACTION_DIM, hold_still(ACTION_DIM))


def is_installed() -> bool:
    return find_spec("metaworld") is not None


def import_metaworld():
    """(environments, scripted policies, the module mujoco). Raises SimulatorError."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # needs no display; read when mujoco is imported
        # Mesa renders with its own LLVM. Triton's LLVM, which torch loads with an optimiser, crashes if it is loaded second.
        with suppress(ImportError):
            import triton  # noqa: F401
    try:
        import mujoco
        from metaworld import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        if "OpenGL" in str(error) or "EGL" in str(error):
            raise no_gl(error) from error
        raise SimulatorError(f"the simulator needs Meta-World ({error}): {install('robot')}") from error
    except (AttributeError, RuntimeError) as error:  # PyOpenGL raises these if there is no libEGL
        raise no_gl(error) from error
    return ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE, ENV_POLICY_MAP, mujoco


def no_gl(error: Exception) -> SimulatorError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SimulatorError(
        f"the simulator cannot render on this machine ({reason[:200]}): on Debian or Ubuntu, "
        "apt-get install libegl1 libgl1-mesa-dri, and set MUJOCO_GL=egl"
    )
