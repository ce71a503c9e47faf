"""Scores of a checkpoint on questions or captions about photographs, each next to its controls: the same questions with
another picture (shuffled), without a picture (blind), and the most common answer (majority)."""

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

from nanochat.agent import Agent
from nanochat.data import Dataset, Sample, image_key, limit, load_dataset
from nanochat.errors import UserError
from nanochat.evaluation import metrics
from nanochat.evaluation.controls import CONDITIONS, commonest_answer, conditions
from nanochat.files import atomic_path

NEW_TOKENS = {"vqa": 24, "caption": 32}


@dataclass
class Answers:
    """The model's answers to all samples under each condition; "shuffled" is missing if there is only one picture."""

    dataset: Dataset
    by_condition: dict[str, list[str]]
    too_long: int = 0
    "Number of samples whose question fills the context. Their answers are empty and count as wrong."


def evaluate_dataset(
    checkpoint: str,
    dataset: str,
    split: str,
    n_samples: int | None,
    json_out: Path | None,
    batch_size: int,
    strict: bool,
    device: torch.device,
) -> dict:
    """Answer a dataset, or a random subset of n_samples; print the scores and return them (see `score`).

    json_out: a file to write the scores to.

    Raises:
        ValueError: the batch size is below 1, or a sample has not exactly one picture.
        DataError, CheckpointError: the dataset or the checkpoint cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    data = load_dataset(dataset, split, strict)
    if n_samples is not None:
        data.samples = limit(data.samples, n_samples)
    agent = Agent.load(checkpoint, device)
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("answering", total=None)
        answers = answer_dataset(
            agent, data, batch_size, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    result = score(answers)
    console.print(table(result))
    if data.skipped:
        console.print(f"{data.skipped} rows left out: their picture is missing")
    if answers.too_long:
        console.print(f"{answers.too_long} questions do not fit into the context: counted as wrong")
    if json_out is not None:
        with atomic_path(json_out) as new:
            new.write_text(json.dumps(result, indent=1))
    return result


def answer_dataset(
    agent: Agent,
    dataset: Dataset,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Greedy answers to every sample under every condition. progress(done, total) is called after each batch.

    Raises:
        ValueError: a sample has not exactly one picture; "another picture" would have no meaning for it.
    """
    samples = dataset.samples
    for sample in samples:
        if len(sample.images) != 1:
            raise UserError(
                f"evaluation needs exactly one picture per sample, found {len(sample.images)} at {sample.question!r}"
            )
    keys = [image_key(sample.images[0]) for sample in samples]
    images = {key: sample.images[0] for key, sample in zip(keys, samples, strict=True)}
    row_of = {key: row for row, key in enumerate(images)}
    context, wanted = agent.model.config.sequence_len, NEW_TOKENS[dataset.task]
    rooms = [min(wanted, context - len(agent.prompt(sample.messages[:-1]))) for sample in samples]
    parts = list(batches(rooms, batch_size))
    n_conditions = len(CONDITIONS) if len(images) > 1 else len(CONDITIONS) - 1
    total, done = -(-len(images) // batch_size) + n_conditions * len(parts), 0

    looked, pictures = [], list(images.values())
    for start in range(0, len(pictures), batch_size):
        looked.append(agent.look(pictures[start : start + batch_size]))
        progress(done := done + 1, total)
    by_condition = {}
    for condition, vectors in conditions(torch.cat(looked), list(images)).items():  # (pictures, N, D)
        found = by_condition[condition] = [""] * len(samples)
        for room, part in parts:
            conversations = [samples[i].messages[:-1] for i in part]
            shown = [vectors[row_of[keys[i]], None] for i in part]  # (1, N, D) each
            for i, answer in zip(part, agent.answer_all(conversations, shown, room), strict=True):
                found[i] = answer
            progress(done := done + 1, total)
    return Answers(dataset, by_condition, sum(room < 1 for room in rooms))


def batches(rooms: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(number of new tokens, rows that are answered with that number), at most `size` rows each; rows without room are
    left out."""
    for room in sorted({room for room in rooms if room > 0}, reverse=True):
        rows = [row for row, own in enumerate(rooms) if own == room]
        for start in range(0, len(rows), size):
            yield room, rows[start : start + size]


def score(answers: Answers) -> dict:
    """{"dataset", "n", "n_images", "skipped", then "accuracy" for questions, or "bleu1".."bleu4" and "cider" for captions}.

    Each measure is {"aligned", "shuffled" (None if there is only one picture), "blind", "majority" (questions only),
    "ci95": [low, high] of aligned}. Accuracy is 0..1, BLEU and CIDEr have their usual scale of 0..100. "too_long" is there
    if some questions fill the context: their number.
    """
    dataset = answers.dataset
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
    return result | scorer(dataset.samples, answers.by_condition, keys)


def score_vqa(samples: Sequence[Sample], by_condition: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]

    def correct(predictions):
        return [metrics.exact_match(p, r) for p, r in zip(predictions, references, strict=True)]

    majority = commonest_answer([usual for usual, *_ in references])
    predicted = by_condition | {"majority": [majority] * len(samples)}
    row = {name: float(np.mean(correct(predictions))) for name, predictions in predicted.items()}
    return {"accuracy": measure(row, metrics.accuracy(correct(by_condition["aligned"]), keys))}


def score_captions(samples: Sequence[Sample], by_condition: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]
    bleu = {condition: metrics.bleu(predictions, references) for condition, predictions in by_condition.items()}
    intervals = metrics.bleu_interval(by_condition["aligned"], references, keys)
    result = {
        f"bleu{n + 1}": measure({condition: values[n] for condition, values in bleu.items()}, interval, 100)
        for n, interval in enumerate(intervals)
    }
    cider = {condition: metrics.cider(predictions, references) for condition, predictions in by_condition.items()}
    row = {condition: float(values.mean()) for condition, values in cider.items()}
    return result | {"cider": measure(row, metrics.accuracy(cider["aligned"], keys), 100)}


def measure(row: dict[str, float], interval: metrics.Estimate, scale: float = 1) -> dict:
    """One measure of the result: its value under every condition, and the interval of aligned."""
    scaled = {name: scale * value for name, value in row.items()}
    return dict.fromkeys(CONDITIONS) | scaled | {"ci95": [scale * interval.low, scale * interval.high]}


def table(result: dict) -> Table:
    """The scores for a terminal: one row per measure, the column with the right picture first."""
    measures = {name: row for name, row in result.items() if isinstance(row, dict)}
    columns = [c for c in (*CONDITIONS, "majority") if any(c in row for row in measures.values())]
    out = Table(title=f"{escape(result['dataset'])}: {result['n']:,} samples, {result['n_images']:,} pictures")
    if "majority" in columns:
        out.caption = "majority: the most common answer, computed on the test answers, so optimistic"
    out.add_column("")
    for column in ("aligned", "95 % interval", *columns[1:]):
        out.add_column(column, justify="right")
    for name, row in measures.items():
        style = "{:.1%}" if name == "accuracy" else "{:.1f}"
        low_high = " .. ".join(style.format(v) for v in row["ci95"])
        cells = ["" if row.get(c) is None else style.format(row[c]) for c in columns]
        out.add_row(name, cells[0], low_high, *cells[1:])
    return out
