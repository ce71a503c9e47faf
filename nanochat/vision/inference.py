"""Encoders without gradients, fast: a copy with BatchNorm merged into the convolutions and channels last, which takes a few
pictures at a time; in bfloat16 where the processor computes in it and the result agrees.

The encoder itself stays as it is, with the weights that train. Its copy is made when it first encodes pictures and again when a
weight has changed. It takes as much memory as the encoder's weights.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nanochat.errors import UserError
from nanochat.vision.images import ImageSource
from nanochat.vision.letterbox import of_rectangles
from nanochat.vision.pixels import evaluating, read_squares, to_pixels

PART = 4  # float32 pictures that go through a CPU at once, in 16 bits twice as many: the maps of more leave its caches
AGREEMENT = 0.999  # least cosine of a picture's mean map in bfloat16 and in float32
SAME = 1e-3  # of the largest value of a map: more than rounding changes it, less than a wrong merge


class Copy(NamedTuple):
    version: list[tuple[int, int]]
    encoder: nn.Module


COPIES: WeakKeyDictionary[nn.Module, dict[torch.dtype, Copy]] = WeakKeyDictionary()


@torch.no_grad()
def infer(
    encoder: nn.Module,
    squares: np.ndarray,
    compute: Callable[[nn.Module, torch.Tensor], dict],
    dtype: torch.dtype | None = None,
) -> dict:
    """What `compute(encoder, pixels)` says of pictures, {name: (B, ...)}, with the encoder's fast copy, in evaluation mode.

    squares: (B, H, W, 3) uint8. dtype: of weights and pixels; None for the encoder's own one. An encoder whose modules
    have hooks is run itself, and on all pictures at once, since the hooks are there to see it.
    """
    weight = next(encoder.parameters())
    dtype = dtype or weight.dtype
    fast = fast_copy(encoder, dtype)
    if fast is None:
        with evaluating(encoder):
            return compute(encoder, to_pixels(squares, weight.device, weight.dtype))
    part = PART * 4 // dtype.itemsize if weight.device.type == "cpu" else len(squares)
    results = [
        compute(fast, to_pixels(squares[first : first + part], weight.device, dtype, torch.channels_last))
        for first in range(0, len(squares), part)
    ]
    return (
        results[0]
        if len(results) == 1
        else {name: torch.cat([found[name] for found in results]) for name in results[0]}
    )


def inference_maps(
    encoder: nn.Module, squares: np.ndarray, layers: Sequence[str | int], dtype: torch.dtype | None = None
) -> dict[str | int, torch.Tensor]:
    """`Encoder.maps` of (B, H, W, 3) uint8 pictures, without gradients. dtype: see `infer`."""
    return infer(encoder, squares, lambda fast, pixels: fast.maps(pixels, layers), dtype)


def embeddings(
    encoder: nn.Module,
    images: ImageSource | Sequence[ImageSource],
    pool: str,
    layer: str | int,
    dtype: torch.dtype | None = None,
    rectangles: bool = False,
) -> torch.Tensor:
    """One image or a list of B -> (B, C) by "avg" or "max", (B, C*H*W) by "flatten". encoder: any `Encoder`. dtype: see
    `infer`; what is returned has the encoder's own one. rectangles: borders up to a multiple of 32 only, not to a square.

    Raises ImageError for an image that cannot be opened, ValueError for an empty list and for an unknown layer or pool.
    """
    if pool not in ("avg", "max", "flatten"):
        raise UserError(f'pool must be "avg", "max" or "flatten", got {pool!r}')
    if rectangles and pool == "flatten":
        raise UserError('rectangles give maps of several sizes: choose the pool "avg" or "max"')

    def vectors(pixels: np.ndarray) -> torch.Tensor:
        features = inference_maps(encoder, pixels, [layer], dtype)[layer].to(next(encoder.parameters()).dtype)
        if pool == "flatten":
            return features.flatten(1)
        return features.mean((2, 3)) if pool == "avg" else features.amax((2, 3))

    if rectangles:
        size, antialias = encoder.image_size, encoder.antialias
        return torch.stack(of_rectangles(images, size, antialias, lambda pixels, fits: vectors(pixels)))
    return vectors(read_squares(encoder, images)[0])


# ---- the copy


def fast_copy(encoder: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """The copy that belongs to the encoder's weights as they are now. None where there can be none: see `version_of`, and `infer`
    for hooks."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules()):
        return None
    version = version_of(encoder)
    if version is None:
        return None
    copies = COPIES.setdefault(encoder, {})
    if dtype not in copies or copies[dtype].version != version:
        copies[dtype] = Copy(version, make_copy(encoder, dtype))
    return copies[dtype].encoder


def version_of(encoder: nn.Module) -> list[tuple[int, int]] | None:
    """Changes with every tensor that is replaced or written to. None for tensors of torch.inference_mode, which do not count."""
    tensors = list(tensors_of(encoder))
    return None if any(t.is_inference() for t in tensors) else [(t.data_ptr(), t._version) for t in tensors]


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers; twice as fast as `parameters()` and `buffers()`, and a policy asks for every picture."""
    for part in module.modules():
        for named in (part._parameters, part._buffers):
            yield from (tensor for tensor in named.values() if tensor is not None)


def make_copy(encoder: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.inference_mode(False), torch.no_grad():  # its tensors must work in both modes
        fast = copy.deepcopy(encoder).eval().requires_grad_(False)
        if hasattr(fast, "merge_norms"):
            fast.merge_norms()
        return fast.to(dtype=dtype, memory_format=torch.channels_last)


def merge_pairs(module: nn.Module) -> None:
    """Merge each BatchNorm that directly follows a convolution among the children of a module, in place. That its input is this
    convolution's output is a guess, which the caller has to check."""
    previous: tuple[str, nn.Module] = ("", module)
    for name, child in list(module.named_children()):
        before, conv = previous
        if (
            isinstance(conv, nn.Conv2d)
            and isinstance(child, nn.BatchNorm2d)
            and child.num_features == conv.out_channels
        ):
            setattr(module, before, fuse_conv_bn_eval(conv, child))
            setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's have their activation in them
        else:
            merge_pairs(child)
        previous = name, child


def same_maps(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two maps differ by rounding only."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= SAME * expected.abs().max())


# ---- bfloat16


def quick_dtype(encoder: nn.Module, layer: str | int) -> torch.dtype:
    """bfloat16 if the processor computes in it and the layer's mean map of a test picture agrees with that in float32; else the
    encoder's own dtype."""
    weight = next(encoder.parameters())
    if weight.dtype != torch.float32 or not computes_bfloat16(weight.device):
        return weight.dtype
    picture = probe_picture(encoder.image_size)
    exact, quick = (
        inference_maps(encoder, picture, [layer], dtype)[layer].float().mean((2, 3))
        for dtype in (torch.float32, torch.bfloat16)
    )
    agreement = torch.cosine_similarity(exact, quick).item()
    return torch.bfloat16 if agreement >= AGREEMENT else torch.float32


def computes_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 faster than float32: processors with AVX512-BF16 or AMX, GPUs since Ampere."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def probe_picture(size: int) -> np.ndarray:
    """(1, size, size, 3) uint8: smooth noise, since photographs too have most of their power at low frequencies."""
    coarse = torch.rand((1, 3, 9, 9), generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
