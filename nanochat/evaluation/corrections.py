"""A policy that drives while demonstrations are recorded, so that the expert corrects what it does (DAgger: Ross et al. 2011,
arXiv 1011.0686).

    record_demonstrations(..., policy=Driving("runs/mt50"))

Noise shows how to return to the path from anywhere near it; a policy leads to where it goes astray itself.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from nanochat.agent import Agent
from nanochat.evaluation.rollout import Act, acting
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.simulator import CAMERA


@dataclass
class Driving:
    """The policy of a checkpoint, as it drives in a rollout: `execute` actions of each chunk. cameras: those that it reads. It
    can be sent to another process, which loads the checkpoint when it first needs it."""

    checkpoint: str
    cameras: tuple[str, ...] = (CAMERA,)
    execute: int = 5
    chunk: list[np.ndarray] = field(default_factory=list, repr=False)

    def begin(self) -> None:
        """Forget the actions that are left: others have been executed since."""
        self.chunk = []

    def action(self, images: dict[str, np.ndarray], state: np.ndarray, task: str) -> np.ndarray:
        """The action of this step, (4,). images: camera -> (S, S, 3) uint8; state: (4,) float32."""
        if not self.chunk:
            shown = {camera: images[camera] for camera in self.cameras}
            chunk = loaded(self.checkpoint)([shown], state[None], [INSTRUCTIONS[task][0]])[0]
            self.chunk = list(chunk[: self.execute])
        return self.chunk.pop(0)


@lru_cache(maxsize=1)
def loaded(checkpoint: str) -> Act:
    torch.set_num_threads(1)  # the fastest for a small network, and processes share the cores
    agent = Agent.load(checkpoint)
    agent.check_can_act()
    return acting(agent)
