"""Builds the networks behind `YOLOv9Plus`: imports ultralytics, finds weights and model descriptions, downloads them.

ultralytics (AGPL-3.0) is imported only when an encoder is built, here and in yolov9.py. Text models, cached features and
training on them work without it.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image

from nanochat.files import short_repr
from nanochat.meta import on_meta
from nanochat.vision.weights import WeightsError, check_architecture, grows_little, one_line, read_pt

SIZES = "tsmce"  # of the official models: yolov9t ... yolov9e
DEFAULT_WEIGHTS = "yolov9t.pt"
SETTINGS_PREFIX = "nanochat-yolo-"
SOURCE = "https://github.com/ultralytics/assets/releases"  # of the official weights


def import_ultralytics():
    """The ultralytics package, imported without its side effects. Raises ImportError where it cannot be imported.

    By default it writes to the home folder, uses the network, installs packages and replaces `PIL.Image.open`.
    Environment variables that the user has set are kept.
    """
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    pillow_open = Image.open
    try:
        with settings_folder():
            import ultralytics.nn.tasks
    except ImportError as error:
        if any(name in str(error) for name in ("libGL", "libgthread", "libglib", "libxcb", "libX11")):
            raise ImportError(
                f"OpenCV, which ultralytics uses, needs a system library that is missing ({error}): "
                "on Debian or Ubuntu, apt-get install libgl1 libglib2.0-0"
            ) from error
        raise ImportError(
            f"the YOLOv9 encoder needs ultralytics ({error}): pip install ultralytics. Everything else works without it"
        ) from error
    finally:
        Image.open = pillow_open  # theirs tries to install a package for every file that is not an image
    return ultralytics


@contextmanager
def settings_folder() -> Iterator[None]:
    """A folder for the settings that ultralytics writes while it is imported, and never reads again. It is deleted at the end of
    the block; those of processes that were killed inside the block are deleted by a later one."""
    if "YOLO_CONFIG_DIR" in os.environ or "ultralytics" in sys.modules:
        yield
        return
    for left in Path(tempfile.gettempdir()).glob(f"{SETTINGS_PREFIX}*"):
        with suppress(OSError):
            if left.is_dir() and not left.is_symlink() and time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=SETTINGS_PREFIX)
    os.environ["YOLO_CONFIG_DIR"] = folder
    try:
        yield
    finally:
        del os.environ["YOLO_CONFIG_DIR"]  # a child process makes its own
        shutil.rmtree(folder, ignore_errors=True)


def build(
    description: dict, n_classes: int | None, n_layers: int | None = None, shapes_only: bool = False
) -> nn.Module:
    """A DetectionModel with random weights from a model description.

    n_classes: None for the number in the description. n_layers: build the first rows only; the detection head is the last row.
    shapes_only: without memory, on the meta device, to compare the shapes of the weights with those of a file.
    Raises WeightsError for a description that is unsafe, cannot be built, or is not a detector with three levels.
    """
    tasks = import_ultralytics().nn.tasks
    check_architecture(description, tasks)
    rows = deepcopy(description["backbone"] + description["head"])
    n_layers = len(rows) if n_layers is None else n_layers
    if type(n_layers) is not int or not 0 < n_layers <= len(rows):
        raise WeightsError(f"wrong encoder architecture: n_layers is {short_repr(n_layers)}, expected 1..{len(rows)}")
    described = deepcopy(description) | {"backbone": rows[:n_layers], "head": []}
    default = tasks.Conv.default_act  # a class attribute: building a ReLU model would turn later SiLU models into ReLU
    try:
        if shapes_only:
            net = build_on_meta(tasks.DetectionModel, described, n_classes)
        else:
            net = tasks.DetectionModel(described, nc=n_classes, verbose=False)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"ultralytics cannot build this model: {one_line(error)}") from error
    finally:
        tasks.Conv.default_act = default
    if n_layers == len(rows):
        check_head(net)
    return net


def build_on_meta(kind: type, description: dict, n_classes: int | None) -> nn.Module:
    class ShapesOnly(
        kind
    ):  # a DetectionModel runs a picture while it is built, to see its strides: slow on the meta device
        def forward(self, x, *args, **kwargs):
            return {"feats": [torch.zeros(1, 1, 256 // stride, 256 // stride) for stride in (8, 16, 32)]}

    with on_meta(), torch.no_grad():
        net = ShapesOnly(description, nc=n_classes, verbose=False)
        if not grows_little(description["backbone"]):
            net.eval()._predict_once(torch.zeros(1, 3, 256, 256))  # `on_meta` refuses outputs that are too large
    return net


def check_head(net: nn.Module) -> None:
    head = net.model[-1]
    if type(head).__name__ != "Detect" or net.stride.tolist() != [8, 16, 32] or getattr(head, "end2end", False):
        raise WeightsError(
            f"this model ends in {type(head).__name__} at strides {net.stride.tolist()}, expected a detector like YOLOv9's: "
            "Detect at strides 8, 16 and 32, without a one-to-one head"
        )


def load_weights(name: str, trust_pickle: bool) -> tuple[dict, dict[int, str] | None, dict[str, torch.Tensor] | None]:
    """(model description, class names, state dict) of a .pt file. Of a .yaml, the description, None and None.

    Raises FileNotFoundError for a file that does not exist, WeightsError for one that holds no detector.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return read_yaml(name), None, None
    path = find_weights(name)
    import_ultralytics()
    return read_pt(path, trust_pickle)


