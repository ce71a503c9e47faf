"""A checkpoint is a folder without pickles, complete or not there at all:

    model.safetensors   weights, the encoder's too       config.json     shapes, encoder architecture
    tokenizer.json      the vocabulary                    training.json   how it was made
    manifest.json       size and SHA-256 of each file     resume.safetensors   optimiser state (only while training)

A new one is written next to the old one under a temporary name, then the two are exchanged by two renames. A kill between the
renames leaves no folder of the name but a complete one next to it, which loading reads and the next save moves back. (One
step would be better, but Python has no exchange of two folders, and os.replace takes no folder that has files in it.)
"""

import json
import os
import shutil
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat import hub
from nanochat.errors import UPDATE, UserError
from nanochat.files import short_repr
from nanochat.gpt import GPT, default_compute_dtype
from nanochat.meta import on_meta
from nanochat.onnx.folder import is_export
from nanochat.shipped import ASSETS, SHIPPED, shipped_folder  # noqa: F401, others import the first two from here
from nanochat.tokenizer import Tokenizer
from nanochat.verify import (
    FORMAT_VERSION,
    REQUIRED,
    RESUME,
    CheckpointError,
    check_file,
    check_header,
    read_header,
    read_json,
    read_manifest,
    read_training,
    sha256,
    verify,
)
from nanochat.vision.encoder import Encoder, encoder_from_architecture, is_timm_name, open_encoder

PUBLISHED = [*REQUIRED, "manifest.json"]  # what travels: all but the optimiser state
# `kind` of a model -> its class, imported when a checkpoint needs it
MODELS = {"gpt": "nanochat.gpt:GPT", "multimodal_gpt": "nanochat.multimodal_gpt:MultimodalGPT",
          "robot_gpt": "nanochat.robot_gpt:RobotGPT"}  # fmt: skip


# ---- saving ----


