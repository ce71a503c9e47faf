"""Scores of a checkpoint, each beside what is reached without looking: the same questions with another picture
(shuffled), with none (blind, the question-only guess of the same model), and the commonest answer (majority)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from nanochat import metrics
from nanochat.assistant import Assistant
from nanochat.data import Dataset, Sample, image_key

WAYS = ("aligned", "shuffled", "blind")
NEW_TOKENS = {"vqa": 24, "caption": 32}


@dataclass
class Answers:
    """What the model said to each sample, in each of the three ways."""

    dataset: Dataset
    said: dict[str, list[str]]


def answer_dataset(
    assistant: Assistant,
    dataset: Dataset,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Greedy answers to every sample. Raises ValueError for samples of other than one picture: "another picture" would
    have no meaning there."""
    samples = dataset.samples
    for sample in samples:
        if len(sample.images) != 1:
            raise ValueError(
                f"evaluation takes one picture a sample, found {len(sample.images)} at {sample.question!r}"
            )
    keys = [image_key(sample.images[0]) for sample in samples]
    images = {key: sample.images[0] for key, sample in zip(keys, samples, strict=True)}
    steps = -(-len(images) // batch_size) + len(WAYS) * -(-len(samples) // batch_size)
    done = 0

    seen: dict[str, torch.Tensor] = {}
    names = list(images)
    for start in range(0, len(names), batch_size):
        part = names[start : start + batch_size]
        seen |= zip(part, assistant.look([images[name] for name in part]), strict=True)
        progress(done := done + 1, steps)

    other = dict(zip(names, another_image(names), strict=True))
    nothing = torch.zeros_like(next(iter(seen.values())))
    choose = {"aligned": lambda key: seen[key], "shuffled": lambda key: seen[other[key]], "blind": lambda key: nothing}
    said = {way: [] for way in WAYS}
    for way in WAYS:
        for start in range(0, len(samples), batch_size):
            part = range(start, min(start + batch_size, len(samples)))
            conversations = [samples[i].messages[:-1] for i in part]
            vectors = [choose[way](keys[i])[None] for i in part]
            said[way] += assistant.answer_all(conversations, vectors, NEW_TOKENS[dataset.task])
            progress(done := done + 1, steps)
    return Answers(dataset, said)


def another_image(names: Sequence[str], seed: int = 0) -> list[str]:
    """For each name another one, no name twice: the successor in a random circle."""
    order = np.random.default_rng(seed).permutation(len(names))
    other = [""] * len(names)
    for here, there in zip(order, np.roll(order, -1), strict=True):
        other[here] = names[there]
    return other


def score(answers: Answers) -> dict:
    """{"dataset", "n", "n_images", then "accuracy" for questions, or "bleu1".."bleu4" and "cider" for captions}: each
    {"aligned", "shuffled", "blind", ("majority",) "ci95": [low, high] of aligned}. Shares are 0..1, BLEU and CIDEr
    on their usual scale of 0..100."""
    dataset, said = answers.dataset, answers.said
    keys = [image_key(sample.images[0]) for sample in dataset.samples]
    result = {
        "dataset": dataset.name,
        "n": len(dataset.samples),
        "n_images": len(set(keys)),
        "skipped": dataset.skipped,
    }
    scorer = score_vqa if dataset.task == "vqa" else score_captions
    return result | scorer(dataset.samples, said, keys)


def score_vqa(samples: Sequence[Sample], said: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]

    def correct(predictions):
        return [metrics.exact_match(p, r) for p, r in zip(predictions, references, strict=True)]

    row = {way: float(np.mean(correct(said[way]))) for way in WAYS}
    row["majority"] = float(np.mean(correct(metrics.majority_baseline(references).predictions)))
    interval = metrics.accuracy(correct(said["aligned"]), keys)
    return {"accuracy": row | {"ci95": [interval.low, interval.high]}}


def score_captions(samples: Sequence[Sample], said: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]
    bleu = {way: metrics.bleu(said[way], references) for way in WAYS}
    result = {f"bleu{n}": {way: 100 * bleu[way][n - 1] for way in WAYS} for n in (1, 2, 3, 4)}
    interval = metrics.bleu_interval(said["aligned"], references, keys)
    result["bleu4"]["ci95"] = [100 * interval.low, 100 * interval.high]
    cider = {way: metrics.cider(said[way], references) for way in WAYS}
    interval = metrics.accuracy(cider["aligned"], keys)
    result["cider"] = {way: 100 * float(cider[way].mean()) for way in WAYS}
    result["cider"]["ci95"] = [100 * interval.low, 100 * interval.high]
    return result


def table(result: dict) -> Table:
    """The scores as people read them: one row a measure, the right picture's column first."""
    measures = {name: row for name, row in result.items() if isinstance(row, dict)}
    columns = [c for c in (*WAYS, "majority") if any(c in row for row in measures.values())]
    out = Table(title=f"{result['dataset']}: {result['n']:,} samples, {result['n_images']:,} pictures")
    out.add_column("")
    for column in ("aligned", "95 % interval", *columns[1:]):
        out.add_column(column, justify="right")
    for name, row in measures.items():
        style = "{:.1%}" if name == "accuracy" else "{:.1f}"
        low_high = " .. ".join(style.format(v) for v in row["ci95"]) if "ci95" in row else ""
        cells = [style.format(row[c]) if c in row else "" for c in columns]
        out.add_row(name, cells[0], low_high, *cells[1:])
    return out
