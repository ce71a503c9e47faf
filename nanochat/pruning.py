"""`nanochat prune`: a checkpoint whose MLPs have fewer hidden units. It is smaller and faster, answers worse until it has been
trained again, and is otherwise an ordinary checkpoint.

Hidden units are removed in every MLP: those of the decoder, and that of the projector from vision vectors to tokens. Attention,
cross-attention, embeddings, heads and the encoder stay as they are.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.checkpoint import load_checkpoint, locate, save_checkpoint
from nanochat.errors import UserError
from nanochat.fusion import VisionProjector
from nanochat.gpt import GPT, MLP
from nanochat.packing import terms

MULTIPLE = 32  # of hidden units: processors multiply such widths fastest


class Report(NamedTuple):
    """Hidden units of each MLP and parameters of the model, (before, after) each."""

    hidden: tuple[int, int]
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
    return Report(
        (model.config.mlp_width, smaller.config.mlp_width), (model.num_parameters(), smaller.num_parameters())
    )


def pruned(model: GPT, ratio: float) -> GPT:
    """A model with the heaviest hidden units of each MLP, in their order; it shares the encoder. Raises UserError, see
    `prune_checkpoint`."""
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
        smaller.attach_encoder(model.vision_encoder)
    smaller.load_state_dict(state)
    smaller.set_compute_dtype(model.compute_dtype)
    return smaller.to(model.device).train(model.training)


def importance(into: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """(hidden,): how much a unit with ReLU² adds to the output for normed inputs, up to a factor. 0 for one that adds nothing."""
    return into.square().sum(1) * out.norm(dim=0)
