"""The folder that `nanochat export` makes: what is in it, and how it is opened. No torch.

encoder.onnx decoder.onnx ...   the graphs, see `export.decoder` and `export.encoder`     weights.bin   what they share
config.json   shapes            tokenizer.json     training.json     README.md            manifest.json   SHA-256 of each file
"""

import json
from dataclasses import fields
from pathlib import Path

from nanochat.config import GPTConfig, MultimodalGPTConfig, RobotGPTConfig
from nanochat.errors import UPDATE, UserError
from nanochat.files import sha256, short_repr
from nanochat.onnx.model import HEADS, OnnxGPT, OnnxModel, OnnxPolicy
from nanochat.tokenizer import Tokenizer
from nanochat.verify import CheckpointError, check_entry, check_file, listed_files, read_json, read_training

FORMAT, VERSION = "nanochat-onnx", 1
TEXTS = ("config.json", "tokenizer.json", "training.json")
GRAPHS = {
    "gpt": ("decoder",),
    "multimodal_gpt": ("encoder", "pictures", "decoder"),
    "robot_gpt": ("encoder", "pictures", "decoder"),
}
CONFIGS = {"gpt": GPTConfig, "multimodal_gpt": MultimodalGPTConfig, "robot_gpt": RobotGPTConfig}
AGAIN = "export the model again, or copy the folder again"


def is_export(folder: str | Path) -> bool:
    """Whether this is a folder of `nanochat export`, of any version."""
    path = Path(folder).expanduser() / "manifest.json"
    return path.is_file() and read_json(path).get("format") == FORMAT


def write_manifest(folder: Path) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    text = json.dumps({"format": FORMAT, "format_version": VERSION, "files": files}, indent=1)
    (folder / "manifest.json").write_text(text)


def open_export(name: str | Path) -> tuple[OnnxGPT, Tokenizer, dict]:
    """(model, tokenizer, training.json). Raises CheckpointError for a folder that is incomplete or altered, or that a newer
    version made."""
    folder = Path(name).expanduser().resolve()
    check(folder)
    described = read_json(folder / "config.json")
    kind, values, encoder = (described.get(key) for key in ("model", "config", "encoder"))
    if kind not in CONFIGS or not isinstance(values, dict):
        raise CheckpointError(
            f"{folder}: config.json has the model {short_repr(kind)}, expected one of {', '.join(CONFIGS)}"
        )
    if unknown := sorted(set(values) - {field.name for field in fields(CONFIGS[kind])}):
        raise CheckpointError(
            f"{folder}: config.json has fields that this version does not know: {', '.join(map(repr, unknown))[:200]}; the model "
            f"was exported by a newer one: {UPDATE}"
        )
    try:
        config = CONFIGS[kind](**values)
    except (UserError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: config.json does not describe a model: {error}; {AGAIN}") from error
    graphs = [*GRAPHS[kind], *(["policy"] if getattr(config, "action_head", "") == "continuous" else [])]
    if missing := [name for name in graphs if not (folder / f"{name}.onnx").is_file()]:
        raise CheckpointError(f"{folder} has no {missing[0]}.onnx, which a {kind} needs: {AGAIN}")
    if getattr(config, "action_head", "bins") not in HEADS:
        raise CheckpointError(f"{folder}: this version cannot run the action head {short_repr(config.action_head)}")
    model = {"gpt": OnnxGPT, "multimodal_gpt": OnnxModel, "robot_gpt": OnnxPolicy}[kind](folder, config, encoder)
    return model, Tokenizer.load(folder / "tokenizer.json"), read_training(folder)


def check(folder: Path) -> None:
    """Raises CheckpointError unless every file is as the manifest says."""
    path = folder / "manifest.json"
    files = listed_files(path, VERSION, TEXTS, AGAIN)
    for name, expected in files.items():
        check_entry(path, short_repr(name), expected if Path(name).name == name else None, AGAIN)
        check_file(folder, name, expected)
    if strangers := sorted({one.name for one in folder.glob("*.onnx")} - set(files)):
        raise CheckpointError(f"{folder} has a file {strangers[0]} that manifest.json does not list: {AGAIN}")
