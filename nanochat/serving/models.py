"""What a server serves: models by name, each behind its own batcher. No torch."""

import time
from dataclasses import dataclass, field
from typing import Protocol

from nanochat.data.sample import CAPTION_PROMPT
from nanochat.serving.batching import Batcher
from nanochat.serving.problems import ApiError


class Limits(Protocol):
    """Of one request, see `cli.serve.LimitFlags`."""

    max_pixels: int
    max_pictures: int
    max_seconds: float


@dataclass
class Served:
    """A model that clients can ask. agent: `nanochat.agent.Agent`."""

    name: str
    agent: object
    batcher: Batcher
    created: int = field(default_factory=lambda: int(time.time()))

    def described(self) -> dict:
        """As it stands in /v1/models."""
        agent, config = self.agent, self.agent.model.config
        sees = bool(agent.places_per_image)
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "nanochat",
            "modalities": {"input": ["text", "image"] if sees else ["text"], "output": ["text"]},
            "context_length": config.sequence_len,
            "images": agent.images_learnt if sees else 0,
            "multi_turn": agent.multi_turn,
            "learnt": agent.learnt,
            "caption_prompt": CAPTION_PROMPT if agent.learnt["captions"] else None,
            "acts": hasattr(config, "action_dim"),
        }  # fmt: skip


class Models:
    """Served models by name; the first one answers where a request names none."""

    def __init__(self, served: dict[str, Served]):
        self.served = served

    def find(self, name: str | None) -> Served:
        """Raises ApiError 404 for a name that is not there."""
        if name is None and self.served:
            return next(iter(self.served.values()))
        if name not in self.served:
            there = ", ".join(self.served) or "none"
            raise ApiError(
                404, f"there is no model {str(name)[:100]!r} here, only: {there}", "model", "model_not_found"
            )
        return self.served[name]

    def close(self) -> None:
        for served in self.served.values():
            served.batcher.close()
