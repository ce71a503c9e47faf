"""BatchNorm's running statistics, estimated again from training pictures before every validation and every save.

A BatchNorm that trains normalises with the statistics of its batch. A saved model has no batch: it needs statistics of the data.
The running averages that torch keeps follow the weights with a delay (YOLOv9's momentum is 0.03), so after a short run they
belong to weights of long ago. Here they are the mean over some training batches with the weights as they are, as in
"precise BatchNorm" (Wu and Johnson 2021, arXiv 2105.07576).

The pictures and their augmentation depend on the seed alone. So the statistics are a function of the weights, the data and the
seed, whenever they are estimated: a resumed run equals an unbroken one, and what is saved is what was validated. Training reads
them only in reward steps, where the encoder no longer changes.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

MAX_PICTURES = (
    512  # one forward pass of the encoder for so many pictures at most: 1 to 2 % of the time between validations
)


def trained_norms(model: torch.nn.Module) -> list[_BatchNorm]:
    """The BatchNorms that are in training mode and keep statistics."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and norm.running_mean is not None]


@torch.no_grad()
def estimate_statistics(model, norms: list[_BatchNorm], batches: Iterable[torch.Tensor]) -> None:
    """Set the running statistics of `norms` to the mean over the batches. The model is left in evaluation mode.

    batches: pixels (B, 3, S, S) of training pictures, as a step has them. Without a batch the statistics stay as they are.
    """
    momenta = [norm.momentum for norm in norms]
    model.eval()
    try:
        for number, pixels in enumerate(batches):
            for norm in norms if number == 0 else ():
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over the batches
                norm.train()
            model.see(pixels)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def picture_batches(n: int, size: int, rng: np.random.Generator) -> list[list[int]]:
    """Up to MAX_PICTURES of the numbers 0 .. n - 1 in batches of up to `size`, equally large."""
    chosen = rng.permutation(n)[:MAX_PICTURES]
    return [part.tolist() for part in np.array_split(chosen, -(-len(chosen) // size))] if n else []
