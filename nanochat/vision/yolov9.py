"""YOLOv9 (Wang, Yeh, Liao 2024, arXiv 2402.13616) as an image encoder: the feature maps of any layer, pooled embeddings and
detections, from one forward pass. The network itself is ultralytics' (AGPL-3.0); see yolov9_weights.py.
"""

import os
import re
import threading
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.devices import usable_device
from nanochat.errors import UserError
from nanochat.vision.detections import Detection
from nanochat.vision.hidden import described_hidden, narrow
from nanochat.vision.images import ImageSource, is_batch
from nanochat.vision.inference import embeddings, infer
from nanochat.vision.letterbox import STRIDE, Letterbox, of_rectangles
from nanochat.vision.pixels import SquareInput, check_pixels, evaluating, read_squares
from nanochat.vision.weights import WeightsError, class_names, head_inputs, one_line
from nanochat.vision.yolov9_weights import DEFAULT_WEIGHTS, build, load_weights

LEVELS = ("p3", "p4", "p5")  # inputs of the detection head, at stride 8, 16 and 32
MAX_DETECTIONS = 300  # per image, as in ultralytics' predict


@dataclass
class Encoded:
    """maps: {layer: (B, C, H, W)}; detections: a list for each image, or None if they were not requested."""

    maps: dict[str | int, torch.Tensor]
    detections: list[list[Detection]] | None


