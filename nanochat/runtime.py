"""Models without torch: a folder that `nanochat export` made, on ONNX Runtime.

from nanochat.runtime import load

agent = load("photos-onnx")
seen = agent.look("photo.jpg")                       # (1, N, D) numpy
"".join(agent.ask("is there a dog?", seen))
engine = Engine(agent.model)                         # rows that come and go: engine.add, engine.step, engine.drop
"""

from nanochat.agent import Agent
from nanochat.engine import Engine

__all__ = ["Engine", "load"]


def load(folder: str) -> Agent:
    """Raises CheckpointError for a folder that is incomplete or altered, or that a newer version made; UserError for another."""
    return Agent.load(folder, runtime="onnx")
