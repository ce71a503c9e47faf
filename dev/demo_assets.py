"""Writes nanochat/assets/demo: a picture with questions and answers, and a recorded episode for machines that cannot render.

    python dev/demo_assets.py [CHECKPOINT]

and the picture of the README, docs/demo.png with its docs/demo.gif: one photograph, and the arm.

    python dev/demo_assets.py readme

The photograph is grace_hopper.jpg, a work of the US government and so in the public domain; the other photographs of the demo
must not be in this repository. Seeds are small, so no policy was trained on them. Run it again when a new model ships.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.agent import Agent
from nanochat.demo import ASSETS, drive_arm, run_demo
from nanochat.demo_photos import packaged_photographs
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.scene import scene_questions
from nanochat.metaworld.simulator import Arm

DOCS = Path(__file__).parents[1] / "docs"
KINDS = ("task", "gripper", "cell")  # of the questions
EPISODE_FRAMES = 24


def main(checkpoint: str) -> None:
    if checkpoint == "readme":
        (free,) = [photograph for photograph in packaged_photographs() if photograph[0] == "grace_hopper.jpg"]
        run_demo(DOCS / "demo.png", "door-open", 0, photographs=[free])
        return
    ASSETS.mkdir(exist_ok=True)
    agent = Agent.load(checkpoint)
    size = agent.metadata["image_size"]
    write_frame("drawer-open", 7, 45, size)
    write_episode(agent, "door-open", 1, size)


def write_frame(task: str, seed: int, step: int, size: int) -> None:
    """The scene after some steps of the scripted expert, with questions and answers about it."""
    arm = Arm(task, size)
    scene = arm.reset(seed)
    for _ in range(step):
        scene = arm.step(arm.expert_action())
    Image.fromarray(arm.image()).save(ASSETS / "frame.png")
    arrays = scene.environment_state[None], np.array([scene.success]), np.array([scene.held])
    found = {q.kind: q for q in scene_questions(task, *arrays, 0, 0, np.random.default_rng(0))}
    questions = [(found[kind].question, found[kind].answer) for kind in KINDS]
    about = {
        "image": "frame.png",
        "source": f"{task}, seed {seed}, step {step}",
        "description": found["describe"].answer,
    }
    (ASSETS / "questions.json").write_text(json.dumps(about | {"questions": questions}, indent=1))


def write_episode(agent: Agent, task: str, seed: int, size: int) -> None:
    """The frames of an episode side by side in one picture."""
    arm = Arm(task, size)
    arm.reset(seed)
    frames = drive_arm(agent, arm, INSTRUCTIONS[task][0])
    chosen = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, EPISODE_FRAMES).round().astype(int))]
    Image.fromarray(np.concatenate([frame.image for frame in chosen], 1)).save(ASSETS / "recorded.png")
    about = {
        "instruction": INSTRUCTIONS[task][0],
        "source": f"a recorded episode ({task}, seed {seed})",
        "steps": [frame.step for frame in chosen],
        "success": chosen[-1].done,
    }
    (ASSETS / "recorded.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["robot"]))
