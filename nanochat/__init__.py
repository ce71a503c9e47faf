"""A small vision-language-action model: YOLOv9 encoder, projector, nanochat-style GPT. Start at `nanochat.agent.Agent`."""

__version__ = "0.1.0"
