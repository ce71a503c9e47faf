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

from nanochat.agent import Agent, learnt_by
from nanochat.beams import check_beams
from nanochat.data import Dataset, Sample, image_key, limit, load_dataset, picture_groups
from nanochat.data.image_files import check_decodable
from nanochat.errors import UserError
from nanochat.evaluation import metrics
from nanochat.evaluation.controls import CONDITIONS, SINGLE, commonest_answer, conditions, single_picture
from nanochat.evaluation.held_out import default_split, runs_of, training_overlap
from nanochat.files import atomic_path
from nanochat.vision.images import ImageError, ImageSource

NEW_TOKENS = {"vqa": 24, "caption": 32}


@dataclass
class Answers:
    """The model's answers to the samples that have a picture, under each condition; "shuffled" is missing if there is only
    one group of pictures, "single" unless all samples have several pictures. samples: those that were answered, in the order
    of the answers."""

    dataset: Dataset
    by_condition: dict[str, list[str]]
    too_long: int = 0
    "Number of samples whose question fills the context. Their answers are empty and count as wrong."
    without_picture: int = 0
    "Number of samples without a picture, which are not answered: the conditions would all be the same."

    @property
    def samples(self) -> list[Sample]:
        return [sample for sample in self.dataset.samples if sample.images]


