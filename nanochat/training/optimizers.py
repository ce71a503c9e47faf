"""Optimisers of a model's parameter groups, their learning rates, and their state as tensors for a checkpoint.

Muon (Keller Jordan, 2024) trains the decoder's matrices; AdamW trains everything else.
"""

from collections.abc import Iterable

import torch

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.training.recipe import Recipe

BETAS = (0.9, 0.95)


def make_optimizers(
    model: GPT, recipe: Recipe, auxiliary: torch.nn.Module | None = None
) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW] for `model.param_groups()` and the auxiliary head, which learns as fast as the encoder."""
    groups = model.param_groups()
    if recipe.projector_lr is None:  # one group in the order of the model, as in runs that are older than this field
        order = {parameter: number for number, parameter in enumerate(model.parameters())}
        matrices = sorted(groups["matrices"] + groups["projector"], key=order.__getitem__)
        muon_groups = [{"params": matrices, "lr": recipe.matrix_lr}]
    else:
        muon_groups = [
            {"params": groups["matrices"], "lr": recipe.matrix_lr},
            {"params": groups["projector"], "lr": recipe.projector_lr},
        ]
    muon = torch.optim.Muon(
        [group for group in muon_groups if group["params"]], weight_decay=recipe.weight_decay, adjust_lr_fn="original"
    )
    adamw_groups = [
        {"params": groups["embeddings"], "lr": recipe.embedding_lr, "weight_decay": 0.0},
        {"params": groups["outputs"], "lr": recipe.head_lr, "weight_decay": 0.0},
    ]
    if groups["encoder"]:
        adamw_groups.append(
            {"params": groups["encoder"], "lr": recipe.encoder_lr, "weight_decay": recipe.encoder_decay}
        )
    if auxiliary is not None:
        adamw_groups.append({"params": list(auxiliary.parameters()), "lr": recipe.encoder_lr, "weight_decay": 0.0})
    # foreach: the same numbers in a third of the time on a CPU, where it is not the default
    adamw = torch.optim.AdamW([group for group in adamw_groups if group["params"]], betas=BETAS, foreach=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rates of a step as a share of the peak: linear warmup, constant, then linear to zero."""
    rise = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    fall = min(1.0, (steps - step) / max(1, recipe.cooldown * steps))
    return rise * fall


def gradients_are_finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether every gradient is finite, and the norm over all of them too."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def optimizer_tensors(optimizers) -> dict[str, torch.Tensor]:
    """All optimiser state as flat named tensors: "optimizer.parameter.name"."""
    return {
        f"{i}.{number}.{key}": value
        for i, optimizer in enumerate(optimizers)
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizers(optimizers, tensors: dict[str, torch.Tensor]) -> None:
    """Restore what `optimizer_tensors` gave. Raises UserError where the optimisers have other parameters, or another order."""
    for i, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict] = {}
        for name, value in tensors.items():
            owner, number, key = name.split(".", 2)
            if int(owner) != i:
                continue
            known = int(number) < len(parameters)
            if not known or value.dim() and value.shape != parameters[int(number)].shape:  # a step count has no shape
                raise UserError(
                    f"the optimiser's state {name} of shape {tuple(value.shape)} fits none of this run's parameters: it was "
                    "saved by another version. Resume the run with that version, or train on with --start-from"
                )
            state.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