def save_checkpoint(
    folder: str | Path,
    model: GPT,
    tokenizer: Tokenizer,
    training: dict,
    *,
    resume: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    extra: dict[str, bytes] | None = None,
) -> None:
    """Write a checkpoint, or replace the one in `folder`, in one step.

    training: JSON-able, how the model was made. resume: tensors to go on training with. dtype: store floating-point weights
    in it (torch.float16 halves the file), except tensors with values beyond its range. extra: further
    files, name -> contents; files in the folder that are no part of a checkpoint stay.
    Raises OSError, as for a full disk, with one line that says so: what was in `folder` is then still there.
    """
    folder = Path(folder).resolve()  # a link to a folder stays one: what it points to is replaced
    recover(folder)
    if folder.exists() and not (folder / "manifest.json").is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is no checkpoint: choose another name, nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = sibling(folder, "new"), sibling(folder, "old")
    shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed while it wrote
    try:
        new.mkdir()
        write_files(new, model, tokenizer, training, resume, dtype, extra or {})
        if folder.exists():
            keep_foreign_files(folder, new)
        put_in_place(new, folder)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        recover(folder)
        if isinstance(error, (OSError, SafetensorError)):  # a full disk is the latter, which is no OSError
            state = "the checkpoint that was there is intact" if folder.exists() else "nothing was written"
            raise OSError(f"{folder} cannot be written, {state}: {' '.join(str(error).split())}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_files(folder: Path, model, tokenizer, training, resume, dtype, extra: dict[str, bytes]) -> None:
    encoder = getattr(model, "vision_encoder", None)
    config = {"model": model.kind, "config": asdict(model.config), "encoder": encoder.architecture if encoder else None}
    weights = {name: to_store(tensor, dtype) for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    if resume is not None:
        save_file({name: to_store(tensor, None) for name, tensor in resume.items()}, folder / RESUME)
    texts = {
        "config.json": json.dumps(config, indent=1),
        "tokenizer.json": tokenizer.to_json(),
        "training.json": json.dumps(training, indent=1),
    }
    for name, content in ({name: text.encode() for name, text in texts.items()} | extra).items():
        (folder / name).write_bytes(content)
    names = [*REQUIRED, *([RESUME] if resume is not None else [])]
    mode = (folder / "config.json").stat().st_mode  # as the umask has it; safetensors hides its files from others
    for name in names:
        (folder / name).chmod(mode)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (*folder.iterdir(), folder):
        sync(path)


def to_store(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if dtype is None or not tensor.is_floating_point():
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.isfinite(), tensor.isfinite()) else tensor


def keep_foreign_files(old: Path, new: Path) -> None:
    """Whatever else the user keeps in the folder moves along."""
    for path in old.iterdir():
        if path.name in (*REQUIRED, "manifest.json", RESUME) or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link)
        else:
            link(path, new / path.name)


def link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(old, new, follow_symlinks=False)


def put_in_place(new: Path, folder: Path) -> None:
    """Give the folder `new` the name `folder`. What was there is next to it then, as "old", for the caller to delete."""
    if folder.exists():
        os.rename(folder, sibling(folder, "old"))
    os.rename(new, folder)
    sync(folder.parent)  # the renames are on the disk before the old one is deleted


def sibling(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def recover(folder: Path) -> None:
    """Finish what a kill between the two renames left. For the writer alone: readers use `readable`."""
    found = readable(folder)
    if found != folder:
        os.rename(found, folder)
    shutil.rmtree(sibling(folder, "old"), ignore_errors=True)


def readable(folder: Path) -> Path:
    """Where the checkpoint lies: in its place or, between the two renames, next to it: the new one if complete, else the old."""
    new, old = sibling(folder, "new"), sibling(folder, "old")
    if folder.exists() or not old.exists():
        return folder
    return new if complete(new) else old


def complete(folder: Path) -> bool:
    try:
        verify(folder)
    except (CheckpointError, OSError):
        return False
    return True


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- loading ----


def load_checkpoint(name: str | Path, device="cpu") -> tuple[GPT, Tokenizer, dict]:
    """(model in evaluation mode on `device`, tokenizer, training.json). name: see `locate`.

    Weights become float32, whatever they were stored in; activations are bfloat16 on a GPU that supports it, else float32.
    Raises CheckpointError where a file is missing, truncated or altered, where the format is newer than this version reads,
    and for a folder of `nanochat export`.
    """
    place = locate(name)
    if is_export(place):
        raise CheckpointError(f"{name} was exported for ONNX Runtime: name the checkpoint that it was made from")
    before = identity(place)
    try:
        loaded = read_folder(place, device)
    except (ValueError, OSError):
        if identity(place) == before:
            raise
    else:
        if identity(place) == before:
            return loaded
    return load_checkpoint(name, device)  # a training run has just replaced it


def encoder_of(name: str | Path | None, device="cpu", trust_pickle: bool = False) -> Encoder:
    """The encoder behind a flag: the one that a checkpoint carries (see `locate`), or one of `vision.encoder.open_encoder`.

    Raises CheckpointError for a checkpoint without an encoder, and what `open_encoder` raises.
    """
    if name is None or is_timm_name(name) or not is_checkpoint(name):
        return open_encoder(name, device=device, trust_pickle=trust_pickle)
    encoder = getattr(load_checkpoint(name, device)[0], "vision_encoder", None)
    if encoder is None:
        raise CheckpointError(f"the checkpoint {name} has no encoder: it is a text model, choose another one")
    return encoder


def layer_of(name: str | Path | None) -> str | int:
    """The map of `encoder_of(name)` that is meant where none is named: a checkpoint's decoder reads it; else the last one."""
    if is_timm_name(name):
        return "features"
    if name is None or not is_checkpoint(name):
        return "head"
    return read_json(locate(name) / "config.json")["config"].get("vision_layer", "head")


def is_checkpoint(name: str | Path) -> bool:
    """Whether a name means a checkpoint, and not an encoder's file or official name."""
    return shipped_folder(name) is not None or Path(name).expanduser().is_dir() or is_hub_name(name)


def is_hub_name(name: str | Path) -> bool:
    """ "owner/name", and not a path."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).suffix


def identity(folder: Path) -> tuple[int, int] | None:
    """Tells one saved checkpoint from the next under the same name; None where there is none."""
    try:
        stat = (folder / "manifest.json").stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def read_folder(folder: Path, device) -> tuple[GPT, Tokenizer, dict]:
    verify(folder)
    model = build(folder)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {' '.join(str(error).split())[:300]}"
        ) from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    check_vocabulary(folder, tokenizer, model.config.vocab_size)
    model.to(device).set_compute_dtype(default_compute_dtype(model.device))
    return model.eval(), tokenizer, read_training(folder)


def check_vocabulary(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises CheckpointError for a tokenizer with ids that the model does not have. <|image|> may be one: models of karpathy's
    nanochat do not have it and read no pictures."""
    least = tokenizer.vocab_size - (tokenizer.special("<|image|>") == tokenizer.vocab_size - 1)
    if least > vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model's vocab_size is {vocab_size}: it is the "
            "tokenizer of another model, copy the checkpoint again"
        )


def build(folder: Path) -> GPT:
    """A model of the shape that config.json tells, its weights not yet loaded.

    The files may come from a stranger: the model is built without memory first, and built for real only where its tensors
    are those of model.safetensors.
    """
    described = read_json(folder / "config.json")
    kind, config, encoder = (described.get(key) for key in ("model", "config", "encoder"))
    if not isinstance(kind, str) or kind not in MODELS or not isinstance(config, dict):
        raise CheckpointError(
            f"{folder}: config.json has the model {short_repr(kind)} and a config of type {type(config).__name__}, expected "
            f"one of {', '.join(MODELS)} and an object"
        )
    module, class_name = MODELS[kind].split(":")
    model_class = getattr(import_module(module), class_name)
    known = {field.name for field in fields(model_class.config_class)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise CheckpointError(
            f"{folder}: config.json has fields that this version does not know: {', '.join(map(repr, unknown))[:200]}; the "
            f"checkpoint was made by a newer one: {UPDATE}"
        )
    try:
        check_header(folder / "model.safetensors", shapes_of(model_class, config, encoder), model_class.later_weights)
        model = model_class(model_class.config_class(**config))
        if encoder is not None:
            model.attach_encoder(encoder_from_architecture(encoder))
        return model
    except CheckpointError:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{folder}: config.json does not describe a model: {reason}") from error


def shapes_of(model_class, config: dict, encoder: dict | None) -> dict[str, torch.Tensor]:
    """The state dict that a checkpoint describes, without memory: tensors on the meta device."""
    with on_meta():
        model = model_class(model_class.config_class(**config))
    if encoder is not None:
        if not hasattr(model, "attach_encoder"):
            raise UserError(f"a {model_class.__name__} has no encoder")
        model.vision_encoder = encoder_from_architecture(encoder, shapes_only=True)  # attach_encoder would run it
    return model.state_dict()


def load_resume(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors to go on training with. Raises CheckpointError if the checkpoint has none, or they are damaged."""
    place = readable(Path(folder).resolve())
    files = read_manifest(place)
    if RESUME not in files or not (place / RESUME).is_file():
        raise CheckpointError(
            f"{folder} has no resume.safetensors: it is a finished model, training cannot go on from it"
        )
    check_file(place, RESUME, files[RESUME])
    read_header(place / RESUME)  # a bounded number of tensors
    try:
        return load_file(place / RESUME)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{place / RESUME} is damaged, training cannot go on from it: {reason}") from error


def locate(name: str | Path) -> Path:
    """The folder of a checkpoint: a model that ships (see `shipped`), a local folder, or the cached download of a hub name
    "owner/name". The only place that resolves checkpoint names."""
    folder = readable(Path(shipped_folder(name) or name).expanduser().resolve())
    if folder.exists() or not is_hub_name(name):
        return folder
    try:
        return hub.download(str(name), PUBLISHED)
    except OSError as error:
        raise CheckpointError(f"there is no folder {name}, and {error}") from error