def evaluate_dataset(
    checkpoint: str,
    dataset: str,
    split: str | None = None,
    *,
    n_samples: int | None = None,
    json_out: Path | None = None,
    batch_size: int = 64,
    strict: bool = False,
    device: torch.device | str = "cpu",
    beams: int = 1,
) -> dict:
    """Answer a dataset, or a random subset of n_samples; print the scores and return them (see `score`).

    split: None for the part that training held out of this data, or what `held_out.default_split` chooses. strict: refuse data
    with missing pictures, instead of leaving their rows out.
    json_out: a file to write the scores to. beams: see `beams.beam_search`; 1 is greedy.

    Raises:
        ValueError: the batch size or the number of beams is out of range, or no sample has a picture.
        DataError, CheckpointError: the dataset or the checkpoint cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    check_beams(beams)
    console, reason = Console(), ""
    if split is not None:  # wrong data is reported before the model is loaded
        data = load_dataset(dataset, split, strict)
    agent = Agent.load(checkpoint, device)
    recipe, *earlier = runs_of(agent.training)
    if split is None:
        split, reason = default_split(dataset, recipe, earlier)
        data = load_dataset(dataset, split, strict)
    if n_samples is not None:
        data.samples = limit([sample for sample in data.samples if sample.images] or data.samples, n_samples)
    overlap = training_overlap(data.samples, recipe, earlier)
    print_notes(console, [f"{dataset}: split {split}, {reason}"] if reason else [], data.notes)
    kind = "captions" if data.task == "caption" else "questions"
    if not learnt_by(agent.training)[kind]:
        print_notes(console, [f"{checkpoint} was not trained on {kind}: expect nothing of it"])
    if overlap.note:
        console.print(f"[yellow]{escape(overlap.note)}[/yellow]", highlight=False, soft_wrap=True)
    with Progress(console=console) as progress:
        bar = progress.add_task("answering", total=None)
        answers = answer_dataset(
            agent, data, batch_size, lambda done, total: progress.update(bar, completed=done, total=total), beams
        )
    result = score(answers) | {"split": split, "beams": beams}
    if overlap.trained_on is not None:
        result["training_pictures"] = overlap.trained_on
    console.print(table(result))
    print_notes(console, notes_of(answers))
    if json_out is not None:
        with atomic_path(json_out) as new:
            new.write_text(json.dumps(result, indent=1))
    return result


def print_notes(console: Console, *parts: Sequence[str]) -> None:
    for note in (note for part in parts for note in part):
        console.print(escape(note), highlight=False, soft_wrap=True)


def notes_of(answers: Answers) -> list[str]:
    """What the scores do not say."""
    notes, data, total = [], answers.dataset, len(answers.dataset.samples)
    if answers.without_picture:
        notes.append(f"{answers.without_picture} of {total} samples have no picture: not evaluated")
    several = sum(len(sample.images) > 1 for sample in answers.samples)
    if several:
        notes.append(
            f"{several} samples have several pictures: shuffled and blind change all pictures of a sample"
            + (", single shows one of them" if SINGLE in answers.by_condition else "")
        )
    if answers.too_long:
        notes.append(f"{answers.too_long} questions do not fit into the context: counted as wrong")
    if data.task == "caption":
        short = sum(metrics.longest(sample.references) < metrics.MAX_N for sample in answers.samples)
        if short:
            notes.append(
                f"{short} samples have no caption of {metrics.MAX_N} words: BLEU-{metrics.MAX_N} counts runs of "
                f"{metrics.MAX_N} words, so it is low for them even if every caption is right; see exact_match"
            )
    return notes


def answer_dataset(
    agent: Agent,
    dataset: Dataset,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
    beams: int = 1,
) -> Answers:
    """The answers to every sample with a picture, under every condition: greedy, or by beam search with more than one beam.
    progress(done, total) is called after each batch.

    Pictures that some sample shows together are exchanged with those of other samples, see `picture_groups`.

    Raises:
        ValueError: no sample has a picture.
        DataError: a picture cannot be decoded; the message names the row.
    """
    samples = [sample for sample in dataset.samples if sample.images]
    if not samples:
        raise UserError(
            f"{dataset.name}: none of the {len(dataset.samples)} samples has a picture: there is nothing to compare with other "
            "pictures"
        )
    keys = [[image_key(image) for image in sample.images] for sample in samples]
    sources = {
        key: (image, sample.where)
        for sample, own in zip(samples, keys, strict=True)
        for key, image in zip(own, sample.images, strict=True)
    }
    row_of = {key: row for row, key in enumerate(sources)}
    group_of = picture_groups(samples)
    groups = [group_of[key] for key in sources]
    context, wanted = agent.model.config.sequence_len, NEW_TOKENS[dataset.task]
    rooms = [min(wanted, context - len(agent.prompt(sample.messages[:-1]))) for sample in samples]
    parts = list(batches(rooms, batch_size))
    several = all(len(own) > 1 for own in keys)
    n_conditions = len(CONDITIONS) - (len(set(groups)) == 1) + several
    total, done = -(-len(sources) // batch_size) + n_conditions * len(parts), 0

    looked, pictures = [], list(sources.values())
    for start in range(0, len(pictures), batch_size):
        looked.append(look(agent, pictures[start : start + batch_size]))
        progress(done := done + 1, total)
    by_condition, seen = {}, conditions(torch.cat(looked), groups)  # (pictures, N, D) each
    if several:
        seen[SINGLE] = seen["aligned"]
    for condition, vectors in seen.items():
        found = by_condition[condition] = [""] * len(samples)
        for room, part in parts:
            conversations = [samples[i].messages[:-1] for i in part]
            shown = [vectors[[row_of[key] for key in keys[i]]] for i in part]  # (pictures of the sample, N, D) each
            if condition == SINGLE:
                shown = [single_picture(own, i) for own, i in zip(shown, part, strict=True)]
            for i, answer in zip(part, agent.answer_all(conversations, shown, room, beams), strict=True):
                found[i] = answer
            progress(done := done + 1, total)
    return Answers(dataset, by_condition, sum(room < 1 for room in rooms), len(dataset.samples) - len(samples))


def look(agent: Agent, pictures: Sequence[tuple[ImageSource, str]]) -> torch.Tensor:
    """The vision vectors (n, N, D) of (image, its row). Raises DataError naming the row of an image that cannot be decoded."""
    try:
        return torch.as_tensor(agent.look([image for image, _ in pictures]))
    except ImageError:
        check_decodable(pictures)
        raise


def batches(rooms: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(number of new tokens, rows that are answered with that number), at most `size` rows each; rows without room are
    left out."""
    for room in sorted({room for room in rooms if room > 0}, reverse=True):
        rows = [row for row, own in enumerate(rooms) if own == room]
        for start in range(0, len(rows), size):
            yield room, rows[start : start + size]


