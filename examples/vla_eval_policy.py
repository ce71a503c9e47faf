"""A policy behind vla-eval's model server, and Meta-World as a benchmark for its harness. docs/SERVE.md leads there.

    python examples/vla_eval_policy.py --args.checkpoint robot --address 127.0.0.1:8001
    PYTHONPATH=examples vla-eval run --config examples/vla_eval.yaml --no-docker --render cpu

It runs in an environment with vla-eval 0.8 and nanochat-vision[robot,torch].
"""

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW

from nanochat.agent import Agent
from nanochat.evaluation.rollout import layout_seed
from nanochat.metaworld.instructions import INSTRUCTIONS, task_list
from nanochat.metaworld.simulator import CAMERA, MAX_STEPS, Arm
from nanochat.serving.policy import SafePolicy


class NanochatPolicy(PredictModelServer):
    """checkpoint: as `Agent.load` takes it. execute: actions of a chunk before the policy is asked again; None for all of them.
    Observations are in vla-eval's words: "images" by camera, "states" and "task_description". A policy with one camera that has
    no name reads the benchmark's first one."""

    def __init__(self, checkpoint: str = "robot", execute: int | None = 5, device: str = "cpu"):
        self.policy = SafePolicy(Agent.load(checkpoint, device), execute)
        super().__init__(chunk_size=self.policy.metadata["chunk"])
        self.robots = {}  # session -> its function of `SafePolicy.session`, which knows the last action

    def predict(self, obs: dict, ctx) -> dict:
        """{"actions": (execute, action_dim) float32}, within the range of the training data. Raises ValueError for a wrong
        observation."""
        images, names = obs.get("images", {}), self.policy.metadata["cameras"]
        shown = {f"observation/{name}": images[name] for name in names if name in images}
        if not names:
            shown = {"observation/image": next(iter(images.values()), None)}
        state = obs.get("states", obs.get("state"))
        robot = self.robots[ctx.session_id]
        return robot(shown | {"observation/state": state, "prompt": obs.get("task_description")})

    async def on_episode_start(self, config: dict, ctx) -> None:
        await super().on_episode_start(config, ctx)
        self.robots[ctx.session_id] = self.policy.session()

    def get_action_spec(self) -> dict:
        return {"actions": RAW}  # what the numbers mean is the checkpoint's: nothing is converted

    def get_observation_spec(self) -> dict:
        state = {"state": RAW} if self.policy.metadata["state_dim"] else {}
        return {"image": IMAGE_RGB, "language": LANGUAGE} | state

    def get_observation_params(self) -> dict:
        return {"send_state": bool(self.policy.metadata["state_dim"])}


class MetaWorld(StepBenchmark):
    """The simulated arm of `nanochat rollout`, with its layouts. tasks: names, mt10 or mt50."""

    render_backends = frozenset({"gpu", "cpu"})

    @classmethod
    def configure_render(cls, mode: str) -> dict:
        return {}  # MuJoCo finds what there is

    def __init__(self, tasks: tuple[str, ...] | list[str] = ("mt10",), image_size: int = 128, send_state: bool = True):
        super().__init__()
        self.tasks, self.image_size, self.arm = task_list(tasks), image_size, None

    def get_tasks(self) -> list[dict]:
        return [{"name": name} for name in self.tasks]

    def reset(self, task: dict):
        self.cleanup()
        self.arm = Arm(task["name"], self.image_size)
        return self.arm.reset(layout_seed(task["name"], task["episode_idx"]))

    def step(self, action: dict) -> StepResult:
        scene = self.arm.step(action["actions"])
        return StepResult(scene, float(scene.success), scene.success or self.arm.steps == MAX_STEPS, {})

    def make_obs(self, raw_obs, task: dict) -> dict:
        return {
            "images": {CAMERA: self.arm.image()},
            "task_description": INSTRUCTIONS[task["name"]][0],
            "states": np.asarray(raw_obs.state, np.float32),
        }

    def get_step_result(self, step_result: StepResult) -> dict:
        return {"success": step_result.obs.success}

    def get_action_spec(self) -> dict:
        return {"actions": RAW}

    def get_observation_spec(self) -> dict:
        return {"image": IMAGE_RGB, "language": LANGUAGE, "state": RAW}

    def get_metadata(self) -> dict:
        return {"max_steps": MAX_STEPS}

    def cleanup(self) -> None:
        if self.arm is not None:
            self.arm.close()


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(NanochatPolicy)
