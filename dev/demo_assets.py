"""Makes nanochat/assets/demo: a frame with questions and their answers, and a recorded episode for machines that cannot draw.

    python dev/demo_assets.py [CHECKPOINT]

Seeds are small: no policy was trained on them. Run it again when a new policy ships.
"""

import json
import sys

import numpy as np
from PIL import Image

from nanochat.assistant import Assistant
from nanochat.demo import ASSETS, drive
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.scene import scene_questions
from nanochat.metaworld.simulator import Arm
from nanochat.policy import Policy

ASKED = ("task", "gripper", "cell")
RECORDED = 24  # frames


def main(checkpoint: str) -> None:
    ASSETS.mkdir(exist_ok=True)
    policy = Policy.load(checkpoint)
    size = policy.model.config.vision_image_size
    write_frame("drawer-open", 7, 45, size)
    write_episode(policy, "door-open", 1, size)


def write_frame(task: str, seed: int, step: int, size: int) -> None:
    """What the expert has brought about after some steps, and what there is to say about it."""
    arm = Arm(task, size)
    scene = arm.reset(seed)
    for _ in range(step):
        scene = arm.step(arm.expert_action())
    Image.fromarray(arm.image()).save(ASSETS / "frame.png")
    arrays = scene.environment_state[None], np.array([scene.success]), np.array([scene.held])
    found = {q.kind: q for q in scene_questions(task, *arrays, 0, 0, np.random.default_rng(0))}
    questions = [(found[kind].question, found[kind].answer) for kind in ASKED]
    about = {
        "image": "frame.png",
        "source": f"{task}, seed {seed}, step {step}",
        "description": found["describe"].answer,
    }
    (ASSETS / "questions.json").write_text(json.dumps(about | {"questions": questions}, indent=1))


def write_episode(policy: Policy, task: str, seed: int, size: int) -> None:
    """Frames side by side in one picture."""
    arm = Arm(task, size)
    arm.reset(seed)
    film = drive(policy, Assistant(policy.model, policy.tokenizer), arm, INSTRUCTIONS[task][0])
    chosen = [film[i] for i in np.unique(np.linspace(0, len(film) - 1, RECORDED).round().astype(int))]
    Image.fromarray(np.concatenate([shot.image for shot in chosen], 1)).save(ASSETS / "recorded.png")
    about = {
        "instruction": INSTRUCTIONS[task][0],
        "source": f"a recorded episode ({task}, seed {seed})",
        "steps": [shot.step for shot in chosen],
        "success": chosen[-1].done,
    }
    (ASSETS / "recorded.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["robot"]))
