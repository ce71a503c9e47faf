"""Vision: images in; feature maps, embeddings and detections out. Imports nothing of the language side.

The names below are loaded on first use, so `import nanochat.vision` loads neither torch nor an encoder.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.vision.detections import Detection
    from nanochat.vision.encoder import open_encoder
    from nanochat.vision.images import ImageError
    from nanochat.vision.timm_encoder import TimmEncoder
    from nanochat.vision.yolov9 import Encoded, YOLOv9Plus

__all__ = ["Detection", "Encoded", "ImageError", "TimmEncoder", "YOLOv9Plus", "open_encoder"]

# name -> the module of this package that defines it
MODULES = {
    "Detection": "detections",
    "Encoded": "yolov9",
    "ImageError": "images",
    "TimmEncoder": "timm_encoder",
    "YOLOv9Plus": "yolov9",
    "open_encoder": "encoder",
}


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
