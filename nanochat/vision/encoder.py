"""What an image encoder is, and how the rest of the project opens one.

A new encoder is a class with the methods of `Encoder` in a file of its own, plus one branch in `open_encoder` and one in
`encoder_from_architecture`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import torch
import torch.nn as nn

from nanochat.errors import UserError
from nanochat.vision.timm_encoder import PREFIX, WHEELS, TimmEncoder, open_timm


@runtime_checkable
class Encoder(Protocol):
    """An nn.Module that turns pixels into feature maps. The other methods of this protocol are those of nn.Module.

    image_size: side S of the square input in pixels. Setting it raises ValueError for a size that the encoder cannot use.
    antialias: how `images.letterbox` shrinks pictures for it.
    architecture: a JSON-able dict from which `encoder_from_architecture` rebuilds the encoder without its weights.
        "kind" names the class; it is saved in checkpoints.
    layer: a map's name, or a module number.

    One with channels that can be pruned also has `net`, its network, and `hidden`, see `vision.hidden`.
    """

    image_size: int
    antialias: bool

    @property
    def architecture(self) -> dict: ...

    def channels(self, layer: str | int) -> int:
        """Channels C of the layer's map. Raises ValueError for a layer that does not exist."""
        ...

    def maps(self, pixels: torch.Tensor, layers: Sequence[str | int]) -> dict[str | int, torch.Tensor]:
        """(B, 3, S, S) in 0..1 -> {layer: (B, C, H, W)} from one forward pass, differentiable."""
        ...

    def truncate(self, layer: str | int) -> Self:
        """Drop the modules after `layer`, in place. Returns the encoder."""
        ...

    def parameters_from(self, layer: str | int) -> list[nn.Parameter]:
        """The parameters of the modules that compute this layer, and of those behind it; "" for all. Raises ValueError for a
        layer that does not exist."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Self: ...


# ---- opening an encoder


def open_encoder(
    name: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
    trust_pickle: bool = False,
) -> Encoder:
    """The only place that resolves the name of an encoder.

    name: an official YOLOv9 name (yolov9t.pt ... yolov9e.pt), a .pt file, a .yaml for random weights, or None for
        $NANOCHAT_YOLO_WEIGHTS, else yolov9t.pt; efficientnet_lite0, efficientnet_lite2, timm:NAME or timm:NAME=FILE for a
        network of timm, see `timm_encoder`.
    image_size: side of the square input in pixels; by default 640, and 224 for networks of timm.
    trust_pickle: load a .pt file that contains more than a plain detector. Such a file can run any code.

    Raises FileNotFoundError for an unknown name and for weights that are not there; ValueError for files that hold no
    encoder, and for a device or image size that cannot be used; ImportError where ultralytics is missing.
    """
    if is_timm_name(name):
        return open_timm(str(name), device, image_size or 224)
    from nanochat.vision.yolov9 import YOLOv9Plus

    path = Path(name).expanduser() if name else None
    if path is not None and path.is_dir():
        raise FileNotFoundError(f"{name} is a folder, expected an encoder file (.pt or .yaml)")
    if path is not None and path.suffix.lower() not in (".pt", ".yaml", ".yml") and not path.is_file():
        raise FileNotFoundError(
            f"there is no encoder {str(name)!r}: expected an official YOLOv9 name (yolov9t.pt, yolov9s.pt, yolov9m.pt, "
            "yolov9c.pt, yolov9e.pt), a .pt file, a .yaml for random weights (yolov9t.yaml), efficientnet_lite0, "
            "efficientnet_lite2, timm:NAME, timm:NAME=FILE, or a nanochat checkpoint"
        )
    return YOLOv9Plus(name, device=device, image_size=image_size or 640, trust_pickle=trust_pickle)


def is_timm_name(name: str | Path | None) -> bool:
    return str(name).startswith(PREFIX) or str(name) in WHEELS


def encoder_from_architecture(architecture: dict, *, shapes_only: bool = False) -> Encoder:
    """An encoder with random weights, from its `architecture` in a checkpoint. Load its state dict next.

    The architecture may come from an untrusted checkpoint: it is checked, and none of its content is run as code.
    shapes_only: it is made without memory (`meta.on_meta`), to compare the shapes of its weights; it will not run.
    Raises ValueError for an unknown kind and for an incomplete or unsafe architecture.
    """
    if not isinstance(architecture, dict):
        raise UserError(f"the encoder architecture must be a mapping, got {type(architecture).__name__}")
    kind = architecture.get("kind", "yolov9")  # checkpoints of release 0.1 have no kind
    if kind == "timm":
        return TimmEncoder(architecture, shapes_only=shapes_only)
    if kind != "yolov9":
        raise UserError(
            f"unknown encoder kind {str(kind)[:80]!r}, expected yolov9 or timm: is this nanochat too old for it?"
        )
    from nanochat.vision.yolov9 import YOLOv9Plus

    return YOLOv9Plus.from_architecture(architecture, shapes_only=shapes_only)