class YOLOv9Plus(SquareInput, nn.Module):
    """YOLOv9 as an `Encoder`: gives the output of any layer as a feature map, and detections.

    weights: an official name (yolov9t.pt ... yolov9e.pt; downloaded by ultralytics on first use), a path to a .pt
        file, or a .yaml for random weights ("yolov9t.yaml", or your own). Default: $NANOCHAT_YOLO_WEIGHTS, else
        yolov9t.pt.
    image_size: side of the square input in pixels, a multiple of 32.
    trust_pickle: a .pt file is a pickle. By default only numbers and names are read from it, and a file that asks for
        more is refused. With trust_pickle=True the file can run any code.

    Raises FileNotFoundError for weights that do not exist, WeightsError for files that hold no detector, ImportError
    where ultralytics is missing, and ValueError for other bad arguments, such as a device that is not available.

    `layer` in the methods below: "head" is the decoded prediction map of the coarsest level: per cell 4 box values
    (centre x, y, width, height, as fractions of the input) and a score for each class. "p3", "p4", "p5" are the inputs
    of the detection head, at stride 8, 16 and 32. A number is the output of that module. "p3+p4+p5" concatenates maps
    along their channels, on the grid of the first.
    """

    antialias = False  # as ultralytics resizes, for equal detections

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
        description, names, state = load_weights(weights, trust_pickle)
        self.set_up(description, names, image_size)
        if state is not None:
            try:
                self.net.load_state_dict(state)
            except RuntimeError as error:
                raise WeightsError(
                    f"{weights} does not fit its own architecture: fused or pruned? {one_line(error)}"
                ) from error
        self.to(device)

    @classmethod
    def from_architecture(
        cls, architecture: dict, device: str | torch.device = "cpu", *, shapes_only: bool = False
    ) -> "YOLOv9Plus":
        """An encoder with random weights, from the `architecture` of another one. Load a state dict into it next.

        The architecture may come from an untrusted checkpoint. It is checked, and none of its content is run as code.
        shapes_only: without memory, on the meta device; the encoder will not run.
        Raises WeightsError for one that is incomplete or unsafe.
        """
        if not isinstance(architecture, dict) or not {"yaml", "names", "image_size", "n_layers"} <= architecture.keys():
            raise WeightsError(
                "incomplete encoder architecture: expected the keys yaml, names, image_size and n_layers"
            )
        self = cls.__new__(cls)  # __init__ would look for weights
        nn.Module.__init__(self)
        description, n = architecture["yaml"], architecture["n_layers"]
        self.set_up(description, class_names(architecture["names"]), architecture["image_size"], n, shapes_only)
        self.hidden = narrow(self.net, architecture.get("hidden"))
        return self if shapes_only else self.to(device)

    def set_up(
        self, description: dict, names: dict[int, str] | None, image_size: int, n_layers=None, shapes_only=False
    ) -> None:
        self.image_size = image_size
        self.yaml = description
        self.net = build(description, None if names is None else len(names), n_layers, shapes_only)
        self.names = names or dict(self.net.names)
        self.hidden: dict[str, int] = {}
        self.levels = dict(zip(LEVELS, head_inputs(description), strict=True))  # kept when the head is cut off
        self.eval()

    @property
    def architecture(self) -> dict:
        """JSON-able: everything that `from_architecture` needs."""
        names = {str(i): name for i, name in self.names.items()}
        return {
            "kind": "yolov9", "yaml": self.yaml, "names": names, "image_size": self.image_size,
            "n_layers": len(self.net.model), **described_hidden(self.net, self.hidden),
        }  # fmt: skip

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def has_head(self) -> bool:
        return type(self.net.model[-1]).__name__ == "Detect"

    # ---- layers

    def index_of(self, part: str) -> int:
        """The number of the module behind one layer name. Raises ValueError for a layer that does not exist."""
        n = len(self.net.model)
        if part == "head":
            if not self.has_head:
                raise UserError(
                    f"this encoder was truncated after layer {n - 1} and has no detection head: it gives maps of the "
                    f"layers 0..{n - 1}, and no detections"
                )
            return n - 1
        if part in self.levels:
            index = self.levels[part]
        elif re.fullmatch(r"-?\d+", part):
            index = int(part) + (n if part.startswith("-") else 0)
        else:
            raise UserError(
                f'unknown layer {part!r}: choose "head", "p3", "p4", "p5", 0..{n - 1}, or several joined by "+"'
            )
        if not 0 <= index < n:
            raise UserError(f"there is no layer {part} (module {index}): this encoder has modules 0..{n - 1}")
        return index

    def channels(self, layer: str | int = "head") -> int:
        """Channels of the layer's map: the required vision_embedding_dim. Raises ValueError for an unknown layer."""
        weight = next(self.net.parameters())
        with torch.no_grad(), evaluating(self):
            return self(weight.new_zeros(1, 3, 2 * STRIDE, 2 * STRIDE), layer).size(1)

    def truncate(self, layer: str | int) -> "YOLOv9Plus":
        """Drop the modules after `layer`, in place: a smaller encoder, without detections unless the layer is "head"."""
        self.net.model = self.net.model[: max(map(self.index_of, parts_of(layer))) + 1]
        return self

    def merge_norms(self) -> None:
        """Merge BatchNorm into the convolutions, and parallel convolutions into one, and let activations write over what these
        made: in place, for inference only."""
        from ultralytics.nn.modules.conv import Conv, RepConv

        self.net.fuse(verbose=False)
        for module in self.net.modules():
            if isinstance(module, (Conv, RepConv)) and hasattr(module.act, "inplace"):
                module.act = copy(module.act)  # one object may serve several
                module.act.inplace = True

    def parameters_from(self, layer: str | int) -> list[nn.Parameter]:
        """Those of the module behind `layer` and of the modules after it; "" for all. Raises ValueError for an unknown layer."""
        first = min(map(self.index_of, parts_of(layer))) if layer != "" else 0
        return [parameter for module in self.net.model[first:] for parameter in module.parameters()]

    # ---- forward pass

    def forward(self, pixels: torch.Tensor, layer: str | int = "head") -> torch.Tensor:
        """(B, 3, H, W) in 0..1 -> the layer's map (B, C, H', W'). Differentiable. Raises ValueError, see `maps`."""
        return self.maps(pixels, [layer])[layer]

    def maps(self, pixels: torch.Tensor, layers: Sequence[str | int]) -> dict[str | int, torch.Tensor]:
        """(B, 3, H, W) in 0..1 -> {layer: map (B, C, H', W')} from one forward pass. Differentiable.

        Raises ValueError for pixels of another shape, sides that are not multiples of 32, an unknown layer, a layer
        whose output is not a map, and for "head" in training mode.
        """
        outputs = self.run_parts(pixels, {part for layer in layers for part in parts_of(layer)})
        return assemble(outputs, layers, *pixels.shape[2:])

    def run_parts(self, pixels: torch.Tensor, parts: Iterable[str]) -> dict[str, torch.Tensor]:
        """One forward pass, which stops after the last module needed: {part: map (B, C, H', W')}.

        "head" gives the predictions (B, 4 + n_classes, cells of all levels) instead of a map.
        """
        check_pixels(pixels)
        indices = {part: self.index_of(part) for part in parts}
        outputs: dict[int, torch.Tensor] = {}
        hooks = [
            self.net.model[index].register_forward_hook(store_output(outputs, index)) for index in set(indices.values())
        ]
        last = max(indices.values())
        try:
            # `embed` makes ultralytics stop after that module; the value it returns is not used
            self.net(pixels, embed=[last] if last < len(self.net.model) - 1 else None)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            part: predictions_of(outputs[index]) if part == "head" else checked_map(outputs[index], part)
            for part, index in indices.items()
        }

    # ---- images in, maps and detections out

    @torch.no_grad()  # not inference_mode: its tensors cannot be used for training later
    def encode(
        self,
        images: ImageSource | Sequence[ImageSource],
        layers: Sequence[str | int] = ("head",),
        detect: bool = False,
        conf: float = 0.25,
        iou: float = 0.7,
    ) -> Encoded:
        """Maps of several layers and, if requested, detections, from one forward pass over all images.

        conf, iou: see `detect`, whose pictures have smaller borders. Runs in evaluation mode, whatever the encoder's mode is.
        Raises ImageError for an image that cannot be opened, ValueError for an unknown layer, thresholds outside 0..1, or
        nothing to compute.
        """
        layers = [layers] if isinstance(layers, (str, int)) else list(layers)
        check_thresholds(conf, iou)
        if not layers and not detect:
            raise UserError("nothing to do: name at least one layer, or set detect=True")
        parts = {part for layer in layers for part in parts_of(layer)} | ({"head"} if detect else set())
        squares, fits = read_squares(self, images)
        outputs = infer(self, squares, lambda fast, pixels: fast.run_parts(pixels, parts))
        maps = assemble(outputs, layers, *squares.shape[1:3])
        return Encoded(maps, self.to_detections(outputs["head"], fits, conf, iou) if detect else None)

    def extract_features(self, images: ImageSource | Sequence[ImageSource], layer: str | int = "head") -> torch.Tensor:
        """One image or a list of B -> the layer's map (B, C, H, W), not pooled. Raises as `encode` does."""
        return self.encode(images, [layer]).maps[layer]

    def get_image_embeddings(
        self,
        images: ImageSource | Sequence[ImageSource],
        pool: str = "avg",
        layer: str | int = "head",
        rectangles: bool = False,
    ) -> torch.Tensor:
        """One image or a list of B -> (B, C) by "avg" or "max", (B, C*H*W) by "flatten". Raises as `encode` does.

        rectangles: as ultralytics' `embed`, less border and so less time, but not the vectors that models are trained on.
        """
        return embeddings(self, images, pool, layer, rectangles=rectangles)

    @torch.no_grad()
    def detect(
        self, images: ImageSource | Sequence[ImageSource], conf: float = 0.25, iou: float = 0.7
    ) -> list[Detection] | list[list[Detection]]:
        """Objects in one image, highest score first; for a list of images, a list of such lists.

        conf: minimum score. iou: of two boxes of a class that overlap more, the one with the lower score is dropped.
        As by ultralytics' `predict`, pictures get borders up to a multiple of 32 only. Raises as `encode` does.
        """
        check_thresholds(conf, iou)

        def detections(pixels: np.ndarray, fits: list[Letterbox]) -> list[list[Detection]]:
            predictions = infer(self, pixels, lambda fast, pixels: fast.run_parts(pixels, ["head"]))["head"]
            return self.to_detections(predictions, fits, conf, iou)

        found = of_rectangles(images, self.image_size, self.antialias, detections)
        return found if is_batch(images) else found[0]

    def to_detections(
        self, predictions: torch.Tensor, fits: list[Letterbox], conf: float, iou: float
    ) -> list[list[Detection]]:
        """Predictions (B, 4 + n_classes, cells) -> non-maximum suppression -> boxes in each image's own pixels."""
        from ultralytics.utils.nms import non_max_suppression

        # a time limit that is never reached: after it, ultralytics returns no boxes for the remaining images
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


