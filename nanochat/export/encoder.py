"""The encoder as an ONNX graph, with what stands behind it: the mean over a grid (`fusion.pool_to_tokens`), or a robot's glances.

    encoder.onnx    squares (B, S, S, 3) uint8, and a number of its camera for each where there are several -> (B, N, D)

Where a picture is one vector, the mean of its map, rectangles (B, H, W, 3) will do too, sides multiples of 32.

int8: convolutions and glances with 8-bit weights, a scale for each channel, and 8-bit maps, whose ranges are measured on pictures
that the user names. The first and the last convolution stay in float32: one amplifies the rounding of pixels, and the other's map
may be all in a few of 256 steps, as that of a policy whose glances read small differences. Each of the others keeps the mean of
its channels (bias correction, Nagel et al. 2019, arXiv 1906.04721), as rounded weights shift it.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn as nn

from nanochat.export.graph import OPSET
from nanochat.vision.inference import make_copy
from nanochat.vision.letterbox import MAX_IMAGE_SIZE, STRIDE
from nanochat.vision.pixels import scaled

# A convolution takes the range of the Clip (ReLU6) behind it only where that is named too: without it, most of what
# EfficientNet-Lite says was lost
QUANTIZED = ["Conv", "Clip", "Add", "Gemm"]
MAX_SIDE = MAX_IMAGE_SIZE // STRIDE  # cells
LEVELS = 127  # of a positive 8-bit weight


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


def export_encoder(model, path: Path, int8: bool = False, squares: Sequence[np.ndarray] = ()) -> None:
    """squares: for int8, pictures (S, S, 3) uint8 to measure on."""
    eyes, size = Eyes(model).eval(), model.vision_encoder.image_size
    if int8:
        correct_biases(eyes, torch.from_numpy(np.stack(squares)))
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
    if int8:
        quantize_encoder(path, squares, getattr(model.config, "n_cameras", 1))


def takes_rectangles(model) -> bool:
    """Whether the graph is for pictures of any shape: a map's mean is one vector, whatever its sides."""
    return model.config.vision_tokens_per_image == 1 and not hasattr(model, "glances")


@torch.no_grad()
def correct_biases(eyes: Eyes, squares: torch.Tensor) -> None:
    """Add to the bias of each convolution, in place, what its channels will lose on average when its weights and those before it
    are 8-bit numbers."""
    means: dict[nn.Conv2d, torch.Tensor] = {}  # in the order in which they run

    def remember(one: nn.Conv2d, _, maps: torch.Tensor) -> None:
        means[one] = maps.mean((0, 2, 3))

    def correct(one: nn.Conv2d, _, maps: torch.Tensor) -> torch.Tensor:
        lost = means[one] - maps.mean((0, 2, 3))
        one.bias += lost
        return maps + lost[:, None, None]

    run_with_hooks(eyes, squares, [one for one in eyes.modules() if isinstance(one, nn.Conv2d)], remember)
    stored = [one for one in list(means)[1:-1] if one.bias is not None]  # the first and the last stay in float32
    weights = [one.weight.data for one in stored]
    for one in stored:
        one.weight.data = rounded(one.weight.data)
    run_with_hooks(eyes, squares, stored, correct)
    for one, weight in zip(stored, weights, strict=True):
        one.weight.data = weight


def run_with_hooks(eyes: Eyes, squares: torch.Tensor, modules: Sequence[nn.Module], hook: Callable) -> None:
    handles = [one.register_forward_hook(hook) for one in modules]
    eyes(squares)
    for handle in handles:
        handle.remove()


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """(out, in, h, w) as ONNX Runtime stores it in 8 bits: symmetric, a scale for each output channel."""
    scale = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / LEVELS
    return (weight / scale).round() * scale


def quantize_encoder(path: Path, squares: Sequence[np.ndarray], cameras: int) -> None:
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
        join_silu(ready)
        quantize_static(
            ready, path, Pictures(), quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=QUANTIZED,
            nodes_to_exclude=first_and_last(ready), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"CalibMovingAverage": True},  # the mean of all pictures' extremes: one picture makes no steps coarse
        )  # fmt: skip
    ready.unlink()


def join_silu(path: Path) -> None:
    """Make one operator of each x * sigmoid(x) of a graph, in place. ONNX Runtime does so itself, but not where x comes out of
    8 bits."""
    from onnxscript.rewriter import pattern, rewrite

    rule = pattern.RewriteRule(
        lambda op, x: op.Mul(x, op.Sigmoid(x)), lambda op, x: op.QuickGelu(x, alpha=1.0, _domain="com.microsoft")
    )
    onnx.save(rewrite(onnx.load(path), pattern.RewriteRuleSet([rule], commute=True)), path)


def first_and_last(path: Path) -> list[str]:
    """The names of the first and the last convolution of a graph, and of what alone reads their maps."""
    nodes = onnx.load(path).graph.node
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    maps = {convolutions[0].output[0], convolutions[-1].output[0]}
    return [node.name for node in nodes if maps & {*node.input[:1], *node.output}]


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
