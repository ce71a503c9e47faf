"""Detectors from files that strangers made: what is read, and what is refused. Nothing in such a file is ever run.

Two doors lead from a downloaded file to running code, and both are shut here: a .pt file is a pickle, which calls what it
names; and ultralytics evaluates parts of a model description as Python. Knows files and torch, not ultralytics.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn

# What a .pt file of a detector may mention: all of it becomes StandIn
DETECTOR_GLOBALS = re.compile(
    r"(ultralytics|torch\.nn|pathlib)\..+|builtins\.getattr|numpy\.(dtype|_?core\.multiarray\.scalar)"
)
# What a model description may say
ACTIVATION = re.compile(
    r"(torch\.)?nn\.(ReLU|ReLU6|LeakyReLU|SiLU|GELU|Mish|Hardswish|ELU|Identity)\((inplace=(True|False)|\d*\.?\d*)\)"
)
MODULE_NAME = re.compile(r"(nn\.)?[A-Z][A-Za-z0-9]*")
PLAIN_STRINGS = {"nc", "None", "True", "False", "nearest", "bilinear"}


class WeightsError(ValueError):
    """A file or a model description that is no detector, or asks for more than one; the message says which."""


class StandIn(nn.Module):
    """What every class in a .pt file becomes: it keeps the stored attributes, and runs none of the class's own code.

    Letting torch unpickle the real classes, as an allow-list would, lets the file call their constructors too, and
    ultralytics' own evaluates strings as Python.
    """

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        if isinstance(state, dict):
            super().__setstate__(state)


def read_pt(path: Path, trust_pickle: bool = False) -> tuple[dict, dict[int, str], dict[str, torch.Tensor]]:
    """(model description, class names, float32 state dict) of an ultralytics .pt file.

    Only numbers and names are taken; the model is built anew from them. With trust_pickle, the file may run any code.
    Raises WeightsError for a file that holds no detector or, without trust_pickle, asks for more than one needs.
    """
    try:
        content = torch.load(path, "cpu", weights_only=False) if trust_pickle else load_with_stand_ins(path)
        model = content.get("ema") or content["model"]
        description = {key: value for key, value in model.yaml.items() if key not in ("yaml_file", "ch")}
        state = {name: tensor.float() for name, tensor in model.state_dict().items()}
        return json.loads(json.dumps(description)), class_names(model.names), state
    except (OSError, WeightsError):
        raise
    except Exception as error:  # a broken or foreign file can raise anything
        raise WeightsError(
            f"{path} is no ultralytics detector (a .pt file with its 'model'), or is cut off: {one_line(error)}"
        ) from error


def load_with_stand_ins(path: Path):
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    refused = sorted(name for name in names if not DETECTOR_GLOBALS.fullmatch(name))
    if refused:
        raise WeightsError(
            f"{path} is a pickle that asks for {', '.join(refused[:3])}, which no detector needs: refused, since it could "
            "run any code. If you trust its source, pass trust_pickle=True (--trust-pickle)"
        )
    with torch.serialization.safe_globals([(StandIn, name) for name in names]):
        return torch.load(path, "cpu", weights_only=True)


def class_names(names) -> dict[int, str]:
    """{id: name} from a list or a mapping whose ids are 0..n-1."""
    pairs = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(pairs, dict) or not pairs or {str(i) for i in pairs} != {str(i) for i in range(len(pairs))}:
        raise WeightsError(f"class names must be a list, or a mapping from 0..n-1, got {str(names)[:80]}")
    return {int(i): str(name) for i, name in pairs.items()}


def check_architecture(description: dict, layers) -> None:
    """Refuse a model description that could do more than describe a model.

    ultralytics evaluates `activation`, and calls whatever a row names with whatever arguments it has: so only layers, and
    only plain arguments. layers: the module among whose globals ultralytics looks a row's name up.
    """
    if not isinstance(description, dict) or not all(
        isinstance(description.get(part), list) for part in ("backbone", "head")
    ):
        raise WeightsError("no YOLO model description: expected a mapping with the lists backbone and head")
    activation = description.get("activation")
    if activation is not None and not (isinstance(activation, str) and ACTIVATION.fullmatch(activation)):
        raise WeightsError(f"refused encoder architecture: activation {activation!r} is no plain torch.nn activation")
    for row in description["backbone"] + description["head"]:
        if not (isinstance(row, list) and len(row) == 4 and isinstance(row[2], str) and isinstance(row[3], list)):
            raise WeightsError(
                f"refused encoder architecture: {str(row)[:80]} is no [from, repeats, module, arguments] row"
            )
        name = row[2]
        found = getattr(nn if name.startswith("nn.") else layers, name.removeprefix("nn."), None)
        is_layer = isinstance(found, type) and issubclass(found, nn.Module) and MODULE_NAME.fullmatch(name)
        if not is_layer or not found.__module__.startswith(("torch.nn.modules.", "ultralytics.nn.modules.")):
            raise WeightsError(f"refused encoder architecture: {name!r} is no layer of torch.nn or ultralytics")
        for value in flat(row[3]):
            if not (value is None or isinstance(value, (int, float)) or value in PLAIN_STRINGS):
                raise WeightsError(f"refused encoder architecture: {str(value)[:80]!r} is no plain argument of {name}")


def flat(value) -> Iterator:
    if isinstance(value, list):
        for item in value:
            yield from flat(item)
    elif isinstance(value, (str, int, float, type(None))):
        yield value
    else:
        yield repr(value)  # a mapping, say: no plain argument


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= 200 else text[:200] + "..."
