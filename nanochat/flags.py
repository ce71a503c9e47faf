"""Flags that several commands share, and the objects they describe. Heavy imports wait until a command runs."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nanochat.errors import UserError

Out = Annotated[Path, arg(aliases=["-o"], help="Where to write the result.")]
MaybeOut = Annotated[Path | None, arg(aliases=["-o"], help="Where to write the result.")]
JsonOut = Annotated[Path | None, arg(name="json", help="Also write the results to this JSON file.")]
JsonRows = Annotated[
    Path | None,
    arg(
        name="json",
        metavar="[FILE]",
        help="Write the results as JSON, one object per answer: to FILE, which is a .json (a list) or .jsonl (one per line) "
        "file, or without FILE to the standard output, one per line.",
    ),
]
Frames = Annotated[
    int | None,
    arg(
        help="How many pictures to take of each video, folder or glob, evenly spaced in time or order: "
        "clip.mp4 --frames 8. Videos need PyAV (pip install av)."
    ),
]
Beams = Annotated[
    int,
    arg(
        help="Beam search: follow this many answers at once and take the likeliest; 1 is greedy, 3 is usual for captions."
    ),
]
Camera = Annotated[int | None, arg(help="Take the picture with this camera, 0 for the first. Needs OpenCV.")]
Pictures = Annotated[
    Positional[tuple[str, ...]],
    arg(
        metavar="IMAGE...",
        help="Image files, folders, quoted globs such as 'photos/**/*.jpg', or - for the standard input. A broken picture that "
        "you name is an error; broken ones of a folder or a glob are left out and counted.",
        help_behavior_hint="",
    ),
]
CHECKPOINT = (
    "A checkpoint folder, a hub name (owner/name), or a model that ships: `photos`, `photos-yolo`, `shapes` or `robot`."
)
Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT", help=CHECKPOINT)]
Device = Annotated[str, arg(help="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.")]


Runtime = Annotated[
    Literal["auto", "torch", "onnx"],
    arg(
        help="What runs the model: a checkpoint runs on torch, a folder of `nanochat export` on ONNX Runtime. With onnx, a "
        "checkpoint is exported to the cache first."
    ),
]


def load_agent(name: str, device: str, runtime: str):
    """An `agent.Agent` from the flags --checkpoint, --device and --runtime."""
    from nanochat.agent import Agent
    from nanochat.onnx.folder import is_export

    if runtime == "onnx" and not is_export(name):
        from nanochat.export import cached_export

        name = cached_export(name)
    return Agent.load(name, device, runtime)


@dataclass(frozen=True)
class SamplingFlags:
    """Which model answers, and how it chooses its tokens."""

    checkpoint: Annotated[str, arg(help=CHECKPOINT)] = "photos"
    device: Device = "auto"
    runtime: Runtime = "auto"
    max_new_tokens: int | None = None
    "Maximum length of an answer; by default what fits the context, up to 64."
    temperature: float = 0.0
    "0 always takes the most likely token (greedy); higher values sample more randomly."
    top_k: int | None = None
    "Sample only from the k most likely tokens."
    top_p: float | None = None
    "Sample only from the most likely tokens that together have this probability."
    min_p: float | None = None
    "Sample only from tokens with at least this share of the highest probability, such as 0.1."
    repetition_penalty: float = 1.0
    "Values above 1 make tokens that are already in the answer less likely."
    seed: int = 0
    "Seed of the sampling; the same seed gives the same answer."

    def sampling(self):
        from nanochat.sampling import Sampling

        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, seed=self.seed,
        )  # fmt: skip

    def agent(self):
        if not self.checkpoint.strip():
            raise UserError("the name in --checkpoint is empty: leave the flag out for the default")
        return load_agent(self.checkpoint, self.device, self.runtime)


@dataclass(frozen=True)
class EncoderFlags:
    """Which vision encoder, and its input size."""

    weights: str | None = None
    """Official name (yolov9t.pt, ...), .pt file, .yaml file (random weights), efficientnet_lite2, timm:NAME, or a checkpoint,
    whose encoder is used (embed: or an exported one); default $NANOCHAT_YOLO_WEIGHTS, then yolov9t.pt."""
    image_size: int | None = None
    "Side of the square input in pixels, a multiple of 32; default 640, 224 for timm's, or the checkpoint's."
    device: Device = "auto"
    trust_pickle: bool = False
    "Also load .pt files that contain other objects than a plain detector. They can run any code: only for files you trust."

    def encoder(self):
        if self.weights is not None and not self.weights.strip():
            raise UserError("the name in --weights is empty: leave the flag out for the default")
        from nanochat.checkpoint import encoder_of
        from nanochat.devices import pick_device

        name = self.weights or os.environ.get("NANOCHAT_YOLO_WEIGHTS") or ""
        encoder = encoder_of(self.weights, pick_device(self.device), self.trust_pickle)
        if name.lower().endswith((".yaml", ".yml")):
            print(
                f"note: {name} describes a model without weights: they are random, so detections and embeddings mean nothing; "
                "use --weights yolov9t.pt, another .pt file, or a checkpoint",
                file=sys.stderr,
            )
        if self.image_size is not None:
            encoder.image_size = self.image_size
        return encoder


def check_out(out: Path, *suffixes: str) -> None:
    """Raises ValueError or OSError, before any work is done, if the result could not be written to `out`."""
    if suffixes and out.suffix.lower() not in suffixes:
        raise UserError(f"{out} should end in {' or '.join(suffixes)}")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder, expected the name of a file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: there is no folder {out.parent}, create it first")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"cannot write {out}: no permission to write to the folder {out.parent}")


def next_step(hint: str) -> None:
    """Say what to do with a result. On the standard error, so that the standard output has results only."""
    print(f"next: {hint}", file=sys.stderr)


def say_where(out: Path | None) -> None:
    if out is not None:
        print(f"results in {out}")