def read_yaml(name: str) -> dict:
    """A model description from a file, or an official one by name (yolov9t.yaml ... yolov9e.yaml).

    Raises FileNotFoundError for an unknown name, WeightsError for a file that is not YAML.
    """
    package = import_ultralytics()
    import yaml  # comes with ultralytics, whose own YAML.load refuses the extension .YAML

    path = Path(name).expanduser()
    if not path.is_file():
        official = [f"yolov9{size}.yaml" for size in SIZES]
        if name not in official:
            raise FileNotFoundError(
                f"there is no model description {name}: pass a path, or one of {', '.join(official)}"
            )
        path = Path(package.__file__).parent / "cfg/models/v9" / name
    try:
        return json.loads(
            json.dumps(yaml.safe_load(path.read_bytes()))
        )  # must be JSON: it becomes part of a checkpoint's config.json
    except OSError:
        raise
    except Exception as error:  # of the YAML library, which only ultralytics imports
        raise WeightsError(f"{path} is not a YAML model description: {one_line(error)}") from error


def find_weights(name: str) -> Path:
    """The path of a weights file; official weights are downloaded. Raises FileNotFoundError, listing the alternatives."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    reason = f"there is no file {name}"
    if name in [f"yolov9{size}.pt" for size in SIZES]:
        try:
            return download(name)
        except (OSError, MemoryError) as error:  # ultralytics raises MemoryError for a full disk
            reason = f"{name} is not on this computer and could not be downloaded ({one_line(error)})"
    raise FileNotFoundError(
        f"{reason}. Use one of these: a path to a YOLOv9 .pt file; NANOCHAT_YOLO_WEIGHTS set to such a path; a .yaml such "
        "as yolov9t.yaml for random weights; the encoder of a nanochat checkpoint (its folder)"
    )


def download(name: str) -> Path:
    """Official weights, downloaded once into the user's cache folder. Raises OSError where the download fails."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanochat-vision"
    if not (folder / name).is_file():
        import_ultralytics()
        from ultralytics.utils.downloads import attempt_download_asset

        print(
            f"note: fetching {name} from {SOURCE} to {folder}, once. Offline, copy the file there from another computer, set "
            "NANOCHAT_YOLO_WEIGHTS to a YOLOv9 .pt file, or use the encoder of a checkpoint",
            file=sys.stderr,
        )
        try:
            attempt_download_asset(folder / name, retry=0, progress=False)  # retries take minutes without a network
        except (OSError, MemoryError):
            with suppress(OSError):  # removes the new folder if it is empty
                folder.rmdir()
            raise
    return folder / name
