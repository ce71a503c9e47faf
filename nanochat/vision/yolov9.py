"""YOLOv9 (Wang, Yeh, Liao 2024, arXiv 2402.13616), as ultralytics builds it, turned into an encoder: feature maps of
any layer, pooled embeddings, and detections, in one forward pass.

The only file that imports ultralytics (AGPL-3.0), and only when an encoder is built. Everything else of the package
runs without it: text models, cached features, training on them.
"""

import atexit
import colorsys
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from nanochat.vision.images import ImageSource, Letterbox, letterbox, open_image
from nanochat.vision.weights import WeightsError, check_architecture, class_names, one_line, read_pt

SIZES = "tsmce"  # of the official models: yolov9t ... yolov9e
DEFAULT_WEIGHTS = "yolov9t.pt"
STRIDE = 32  # of the coarsest map; input sizes are multiples of it
LEVELS = ("p3", "p4", "p5")  # what the detection head sees, at stride 8, 16 and 32
MAX_DETECTIONS = 300  # for each picture, as in ultralytics' predict


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

    weights: an official name (yolov9t.pt ... yolov9e.pt; downloaded by ultralytics on first use), a path to a .pt
        file, or a .yaml for random weights ("yolov9t.yaml", or your own). Default: $NANOCHAT_YOLO_WEIGHTS, else
        yolov9t.pt.
    image_size: side of the square input in pixels, a multiple of 32.
    trust_pickle: a .pt file is a pickle. Without this, only numbers and names are read from it, and a file that asks for
        more is refused; with it, the file may run any code.

    Raises FileNotFoundError where there are no such weights, WeightsError for files that are no detector, ImportError
    where ultralytics is missing, ValueError for other bad arguments, as a device that is not there.

    layer: "head" is the decoded prediction map of the coarsest level: 4 box values (centre x, y, width, height, as
    shares of the input) and a score for each class, per cell. "p3", "p4", "p5" are the maps that the head sees, at
    stride 8, 16, 32. A number is the output of that module. "p3+p4+p5" joins maps along their channels, on the grid of
    the first.
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
        device = usable_device(device)
        weights = str(weights or os.environ.get("NANOCHAT_YOLO_WEIGHTS") or DEFAULT_WEIGHTS)
        if weights.endswith((".yaml", ".yml")):
            self.set_up(read_yaml(weights), None, image_size)
        else:
            path = find_weights(weights)
            import_ultralytics()
            yaml, names, state = read_pt(path, trust_pickle)
            self.set_up(yaml, names, image_size)
            try:
                self.net.load_state_dict(state)
            except RuntimeError as error:
                raise WeightsError(
                    f"{path} does not fit its own architecture: fused or pruned? {one_line(error)}"
                ) from error
        self.to(device)

    @classmethod
    def from_architecture(cls, architecture: dict, device: str | torch.device = "cpu") -> "YOLOv9Plus":
        """An encoder of the shape that `architecture` tells, with random weights: load a state dict into it next.

        It may come from a stranger's checkpoint: what it says is checked, and runs no code of theirs (WeightsError).
        """
        if not isinstance(architecture, dict) or not {"yaml", "names", "image_size", "n_layers"} <= architecture.keys():
            raise WeightsError("no encoder architecture: expected the keys yaml, names, image_size and n_layers")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.set_up(architecture["yaml"], class_names(architecture["names"]), architecture["image_size"])
        n, n_layers = architecture["n_layers"], len(self.net.model)
        if type(n) is not int or not 0 < n <= n_layers:
            raise WeightsError(f"no encoder architecture: n_layers is {n!r}, expected 1..{n_layers}")
        self.net.model = self.net.model[:n]
        return self.to(device)

    def set_up(self, yaml: dict, names: dict[int, str] | None, image_size: int) -> None:
        self.image_size = checked_size(image_size)
        self.yaml = yaml
        self.net = build(yaml, None if names is None else len(names))
        self.names = names or dict(self.net.names)
        self.levels = dict(zip(LEVELS, self.net.model[-1].f, strict=True))  # kept when the head is cut off
        self.eval()

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

    def index_of(self, part: str) -> int:
        """The module behind one layer name. Raises ValueError for one that is not there."""
        n = len(self.net.model)
        if part == "head":
            if not self.has_head:
                raise ValueError(
                    f"this encoder was cut after layer {n - 1} and has no detection head: it gives maps of the layers "
                    f"0..{n - 1}, and no detections"
                )
            return n - 1
        if part in self.levels:
            index = self.levels[part]
        elif re.fullmatch(r"-?\d+", part):
            index = int(part) + (n if part.startswith("-") else 0)
        else:
            raise ValueError(
                f'unknown layer {part!r}: choose "head", "p3", "p4", "p5", 0..{n - 1}, or several joined by "+"'
            )
        if not 0 <= index < n:
            raise ValueError(f"there is no layer {part} (module {index}): this encoder has modules 0..{n - 1}")
        return index

    def embedding_dim(self, layer: str | int = "head") -> int:
        """Channels of the layer's map: what vision_embedding_dim must be."""
        weight = next(self.net.parameters())
        with torch.no_grad(), evaluating(self):
            return self(weight.new_zeros(1, 3, 2 * STRIDE, 2 * STRIDE), layer).size(1)

    def truncate(self, layer: str | int) -> "YOLOv9Plus":
        """Drop the modules behind `layer`: a smaller encoder, without detections unless the layer is the head."""
        self.net.model = self.net.model[: max(map(self.index_of, parts_of(layer))) + 1]
        return self

    # ---- forward

    def pixels(self, images: ImageSource | Sequence[ImageSource]) -> tuple[torch.Tensor, list[Letterbox]]:
        """One picture or a list of B -> (B, 3, S, S) RGB in 0..1 on the encoder's device, and how each was fitted."""
        weight, size = next(self.net.parameters()), self.image_size
        fitted = [letterbox(open_image(image), size) for image in as_list(images)]
        squares = np.stack([square for square, _ in fitted])
        x = torch.from_numpy(squares).to(weight.device).permute(0, 3, 1, 2).to(weight.dtype) / 255
        return x.contiguous(), [fit for _, fit in fitted]

    def forward(self, pixels: torch.Tensor, layer: str | int = "head") -> torch.Tensor:
        """(B, 3, S, S) in 0..1 -> the layer's map (B, C, H, W). Differentiable: this is what training goes through."""
        return self.run(pixels, [layer])[0][layer]

    def run(
        self, pixels: torch.Tensor, layers: Sequence[str | int], head: bool = False
    ) -> tuple[dict[str | int, torch.Tensor], torch.Tensor | None]:
        """One pass, as far as it is needed. Returns {layer: map} and, with `head`, the predictions (B, 4 + nc, cells)."""
        if pixels.dim() != 4 or pixels.size(1) != 3 or any(side % STRIDE for side in pixels.shape[2:]):
            raise ValueError(f"pixels must be (B, 3, H, W), sides multiples of {STRIDE}, got {tuple(pixels.shape)}")
        parts = {part for layer in layers for part in parts_of(layer)} | ({"head"} if head else set())
        indices = {part: self.index_of(part) for part in parts}
        caught: dict[int, torch.Tensor] = {}
        hooks = [
            self.net.model[index].register_forward_hook(catch_into(caught, index)) for index in set(indices.values())
        ]
        last = max(indices.values())
        try:
            # `embed` makes ultralytics stop behind that module; what it returns then is of no use here
            self.net(pixels, embed=[last] if last < len(self.net.model) - 1 else None)
        finally:
            for hook in hooks:
                hook.remove()
        predictions = predictions_of(caught[indices["head"]]) if "head" in parts else None
        maps = {
            part: prediction_map(predictions, *pixels.shape[2:]) if part == "head" else checked_map(caught[index], part)
            for part, index in indices.items()
        }
        return {layer: join([maps[part] for part in parts_of(layer)]) for layer in layers}, predictions

    # ---- what people call

    @torch.no_grad()  # not inference_mode: its tensors could not be used in training a projector later
    def encode(
        self,
        images: ImageSource | Sequence[ImageSource],
        layers: Sequence[str | int] = ("head",),
        detect: bool = False,
        conf: float = 0.25,
        iou: float = 0.7,
    ) -> Encoded:
        """Maps of several layers, and detections if asked for, from one forward pass over all the pictures.

        conf, iou: see `detect`. Always in evaluation mode, whatever mode the encoder is in.
        """
        layers = [layers] if isinstance(layers, (str, int)) else list(layers)
        for name, value in (("conf", conf), ("iou", iou)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {value}")
        if not layers and not detect:
            raise ValueError("nothing to do: name at least one layer, or set detect=True")
        with evaluating(self):
            x, fits = self.pixels(images)
            maps, predictions = self.run(x, layers, head=detect)
        return Encoded(maps, self.to_detections(predictions, fits, conf, iou) if detect else None)

    def extract_features(self, images: ImageSource | Sequence[ImageSource], layer: str | int = "head") -> torch.Tensor:
        """One picture or a list -> (B, C, H, W), unpooled."""
        return self.encode(images, [layer]).maps[layer]

    def get_image_embeddings(
        self, images: ImageSource | Sequence[ImageSource], pool: str = "avg", layer: str | int = "head"
    ) -> torch.Tensor:
        """One picture or a list -> (B, C) by "avg" or "max", (B, C*H*W) by "flatten"."""
        if pool not in ("avg", "max", "flatten"):
            raise ValueError(f'pool must be "avg", "max" or "flatten", got {pool!r}')
        features = self.extract_features(images, layer)
        if pool == "flatten":
            return features.flatten(1)
        return features.mean((2, 3)) if pool == "avg" else features.amax((2, 3))

    def detect(
        self, images: ImageSource | Sequence[ImageSource], conf: float = 0.25, iou: float = 0.7
    ) -> list[Detection] | list[list[Detection]]:
        """Objects of one picture as a list of Detection, best first; for a list of pictures, a list of such lists.

        conf: least score. iou: boxes of a class that overlap more are taken for the same object.
        """
        found = self.encode(images, [], detect=True, conf=conf, iou=iou).detections
        return found if isinstance(images, (list, tuple)) or is_batch(images) else found[0]

    def to_detections(
        self, predictions: torch.Tensor, fits: list[Letterbox], conf: float, iou: float
    ) -> list[list[Detection]]:
        """Non-maximum suppression, and boxes back into each picture's own pixels."""
        from ultralytics.utils.nms import non_max_suppression

        # the time limit is there to be never reached: past it, ultralytics gives the remaining pictures no boxes at all
        kept = non_max_suppression(
            predictions.float(), conf, iou, max_det=MAX_DETECTIONS, nc=len(self.names), max_time_img=60.0
        )
        result = []
        for rows, fit in zip(kept, fits, strict=True):
            rows = rows.cpu().numpy()  # (n, 6): x1, y1, x2, y2, score, class
            boxes = fit.to_image(rows[:, :4]).tolist()
            scores, classes = rows[:, 4].tolist(), rows[:, 5].astype(int).tolist()
            result.append(
                [Detection(tuple(b), s, c, self.names[c]) for b, s, c in zip(boxes, scores, classes, strict=True)]
            )
        return result

    @staticmethod
    def draw(image: ImageSource, detections: Sequence[Detection]) -> Image.Image:
        """A copy of the picture with boxes, classes and scores drawn in, in proportion to its size."""
        picture = open_image(image).copy()
        pen = ImageDraw.Draw(picture)
        side = max(picture.size)
        thick, font = max(2, side // 250), ImageFont.load_default(size=max(10, side // 40))
        for detection in sorted(detections, key=lambda d: d.score):  # the surest on top
            colour = class_colour(detection.class_id)
            pen.rectangle(detection.box, outline=colour, width=thick)
            label = f"{detection.class_name} {detection.score:.2f}"
            _, _, width, height = pen.textbbox((0, 0), label, font=font)
            left, top = detection.box[:2]
            x = max(0, min(left, picture.width - width - 2 * thick))
            y = top - height - thick if top > height + thick else top  # above the box where there is room, else inside
            pen.rectangle((x, y, x + width + 2 * thick, y + height + thick), fill=colour)
            pen.text((x + thick, y), label, fill="white", font=font)
        return picture


# ---- small helpers ----


def checked_size(size: int) -> int:
    if not isinstance(size, int) or size < STRIDE or size % STRIDE:
        raise ValueError(f"image_size must be a positive multiple of {STRIDE}, got {size!r}")
    return size


def usable_device(name: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch that was built without this kind
        raise ValueError(f"the device {name} cannot be used ({one_line(error)}): use cpu, or another one") from error


def is_batch(images) -> bool:
    return isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4 and len(images) != 1


def as_list(images) -> list[ImageSource]:
    if isinstance(images, (list, tuple)) or is_batch(images):
        if len(images) == 0:
            raise ValueError("there are no pictures: the list is empty")
        return list(images)
    return [images]


def parts_of(layer: str | int) -> list[str]:
    return str(layer).split("+")


def catch_into(caught: dict[int, torch.Tensor], index: int):
    owner = threading.get_ident()  # another thread's pass through the same modules must not end up in ours

    def hook(module, inputs, output):
        if threading.get_ident() == owner:
            caught[index] = output

    return hook


def predictions_of(output) -> torch.Tensor:
    """The detection head's output -> predictions (B, 4 + nc, cells): x, y, w, h in pixels of the input, then scores."""
    if isinstance(output, dict):
        raise ValueError("the detection head decodes in evaluation mode only: call eval(), or train on another layer")
    return output[0] if isinstance(output, (tuple, list)) else output


def checked_map(output, layer: str) -> torch.Tensor:
    if not isinstance(output, torch.Tensor) or output.dim() != 4:
        raise ValueError(f"layer {layer} gives no map (B, C, H, W): choose another")
    return output


def prediction_map(predictions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 4 + nc, cells of all levels) -> (B, 4 + nc, H / 32, W / 32): the coarsest level, boxes as shares of H, W."""
    rows, columns = height // STRIDE, width // STRIDE
    coarsest = predictions[..., -rows * columns :].unflatten(-1, (rows, columns))  # levels lie one behind the other
    sides = predictions.new_tensor([width, height, width, height]).view(4, 1, 1)
    return torch.cat([coarsest[:, :4] / sides, coarsest[:, 4:]], 1)


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
def evaluating(module: nn.Module) -> Iterator[None]:
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
    return tuple(int(255 * v) for v in colorsys.hsv_to_rgb((class_id * 0.618034 + 0.02) % 1, 0.85, 0.75))


# ---- building and loading ----


def import_ultralytics():
    """ultralytics, quiet and private: left alone, it writes into the home folder, asks the network, installs packages."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    if "YOLO_CONFIG_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="nanochat-yolo-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["YOLO_CONFIG_DIR"] = folder
    pillow_open = Image.open
    try:
        import ultralytics.nn.tasks
    except ImportError as error:
        if any(name in str(error) for name in ("libGL", "libgthread", "libglib", "libxcb", "libX11")):
            raise ImportError(
                f"OpenCV, which ultralytics uses, lacks a system library ({error}): "
                "on Debian or Ubuntu, apt-get install libgl1 libglib2.0-0"
            ) from error
        raise ImportError(
            f"the encoder needs ultralytics ({error}): pip install ultralytics. Everything else works without it"
        ) from error
    finally:
        # it puts its own there, which wants to install a package for any file that is no image
        Image.open = pillow_open
    return ultralytics


def build(yaml: dict, n_classes: int | None) -> nn.Module:
    """A DetectionModel with random weights. Raises WeightsError for anything but a three-level detector."""
    tasks = import_ultralytics().nn.tasks
    check_architecture(yaml, tasks)
    default = tasks.Conv.default_act  # building a ReLU model must not turn later SiLU models into ReLU ones
    try:
        net = tasks.DetectionModel(deepcopy(yaml), nc=n_classes, verbose=False)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"ultralytics cannot build this model: {one_line(error)}") from error
    finally:
        tasks.Conv.default_act = default
    head = net.model[-1]
    if type(head).__name__ != "Detect" or net.stride.tolist() != [8, 16, 32] or getattr(head, "end2end", False):
        raise WeightsError(
            f"this model ends in {type(head).__name__} at strides {net.stride.tolist()}, expected a detector like YOLOv9's: "
            "Detect at strides 8, 16 and 32, without a one-to-one head"
        )
    return net


def read_yaml(name: str) -> dict:
    """A model description: a file, or the name of an official one. Raises FileNotFoundError or ValueError."""
    package = import_ultralytics()
    from ultralytics.utils import YAML

    path = Path(name).expanduser()
    if not path.is_file():
        if name not in [f"yolov9{size}.yaml" for size in SIZES]:
            raise FileNotFoundError(
                f"there is no model description {name}: give a path, or one of "
                + ", ".join(f"yolov9{size}.yaml" for size in SIZES)
            )
        path = Path(package.__file__).parent / "cfg/models/v9" / name
    try:
        return json.loads(json.dumps(YAML.load(path)))  # it goes into the config.json of checkpoints
    except OSError:
        raise
    except Exception as error:  # of the YAML library, which only ultralytics imports
        raise WeightsError(f"{path} is no YAML model description: {one_line(error)}") from error


def find_weights(name: str) -> Path:
    """A file on disk; official names are fetched if need be. Raises FileNotFoundError, with the ways out."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    reason = f"there is no file {name}"
    if name in [f"yolov9{size}.pt" for size in SIZES]:
        try:
            return download(name)
        except (OSError, MemoryError) as error:  # MemoryError is ultralytics' word for a full disk
            reason = f"{name} is not here and could not be downloaded ({one_line(error)})"
    raise FileNotFoundError(
        f"{reason}. Ways out: a path to a YOLOv9 .pt file; NANOCHAT_YOLO_WEIGHTS set to one; a .yaml such as "
        "yolov9t.yaml for random weights; or the encoder of a nanochat checkpoint (its folder; load_encoder in Python)"
    )


def download(name: str) -> Path:
    """Official weights into the user's cache folder, where they stay. Raises OSError where the network gives none."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanochat-vision"
    if not (folder / name).is_file():
        import_ultralytics()
        from ultralytics.utils.downloads import attempt_download_asset

        try:  # once: more tries take minutes where there is no network
            attempt_download_asset(folder / name, retry=0, progress=False)
        except (OSError, MemoryError):
            with suppress(OSError):  # the folder that it was to go into, if nothing else is there
                folder.rmdir()
            raise
    return folder / name
