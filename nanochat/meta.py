"""Models without memory: a description from a stranger is built on torch's meta device, where tensors have shapes and no
values, and within a budget. So its shapes can be compared with those of the file before the real model costs anything.

    with on_meta(): model = GPT(config)      # any size, no memory; UserError beyond the budget
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from nanochat.errors import UserError

MAX_MODULES = 20_000  # YOLOv9-e has 1,800, a GPT of 32 layers 290
MAX_PARAMETERS = 10_000  # tensors, not numbers
MAX_OUTPUT = 2**24  # numbers in the output of one module for a 256 x 256 picture; YOLOv9-e needs 2**20
FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm,
    torch.linspace, torch.logspace, torch.eye, torch.empty_strided, torch.normal,
}  # fmt: skip
# There are no values to draw; torch would import its compiler to do so on the meta device, which takes seconds
INITIALISERS = {
    "normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "orthogonal_",
}  # fmt: skip


class MetaTensors(TorchFunctionMode):
    """New tensors are made on the meta device, except those of known values (`torch.tensor`, `torch.arange`): a detector reads
    its strides while it is built, and the tables of positions are small."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        if func in FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside the block, this thread builds modules without memory. Raises UserError as soon as there are more modules or
    parameters than any model of this project has, or a module whose output is far larger than a picture."""
    owner, counts = threading.get_ident(), {"modules": 0, "parameters": 0}

    def count(what: str, limit: int) -> None:
        if threading.get_ident() != owner:
            return
        counts[what] += 1
        if counts[what] > limit:
            raise UserError(
                f"the model described has more than {limit:,} {what}: it is too large to be one of this project"
            )

    def measure(module, inputs, output):
        if threading.get_ident() == owner and isinstance(output, torch.Tensor) and output.numel() > MAX_OUTPUT:
            raise UserError(
                f"the {type(module).__name__} of the model described turns a picture into {output.numel():,} numbers, "
                f"the limit is {MAX_OUTPUT:,}"
            )

    handles = [
        hooks.register_module_module_registration_hook(lambda *_: count("modules", MAX_MODULES)),
        hooks.register_module_parameter_registration_hook(lambda *_: count("parameters", MAX_PARAMETERS)),
        hooks.register_module_forward_hook(measure),
    ]
    try:
        with MetaTensors():
            yield
    finally:
        for handle in handles:
            handle.remove()
