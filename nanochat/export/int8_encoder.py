"""An encoder in int8: convolutions and glances with 8-bit weights, a scale for each channel, and 8-bit maps, whose ranges are
measured on pictures that the user names.

Some stay in float32: the first convolution, which would amplify the rounding of pixels; the last one, whose map may be all in a
few of 256 steps, as that of a policy whose glances read small differences; and what reads a map with few large channels. Each of
the others keeps the mean of its channels (bias correction, Nagel et al. 2019, arXiv 1906.04721), as rounded weights shift it.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn as nn
from onnx import helper

from nanochat.export.graph import quiet

# A convolution takes the range of the Clip (ReLU6) behind it only where that is named too: without it, most of what
# EfficientNet-Lite says was lost
QUANTIZED = ["Conv", "Clip", "Add", "Gemm"]
PICTURES_FOR_MEANS = 32  # all in memory at once
LEVELS = 127  # of a positive 8-bit weight
STEPS = 255  # of an 8-bit map
COARSE = 0.01  # of a channel's variance


@torch.no_grad()
def correct_biases(eyes: nn.Module, squares: Sequence[np.ndarray]) -> None:
    """Add to the bias of each convolution, in place, what its channels will lose on average when its weights and those before it
    are 8-bit numbers."""
    pixels = torch.from_numpy(np.stack(squares[:: -(-len(squares) // PICTURES_FOR_MEANS)]))
    means: dict[nn.Conv2d, torch.Tensor] = {}  # in the order in which they run

    def remember(one: nn.Conv2d, _, maps: torch.Tensor) -> None:
        means[one] = maps.mean((0, 2, 3))

    def correct(one: nn.Conv2d, _, maps: torch.Tensor) -> torch.Tensor:
        lost = means[one] - maps.mean((0, 2, 3))
        one.bias += lost
        return maps + lost[:, None, None]

    run_with_hooks(eyes, pixels, [one for one in eyes.modules() if isinstance(one, nn.Conv2d)], remember)
    stored = [one for one in list(means)[1:-1] if one.bias is not None]  # the first and the last stay in float32
    weights = [one.weight.data for one in stored]
    for one in stored:
        one.weight.data = rounded(one.weight.data)
    run_with_hooks(eyes, pixels, stored, correct)
    for one, weight in zip(stored, weights, strict=True):
        one.weight.data = weight


def run_with_hooks(eyes: nn.Module, pixels: torch.Tensor, modules: Sequence[nn.Module], hook: Callable) -> None:
    handles = [one.register_forward_hook(hook) for one in modules]
    eyes(pixels)
    for handle in handles:
        handle.remove()


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """(out, in, h, w) as ONNX Runtime stores it in 8 bits: symmetric, a scale for each output channel."""
    scale = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / LEVELS
    return (weight / scale).round() * scale


def quantize_encoder(path: Path, squares: Sequence[np.ndarray], cameras: int) -> None:
    """Replace a float32 encoder by one in int8. squares: pictures (S, S, 3) uint8 to measure the maps on. A map's range holds all
    that occurs: the mean of the pictures' extremes cuts off what is rare, such as a gripper that is near."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    more = {"cameras": np.zeros(1, np.int64)} if cameras > 1 else {}
    inputs = [{"squares": picture[None]} | more for picture in squares]

    class Pictures(CalibrationDataReader):
        def __init__(self):
            self.left = iter(inputs)

        def get_next(self):
            return next(self.left, None)

    ready = path.with_name("encoder.float.onnx")
    with quiet():
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        join_silu(ready)
        quantize_static(
            ready, path, Pictures(), quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=QUANTIZED,
            nodes_to_exclude=[*first_and_last(ready), *readers_of_coarse(ready, inputs)],
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
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


def readers_of_coarse(path: Path, inputs: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """The names of the nodes of a graph that read a map for which 8 bits are too coarse: one of few large channels, by which the
    steps are too large for most others."""
    model = onnx.load(path)
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type in QUANTIZED and node.op_type != "Clip":  # which goes with the convolution before it
            for name in node.input[: 2 if node.op_type == "Add" else 1]:
                readers.setdefault(name, []).append(node.name)
    shares = rounding_shares(model, readers, inputs)
    return [name for read, share in shares.items() if share > COARSE for name in readers[read]]


def rounding_shares(
    model: onnx.ModelProto, names: Iterable[str], inputs: Sequence[dict[str, np.ndarray]]
) -> dict[str, float]:
    """The error that 256 steps over the whole range of a map make, squared, as a share of the variance of its median channel; for
    each map (B, C, H, W) among the names."""
    kept = {output.name for output in model.graph.output} | {constant.name for constant in model.graph.initializer}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in kept)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    seen = [output.name for output in session.get_outputs() if output.name in names and len(output.shape) == 4]
    parts: dict[str, list] = {name: [] for name in seen}  # of each picture: extremes, means and squares by channel
    for given in inputs:
        for name, found in zip(seen, session.run(seen, given), strict=True):
            channels = found.astype(np.float64).swapaxes(0, 1).reshape(found.shape[1], -1)
            parts[name].append((channels.min(), channels.max(), channels.mean(1), (channels**2).mean(1)))
    shares = {}
    for name, rows in parts.items():
        low, high, means, squares = (np.array(column) for column in zip(*rows, strict=True))
        variance = squares.mean(0) - means.mean(0) ** 2
        step = (high.max() - low.min()) / STEPS
        shares[name] = float(step**2 / 12 / max(np.median(variance), np.finfo(np.float64).tiny))
    return shares
