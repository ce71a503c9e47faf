"""The models that ship, by name, and what `nanochat models` says about them. Imports no torch."""

import json
import math
from pathlib import Path

NO_PARAMETERS = ("__metadata__", "running_mean", "running_var", "num_batches_tracked")
ASSETS = Path(__file__).parent / "assets"
SHIPPED = {
    "photos": ASSETS / "photos", "photos-yolo": ASSETS / "photos-yolo", "shapes": ASSETS / "easy_vqa", "robot": ASSETS / "robot"
}  # fmt: skip
ALIASES = {"default": "photos"}  # further names of these models


def shipped_folder(name: str | Path) -> Path | None:
    """The folder of a model that ships, or None for any other name."""
    return SHIPPED.get(ALIASES.get(str(name), str(name)))


def shipped_models() -> list[dict]:
    """One row per model: name, aliases, parameters, bytes, purpose, figures [(what, score, controls)], example.

    The texts are in assets/models.json; a test compares their figures with those of the README."""
    rows = []
    for name, about in json.loads((ASSETS / "models.json").read_text(encoding="utf-8")).items():
        folder = SHIPPED[name]
        aliases = [alias for alias, meant in ALIASES.items() if meant == name]
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        known = {
            "name": name,
            "aliases": aliases,
            "parameters": n_parameters(folder / "model.safetensors"),
            "bytes": size,
        }
        rows.append(known | about)
    return rows


def n_parameters(weights: Path) -> int:
    """The parameters in a .safetensors file, from its header: 8 bytes with the length of a JSON object that has all shapes.
    Statistics of BatchNorm are no parameters."""
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if not name.endswith(NO_PARAMETERS))
