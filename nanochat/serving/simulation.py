"""POST /simulator: the policy drives Meta-World's arm, and each chunk of actions is streamed with the picture it was made from.
For the page. No torch."""

import asyncio
import base64
import io
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from PIL import Image

from nanochat.metaworld.instructions import INSTRUCTIONS, task_list
from nanochat.metaworld.scene import project
from nanochat.metaworld.simulator import ACTION_DIM, CAMERA, MAX_STEPS, STATE_DIM, Arm, is_installed
from nanochat.serving.chat import SSE, sse
from nanochat.serving.openpi import RobotPolicy, Run
from nanochat.serving.problems import ApiError
from nanochat.serving.requests import Busy
from nanochat.serving.schema import SimulatorRequest

EXECUTE = 5  # actions of a chunk before the policy is asked again, as in the demo
METRES = 0.01  # that an action of 1 moves the hand in Meta-World


def can_simulate(policy: RobotPolicy | None) -> bool:
    """Whether the policy is one for Meta-World's arm, and Meta-World is installed."""
    if policy is None or not is_installed():
        return False
    return (policy.metadata.get("action_dim"), policy.metadata.get("state_dim")) == (ACTION_DIM, STATE_DIM)


def simulation_router(policy: RobotPolicy, run: Run) -> APIRouter:
    """run: see `actions_router`."""
    router, simulator = APIRouter(tags=["actions"]), Simulator(policy, run)

    @router.get("/simulator", summary="The tasks of the simulator, each with its instruction")
    async def tasks():
        return {"tasks": [{"name": name, "instruction": INSTRUCTIONS[name][0]} for name in task_list(["mt50"])]}

    @router.post("/simulator", summary="Drive the simulated arm; a stream of pictures and actions")
    async def drive(body: SimulatorRequest):
        if body.task not in INSTRUCTIONS:
            raise ApiError(404, f"there is no task {body.task[:60]!r}: GET /simulator lists them", "task")
        frames = simulator.episode(body.task, body.instruction or INSTRUCTIONS[body.task][0], body.seed)
        return StreamingResponse(sse(frames), media_type=SSE, headers={"Cache-Control": "no-store"})

    return router


class Simulator:
    """One episode at a time. OpenGL belongs to one thread, in which all simulation runs."""

    def __init__(self, policy: RobotPolicy, run: Run):
        self.policy, self.run = policy, run
        self.thread, self.driving = ThreadPoolExecutor(1, "nanochat-simulator"), threading.Lock()

    async def episode(self, task: str, instruction: str, seed: int) -> AsyncIterator[dict]:
        """Frames until success, or until the steps are used up. Closing the iterator stops the arm. Raises Busy."""
        if not self.driving.acquire(blocking=False):
            raise Busy("the simulator is in use by another client: try again in 10 s", 10)
        loop, arm = asyncio.get_running_loop(), None
        try:
            metadata, act = self.policy.metadata, self.policy.session()
            cameras = metadata["cameras"] or (CAMERA,)
            arm = await loop.run_in_executor(self.thread, Arm, task, metadata["image_size"], cameras)
            scene = await loop.run_in_executor(self.thread, arm.reset, seed)
            while True:
                images = await loop.run_in_executor(self.thread, arm.images)
                ended = scene.success or arm.steps >= MAX_STEPS
                named = {f"observation/{name}": image for name, image in images.items()} if metadata["cameras"] else {}
                seen = {
                    "observation/image": images[cameras[0]],
                    "observation/state": scene.state,
                    "prompt": instruction,
                }
                actions = np.zeros((0, ACTION_DIM))
                if not ended:
                    actions = (await self.run(partial(act, seen | named)))["actions"][:EXECUTE]
                yield frame(arm.steps, images[cameras[0]], scene.state, actions, scene.success, ended)
                if ended:
                    return
                scene = await loop.run_in_executor(self.thread, carry_out, arm, actions)
        finally:
            if arm is not None:
                self.thread.submit(arm.close)
            self.driving.release()


def carry_out(arm: Arm, actions: np.ndarray):
    """The scene after some actions, or after the one that solved the task."""
    for action in actions:
        scene = arm.step(action)
        if scene.success or arm.steps == MAX_STEPS:
            break
    return scene


def frame(step: int, image: np.ndarray, state: np.ndarray, actions: np.ndarray, success: bool, ended: bool) -> dict:
    """What the page draws. path: where the actions are meant to take the hand, x and y of the picture in 0..1."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    hand = state[:3] + METRES * np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:, :3], 0)])
    return {
        "step": step, "of": MAX_STEPS, "success": success, "ended": ended,
        "image": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}",
        "path": np.nan_to_num(project(hand), nan=-1).round(4).tolist(),
        "actions": np.round(actions, 4).tolist(),
    }  # fmt: skip
