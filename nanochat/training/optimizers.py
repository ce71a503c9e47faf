"""Which parameters each optimiser turns, how their learning rates go, and their state as tensors for a checkpoint.

Muon (Keller Jordan, 2024) turns the matrices of the decoder and the projector; AdamW the embeddings, the head and the eyes.
"""

import torch

from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.training.recipes import Recipe

BETAS = (0.9, 0.95)
OUTPUTS = ("lm_head", "action_head", "vision_projector.position")  # two axes, but no matrices between hidden states


def make_optimizers(
    model: MultimodalGPT, recipe: Recipe, helper: torch.nn.Module | None = None
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder and the projector; AdamW for embeddings, head, positions and encoder."""
    matrices, embeddings, tables, encoder = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith(("vision_encoder.", "glances.")):
            encoder.append(p)
        elif name.startswith("transformer.wte"):
            embeddings.append(p)
        elif p.dim() == 2 and not name.startswith(OUTPUTS):
            matrices.append(p)
        else:
            tables.append(p)
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="original")
    groups = [
        {"params": embeddings, "lr": recipe.embedding_lr, "weight_decay": 0.0},
        {"params": tables, "lr": recipe.head_lr, "weight_decay": 0.0},
    ]
    if encoder:
        groups.append({"params": encoder, "lr": recipe.encoder_lr, "weight_decay": recipe.encoder_decay})
    if helper is not None:
        groups.append({"params": list(helper.parameters()), "lr": recipe.encoder_lr, "weight_decay": 0.0})
    adamw = torch.optim.AdamW(groups, betas=BETAS)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """Warm up, stay, fall to zero along a line: a trapezoid."""
    rise = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    fall = min(1.0, (steps - step) / max(1, recipe.cooldown * steps))
    return rise * fall


def optimizer_tensors(optimizers) -> dict[str, torch.Tensor]:
    """All optimiser state as flat named tensors: "optimizer.parameter.name"."""
    return {
        f"{i}.{number}.{key}": value
        for i, optimizer in enumerate(optimizers)
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizers(optimizers, tensors: dict[str, torch.Tensor]) -> None:
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict] = {}
        for name, value in tensors.items():
            owner, number, key = name.split(".", 2)
            if int(owner) == i:
                state.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
