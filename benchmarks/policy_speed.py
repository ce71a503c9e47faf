"""Time from a camera frame to a chunk of actions, one frame at a time, as on a robot.

    python benchmarks/policy_speed.py [CHECKPOINT ...] [--threads 2] [--rounds 50]

Each checkpoint is timed alternately with a peer, so that other load on the machine affects both: torchvision's ResNet-18 with
random weights, the vision encoder of ACT and Diffusion Policy, on images of the policy's size and of 224 pixels. The peer only
encodes the image; what those policies compute after it is not included. A policy of the same shape with two cameras, whose
weights are random, gets pictures of 480 x 640 pixels: making them small is included. Medians of the time that passes, and of the
time that the process itself computes.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torchvision
import tyro

from nanochat.agent import Agent
from nanochat.robot_gpt import RobotGPT


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ("robot",)
    "Checkpoint folders, or `robot`, the shipped policy."
    threads: int = 2
    rounds: int = 50


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    peer = torchvision.models.resnet18().eval()
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds; ms, median (25 % .. 75 %)")
    for name in args.checkpoints:
        agent = Agent.load(name)
        rng = np.random.default_rng(0)
        size, state_dim = agent.metadata["image_size"], agent.metadata["state_dim"]
        frames = rng.integers(0, 256, (args.rounds + 5, size, size, 3), np.uint8)
        states = rng.uniform(0, 0.5, (args.rounds + 5, state_dim)).astype(np.float32)
        small, large = torch.rand(1, 3, size, size), torch.rand(1, 3, 224, 224)
        two, seen = with_two_cameras(agent), list(rng.integers(0, 256, (2, 480, 640, 3), np.uint8))
        ours, both, same_size, usual_size = [], [], [], []
        for image, state in zip(frames, states, strict=True):
            one = image if len(agent.metadata["cameras"]) < 2 else dict.fromkeys(agent.metadata["cameras"], image)
            ours.append(timed(lambda: agent.act([one], state[None], ["open the door"])))  # noqa: B023
            pictures = {"front": np.roll(seen[0], len(both), 0), "wrist": np.roll(seen[1], len(both), 0)}
            both.append(timed(lambda: two.act([pictures], state[None], ["open the door"])))  # noqa: B023
            same_size.append(timed(lambda: peer(small)))  # noqa: B023
            usual_size.append(timed(lambda: peer(large)))  # noqa: B023
        for label, times in (
            (f"{name} ({agent.model.num_parameters():,} parameters)", ours),
            ("the same shape, two cameras of 480 x 640", both),
            (f"ResNet-18 alone, {size} pixels", same_size),
            ("ResNet-18 alone, 224 pixels", usual_size),
        ):
            passed, own = 1e3 * np.array(times[5:]).T  # the first rounds warm up
            low, middle, high = np.quantile(passed, (0.25, 0.5, 0.75))
            print(f"{label:50s} {middle:7.2f}  ({low:.2f} .. {high:.2f}), own {np.median(own):.2f}")


def with_two_cameras(agent: Agent) -> Agent:
    """A policy of the same shape that reads the cameras front and wrist, with random weights and the same encoder."""
    model = RobotGPT(replace(agent.model.config, cameras=["front", "wrist"]))
    model.init_weights()
    model.attach_encoder(agent.model.vision_encoder)
    return Agent(model.eval(), agent.tokenizer)


@torch.inference_mode()
def timed(call) -> tuple[float, float]:
    """Seconds that passed, and seconds of this process on all of its threads."""
    since, own = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - since, time.process_time() - own


if __name__ == "__main__":
    main(tyro.cli(Args))
