"""Names of release 0.1 that still work for one release, and warn."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nanochat.agent import Agent
from nanochat.checkpoint import ASSETS, SHIPPED
from nanochat.conversation import user_message

PICTURE = ASSETS / "pictures" / "0.png"
QUESTION = "what color is the shape?"


def import_again(name):
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated: use nanochat.agent") as caught:
        module = importlib.import_module(name)
    assert len(caught) == 1
    return module


def test_assistant_forwards_to_the_agent():
    old = import_again("nanochat.assistant")
    assistant = old.Assistant.load("shapes")
    assert "".join(assistant.ask(QUESTION, assistant.look(PICTURE))) == "red"
    assert "".join(old.Chat(assistant, assistant.look(PICTURE)).say(QUESTION)) == "red"
    assert not assistant.multi_turn
    assert old.Assistant(assistant.model, assistant.tokenizer, multi_turn=True).multi_turn
    assert old.user_message is user_message
    assert old.resolve_checkpoint("robot") == str(SHIPPED["robot"]) and old.resolve_checkpoint("a/b") == "a/b"


def test_policy_forwards_to_the_agent():
    old = import_again("nanochat.robot.policy")
    policy, agent = old.Policy.load("robot"), Agent.load("robot")
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    state = np.array([0.0, 0.6, 0.2, 1.0], np.float32)
    expected = agent.act([image], state[None], ["open the door"])
    np.testing.assert_allclose(policy([image], state[None], ["open the door"]), expected, atol=1e-5)
    observation = {"observation/image": image, "observation/state": state, "prompt": "open the door"}
    np.testing.assert_allclose(policy.act(observation)["actions"], expected[0], atol=1e-5)
    assert policy.metadata == agent.metadata and policy.training == agent.training
    served = old.Served(policy, execute=3, hold="last")
    low, high = agent.action_range
    np.testing.assert_allclose(served.session()(observation)["actions"], expected[0, :3].clip(low, high), atol=1e-5)
    with pytest.raises(ValueError, match="without an action head"):
        old.Policy.load("shapes")


def test_nothing_else_imports_the_old_names():
    package = Path(__file__).parents[1] / "nanochat"
    allowed = {package / "assistant.py", package / "robot/policy.py", package / "robot/__init__.py"}
    old = re.compile(r"nanochat\.(assistant|robot|policy)\b")
    using = [str(path) for path in package.rglob("*.py") if path not in allowed and old.search(path.read_text())]
    assert not using
