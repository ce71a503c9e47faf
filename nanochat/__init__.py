"""nanochat that sees and says: YOLOv9 eyes, a small GPT, one training command, one question command."""

__version__ = "0.1.0"
