"""Scores of a checkpoint, each beside what is reached without looking: the same questions with another picture
(shuffled), with none (blind, the question-only guess of the same model), and the commonest answer (majority)."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from nanochat.assistant import Assistant
from nanochat.data import Dataset, Sample, image_key, limit, load_dataset
from nanochat.data.sample import written_whole
from nanochat.evaluation import metrics
from nanochat.evaluation.controls import commonest_answer

WAYS = ("aligned", "shuffled", "blind")
NEW_TOKENS = {"vqa": 24, "caption": 32}


@dataclass
class Answers:
    """What the model said to each sample, in each of the ways: not shuffled where there is no other picture."""

    dataset: Dataset
    said: dict[str, list[str]]
    too_long: int = 0
    "Samples whose question fills the context: their answers are empty, and wrong."


def run(
    checkpoint: str,
    dataset: str,
    split: str,
    n_samples: int | None,
    json_out: Path | None,
    batch_size: int,
    strict: bool,
    device: torch.device,
) -> None:
    """Answer a dataset (a random subset of it with n_samples), print the scores, and write them to `json_out`."""
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    found = load_dataset(dataset, split, strict)
    if n_samples is not None:
        found.samples = limit(found.samples, n_samples)
    assistant = Assistant.load(checkpoint, device)
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("answering", total=None)
        answers = answer_dataset(
            assistant, found, batch_size, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    result = score(answers)
    console.print(table(result))
    if found.skipped:
        console.print(f"{found.skipped} rows left out: their picture is missing")
    if answers.too_long:
        console.print(f"{answers.too_long} questions do not fit the context: counted as wrong")
    if json_out is not None:
        with written_whole(json_out) as new:
            new.write_text(json.dumps(result, indent=1))


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
    context, wanted = assistant.model.config.sequence_len, NEW_TOKENS[dataset.task]
    rooms = [min(wanted, context - len(assistant.prompt(sample.messages[:-1]))) for sample in samples]
    ways = WAYS if len(images) > 1 else ("aligned", "blind")
    parts = list(batches(rooms, batch_size))
    steps = -(-len(images) // batch_size) + len(ways) * len(parts)
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
    said = {way: [""] * len(samples) for way in ways}
    for way in ways:
        for room, part in parts:
            conversations = [samples[i].messages[:-1] for i in part]
            vectors = [choose[way](keys[i])[None] for i in part]
            for i, answer in zip(part, assistant.answer_all(conversations, vectors, room), strict=True):
                said[way][i] = answer
            progress(done := done + 1, steps)
    return Answers(dataset, said, sum(room < 1 for room in rooms))


def batches(rooms: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(new tokens, rows that are answered with so many), at most `size` rows at a time; rows without room in none."""
    for room in sorted({room for room in rooms if room > 0}, reverse=True):
        rows = [row for row, own in enumerate(rooms) if own == room]
        for start in range(0, len(rows), size):
            yield room, rows[start : start + size]


def another_image(names: Sequence[str], seed: int = 0) -> list[str]:
    """For each name another one, no name twice: the successor in a random circle."""
    order = np.random.default_rng(seed).permutation(len(names))
    other = [""] * len(names)
    for here, there in zip(order, np.roll(order, -1), strict=True):
        other[here] = names[there]
    return other


def score(answers: Answers) -> dict:
    """{"dataset", "n", "n_images", then "accuracy" for questions, or "bleu1".."bleu4" and "cider" for captions}: each
    {"aligned", "shuffled" (None where there is one picture), "blind", ("majority",) "ci95": [low, high] of aligned}.
    Shares are 0..1, BLEU and CIDEr on their usual scale of 0..100. "too_long", where there are such, counts questions that
    fill the context."""
    dataset, said = answers.dataset, answers.said
    keys = [image_key(sample.images[0]) for sample in dataset.samples]
    result = {
        "dataset": dataset.name,
        "n": len(dataset.samples),
        "n_images": len(set(keys)),
        "skipped": dataset.skipped,
    }
    if answers.too_long:
        result["too_long"] = answers.too_long
    scorer = score_vqa if dataset.task == "vqa" else score_captions
    return result | scorer(dataset.samples, said, keys)


def score_vqa(samples: Sequence[Sample], said: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]

    def correct(predictions):
        return [metrics.exact_match(p, r) for p, r in zip(predictions, references, strict=True)]

    majority = commonest_answer([usual for usual, *_ in references])
    ways = said | {"majority": [majority] * len(samples)}
    row = {way: float(np.mean(correct(predictions))) for way, predictions in ways.items()}
    return {"accuracy": measure(row, metrics.accuracy(correct(said["aligned"]), keys))}


def score_captions(samples: Sequence[Sample], said: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]
    bleu = {way: metrics.bleu(predictions, references) for way, predictions in said.items()}
    intervals = metrics.bleu_interval(said["aligned"], references, keys)
    result = {
        f"bleu{n + 1}": measure({way: values[n] for way, values in bleu.items()}, interval, 100)
        for n, interval in enumerate(intervals)
    }
    cider = {way: metrics.cider(predictions, references) for way, predictions in said.items()}
    row = {way: float(values.mean()) for way, values in cider.items()}
    return result | {"cider": measure(row, metrics.accuracy(cider["aligned"], keys), 100)}


def measure(row: dict[str, float], interval: metrics.Estimate, scale: float = 1) -> dict:
    """A row of the result: every way, and the interval of aligned."""
    scaled = {way: scale * value for way, value in row.items()}
    return dict.fromkeys(WAYS) | scaled | {"ci95": [scale * interval.low, scale * interval.high]}


def table(result: dict) -> Table:
    """The scores as people read them: one row a measure, the right picture's column first."""
    measures = {name: row for name, row in result.items() if isinstance(row, dict)}
    columns = [c for c in (*WAYS, "majority") if any(c in row for row in measures.values())]
    out = Table(title=f"{escape(result['dataset'])}: {result['n']:,} samples, {result['n_images']:,} pictures")
    if "majority" in columns:
        out.caption = "majority: the commonest answer of these samples, so flattered"
    out.add_column("")
    for column in ("aligned", "95 % interval", *columns[1:]):
        out.add_column(column, justify="right")
    for name, row in measures.items():
        style = "{:.1%}" if name == "accuracy" else "{:.1f}"
        low_high = " .. ".join(style.format(v) for v in row["ci95"])
        cells = ["" if row.get(c) is None else style.format(row[c]) for c in columns]
        out.add_row(name, cells[0], low_high, *cells[1:])
    return out