def score(answers: Answers) -> dict:
    """{"dataset", "n", "n_images", "skipped", then "accuracy" for questions, or "exact_match", "bleu1".."bleu4" and "cider" for
    captions}.

    Each measure is {"aligned", "shuffled" (None if there is only one picture), "blind", "majority", "ci95": [low, high] of
    aligned}. Accuracy and exact match are 0..1, BLEU and CIDEr have their usual scale of 0..100. "too_long" is there if some
    questions fill the context, "without_picture" if some samples have no picture: their numbers. "kinds" is there if the
    questions have kinds: {kind: {"n", and the same values as "accuracy"}}.
    """
    dataset, samples = answers.dataset, answers.samples
    groups = picture_groups(samples)
    keys = [groups[image_key(sample.images[0])] for sample in samples]
    result = {"dataset": dataset.name, "n": len(samples), "n_images": len(groups), "skipped": dataset.skipped}
    for name in ("too_long", "without_picture"):
        if getattr(answers, name):
            result[name] = getattr(answers, name)
    scorer = score_vqa if dataset.task == "vqa" else score_captions
    return result | scorer(samples, answers.by_condition, keys)


def score_vqa(samples: Sequence[Sample], by_condition: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]
    majority = commonest_answer([usual for usual, *_ in references])
    result = {"accuracy": exact(by_condition | {"majority": [majority] * len(samples)}, references, keys)}
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault(sample.kind, []).append(row)
    if len(rows) > 1:
        result["kinds"] = {
            kind or "other": {"n": len(own)}
            | score_vqa(
                [samples[row] for row in own],
                {condition: [answers[row] for row in own] for condition, answers in by_condition.items()},
                [keys[row] for row in own],
            )["accuracy"]
            for kind, own in sorted(rows.items())
        }
    return result


def score_captions(samples: Sequence[Sample], by_condition: dict[str, list[str]], keys: list[str]) -> dict:
    references = [sample.references for sample in samples]
    majority = commonest_answer([caption for captions in references for caption in captions])
    predicted = by_condition | {"majority": [majority] * len(samples)}
    bleu = {condition: metrics.bleu(predictions, references) for condition, predictions in predicted.items()}
    intervals = metrics.bleu_interval(by_condition["aligned"], references, keys)
    result = {"exact_match": exact(predicted, references, keys)} | {
        f"bleu{n + 1}": measure({condition: values[n] for condition, values in bleu.items()}, interval, 100)
        for n, interval in enumerate(intervals)
    }
    cider = {condition: metrics.cider(predictions, references) for condition, predictions in predicted.items()}
    row = {condition: float(values.mean()) for condition, values in cider.items()}
    return result | {"cider": measure(row, metrics.accuracy(cider["aligned"], keys), 100)}


def exact(predicted: dict[str, list[str]], references: Sequence[Sequence[str]], keys: list[str]) -> dict:
    """The share of answers that equal a reference, under every condition."""
    right = {
        name: [metrics.exact_match(p, r) for p, r in zip(predictions, references, strict=True)]
        for name, predictions in predicted.items()
    }
    row = {name: float(np.mean(hits)) for name, hits in right.items()}
    return measure(row, metrics.accuracy(right["aligned"], keys))


def measure(row: dict[str, float], interval: metrics.Estimate, scale: float = 1) -> dict:
    """One measure of the result: its value under every condition, and the interval of aligned."""
    scaled = {name: scale * value for name, value in row.items()}
    return dict.fromkeys(CONDITIONS) | scaled | {"ci95": [scale * interval.low, scale * interval.high]}


def table(result: dict) -> Table:
    """The scores for a terminal: one row per measure, the column with the right picture first."""
    measures = {name: row for name, row in result.items() if isinstance(row, dict) and name != "kinds"}
    measures |= result.get("kinds", {})
    columns = [c for c in (*CONDITIONS, SINGLE, "majority") if any(c in row for row in measures.values())]
    out = Table(title=f"{escape(result['dataset'])}: {result['n']:,} samples, {result['n_images']:,} pictures")
    if "majority" in columns:
        out.caption = "majority: the most common answer, computed on the test answers, so optimistic"
    out.add_column("")
    for column in ("aligned", "95 % interval", *columns[1:]):
        out.add_column(column, justify="right")
    for name, row in measures.items():
        style = "{:.1f}" if name.startswith(("bleu", "cider")) else "{:.1%}"
        low_high = " .. ".join(style.format(v) for v in row["ci95"])
        cells = ["" if row.get(c) is None else style.format(row[c]) for c in columns]
        out.add_row(name, cells[0], low_high, *cells[1:])
    return out
