"""Which device a model runs on, from what a user typed."""

import re

import torch

from nanochat.errors import UserError


def pick_device(name: str) -> torch.device:
    """auto (the first GPU, else the CPU), cpu, cuda or cuda:N. Raises ValueError for any other name, and for a GPU that this
    machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {name} here ({torch.cuda.device_count()} CUDA devices): use --device cpu")
    return device


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError where it cannot be used."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without this kind of device
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the device {name} cannot be used ({reason}): use cpu, or another device") from error
