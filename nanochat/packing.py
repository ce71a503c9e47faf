"""Publishing a checkpoint: a copy that is small and without the paths of the machine that trained it, and its upload."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from nanochat import hub
from nanochat.checkpoint import PUBLISHED, load_checkpoint, locate, save_checkpoint
from nanochat.data import made_of
from nanochat.verify import read_manifest, read_training, sha256, verify

TERMS = ("NOTICE", "LICENSE*")  # licences of weights that are not ours: they go wherever the weights go
PATHS = (
    "data",
    "also",
    "encoder",
    "start_from",
    "tokenizer",
    "out",
)  # fields of a recipe that can hold a relative path
# An absolute path, or one from a home folder: its folders, and its name where that is not the name of an address
FOLDERS = re.compile(r"(?<![\w/:.~-])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^/\\\n'\":,;|<>]+[/\\]+)*(?=[^/\\\s])")


def pack_checkpoint(name: str, out: Path, half: bool = True) -> tuple[int, int]:
    """Copy the checkpoint `name` to the new folder `out`, without its optimiser state, with the licences beside it, and with
    file names instead of paths in training.json. half: store weights as float16. Returns (number of parameters, bytes written).

    Raises FileExistsError where `out` exists, CheckpointError for a missing or damaged checkpoint.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another name for the packed checkpoint")
    model, tokenizer, training = load_checkpoint(name)
    extra = {path.name: path.read_bytes() for path in terms(locate(name))}
    dtype = torch.float16 if half else None
    save_checkpoint(out, model, tokenizer, without_paths(training), dtype=dtype, extra=extra)
    return model.num_parameters(), sum(path.stat().st_size for path in out.iterdir())


def terms(folder: Path) -> list[Path]:
    """The licences beside a checkpoint."""
    return [path for pattern in TERMS for path in sorted(folder.glob(pattern)) if path.is_file()]


def push_checkpoint(name: str | Path, repo_id: str, private: bool = True) -> str:
    """Verify a checkpoint and upload it to the Hugging Face hub, with file names instead of paths in training.json; returns its
    address. Raises CheckpointError if it is damaged, OSError where the hub cannot be reached or refuses it."""
    folder = locate(name)
    verify(folder)
    with tempfile.TemporaryDirectory(prefix="nanochat-push-") as copy:
        public_copy(folder, Path(copy))
        return hub.upload(Path(copy), repo_id, [*PUBLISHED, *(path.name for path in terms(folder))], private)


def public_copy(folder: Path, copy: Path) -> None:
    """Make in `copy` what may be published of a verified checkpoint: its weights are not copied but linked."""
    manifest = {"format_version": 1, "files": read_manifest(folder)}
    manifest["files"].pop("resume.safetensors", None)
    for name in [*manifest["files"], *(path.name for path in terms(folder))]:
        if name != "training.json":
            try:
                (copy / name).symlink_to((folder / name).resolve())
            except OSError:  # a system without links
                shutil.copyfile(folder / name, copy / name)
    path = copy / "training.json"
    path.write_text(json.dumps(without_paths(read_training(folder)), indent=1))
    manifest["files"]["training.json"] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=1))


def without_paths(value: Any, key: str = "") -> Any:
    """JSON with the last name only of every path in it: absolute paths anywhere, relative ones in the fields PATHS."""
    if isinstance(value, dict):
        return {without_paths(name): without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    if key in PATHS or re.match(r"[/\\~]|[A-Za-z]:[/\\]", value):
        prefix, source = made_of(value)
        return prefix + re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    return FOLDERS.sub("", value)
