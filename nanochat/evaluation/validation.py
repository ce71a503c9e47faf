"""How a run is doing: validation with the right picture (aligned), another one (shuffled) and none (blind), and its record in
metrics.jsonl and loss.png."""

import io
import json

import numpy as np
import torch

from nanochat.gpt import IGNORE_INDEX
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.training.batches import Rows, collate


def describe(step: int, seconds: float, check: dict) -> str:
    """A validation in one line."""
    ways = "  ".join(
        f"{way} {check[way]:.3f}" + (f" ({check[f'{way}_accuracy']:.1%})" if f"{way}_accuracy" in check else "")
        for way in ("aligned", "shuffled", "blind")
    )
    return f"step {step:5d}  {seconds / 60:5.1f} min  loss (answers exactly right): {ways}"


@torch.inference_mode()
def three_ways(model: MultimodalGPT, rows: Rows, eyes, images_per_step: int) -> dict:
    """{"aligned", "shuffled", "blind"} mean losses in nats a token, and "..._accuracy": the share of rows in which every
    learnt token is the likeliest one, which is what greedy generation would say exactly."""
    model.eval()
    totals = {way: np.zeros(3) for way in ("aligned", "shuffled", "blind")}  # loss, exactly right rows, learnt tokens
    n_rows = 0
    for start in range(0, len(rows.groups), images_per_step):
        groups = rows.groups[start : start + images_per_step]
        batch = collate([row for group in groups for row in group])
        n_rows += len(batch.idx)
        idx, targets = batch.idx.to(model.device), batch.targets.to(model.device)
        mask = idx == rows.vision_token_id
        vectors = eyes(batch.numbers).to(model.device) if batch.numbers else None
        if vectors is None:
            ways = dict.fromkeys(totals)
        else:
            # another picture of the batch for each: neighbours swap places, and a lone picture gets none
            other = vectors.roll(1, 0) if len(vectors) > 1 else torch.zeros_like(vectors)
            ways = {"aligned": vectors, "shuffled": other, "blind": torch.zeros_like(vectors)}
        for way, seen in ways.items():
            spread = None if seen is None else batch.spread(seen)
            learnt = model.without_images(targets, mask) != IGNORE_INDEX
            logits = model.logits(model.trunk(model.embed(idx, spread, mask))[learnt])
            losses = torch.nn.functional.cross_entropy(logits, targets[learnt], reduction="sum")
            wrong = torch.zeros_like(targets).masked_scatter(learnt, (logits.argmax(-1) != targets[learnt]).long())
            totals[way] += (losses.item(), (wrong.sum(1) == 0).sum().item(), learnt.sum().item())
    result = {way: t[0] / max(1, t[2]) for way, t in totals.items()}
    return result | {f"{way}_accuracy": t[1] / n_rows for way, t in totals.items()}


def history_files(history: list[dict], unit: str) -> dict[str, bytes]:
    """What people look at beside a checkpoint: metrics.jsonl, a line each, and loss.png. unit: of the losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line for line in history if "loss" in line]
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training", color="0.7")
    checks = [line for line in history if "aligned" in line]
    for way in ("aligned", "shuffled", "blind"):
        axes.plot(
            [line["step"] for line in checks], [line[way] for line in checks], marker=".", label=f"validation, {way}"
        )
    axes.set(xlabel="step", ylabel=unit, ylim=(0, None))
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    plt.close(figure)
    return {"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in history).encode(), "loss.png": png.getvalue()}
