"""Deprecated: use nanochat.agent, nanochat.checkpoint.locate and nanochat.conversation.user_message. This module will be
removed in the next release."""

import warnings

from nanochat.agent import Agent, Chat
from nanochat.conversation import user_message
from nanochat.shipped import ASSETS, SHIPPED, shipped_folder

__all__ = ["ASSETS", "SHIPPED", "Assistant", "Chat", "resolve_checkpoint", "user_message"]

warnings.warn("nanochat.assistant is deprecated: use nanochat.agent (Agent, Chat)", DeprecationWarning, stacklevel=2)


class Assistant(Agent):
    """An Agent with the constructor of release 0.1."""

    def __init__(self, model, tokenizer, multi_turn: bool = False):
        super().__init__(model, tokenizer, {"multi_turn": multi_turn})

    @classmethod
    def load(cls, name: str = "default", device="cpu") -> "Assistant":
        agent = Agent.load(name, device)
        return cls(agent.model, agent.tokenizer, agent.multi_turn)


def resolve_checkpoint(name: str) -> str:
    return str(shipped_folder(name) or name)
