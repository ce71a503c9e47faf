"""The encoder as an ONNX graph, with what stands behind it: the mean over a grid (`fusion.pool_to_tokens`), or a robot's glances.

    encoder.onnx    squares (B, S, S, 3) uint8, and a number of its camera for each where there are several -> (B, N, D)

Where a picture is one vector, the mean of its map, rectangles (B, H, W, 3) will do too, sides multiples of 32.

In int8 it is made by `export.int8_encoder`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn as nn

from nanochat.export.graph import OPSET, quiet
from nanochat.export.int8_encoder import correct_biases, quantize_encoder
from nanochat.vision.inference import make_copy
from nanochat.vision.letterbox import MAX_IMAGE_SIZE, STRIDE
from nanochat.vision.pixels import scaled

MAX_SIDE = MAX_IMAGE_SIZE // STRIDE  # cells


class Eyes(nn.Module):
    """From pictures to vision vectors, as `MultimodalGPT.look` and `RobotGPT.look_around` do it."""

    def __init__(self, model):
        super().__init__()
        self.encoder = make_copy(model.vision_encoder, torch.float32).to(memory_format=torch.contiguous_format)
        if takes_rectangles(model) and hasattr(self.encoder, "fix_padding"):
            self.encoder.fix_padding()
        self.layer, self.pool = model.config.vision_layer, model.pool
        self.glances = getattr(model, "glances", None)

    def forward(self, squares: torch.Tensor, cameras: torch.Tensor | None = None) -> torch.Tensor:
        maps = self.encoder.maps(scaled(squares, torch.float32), [self.layer])[self.layer]
        if self.glances is None:
            return self.pool(maps)
        seen = self.glances.of_every_camera(maps)
        return seen[:, 0] if cameras is None else seen[torch.arange(squares.size(0)), cameras]


def export_encoder(model, path: Path, int8: bool = False, squares: Sequence[np.ndarray] = ()) -> None:
    """squares: for int8, pictures (S, S, 3) uint8 to measure on."""
    eyes, size = Eyes(model).eval(), model.vision_encoder.image_size
    if int8:
        correct_biases(eyes, squares)
    several = getattr(model.config, "n_cameras", 1) > 1
    example = [torch.zeros(2, size, size, 3, dtype=torch.uint8)] + [torch.zeros(2, dtype=torch.int64)] * several
    batch = torch.export.Dim("batch")
    shapes = [{0: batch}] * len(example)
    if takes_rectangles(model):
        shapes = [{0: batch} | {axis: STRIDE * torch.export.Dim(f"side_{axis}", max=MAX_SIDE) for axis in (1, 2)}]
    with quiet():
        torch.onnx.export(
            eyes, tuple(example), path, input_names=["squares", "cameras"][: len(example)], output_names=["vectors"],
            dynamic_shapes=shapes, opset_version=OPSET, dynamo=True, external_data=False, optimize=True,
        )  # fmt: skip
    forget_sources(path)
    if int8:
        quantize_encoder(path, squares, getattr(model.config, "n_cameras", 1))


def forget_sources(path: Path) -> None:
    """Remove what the exporter notes about each operator: the line of code that it comes from, with the paths of this machine."""
    model = onnx.load(path)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, path)


def takes_rectangles(model) -> bool:
    """Whether the graph is for pictures of any shape: a map's mean is one vector, whatever its sides."""
    return model.config.vision_tokens_per_image == 1 and not hasattr(model, "glances")
