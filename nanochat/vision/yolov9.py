"""YOLOv9 (Wang, Yeh, Liao 2024, arXiv 2402.13616), as ultralytics builds it, turned into an encoder: feature maps of any
layer, pooled embeddings, and detections, in one forward pass.

The only file that imports ultralytics (AGPL-3.0), and only when an encoder is built. Everything else of the package runs
without it: text models, cached features, training on them.
"""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from nanochat.vision.images import ImageSource, Letterbox, letterbox, open_image

OFFICIAL = tuple(f"yolov9{size}.pt" for size in "tsmce")
DEFAULT_WEIGHTS = "yolov9t.pt"
STRIDE = 32  # of the coarsest map; input sizes are multiples of it
LEVELS = ("p3", "p4", "p5")
ACTIVATIONS = {"torch.nn.ReLU()", "torch.nn.SiLU()", "nn.ReLU()", "nn.SiLU()", "torch.nn.GELU()", "nn.GELU()"}
MODULE_NAME = re.compile(r"(nn\.)?[A-Z][A-Za-z0-9]*")  # classes only; ultralytics looks the name up among its globals
PLAIN_ARGUMENTS = {"nc", "None", "True", "False", "nearest", "bilinear"}


@dataclass(frozen=True)
class Detection:
    """box: x1, y1, x2, y2 in pixels of the given picture; score: 0..1."""

    box: tuple[float, float, float, float]
    score: float
    class_id: int
    class_name: str


@dataclass
class Encoded:
    """maps: (B, C, H, W) of each layer asked for; detections: a list for each picture, or None if not asked for."""

    maps: dict[str | int, torch.Tensor]
    detections: list[list[Detection]] | None


