"""Publishing a checkpoint: a copy that is small and without the paths of the machine that trained it, and its upload."""

from pathlib import Path

import torch

from nanochat import hub
from nanochat.checkpoint import PUBLISHED, load_checkpoint, locate, save_checkpoint, verify

PATHS = ("data", "encoder", "start_from", "tokenizer")  # fields of a recipe that can hold a path


def pack_checkpoint(name: str, out: Path, half: bool = True) -> tuple[int, int]:
    """Copy the checkpoint `name` to the new folder `out`, without its optimiser state, and with file names instead of paths in
    training.json. half: store weights as float16. Returns (number of parameters, bytes written).

    Raises FileExistsError where `out` exists, CheckpointError for a missing or damaged checkpoint.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another name for the packed checkpoint")
    model, tokenizer, training = load_checkpoint(name)
    for recipe in (training.get("recipe", {}), *training.get("earlier", [])):
        recipe |= {field: Path(recipe[field]).name for field in PATHS if recipe.get(field)}
    save_checkpoint(out, model, tokenizer, training, dtype=torch.float16 if half else None)
    return model.num_parameters(), sum(path.stat().st_size for path in out.iterdir())


def push_checkpoint(name: str | Path, repo_id: str, private: bool = True) -> str:
    """Verify a checkpoint and upload it to the Hugging Face hub; returns its address. Raises CheckpointError if it is damaged,
    OSError where the hub cannot be reached or refuses it."""
    folder = locate(name)
    verify(folder)
    return hub.upload(folder, repo_id, PUBLISHED, private)
