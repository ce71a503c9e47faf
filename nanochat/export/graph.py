"""A small builder of ONNX graphs: nodes, weights that several graphs share in one file, and linear layers in float32 or int8.

The operators of the domain com.microsoft are those of ONNX Runtime: attention with a cache that is filled in place, norms that
add the residual, and matrices of 8-bit blocks (`MatMulNBits`). A row's activations are quantized by themselves there, so a
row's answer does not depend on its neighbours.
"""

import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

MICROSOFT = "com.microsoft"
OPSET = 21
IR_VERSION = 10
EPSILON = float(np.finfo(np.float32).eps)  # of torch's rms_norm
BLOCK = 64  # numbers that share a scale; 32 are a tenth slower
ZERO = 128  # what stands for 0 among 8-bit numbers
INT8_COMPUTE = 4  # accuracy_level of MatMulNBits: products of 8-bit numbers
INSIDE = 1024  # bytes: smaller weights stay in the graph
WEIGHTS = "weights.bin"
TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
}


class Weights:
    """The file that all graphs of a folder read their larger weights from, each stored once."""

    def __init__(self, folder: Path):
        self.path = folder / WEIGHTS
        self.places: dict[str, tuple[int, int]] = {}  # name -> offset and length in bytes
        self.path.touch()

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """The tensor of that name, to put in a graph. The same name is always the same array."""
        tensor = TensorProto(name=name, data_type=TYPES[str(array.dtype)], dims=array.shape)
        if array.nbytes < INSIDE:
            tensor.raw_data = array.tobytes()
            return tensor
        if name not in self.places:
            with open(self.path, "ab") as file:
                file.write(b"\0" * (-file.tell() % 4096))  # so that it can be mapped
                self.places[name] = (file.tell(), array.nbytes)
                file.write(np.ascontiguousarray(array).tobytes())
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = self.places[name]
        for key, value in {"location": WEIGHTS, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """inputs and outputs are declared by name, dtype and shape; a dimension is a number or the name of a free one."""

    def __init__(self, weights: Weights, int8: bool = False):
        self.weights, self.int8 = weights, int8
        self.nodes, self.inputs, self.outputs = [], [], []
        self.initializers: dict[str, TensorProto] = {}

    def input(self, name: str, dtype: str, shape: Sequence) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))

    def op(self, kind: str, *inputs: str, domain: str = "", outputs: Sequence[str] | int = 1, **attributes):
        """Add a node. Returns the name of its output, or a list of them. outputs: how many, or their names."""
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def weight(self, name: str, array: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = self.weights.add(name, array)
        return name

    def numbers(self, values, dtype=np.int64) -> str:
        """A small constant."""
        array = np.asarray(values, dtype)
        return self.weight(f"constant_{array.dtype}_{array.shape}_{array.tolist()}", array)

    # ---- layers

    def linear(self, x: str, name: str, weight: np.ndarray) -> str:
        """x (..., in) times a weight (out, in)."""
        if not self.int8:
            return self.exact_linear(x, name, weight)
        blocks, scales = quantized(weight)
        n_out, n_in = weight.shape
        n_blocks = scales.shape[1]
        return self.op(
            "MatMulNBits", x, self.weight(f"{name}.int8", blocks.reshape(n_out, n_blocks, BLOCK)),
            self.weight(f"{name}.scales", scales), domain=MICROSOFT,
            K=n_in, N=n_out, bits=8, block_size=BLOCK, accuracy_level=INT8_COMPUTE,
        )  # fmt: skip

    def exact_linear(self, x: str, name: str, weight: np.ndarray) -> str:
        """`linear` in float32, also in an int8 model."""
        return self.op("MatMul", x, self.weight(f"{name}.T", weight.T))

    def rows_of(self, ids: str, name: str, table: np.ndarray) -> str:
        """Rows of a table (V, C) by their numbers."""
        if not self.int8:
            return self.op("Gather", self.weight(name, table), ids)
        blocks, scales = quantized(table)
        return self.op(
            "GatherBlockQuantized", self.weight(f"{name}.int8", blocks[:, : table.shape[1]]), ids,
            self.weight(f"{name}.scales", scales), domain=MICROSOFT, bits=8, block_size=BLOCK, quantize_axis=1,
        )  # fmt: skip

    def norm(self, x: str, width: int, used: int | None = None) -> str:
        """The last axis of x, of `width` numbers, over its root mean square. used: how many of them are not zeros beside the
        others; default all."""
        share = (used or width) / width
        scale = self.norm_scale(width, share)
        return self.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=EPSILON * share)

    def norm_scale(self, width: int, share: float = 1.0) -> str:
        return self.weight(f"norm_{width}_{share:g}", np.full(width, share**0.5, np.float32))

    def added_and_normed(self, x: str, more: str, width: int) -> tuple[str, str]:
        """(norm(x + more), x + more)."""
        names = [f"{kind}_{len(self.nodes)}" for kind in ("normed", "sum")]
        self.op(
            "SkipSimplifiedLayerNormalization", x, more, self.norm_scale(width),
            outputs=[names[0], "", "", names[1]], domain=MICROSOFT, epsilon=EPSILON,
        )  # fmt: skip
        return names[0], names[1]

    def squared_relu(self, x: str) -> str:
        x = self.op("Relu", x)
        return self.op("Mul", x, x)

    def save(self, path: Path) -> None:
        graph = helper.make_graph(self.nodes, path.stem, self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), path)


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) float32 -> ((N, K rounded up to whole blocks) uint8, scales (N, blocks) float32): symmetric, a scale for each
    block of a row."""
    n_blocks = -(-weight.shape[1] // BLOCK)
    padded = np.pad(weight, ((0, 0), (0, n_blocks * BLOCK - weight.shape[1]))).reshape(len(weight), n_blocks, BLOCK)
    scales = np.maximum(np.abs(padded).max(-1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    numbers = np.rint(padded / scales[..., None]).clip(-127, 127) + ZERO
    return numbers.astype(np.uint8).reshape(len(weight), -1), scales


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
