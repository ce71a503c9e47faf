"""examples/vla_eval_policy.py with stand-ins for vla-eval's base classes, which have the names and signatures of release 0.8."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from nanochat.errors import UserError

EXAMPLE = Path(__file__).parents[1] / "examples" / "vla_eval_policy.py"


class PredictModelServer:
    def __init__(self, *, chunk_size=None):
        self.chunk_size = chunk_size

    async def on_episode_start(self, config, ctx):
        pass


class Policy:
    """Twice the state, in a chunk of ten, from the brightness of the first picture."""

    action_range = ([-1.0, -1.0], [1.0, 1.0])

    def __init__(self, cameras=()):
        self.metadata = {"chunk": 10, "action_dim": 2, "state_dim": 2, "cameras": cameras, "targets": "relative"}

    def act(self, images, states, instructions):
        shown = images[0][self.metadata["cameras"][0]] if self.metadata["cameras"] else images[0]
        assert instructions == ["open the door"]
        return np.repeat(2 * states[:, None] * (shown.mean() / 255), 10, 1).astype(np.float32)


@pytest.fixture
def example(monkeypatch):
    stands_for = {
        "benchmarks.base": {"StepBenchmark": type("StepBenchmark", (), {}), "StepResult": SimpleNamespace},
        "model_servers.predict": {"PredictModelServer": PredictModelServer},
        "specs": dict.fromkeys(("IMAGE_RGB", "LANGUAGE", "RAW"), "a spec"),
    }
    for name in ("vla_eval", "vla_eval.benchmarks", "vla_eval.model_servers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, what in stands_for.items():
        module = ModuleType(name)
        vars(module).update(what)
        monkeypatch.setitem(sys.modules, f"vla_eval.{name}", module)
    spec = importlib.util.spec_from_file_location("vla_eval_policy", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_observation_of_the_harness_becomes_safe_actions(example, monkeypatch):
    monkeypatch.setattr(example.Agent, "load", lambda name, device: Policy())
    server, ctx = example.NanochatPolicy("mine", execute=4), SimpleNamespace(session_id="a")
    assert server.chunk_size == 4 and server.get_observation_params() == {"send_state": True}
    asyncio.run(server.on_episode_start({}, ctx))
    picture = np.full((8, 8, 3), 255, np.uint8)
    seen = {"images": {"agentview": picture}, "states": [0.25, 5.0], "task_description": "open the door"}
    found = server.predict(seen, ctx)["actions"]
    np.testing.assert_array_equal(found, [[0.5, 1.0]] * 4)  # within the range of the training data
    with pytest.raises(UserError, match="must be a .* uint8 array"):
        server.predict(seen | {"images": {}}, ctx)


def test_cameras_are_found_by_name(example, monkeypatch):
    monkeypatch.setattr(example.Agent, "load", lambda name, device: Policy(["wrist"]))
    server, ctx = example.NanochatPolicy("mine", execute=None), SimpleNamespace(session_id="a")
    asyncio.run(server.on_episode_start({}, ctx))
    dark, bright = (np.full((8, 8, 3), value, np.uint8) for value in (0, 255))
    seen = {"images": {"front": dark, "wrist": bright}, "state": [0.5, 0.0], "task_description": "open the door"}
    np.testing.assert_array_equal(server.predict(seen, ctx)["actions"], [[1.0, 0.0]] * 10)
    with pytest.raises(UserError, match="observation/wrist"):
        server.predict(seen | {"images": {"front": dark}}, ctx)