def check_thresholds(conf: float, iou: float) -> None:
    """Raises ValueError for one outside 0..1."""
    for name, value in (("conf", conf), ("iou", iou)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} must lie in 0..1, got {value}")


def parts_of(layer: str | int) -> list[str]:
    """The single layers of a joined one: "p3+p4" -> ["p3", "p4"]."""
    return str(layer).split("+")


def store_output(outputs: dict[int, torch.Tensor], index: int):
    """A forward hook that stores the module's output in outputs[index]."""
    owner = threading.get_ident()  # ignore passes of other threads through the same module

    def hook(module, inputs, output):
        if threading.get_ident() == owner:
            outputs[index] = output

    return hook


def predictions_of(output) -> torch.Tensor:
    """The detection head's output -> predictions (B, 4 + n_classes, cells): x, y, w, h in input pixels, then scores."""
    if isinstance(output, dict):
        raise UserError("the detection head decodes in evaluation mode only: call eval(), or train on another layer")
    return output[0] if isinstance(output, (tuple, list)) else output


def checked_map(output, layer: str) -> torch.Tensor:
    if not isinstance(output, torch.Tensor) or output.dim() != 4:
        raise UserError(f"the output of layer {layer} is not a map (B, C, H, W): choose another layer")
    return output


def assemble(
    outputs: dict[str, torch.Tensor], layers: Sequence[str | int], height: int, width: int
) -> dict[str | int, torch.Tensor]:
    """Outputs of single layers -> {layer: map} for layers that may be joined. height, width: of the input in pixels."""
    maps = {
        part: prediction_map(output, height, width) if part == "head" else output for part, output in outputs.items()
    }
    return {layer: join([maps[part] for part in parts_of(layer)]) for layer in layers}


def prediction_map(predictions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 4 + n_classes, cells of all levels) -> (B, 4 + n_classes, H / 32, W / 32).

    Takes the coarsest level; boxes become fractions of the input's height and width.
    """
    rows, columns = height // STRIDE, width // STRIDE
    coarsest = predictions[..., -rows * columns :].unflatten(-1, (rows, columns))  # the levels follow each other
    sides = predictions.new_tensor([width, height, width, height]).view(4, 1, 1)
    return torch.cat([coarsest[:, :4] / sides, coarsest[:, 4:]], 1)


def join(maps: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate maps along channels on the first one's grid: coarser maps are repeated, finer ones averaged."""
    size = maps[0].shape[-2:]
    fitted = [
        m if m.shape[-2:] == size
        else F.adaptive_avg_pool2d(m, size) if m.size(-1) > size[-1]
        else F.interpolate(m, size=size, mode="nearest")
        for m in maps
    ]  # fmt: skip
    return fitted[0] if len(fitted) == 1 else torch.cat(fitted, 1)