class YOLOv9Plus(nn.Module):
    """A YOLOv9 whose insides can be looked at.

    weights: an official name (yolov9t.pt ... yolov9e.pt; downloaded by ultralytics on first use), a path to a .pt file, or a
        .yaml for random weights ("yolov9t.yaml", or your own). Default: $NANOCHAT_YOLO_WEIGHTS, else yolov9t.pt.
    image_size: side of the square input in pixels, a multiple of 32.
    trust_pickle: a .pt file is a pickle. Without this, only plain detector modules are read from it and anything else is
        refused; with it, the file may run any code.

    Raises FileNotFoundError where there are no such weights, ValueError for files that are no detector, ImportError where
    ultralytics is missing.

    layer: "head" is the decoded prediction map of the coarsest level: 4 box values (centre x, y, width, height, as shares of
    the input) and a score for each class, per cell. "p3", "p4", "p5" are the maps that the head sees, at stride 8, 16,
    32. A number is the output of that module. "p3+p4+p5" joins maps along their channels, on the grid of the first.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        image_size: int = 640,
        trust_pickle: bool = False,
    ):
        super().__init__()
        self.image_size = checked_size(image_size)
        weights = str(weights or os.environ.get("NANOCHAT_YOLO_WEIGHTS") or DEFAULT_WEIGHTS)
        if weights.endswith((".yaml", ".yml")):
            yaml, names, state = read_yaml(weights), None, None
        else:
            yaml, names, state = read_pt(find_weights(weights), trust_pickle)
        self.yaml = yaml
        self.net = build(yaml, None if names is None else len(names))
        self.names = dict(names or self.net.names)
        if state is not None:
            self.net.load_state_dict(state)
        self.finish(device)

    @classmethod
    def from_architecture(cls, architecture: dict, device: str | torch.device = "cpu") -> "YOLOv9Plus":
        """An encoder of the shape that `architecture` tells, with random weights: load a state dict into it next."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.image_size = checked_size(architecture["image_size"])
        self.yaml = architecture["yaml"]
        self.names = {int(i): str(name) for i, name in architecture["names"].items()}
        self.net = build(self.yaml, len(self.names))
        self.levels = dict(zip(LEVELS, self.net.model[-1].f, strict=True))
        self.net.model = self.net.model[: architecture["n_layers"]]
        self.finish(device)
        return self

    def finish(self, device) -> None:
        if not hasattr(self, "levels"):
            self.levels = dict(zip(LEVELS, self.net.model[-1].f, strict=True))
        self.widths: dict[str, int] = {}
        self.net.requires_grad_(True)  # ultralytics freezes part of its head
        self.to(device).eval()

    @property
    def architecture(self) -> dict:
        """JSON-able: all that `from_architecture` needs."""
        names = {str(i): name for i, name in self.names.items()}
        return {"yaml": self.yaml, "names": names, "image_size": self.image_size, "n_layers": len(self.net.model)}

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def has_head(self) -> bool:
        return type(self.net.model[-1]).__name__ == "Detect"

    # ---- which layer

    def modules_of(self, layer: str | int) -> list[int | str]:
        """The modules that a layer name stands for: indices, or "head"."""
        return [self.module_of(part) for part in str(layer).split("+")]

    def module_of(self, part: str) -> int | str:
        n = len(self.net.model)
        if part == "head":
            if not self.has_head:
                raise ValueError(f"this encoder was cut after layer {n - 1} and has no detection head")
            return part
        if part in self.levels:
            index = self.levels[part]
        elif re.fullmatch(r"-?\d+", part):
            index = int(part) % n if -n <= int(part) < 0 else int(part)
        else:
            raise ValueError(
                f'unknown layer {part!r}: choose "head", "p3", "p4", "p5", 0..{n - 1}, or several joined by "+"'
            )
        if not 0 <= index < n:
            raise ValueError(f"layer {part} is module {index}, but this encoder has modules 0..{n - 1}")
        return index

    def embedding_dim(self, layer: str | int = "head") -> int:
        """Channels of the layer's map: what vision_embedding_dim must be."""
        key = str(layer)
        if key == "head":
            self.module_of(key)
            return 4 + len(self.names)
        if key not in self.widths:
            training = self.training
            self.eval()
            weight = next(self.net.parameters())
            with torch.no_grad():
                self.widths[key] = self(
                    torch.zeros(1, 3, 64, 64, device=weight.device, dtype=weight.dtype), layer
                ).size(1)
            self.train(training)
        return self.widths[key]

    def truncate(self, layer: str | int) -> "YOLOv9Plus":
        """Drop the modules behind `layer`: a smaller, faster encoder, without detections unless the layer is the head."""
        if "head" not in (modules := self.modules_of(layer)):
            self.net.model = self.net.model[: max(modules) + 1]
        return self

    # ---- forward

    def pixels(self, images: ImageSource | Sequence[ImageSource]) -> tuple[torch.Tensor, list[Letterbox]]:
        """One picture or a list -> (B, 3, S, S) RGB in 0..1 on the encoder's device, and how each was fitted.

        A float tensor (B, 3, S, S) of the encoder's own size is taken as it is.
        """
        weight, size = next(self.net.parameters()), self.image_size
        fitted = [letterbox(open_image(image), size) for image in as_list(images)]
        squares = np.stack([square for square, _ in fitted])
        x = torch.from_numpy(squares).to(weight.device).permute(0, 3, 1, 2).to(weight.dtype) / 255
        return x.contiguous(), [fit for _, fit in fitted]

    def forward(self, pixels: torch.Tensor, layer: str | int = "head") -> torch.Tensor:
        """(B, 3, S, S) in 0..1 -> the layer's map (B, C, H, W). Differentiable: this is what training goes through."""
        outputs, _ = self.run(pixels, [layer])
        return outputs[layer]

    def run(self, pixels: torch.Tensor, layers: Sequence[str | int], head: bool = False):
        """One pass of the network. Returns {layer: map} and, with `head`, the raw predictions (B, 4 + nc, cells)."""
        wanted = {module for layer in layers for module in self.modules_of(layer)}
        caught: dict[int | str, torch.Tensor] = {}
        handles = []
        for module in wanted | ({"head"} if head else set()):
            index = len(self.net.model) - 1 if module == "head" else module
            handles.append(self.net.model[index].register_forward_hook(catch_into(caught, module)))
        try:
            self.net(pixels)
        finally:
            for handle in handles:
                handle.remove()
        predictions = caught.get("head")
        if isinstance(predictions, (tuple, list)):  # in evaluation mode: (decoded, raw)
            predictions = predictions[0]
        if predictions is not None and not isinstance(predictions, torch.Tensor):
            raise ValueError(
                "the detection head decodes in evaluation mode only: call eval(), or train on another layer"
            )
        if "head" in wanted:
            caught["head"] = self.prediction_map(predictions, pixels.size(-1))
        for module in wanted:
            if not isinstance(caught[module], torch.Tensor) or caught[module].dim() != 4:
                raise ValueError(f"layer {module} gives no map (B, C, H, W): choose another")
        return {layer: join([caught[module] for module in self.modules_of(layer)]) for layer in layers}, predictions

    @staticmethod
    def prediction_map(predictions: torch.Tensor, size: int) -> torch.Tensor:
        """(B, 4 + nc, cells of all levels) -> (B, 4 + nc, S / 32, S / 32): the coarsest level, boxes as shares of S."""
        side = size // STRIDE
        coarsest = predictions[..., -side * side :].unflatten(-1, (side, side))
        return torch.cat([coarsest[:, :4] / size, coarsest[:, 4:]], 1)

    # ---- what people call

    @torch.no_grad()
    def encode(
        self, images, layers: Sequence[str | int] = ("head",), detect: bool = False, conf=0.25, iou=0.7
    ) -> Encoded:
        """Maps of several layers, and detections if asked for, from one forward pass over all the pictures."""
        if detect:
            self.module_of("head")
        with evaluating(self):
            x, fits = self.pixels(images)
            maps, predictions = self.run(x, layers, head=detect)
        return Encoded(maps, self.suppress(predictions, fits, conf, iou) if detect else None)

    def extract_features(self, images, layer: str | int = "head") -> torch.Tensor:
        """One picture or a list -> (B, C, H, W), unpooled."""
        return self.encode(images, [layer]).maps[layer]

    def get_image_embeddings(self, images, pool: str = "avg", layer: str | int = "head") -> torch.Tensor:
        """One picture or a list -> (B, C) by "avg" or "max", (B, C*H*W) by "flatten"."""
        if pool not in ("avg", "max", "flatten"):
            raise ValueError(f'pool must be "avg", "max" or "flatten", got {pool!r}')
        features = self.extract_features(images, layer)
        return {
            "avg": lambda: features.mean((2, 3)),
            "max": lambda: features.amax((2, 3)),
            "flatten": features.flatten,
        }[pool](*([1] if pool == "flatten" else []))

    def detect(self, images, conf: float = 0.25, iou: float = 0.7):
        """Objects of one picture as a list of Detection, best first; for a list of pictures, a list of such lists.

        conf: least score. iou: boxes of a class that overlap more are taken for the same object.
        """
        for name, value in (("conf", conf), ("iou", iou)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {value}")
        found = self.encode(images, [], detect=True, conf=conf, iou=iou).detections
        return found if isinstance(images, (list, tuple)) or is_batch(images) else found[0]

    def suppress(
        self, predictions: torch.Tensor, fits: list[Letterbox], conf: float, iou: float
    ) -> list[list[Detection]]:
        """Non-maximum suppression, and boxes back into each picture's own pixels."""
        from ultralytics.utils.nms import non_max_suppression

        kept = non_max_suppression(predictions.float(), conf, iou, max_det=300, nc=len(self.names))
        result = []
        for rows, fit in zip(kept, fits, strict=True):
            rows = rows.cpu().numpy()  # (n, 6): box, score, class
            boxes = fit.to_image(rows[:, :4])
            result.append(
                [
                    Detection(tuple(float(v) for v in box), float(row[4]), int(row[5]), self.names[int(row[5])])
                    for box, row in zip(boxes, rows, strict=True)
                ]
            )
        return result

    @staticmethod
    def draw(image: ImageSource, detections: Sequence[Detection]) -> Image.Image:
        """A copy of the picture with boxes, classes and scores drawn in."""
        picture = open_image(image).copy()
        pen = ImageDraw.Draw(picture)
        side = max(picture.size)
        font = ImageFont.load_default(size=max(10, side // 40))
        for detection in sorted(detections, key=lambda d: d.score):  # the surest on top
            colour = class_colour(detection.class_id)
            pen.rectangle(detection.box, outline=colour, width=max(2, side // 250))
            label = f"{detection.class_name} {detection.score:.2f}"
            left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
            x = min(detection.box[0], picture.width - right)
            y = max(0.0, detection.box[1] - bottom - 4)
            pen.rectangle((x, y, x + right + 4, y + bottom + 4), fill=colour)
            pen.text((x + 2, y + 1), label, fill="white", font=font)
        return picture


# ---- small helpers ----


def checked_size(size: int) -> int:
    if not isinstance(size, int) or size < STRIDE or size % STRIDE:
        raise ValueError(f"image_size must be a positive multiple of {STRIDE}, got {size!r}")
    return size


def is_batch(images) -> bool:
    return isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4 and len(images) != 1


def as_list(images) -> list[ImageSource]:
    if isinstance(images, (list, tuple)) or is_batch(images):
        if len(images) == 0:
            raise ValueError("there are no pictures: the list is empty")
        return list(images)
    return [images]


def catch_into(caught: dict, name):
    def hook(module, inputs, output):
        caught[name] = output

    return hook


def join(maps: list[torch.Tensor]) -> torch.Tensor:
    """Maps on one grid, the first one's: coarser ones repeat their cells, finer ones are averaged."""
    size = maps[0].shape[-2:]
    fitted = [
        m if m.shape[-2:] == size
        else F.adaptive_avg_pool2d(m, size) if m.size(-1) > size[-1]
        else F.interpolate(m, size=size, mode="nearest")
        for m in maps
    ]  # fmt: skip
    return fitted[0] if len(fitted) == 1 else torch.cat(fitted, 1)


@contextmanager
def evaluating(module: nn.Module):
    """Evaluation mode inside the block: one look must not move BatchNorm's statistics."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def class_colour(class_id: int) -> tuple[int, int, int]:
    """Colours that stay apart: hues a golden angle from each other, dark enough for white text."""
    import colorsys

    return tuple(int(255 * v) for v in colorsys.hsv_to_rgb((class_id * 0.618034 + 0.02) % 1, 0.85, 0.75))


# ---- building and loading ----


def import_ultralytics():
    """ultralytics, quiet and private: by default it writes into the home folder, asks the network and installs packages."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    if "YOLO_CONFIG_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="nanochat-yolo-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["YOLO_CONFIG_DIR"] = folder
    try:
        import ultralytics.nn.tasks
    except ImportError as error:
        if any(name in str(error) for name in ("libGL", "libgthread", "libglib", "libxcb", "libX11")):
            raise ImportError(
                f"OpenCV, which ultralytics uses, lacks a system library ({error}): "
                "on Debian or Ubuntu, apt-get install libgl1 libglib2.0-0"
            ) from error
        raise ImportError(
            f"the encoder needs ultralytics ({error}): pip install ultralytics; text models and cached features run without it"
        ) from error
    return ultralytics


def build(yaml: dict, n_classes: int | None):
    """A DetectionModel with random weights. Raises ValueError for an architecture that could do more than be one."""
    check_architecture(yaml)
    tasks = import_ultralytics().nn.tasks
    default = tasks.Conv.default_act  # building a ReLU model must not turn later SiLU models into ReLU ones
    try:
        return tasks.DetectionModel(deepcopy(yaml), nc=n_classes, verbose=False)
    finally:
        tasks.Conv.default_act = default


def check_architecture(yaml: dict) -> None:
    """An architecture may come from a downloaded checkpoint, and ultralytics evaluates some of its strings as Python."""
    activation = yaml.get("activation")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"refused encoder architecture: activation {activation!r} is none of {sorted(ACTIVATIONS)}")
    for row in [*yaml.get("backbone", ()), *yaml.get("head", ())]:
        if not (isinstance(row, list) and len(row) == 4 and isinstance(row[2], str) and MODULE_NAME.fullmatch(row[2])):
            raise ValueError(
                f"refused encoder architecture: {str(row)[:80]} is no [from, repeats, module, arguments] row"
            )
        strings = [argument for argument in flat(row[3]) if isinstance(argument, str)]
        if any(argument not in PLAIN_ARGUMENTS for argument in strings):
            raise ValueError(f"refused encoder architecture: arguments {strings} of {row[2]} are not plain values")


def flat(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def read_yaml(name: str) -> dict:
    import_ultralytics()
    from ultralytics.nn.tasks import yaml_model_load

    try:
        return yaml_model_load(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no model description {name}: give a path, or one of yolov9{{t,s,m,c,e}}.yaml"
        ) from error


def find_weights(name: str) -> Path:
    """A file on disk; official names are fetched by ultralytics if need be."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.name in OFFICIAL and path.parent == Path("."):
        found = download(path.name)
        if found is not None:
            return found
        reason = f"{name} is not here and could not be downloaded"
    else:
        reason = f"there is no file {name}"
    raise FileNotFoundError(
        f"{reason}. Ways out: a path to a YOLOv9 .pt file; NANOCHAT_YOLO_WEIGHTS set to one; a .yaml such as yolov9t.yaml for "
        "random weights; or a nanochat checkpoint, which carries its own encoder"
    )


def download(name: str) -> Path | None:
    """Official weights into the user's cache folder; None where the network does not give them."""
    import socket

    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nanochat-vision"
    if (folder / name).is_file():
        return folder / name
    import_ultralytics()
    from ultralytics.utils.downloads import safe_download

    try:  # ask first: ultralytics retries for minutes where there is no network
        socket.create_connection(("github.com", 443), timeout=5).close()
    except OSError:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    url = f"https://github.com/ultralytics/assets/releases/download/v8.4.0/{name}"
    safe_download(url, file=folder / name, min_bytes=1e5, retry=1, progress=False)
    return folder / name if (folder / name).is_file() else None


def read_pt(path: Path, trust_pickle: bool) -> tuple[dict, dict[int, str], dict[str, torch.Tensor]]:
    """(architecture, class names, float32 state dict) of an ultralytics .pt file.

    The module objects in it are read for their numbers and then built anew, so nothing of the pickle stays alive.
    """
    import_ultralytics()
    try:
        if trust_pickle:
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            with torch.serialization.safe_globals(plain_modules(path)):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no PyTorch file, or is cut off: {' '.join(str(error).split())[:200]}") from error
    model = (content.get("ema") or content.get("model")) if isinstance(content, dict) else None
    if model is None or not hasattr(model, "yaml") or not hasattr(model, "names"):
        raise ValueError(f"{path} holds no ultralytics detector ('model' with its yaml and names)")
    yaml = {key: value for key, value in model.yaml.items() if key not in ("yaml_file", "ch")}
    return jsonable(yaml), dict(model.names), {name: t.float() for name, t in model.state_dict().items()}


def jsonable(yaml: dict) -> dict:
    return {
        key: value if isinstance(value, (dict, list, str, int, float, type(None))) else str(value)
        for key, value in yaml.items()
    }


def plain_modules(path: Path) -> list[type]:
    """The classes that the pickle asks for, if all are neural-network modules of torch or ultralytics."""
    import importlib
    import pickle

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no PyTorch file: {error}") from error
    classes = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = None
        if module.startswith(("torch.nn.modules.", "ultralytics.nn.")):
            found = getattr(importlib.import_module(module), attribute, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(
                f"{path} is a pickle that asks for {name}, which a detector does not need: refused, since it could run any code. "
                "If you trust its source, pass trust_pickle=True (--trust-pickle)"
            )
        classes.append(found)
    return classes
