"""The encoder as an ONNX graph, with what stands behind it: the mean over a grid (`fusion.pool_to_tokens`), or a robot's glances.

    encoder.onnx    squares (B, S, S, 3) uint8, and a number of its camera for each where there are several -> (B, N, D)

int8: convolutions with 8-bit weights, a scale for each channel, and 8-bit maps, whose ranges are measured on pictures that the
user names. What is behind the map stays in float32.
"""

import logging
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from nanochat.export.graph import OPSET
from nanochat.vision.inference import make_copy
from nanochat.vision.pixels import scaled

# A convolution takes the range of the Clip (ReLU6) behind it only where that is named too: without it, most of what
# EfficientNet-Lite says was lost
QUANTIZED = ["Conv", "Clip", "Add"]


class Eyes(nn.Module):
    """From pictures to vision vectors, as `MultimodalGPT.look` and `RobotGPT.look_around` do it."""

    def __init__(self, model):
        super().__init__()
        self.encoder = make_copy(model.vision_encoder, torch.float32).to(memory_format=torch.contiguous_format)
        self.layer, self.pool = model.config.vision_layer, model.pool
        self.glances = getattr(model, "glances", None)

    def forward(self, squares: torch.Tensor, cameras: torch.Tensor | None = None) -> torch.Tensor:
        maps = self.encoder.maps(scaled(squares, torch.float32), [self.layer])[self.layer]
        if self.glances is None:
            return self.pool(maps)
        seen = self.glances.of_every_camera(maps)
        return seen[:, 0] if cameras is None else seen[torch.arange(squares.size(0)), cameras]


def export_encoder(model, path: Path) -> None:
    eyes, size = Eyes(model).eval(), model.vision_encoder.image_size
    several = getattr(model.config, "n_cameras", 1) > 1
    example = [torch.zeros(2, size, size, 3, dtype=torch.uint8)] + [torch.zeros(2, dtype=torch.int64)] * several
    batch = torch.export.Dim("batch")
    with quiet():
        torch.onnx.export(
            eyes, tuple(example), path, input_names=["squares", "cameras"][: len(example)], output_names=["vectors"],
            dynamic_shapes=[{0: batch}] * len(example), opset_version=OPSET, dynamo=True, external_data=False, optimize=True,
        )  # fmt: skip


def quantize_encoder(path: Path, squares: Iterable[np.ndarray], cameras: int) -> None:
    """Replace a float32 encoder by one in int8. squares: pictures (S, S, 3) uint8 to measure the maps on."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):
        def __init__(self):
            self.left = iter(squares)

        def get_next(self):
            picture = next(self.left, None)
            if picture is None:
                return None
            return {"squares": picture[None]} | ({"cameras": np.zeros(1, np.int64)} if cameras > 1 else {})

    ready = path.with_name("encoder.float.onnx")
    with quiet():
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        quantize_static(
            ready, path, Pictures(), quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=QUANTIZED,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    ready.unlink()


@contextmanager
def quiet():
    """The exporters of torch and ONNX Runtime tell of each of their steps."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
