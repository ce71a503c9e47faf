"""The first thing that a stranger sees: the shipped model answers questions about pictures that it never trained on, and
one sheet shows what it was asked, what it said, whether that is right, and where it looked."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape

from nanochat.assistant import SHIPPED, Assistant, user_message
from nanochat.data.sample import written_whole
from nanochat.metrics import exact_match
from nanochat.multimodal_gpt import grid_side
from nanochat.vision.images import open_image

PICTURES = Path(__file__).parent / "assets" / "demo"  # easy-VQA test pictures (MIT), never trained on


def run(out: Path) -> None:
    """Answer every bundled question aloud, then write the contact sheet to `out`."""
    console = Console()
    started = time.perf_counter()
    training = json.loads((SHIPPED / "training.json").read_text())
    assistant = Assistant.load("default")
    console.print(
        f"{assistant.model.num_parameters():,} parameters, trained in {training['seconds'] / 60:.0f} minutes "
        f"by `nanochat train {training['recipe_name']} --seed {training['recipe']['seed']}`; "
        f"loaded in {time.perf_counter() - started:.1f} s"
    )
    cards = []
    for item in json.loads((PICTURES / "questions.json").read_text()):
        image = open_image(PICTURES / item["image"])
        vectors = assistant.look(image)  # once for all questions about it
        for question, truth in item["questions"]:
            console.print(f"[dim]{item['image']}[/dim]  {escape(question)}  ", end="")
            said = ""
            for piece in assistant.ask(question, vectors):
                said += piece
                console.print(piece, end="", style="bold", markup=False)
            right = exact_match(said, [truth])
            console.print("  [green]right[/green]" if right else f"  [red]wrong: {escape(truth)}[/red]")
            cards.append((image, question, said, truth, right, looked_at(assistant, question, vectors)))
    draw_sheet(cards, out)
    n_right = sum(card[4] for card in cards)
    console.print(
        f"{n_right} of {len(cards)} right, {time.perf_counter() - started:.1f} s; contact sheet: {escape(str(out))}"
    )


def looked_at(assistant: Assistant, question: str, vectors: torch.Tensor) -> np.ndarray:
    """(h, w) in 0..1: how much of the attention paid to the picture goes to each cell when the answer's first word is
    chosen, averaged over the layers' heads."""
    model, prompt = assistant.model, assistant.prompt([user_message(question, 1)])
    heads = []

    def keep(attn, inputs):
        # the same queries and keys as in the attention itself, from its inputs
        x, cos, sin = inputs[0], inputs[1], inputs[2]
        q, k = attn.rotated(x, cos, sin)
        k = k.repeat_interleave(attn.n_head // attn.n_kv_head, dim=2)
        scores = torch.einsum("bhd,bthd->bht", q[:, -1], k) / attn.head_dim**0.5  # of the last position
        heads.append(scores.softmax(-1)[0])  # (H, T)

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.transformer.h]
    try:
        with torch.inference_mode():
            idx = torch.tensor([prompt], device=model.device)
            model(idx, vectors.flatten(0, 1)[None])
    finally:
        for hook in hooks:
            hook.remove()
    weight = torch.stack(heads).mean((0, 1)).cpu()[torch.tensor(prompt) == model.config.vision_token_id]
    side = grid_side(model.config.vision_tokens_per_image)
    return (weight / weight.max()).view(side, side).numpy()


def draw_sheet(cards, out: Path) -> None:
    """One card a question: the picture beside the same with its unattended parts darkened."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    rows = -(-len(cards) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.35 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, question, said, truth, right, weight) in zip(axes.flat, cards, strict=False):
        size = image.size
        mask = Image.fromarray((255 * weight).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        shade = Image.composite(image, Image.new("RGB", size, (20, 20, 30)), mask)
        gap = max(1, size[0] // 16)
        pair = Image.new("RGB", (2 * size[0] + gap, size[1]), "white")
        pair.paste(image, (0, 0))
        pair.paste(shade, (size[0] + gap, 0))
        axis.imshow(pair, interpolation="nearest")
        verdict, colour = ("right", "#1a7f37") if right else (f"wrong: {truth}", "#cf222e")
        axis.set_title(f"{question}\n{said}  ({verdict})", fontsize=9, color=colour, wrap=True)
    figure.suptitle("Left: the picture. Right: where attention went when the answer was chosen.", fontsize=10)
    with written_whole(out) as new:
        figure.savefig(new, dpi=110, format="png")
    plt.close(figure)
