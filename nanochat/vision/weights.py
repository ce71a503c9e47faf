"""Reads detectors from untrusted .pt files and model descriptions without running any code from them.

A downloaded file could run code in two ways, and both are prevented here: a .pt file is a pickle, which can call any
function; and ultralytics evaluates parts of a model description as Python. Imports torch, not ultralytics.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn

from nanochat.errors import UserError

# Globals that a detector's .pt file may name. Each of them is loaded as Placeholder
DETECTOR_GLOBALS = re.compile(
    r"(ultralytics|torch\.nn|pathlib)\..+|builtins\.getattr|numpy\.(dtype|_?core\.multiarray\.scalar)"
)
# Strings that a model description may contain
ACTIVATION = re.compile(
    r"(torch\.)?nn\.(ReLU|ReLU6|LeakyReLU|SiLU|GELU|Mish|Hardswish|ELU|Identity)\((inplace=(True|False)|\d*\.?\d*)\)"
)
MODULE_NAME = re.compile(r"(nn\.)?[A-Z][A-Za-z0-9]*")
# Layers whose maps are at most as large as their input, but for their first argument, the channels
NO_GROWTH = {
    "Conv", "ELAN1", "AConv", "ADown", "RepNCSPELAN4", "SPPELAN", "Concat", "CBLinear", "CBFuse", "nn.Identity",
    "nn.Upsample", "Detect",
}  # fmt: skip
MAX_ROWS, MAX_REPEATS = 200, 100  # yolov9e has 43 rows, each once
MAX_ARGUMENT = 16_384  # of channels; yolov9e has at most 1,024
PLAIN_STRINGS = {"nc", "None", "True", "False", "nearest", "bilinear"}


class WeightsError(UserError):
    """A file or a model description that is not a detector, or is not safe to load. The message says which."""


class Placeholder(nn.Module):
    """Loaded instead of every class in a .pt file: it keeps the stored attributes and runs none of the class's code.

    An allow-list of the real classes would not be safe: unpickling can call their constructors, and ultralytics'
    constructor evaluates strings as Python.
    """

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        if isinstance(state, dict):
            super().__setstate__(state)


def read_pt(path: Path, trust_pickle: bool = False) -> tuple[dict, dict[int, str], dict[str, torch.Tensor]]:
    """(model description, class names, float32 state dict) of an ultralytics .pt file.

    Only numbers and names are read; the model is then built from them. With trust_pickle the file can run any code.
    Raises WeightsError for a file that holds no detector and, without trust_pickle, for one that names other globals
    than a detector needs; OSError for a file that cannot be read.
    """
    try:
        content = torch.load(path, "cpu", weights_only=False) if trust_pickle else load_with_placeholders(path)
        model = content.get("ema") or content["model"]
        description = {key: value for key, value in model.yaml.items() if key not in ("yaml_file", "ch")}
        state = {name: tensor.float() for name, tensor in model.state_dict().items()}
        return json.loads(json.dumps(description)), class_names(model.names), state
    except (OSError, WeightsError):
        raise
    except Exception as error:  # a damaged or unrelated file can raise any type
        raise WeightsError(
            f"{path} is not an ultralytics detector (a .pt file with a 'model'), or is truncated: {one_line(error)}"
        ) from error


def load_with_placeholders(path: Path):
    """The file's content, with a Placeholder for every class. Raises WeightsError for globals that are not allowed."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    refused = sorted(name for name in names if not DETECTOR_GLOBALS.fullmatch(name))
    if refused:
        raise WeightsError(
            f"{path} is a pickle that uses {', '.join(refused[:3])}, which no detector needs. It was not loaded, because "
            "it could run any code. If you trust its source, pass trust_pickle=True (--trust-pickle)"
        )
    with torch.serialization.safe_globals([(Placeholder, name) for name in names]):
        return torch.load(path, "cpu", weights_only=True)


def class_names(names) -> dict[int, str]:
    """{id: name} from a list or a mapping whose ids are 0..n-1."""
    pairs = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(pairs, dict) or not pairs or {str(i) for i in pairs} != {str(i) for i in range(len(pairs))}:
        raise WeightsError(f"class names must be a list, or a mapping from 0..n-1, got {str(names)[:80]}")
    return {int(i): str(name) for i, name in pairs.items()}


def check_architecture(description: dict, layers) -> None:
    """Raises WeightsError for a model description that could run code.

    ultralytics evaluates `activation` as Python, and calls what a row names with the row's arguments. So only plain
    activations, layers and plain arguments are allowed. layers: the module in which ultralytics looks up a row's name.
    """
    description_rows(description)
    activation = description.get("activation")
    if activation is not None and not (isinstance(activation, str) and ACTIVATION.fullmatch(activation)):
        raise WeightsError(
            f"refused encoder architecture: activation {str(activation)[:80]!r} is not a plain torch.nn activation"
        )
    check_numbers(description)
    for row in description_rows(description):
        check_row(row, layers)


