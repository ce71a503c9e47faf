"""`nanochat export`: from a checkpoint to a folder that runs on ONNX Runtime, without torch.

Every export is compared with the torch model before it takes its place: in float32 the logits must agree; in int8 it is said how
often the likeliest token is the same.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from nanochat import __version__
from nanochat.agent import Agent
from nanochat.cache import cache_folder, make_folder
from nanochat.checkpoint import load_checkpoint, locate, put_in_place, sibling
from nanochat.conversation import user_message
from nanochat.data.image_files import SUFFIXES
from nanochat.data.sample import CAPTION_PROMPT
from nanochat.engine import Unread
from nanochat.errors import UserError
from nanochat.export.decoder import export_attention, export_decoder, export_pictures, export_policy, export_states
from nanochat.export.encoder import export_encoder, takes_rectangles
from nanochat.export.graph import Weights
from nanochat.files import sha256, short_repr
from nanochat.onnx.folder import is_export, open_export, write_manifest
from nanochat.onnx.model import HEADS
from nanochat.vision.inference import probe_picture
from nanochat.vision.letterbox import square

CLOSE = 1e-4  # largest difference of logits in float32
MOST_PICTURES = 128  # to calibrate with
STEPS = 16  # tokens after which int8 is compared


@dataclass(frozen=True)
class Report:
    """bytes: of the folder. logits: the largest difference from torch. agreement: share of tokens whose likeliest one is the
    same. actions: the largest difference of actions, in half ranges; None for a model that does not act."""

    bytes: int
    logits: float
    agreement: float
    actions: float | None


def export(name: str, out: str | Path, int8: bool = False, calibrate: str | Path | None = None) -> Report:
    """Write the folder `out`, or replace an export that is there.

    int8: 8-bit weights and products. calibrate: a folder of pictures such as the model will see, to measure the encoder's
    ranges on. Raises UserError for what cannot be exported, before anything is written, and for an export that does not agree
    with torch.
    """
    out = Path(out).expanduser().resolve()
    check_target(out)
    if int8 and calibrate is None:
        check_text_model(name)
    model, tokenizer, training = load_checkpoint(name)
    check_exports(model, training, name)
    pictures = squares_of(model, calibrate) if model_sees(model) else []
    new = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        new.mkdir(parents=True)
        write_graphs(model, new, int8, pictures)
        write_texts(model, tokenizer, training, new, int8, name)
        write_manifest(new)
        report = compare(Agent(model, tokenizer, training), Agent(*open_export(new)), pictures or probes(model))
        if not int8 and report.logits > CLOSE:
            raise UserError(
                f"the exported model differs from torch by {report.logits:.2g} in a logit, at most {CLOSE:g} is rounding: "
                "nothing was written; please report it"
            )
        put_in_place(new, out)
        shutil.rmtree(sibling(out, "old"), ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return report


def cached_export(name: str) -> str:
    """The folder of a float32 export by this version of the project in the shared cache, made when it is first asked for."""
    manifest = locate(name) / "manifest.json"
    if not manifest.is_file():
        load_checkpoint(name)  # says what is wrong
    folder = cache_folder("exports") / f"{sha256(manifest)[:16]}-{__version__}"
    if not is_export(folder):
        make_folder(folder.parent)
        print(f"note: exporting {name} to {folder}, once", file=sys.stderr)
        export(name, folder)
    return str(folder)


# ---- what can be exported


def check_target(out: Path) -> None:
    """Raises UserError or OSError, before any work is done."""
    if out.exists() and not (out.is_dir() and (is_export(out) or not any(out.iterdir()))):
        raise UserError(f"{out} exists and is no exported model: choose another name, nothing was written")
    parent = next(path for path in out.parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"cannot write {out}: no permission to write to the folder {parent}")


def check_text_model(name: str) -> None:
    described = json.loads((locate(name) / "config.json").read_text())
    if described.get("model") != "gpt":
        raise UserError(
            "int8 needs pictures such as the model will see, to measure the encoder's ranges on: add --calibrate FOLDER"
        )


def check_exports(model, training: dict, name: str) -> None:
    config = model.config
    step, steps = training.get("step"), training.get("steps")
    if isinstance(step, int) and isinstance(steps, int) and step < steps:
        raise UserError(
            f"{name} is a run that stopped at step {step} of {steps}: train it to the end with --resume {name}"
        )
    if hasattr(model, "act") and config.action_head not in HEADS:
        raise UserError(
            f"the action head {short_repr(config.action_head)} cannot be exported, only {' and '.join(HEADS)}"
        )
    if model_sees(model) and model.vision_encoder is None:
        raise UserError(f"{name} has no encoder: train it with one")


def model_sees(model) -> bool:
    return hasattr(model, "vision_projector")


def squares_of(model, folder: str | Path | None) -> list[np.ndarray]:
    """Pictures of a folder, fitted into the encoder's square. Raises UserError for a folder without any."""
    if folder is None:
        return []
    folder, encoder = Path(folder).expanduser(), model.vision_encoder
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        found = "has no pictures in it" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {found}: --calibrate takes a folder of pictures such as the model will see")
    chosen = paths[:: max(1, len(paths) // MOST_PICTURES)][:MOST_PICTURES]
    return [square(path, encoder.image_size, encoder.antialias)[0] for path in chosen]


# ---- writing


def write_graphs(model, folder: Path, int8: bool, pictures: Sequence[np.ndarray]) -> None:
    weights, config = Weights(folder), model.config
    with torch.no_grad():
        export_decoder(model, weights, int8, folder / "decoder.onnx")
        if not model_sees(model):
            return
        export_pictures(model, weights, int8, folder / "pictures.onnx")
        export_encoder(model, folder / "encoder.onnx", int8, pictures)
        if hasattr(model, "act"):
            if config.state_dim:
                export_states(model, weights, folder / "states.onnx")
            if config.action_head == "continuous":
                export_policy(model, weights, int8, folder / "policy.onnx")
        elif config.vision_tokens_per_image > 1:
            export_attention(model, weights, int8, folder / "attention.onnx")


def write_texts(model, tokenizer, training: dict, folder: Path, int8: bool, name: str) -> None:
    encoder = getattr(model, "vision_encoder", None)
    seen = None
    if encoder is not None:
        rectangles = takes_rectangles(model)
        seen = {"image_size": encoder.image_size, "antialias": encoder.antialias, "rectangles": rectangles}
    described = {"model": model.kind, "config": asdict(model.config), "encoder": seen, "int8": int8}
    (folder / "config.json").write_text(json.dumps(described, indent=1))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "training.json").write_text(json.dumps(training, indent=1))
    card = locate(name) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {Path(name).name}\n"
    (folder / "README.md").write_text(
        f"{text.rstrip()}\n\n## ONNX\n\nExported for ONNX Runtime in {'int8' if int8 else 'float32'} by `nanochat export`. "
        'It runs without torch:\n\n    from nanochat.runtime import load\n    agent = load("this folder")\n',
        encoding="utf-8",
    )


# ---- comparing


def probes(model) -> list[np.ndarray]:
    """Pictures of smooth noise, where the user named none."""
    return list(probe_picture(model.vision_encoder.image_size)) if model_sees(model) else []


def compare(one: Agent, other: Agent, pictures: Sequence[np.ndarray]) -> Report:
    """one: on torch. other: the exported one, which reads the tokens that the first one says."""
    folder, differences, same = other.model.folder, [0.0], []
    for picture in pictures[:8] or [None]:
        prompt = one.prompt([user_message(CAPTION_PROMPT, int(picture is not None))])
        rows, caches = [], []
        for agent in (one, other):
            images = None
            if picture is not None:
                images = agent.model.checked_vectors(
                    agent.model.look(picture), prompt.count(one.model.config.vision_token_id)
                )
            rows.append(Unread(prompt, images))
            caches.append(agent.model.new_cache())
        for _ in range(min(STEPS, one.model.config.sequence_len - len(prompt))):
            found = [
                agent.model.read([row], cache)[0] for agent, row, cache in zip((one, other), rows, caches, strict=True)
            ]
            differences.append(float(np.abs(found[0] - found[1]).max()))
            same.append(found[0].argmax() == found[1].argmax())
            rows = [Unread([int(found[0].argmax())])] * 2
    actions = compared_actions(one, other, pictures[:8]) if hasattr(one.model, "act") else None
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Report(size, max(differences), float(np.mean(same)), actions)


def compared_actions(one: Agent, other: Agent, pictures: Sequence[np.ndarray]) -> float:
    config, half = one.model.config, one.model.action_scale.half
    shown = [dict.fromkeys(config.cameras, picture) if config.cameras else picture for picture in pictures]
    states = np.tile(one.model.trained_states.center, (len(shown), 1)) if config.state_dim else None
    acted = [agent.act(shown, states, ["move"] * len(shown)) for agent in (one, other)]
    return float(np.abs((acted[0] - acted[1]) / half).max())
