"""Hidden channels of an encoder: those that one convolution of a block makes and another one of it reads, and nothing else does.

    timm     the expansion of an inverted residual block (Sandler et al. 2018, arXiv 1801.04381): conv_pw -> conv_dw -> conv_pwl
    YOLOv9   the bottleneck in its ELAN blocks: cv1 -> cv2

A pruned encoder has fewer of them. Its maps keep their shapes, so what reads them does not change. How many are left stands in
the encoder's `architecture`, as "hidden": {block: channels}.

Only blocks with a shortcut count. The others, where the width or the stride changes, lose far more, as Li et al. 2017 (arXiv
1608.08710) found for ResNets; `docs/RUNTIME.md` has the numbers of EfficientNet-Lite2.
"""

from typing import NamedTuple

import torch
import torch.nn as nn

from nanochat.files import short_repr
from nanochat.vision.weights import WeightsError


class Hidden(NamedTuple):
    """makers: convolutions and norms that have these channels as their output. norms: those of the makers whose sum the last
    activation reads. readers: convolutions that have them as their input, the block's own one first, and `after` it its norm."""

    makers: list[nn.Module]
    norms: list[nn.BatchNorm2d]
    activation: nn.Module
    readers: list[nn.Conv2d]
    after: nn.BatchNorm2d

    @property
    def width(self) -> int:
        return self.readers[0].in_channels

    def keep(self, kept: torch.Tensor | slice) -> None:
        """Remove the other channels, in place."""
        for maker in self.makers:
            cut(maker, ("weight", "bias", "running_mean", "running_var"), kept)
            if isinstance(maker, nn.BatchNorm2d):
                maker.num_features = len(maker.weight)
                continue
            maker.out_channels = len(maker.weight)
            if maker.groups > 1:  # each channel by itself
                maker.in_channels = maker.groups = maker.out_channels
        for reader in self.readers:
            cut(reader, ("weight",), (slice(None), kept))
            reader.in_channels = reader.weight.size(1)


def cut(module: nn.Module, names: tuple[str, ...], kept) -> None:
    """Index the parameters and buffers of a module, those that it has."""
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(tensor.detach()[kept].clone(), tensor.requires_grad))
        elif tensor is not None:
            setattr(module, name, tensor[kept].clone())


def hidden_channels(net: nn.Module) -> dict[str, Hidden]:
    """The blocks of a network that have hidden channels, by their names, from the picture on."""
    blocks = {name: module for name, module in net.named_modules() if kind_of(module) in KINDS}
    found = {name: KINDS[kind_of(block)](block) for name, block in blocks.items()}
    return {name: hidden for name, hidden in found.items() if hidden is not None and is_plain(hidden)}


def kind_of(module: nn.Module) -> str:
    """ "package.Class", without importing the package."""
    return f"{type(module).__module__.split('.')[0]}.{type(module).__name__}"


def of_inverted_residual(block: nn.Module) -> Hidden | None:
    """timm's. Squeeze-and-excitation reads the channels and scales each of them; anything else between them is not known."""
    makers, readers = [block.conv_pw, block.bn1, block.conv_dw, block.bn2], [block.conv_pwl]
    if type(block.se).__name__ == "SqueezeExcite":
        makers, readers = [*makers, block.se.conv_expand], [*readers, block.se.conv_reduce]
    elif not isinstance(block.se, nn.Identity):
        return None
    if not block.has_skip or not isinstance(block.aa, nn.Identity):
        return None
    return Hidden(makers, [block.bn2], block.bn2.act, readers, block.bn3)


def of_bottleneck(block: nn.Module) -> Hidden | None:
    """ultralytics'. Two parallel convolutions are summed where the first one is re-parameterised (RepConv)."""
    parts = [block.cv1.conv1, block.cv1.conv2] if hasattr(block.cv1, "conv1") else [block.cv1]
    if not block.add:
        return None
    norms = [part.bn for part in parts]
    return Hidden([*(part.conv for part in parts), *norms], norms, block.cv1.act, [block.cv2.conv], block.cv2.bn)


KINDS = {
    "timm.InvertedResidual": of_inverted_residual,
    "ultralytics.Bottleneck": of_bottleneck,
    "ultralytics.RepBottleneck": of_bottleneck,
}


def is_plain(hidden: Hidden) -> bool:
    """Whether the channels are independent: read by dense convolutions, made by dense ones or by one for each channel."""
    dense = all(isinstance(one, nn.Conv2d) and one.groups == 1 for one in hidden.readers)
    return dense and all(
        isinstance(one, nn.BatchNorm2d) or (isinstance(one, nn.Conv2d) and one.groups in (1, one.out_channels))
        for one in (*hidden.makers, hidden.after)
    )


# ---- in an architecture


def narrow(net: nn.Module, hidden: object) -> dict[str, int]:
    """Give blocks of a new network fewer channels, in place. hidden: of an `architecture`, perhaps a stranger's; None for none.
    Returns it. Raises WeightsError for blocks that the network does not have, and for numbers that are not fewer."""
    if hidden is None:
        return {}
    if not isinstance(hidden, dict):
        raise WeightsError(f"wrong encoder architecture: hidden is {short_repr(hidden)}, expected {{block: channels}}")
    blocks = hidden_channels(net)
    for name, width in hidden.items():
        if name not in blocks:
            known = short_repr(list(blocks))
            raise WeightsError(f"wrong encoder architecture: {short_repr(name)} is no block, expected one of {known}")
        if type(width) is not int or not 0 < width < blocks[name].width:
            raise WeightsError(
                f"wrong encoder architecture: {name} has {short_repr(width)} channels, expected 1..{blocks[name].width - 1}"
            )
        blocks[name].keep(slice(width))
    return dict(hidden)


def described_hidden(net: nn.Module, hidden: dict[str, int]) -> dict:
    """What an `architecture` says of it: nothing for a network that is not pruned. hidden: as `narrow` returned it; blocks that
    `truncate` removed since are left out."""
    left = {name: width for name, width in hidden.items() if name in dict(net.named_modules())}
    return {"hidden": left} if left else {}