def description_rows(description: dict) -> list:
    """The rows of a model description. Raises WeightsError where there are none, or too many."""
    parts = [description.get(part) for part in ("backbone", "head")] if isinstance(description, dict) else [None]
    if not all(isinstance(part, list) for part in parts):
        raise WeightsError("not a YOLO model description: expected a mapping with the lists backbone and head")
    rows = parts[0] + parts[1]
    if not 0 < len(rows) <= MAX_ROWS:
        raise WeightsError(f"refused encoder architecture: it has {len(rows)} rows, expected 1..{MAX_ROWS}")
    return rows


def head_inputs(description: dict) -> list[int]:
    """The numbers of the three modules that a detector's last row reads."""
    rows = description_rows(description)
    row = rows[-1]
    inputs = row[0] if isinstance(row, list) and row else None
    if (
        not isinstance(inputs, list)
        or len(inputs) != 3
        or not all(type(i) is int and 0 <= i < len(rows) for i in inputs)
    ):
        raise WeightsError(
            f"refused encoder architecture: its last row reads {str(inputs)[:80]}, expected a detection head on the numbers "
            "of three modules"
        )
    return inputs


def check_numbers(description: dict) -> None:
    """Raises WeightsError for settings of a whole description that are no numbers, or far outside what detectors have."""
    limits = {"nc": 10_000, "reg_max": 64, "depth_multiple": 10, "width_multiple": 10}
    for name, limit in limits.items():
        check_number(description.get(name, 1), limit, name, least=0)
    scales = description.get("scales") or {}
    if not isinstance(scales, dict) or not all(
        isinstance(scale, list) and len(scale) == 3 for scale in scales.values()
    ):
        raise WeightsError("refused encoder architecture: scales must be a mapping of lists of three numbers")
    for depth, width, channels in scales.values():
        check_number(depth, 10, "a depth of scales", least=0)
        check_number(width, 10, "a width of scales", least=0)
        check_number(channels, MAX_ARGUMENT, "the channels of scales", least=1)


def check_number(value, limit: float, name: str, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= limit:
        raise WeightsError(f"refused encoder architecture: {name} is {str(value)[:40]}, expected {least}..{limit}")


def check_row(row, layers) -> None:
    """Raises WeightsError unless a row is [from, repeats, module, arguments] with a layer, and numbers in bounds."""
    if not (isinstance(row, list) and len(row) == 4 and isinstance(row[2], str) and isinstance(row[3], list)):
        raise WeightsError(
            f"refused encoder architecture: {str(row)[:80]} is not a [from, repeats, module, arguments] row"
        )
    sources, repeats, name, arguments = row
    sources = sources if isinstance(sources, list) else [sources]
    if not 0 < len(sources) <= 16 or not all(type(i) is int and abs(i) <= MAX_ROWS for i in sources):
        raise WeightsError(
            f"refused encoder architecture: {name} reads {str(row[0])[:80]}, expected numbers of modules"
        )
    if type(repeats) is not int or not 1 <= repeats <= MAX_REPEATS:
        raise WeightsError(
            f"refused encoder architecture: {name} is repeated {str(repeats)[:40]} times, expected 1..{MAX_REPEATS}"
        )
    found = getattr(nn if name.startswith("nn.") else layers, name.removeprefix("nn."), None)
    is_layer = isinstance(found, type) and issubclass(found, nn.Module) and MODULE_NAME.fullmatch(name)
    if not is_layer or not found.__module__.startswith(("torch.nn.modules.", "ultralytics.nn.modules.")):
        raise WeightsError(f"refused encoder architecture: {name[:80]!r} is not a layer of torch.nn or ultralytics")
    for value in flat(arguments):
        number = isinstance(value, (int, float))
        if not (value is None or (number and abs(value) <= MAX_ARGUMENT) or (not number and value in PLAIN_STRINGS)):
            raise WeightsError(f"refused encoder architecture: {str(value)[:80]!r} is not a plain argument of {name}")


def grows_little(rows: list) -> bool:
    """Whether it is plain that no map can become far larger than the picture: YOLOv9's own layers with their usual numbers.
    Other descriptions are run once on the meta device to see."""
    upsampled = 0
    for _, repeats, name, arguments in rows:
        upsampled += repeats if name == "nn.Upsample" else 0
        numbers = [value for value in flat(arguments[1:]) if value is not None and not isinstance(value, str)]
        small = name not in ("Conv", "nn.Upsample", "nn.Conv2d") or all(abs(value) <= 7 for value in numbers)
        if name not in NO_GROWTH or not small or (name == "nn.Upsample" and numbers != [2]):
            return False
    return upsampled <= 3


def flat(value) -> Iterator:
    """The items of nested lists."""
    if isinstance(value, list):
        for item in value:
            yield from flat(item)
    elif isinstance(value, (str, int, float, type(None))):
        yield value
    else:
        yield repr(value)  # such as a mapping, which is not a plain argument


def one_line(error: Exception) -> str:
    """The message of an exception on one line of at most about 200 characters."""
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= 200 else text[:200] + "..."
