"""The eyes: pictures in, feature maps, embeddings and detections out. Knows nothing of language."""

from nanochat.vision.images import ImageError
from nanochat.vision.yolov9 import Detection, Encoded, YOLOv9Plus

__all__ = ["Detection", "Encoded", "ImageError", "YOLOv9Plus"]
