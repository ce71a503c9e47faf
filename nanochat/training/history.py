"""What a run records of itself: one line per validation on the screen, metrics.jsonl and loss.png in the checkpoint."""

import io
import json

from nanochat.evaluation.controls import CONDITIONS

LEARNT = 0.9  # share of the training questions from which on they count as learnt
OVERFITTED = 1.5  # ratio of the held-out loss and the training loss
GAP = 0.1  # between the shares of training and held-out questions
RISE = 1.02  # ratio of the last held-out loss and the lowest one


def describe(step: int, seconds: float, check: dict) -> str:
    """A validation in one line. check: losses "aligned", "shuffled", "blind", and shares "aligned_accuracy", ...; a condition
    that could not be measured is missing."""
    parts = []
    for condition in CONDITIONS:
        if condition in check:
            accuracy = check.get(f"{condition}_accuracy")
            parts.append(f"{condition} {check[condition]:.3f}" + (f" ({accuracy:.1%})" if accuracy is not None else ""))
    exact = " (answers exactly right)" if "aligned_accuracy" in check else ""
    return f"step {step:5d}  {seconds / 60:5.1f} min  loss{exact}: {'  '.join(parts)}"


def advice(checks: list[dict], steps: int) -> list[str]:
    """What to try next, in words. checks: the validations of the run, see `describe`; the last one also has how well the
    training data are learnt."""
    lines, last = [], checks[-1]
    best = min(checks, key=lambda check: check["aligned"])
    rose = last["aligned"] > RISE * best["aligned"]
    if rose:
        lines.append(
            f"The loss on held-out data was {best['aligned']:.3f} at step {best['step']} and is {last['aligned']:.3f} now, so "
            f"the training data are learnt by heart: take fewer steps (--steps {max(1, best['step'])}), lower rates or more data."
        )
    if "shuffled" in last and "aligned" in last and last["shuffled"] - last["aligned"] < 0.02:
        lines.append("The picture makes no difference: the model has not learnt to use it yet.")
    right, asked, held_out = (last.get(name) for name in ("train_right", "train_asked", "aligned_accuracy"))
    if asked:
        learnt = f"{right} of {asked} answers about training pictures are exactly right"
        if right < LEARNT * asked and not rose:
            lines.append(f"{learnt}: train longer, for instance with --steps {2 * steps}.")
        elif held_out is not None and held_out < right / asked - GAP:
            lines.append(
                f"{learnt}, but {held_out:.0%} of those about held-out ones: more pictures will help, more steps will not."
            )
        else:
            lines.append(f"{learnt}.")
    if "train" in last and last["train"] > 0 and not rose:
        losses = f"the loss is {last['train']:.3f} on training frames and {last['aligned']:.3f} on held-out ones"
        if last["aligned"] > OVERFITTED * last["train"]:
            lines.append(f"{losses}: more episodes will help, more steps will not.")
        else:
            lines.append(f"{losses}: if that is not good enough, train longer, for instance with --steps {2 * steps}.")
    return lines


def history_files(history: list[dict], unit: str) -> dict[str, bytes]:
    """{"metrics.jsonl": one line per entry, "loss.png": the curves}. unit: of the losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line for line in history if "loss" in line]
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training", color="0.7",
              marker="." if len(steps) < 3 else None)  # fmt: skip
    for condition in CONDITIONS:
        checks = [line for line in history if condition in line]
        axes.plot(
            [line["step"] for line in checks], [line[condition] for line in checks], marker=".",
            label=f"validation, {condition}",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel=unit, ylim=(0, None))
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    plt.close(figure)
    return {"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in history).encode(), "loss.png": png.getvalue()}
