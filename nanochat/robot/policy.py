"""Deprecated: use nanochat.agent.Agent instead of Policy, and nanochat.serving.policy.SafePolicy instead of Served. This module
will be removed in the next release."""

import warnings

from nanochat.agent import Agent
from nanochat.serving.policy import SafePolicy, act_on

warnings.warn(
    "nanochat.robot.policy is deprecated: use nanochat.agent.Agent and nanochat.serving.policy.SafePolicy",
    DeprecationWarning,
    stacklevel=2,
)


class Policy:
    """An Agent with the interface of release 0.1."""

    def __init__(self, model, tokenizer, training: dict | None = None):
        self.agent = Agent(model, tokenizer, training)
        self.model, self.tokenizer, self.training = model, tokenizer, self.agent.training
        self.metadata = self.agent.metadata

    @classmethod
    def load(cls, name: str, device="cpu") -> "Policy":
        agent = Agent.load(name, device)
        return cls(agent.model, agent.tokenizer, agent.training)

    def __call__(self, images, states, instructions):
        return self.agent.act(images, states, instructions)

    def act(self, observation: dict) -> dict:
        return {"actions": act_on(self.agent, observation)}


class Served(SafePolicy):
    def __init__(self, policy: Policy, *args, **settings):
        super().__init__(policy.agent, *args, **settings)
