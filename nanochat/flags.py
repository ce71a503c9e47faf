"""Flags that several commands share, and what becomes of them. Heavy imports wait until a command runs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

Out = Annotated[Path, arg(aliases=["-o"], help="Where to write.")]
Pictures = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE...", help="Picture files.", help_behavior_hint="")]
Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]
DEVICE = "cpu, cuda, cuda:1, ...; auto is the GPU where there is one."


@dataclass(frozen=True)
class Speech:
    """How the model is asked to speak."""

    checkpoint: str = "default"
    "A checkpoint folder, a hub name, or a model that ships: `default` or `robot`."
    device: Annotated[str, arg(help=DEVICE)] = "auto"
    max_new_tokens: int | None = None
    "Length of an answer at most; default as many as fit the context, up to 64."
    temperature: float = 0.0
    "0 is greedy: always the likeliest token."
    top_k: int | None = None
    "Choose among the k likeliest tokens."
    top_p: float | None = None
    "Choose among the likeliest tokens that have this probability together."
    min_p: float | None = None
    "Choose among tokens that are at least so many times as likely as the likeliest, as 0.1."
    repetition_penalty: float = 1.0
    "Above 1, what was said is less likely to be said again."
    seed: int = 0
    "The same seed, the same answer."

    def sampling(self):
        from nanochat.sampling import Sampling

        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, seed=self.seed,
        )  # fmt: skip

    def assistant(self):
        from nanochat.assistant import Assistant
        from nanochat.training.run import pick_device

        return Assistant.load(self.checkpoint, pick_device(self.device))


@dataclass(frozen=True)
class Eyes:
    """Which encoder, and how it looks."""

    weights: str | None = None
    "Official name (yolov9t.pt, ...), .pt, .yaml (random weights), checkpoint or `default`; else $NANOCHAT_YOLO_WEIGHTS."
    image_size: int | None = None
    "Side of the square input in pixels, a multiple of 32; default 640, or the checkpoint's."
    device: Annotated[str, arg(help=DEVICE)] = "auto"
    trust_pickle: bool = False
    "Load a .pt file that holds more than a plain detector. It can run any code: only for files you made."

    def encoder(self):
        from nanochat.assistant import resolve_checkpoint
        from nanochat.checkpoint import load_encoder
        from nanochat.training.run import pick_device
        from nanochat.vision.yolov9 import YOLOv9Plus, checked_size

        device = pick_device(self.device)
        if self.weights and (self.weights == "default" or Path(self.weights).expanduser().is_dir()):
            encoder = load_encoder(resolve_checkpoint(self.weights), device)
        else:
            encoder = YOLOv9Plus(self.weights, device=device, trust_pickle=self.trust_pickle)
        if self.image_size is not None:
            encoder.image_size = checked_size(self.image_size)
        return encoder


def check_out(out: Path, *suffixes: str) -> None:
    """Raises ValueError or OSError, before any work, where the result could not be written in the end."""
    if suffixes and out.suffix not in suffixes:
        raise ValueError(f"{out} should end in {' or '.join(suffixes)}")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder, expected the name of a file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: there is no folder {out.parent}, make it first")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"cannot write {out}: you may not write to the folder {out.parent}")
