"""`nanochat prune`: a checkpoint with fewer hidden units in its MLPs, and fewer hidden channels in its encoder. It is smaller and
faster, answers worse until it has been trained again, and is otherwise an ordinary checkpoint.

Hidden units are removed in every MLP: those of the decoder, and that of the projector from vision vectors to tokens. Of the
encoder, the channels inside its blocks, see `vision.hidden`. What others read keeps its width: attention, cross-attention,
embeddings, heads, maps.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.checkpoint import load_checkpoint, locate, save_checkpoint
from nanochat.errors import UserError
from nanochat.fusion import VisionProjector
from nanochat.gpt import GPT, MLP
from nanochat.packing import terms
from nanochat.vision.encoder import Encoder
from nanochat.vision.hidden import Hidden, hidden_channels

MULTIPLE = 32  # of hidden units: processors multiply such widths fastest
CHANNELS = 16  # of which hidden channels are a multiple, for the same reason; a quarter of it where there are few
FEW = 64
QUANTILES = 100  # of a normal distribution, for a mean


class Report(NamedTuple):
    """Hidden units of each MLP, hidden channels of the whole encoder and parameters of the model, (before, after) each."""

    hidden: tuple[int, int]
    channels: tuple[int, int]
    parameters: tuple[int, int]


def prune_checkpoint(name: str, out: Path, ratio: float) -> Report:
    """Write the pruned checkpoint to the new folder `out`. ratio: the share of hidden units that are removed.

    Raises FileExistsError where `out` exists, UserError for a ratio that leaves all or nothing, and as `load_checkpoint`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another name for the pruned checkpoint")
    model, tokenizer, training = load_checkpoint(name)
    smaller = pruned(model, ratio)
    extra = {path.name: path.read_bytes() for path in terms(locate(name))}
    save_checkpoint(out, smaller, tokenizer, training, extra=extra)
    both = (model, smaller)
    return Report(
        tuple(one.config.mlp_width for one in both),
        tuple(channels(one) for one in both),
        tuple(one.num_parameters() for one in both),
    )


def pruned(model: GPT, ratio: float) -> GPT:
    """A model with the heaviest hidden units of each MLP and channels of each block of its encoder, in their order. Raises
    UserError, see `prune_checkpoint`."""
    width = model.config.mlp_width
    if not 0 < ratio < 1:
        raise UserError(f"--ratio is the share of hidden units to remove, between 0 and 1, got {ratio:g}")
    kept = round(width * (1 - ratio) / MULTIPLE) * MULTIPLE
    if not 0 < kept < width:
        raise UserError(
            f"--ratio {ratio:g} of {width} hidden units leaves {kept}, in steps of {MULTIPLE}: choose another one"
        )
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, (MLP, VisionProjector)):
            into, out = f"{name}.c_fc.weight", f"{name}.c_proj.weight"  # (hidden, in), (out, hidden)
            heaviest = importance(state[into], state[out]).topk(kept).indices.sort().values
            state[into], state[out] = state[into][heaviest], state[out][:, heaviest]
    smaller = type(model)(replace(model.config, n_hidden=kept))
    if getattr(model, "vision_encoder", None) is not None:
        encoder = pruned_encoder(model.vision_encoder, ratio)
        smaller.attach_encoder(encoder)
        state |= {f"vision_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    smaller.load_state_dict(state)
    smaller.set_compute_dtype(model.compute_dtype)
    return smaller.to(model.device).train(model.training)


def importance(into: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """(hidden,): how much a unit with ReLU² adds to the output for normed inputs, up to a factor. 0 for one that adds nothing."""
    return into.square().sum(1) * out.norm(dim=0)


# ---- the encoder


@torch.no_grad()
def pruned_encoder(encoder: Encoder, ratio: float) -> Encoder:
    """A copy with the heaviest hidden channels of each block, in their order. An encoder of a kind that has none is as it was."""
    smaller = copy.deepcopy(encoder)
    for name, hidden in blocks_of(smaller).items():
        step = CHANNELS if hidden.width >= FEW else CHANNELS // 4
        kept = max(step, round(hidden.width * (1 - ratio) / step) * step)
        if kept < hidden.width:
            heaviest = importance_of_channels(hidden).topk(kept).indices.sort().values
            keep_mean(hidden, heaviest)
            hidden.keep(heaviest)
            smaller.hidden[name] = kept
    return smaller


def importance_of_channels(hidden: Hidden) -> torch.Tensor:
    """(channels,): how far a channel moves what reads it: the scale of the norm before it (Liu et al. 2017, arXiv 1708.06519)
    times the size of its weights there (L2; Li et al. 2017, arXiv 1608.08710, take L1). 0 for one that adds nothing."""
    return scale_of(hidden) * hidden.readers[0].weight.square().sum((0, 2, 3)).sqrt()


def scale_of(hidden: Hidden) -> torch.Tensor:
    return torch.stack([norm.weight for norm in hidden.norms]).norm(dim=0)


def keep_mean(hidden: Hidden, kept: torch.Tensor) -> None:
    """Let the norm behind the block add what the channels that go add on average: the mean of the activation, whose input has the
    shift and the scale of the norm before it (bias correction, Nagel et al. 2019, arXiv 1906.04721)."""
    normal = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(QUANTILES) + 0.5) / QUANTILES)
    shift = sum(norm.bias for norm in hidden.norms)
    mean = hidden.activation(shift[:, None] + scale_of(hidden)[:, None] * normal).mean(1)
    mean[kept] = 0
    hidden.after.running_mean -= hidden.readers[0].weight.sum((2, 3)) @ mean


def blocks_of(encoder: Encoder) -> dict[str, Hidden]:
    return hidden_channels(encoder.net) if hasattr(encoder, "hidden") else {}


def channels(model: GPT) -> int:
    """Hidden channels of the encoder, if there is one."""
    encoder = getattr(model, "vision_encoder", None)
    return 0 if encoder is None else sum(hidden.width for hidden in blocks_of(encoder).values())
