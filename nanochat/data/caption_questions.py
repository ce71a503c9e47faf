"""Questions about pictures, made from their captions, in the manner of COCO-QA (Ren et al. 2015, arXiv 1505.02074).

The captions of a picture are read with word lists (caption_words.py) and plain rules (caption_facts.py): no parser, no network.
A question is asked where the captions agree on its answer and none contradicts it. Kinds, with examples:

    object    what is the dog chasing?  who is running?  what is the man wearing?
    number    how many dogs are there?          color   what color is the shirt?
    activity  what is the man doing?            place   where is the dog?
    yes/no    is there a horse?

The questions are balanced, so that a model that does not see the picture is near chance: of the questions with one and the
same text, no answer has more than the share in `SHARES`; and for each word, "is there a ...?" is answered with yes as often as
with no. What is made depends on the captions alone.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from nanochat.data import caption_words as words
from nanochat.data.caption_facts import Facts, Question, read_captions
from nanochat.data.sample import Dataset, Sample, vqa_sample
from nanochat.files import DataError

PREFIX = "captions-questions:"
KINDS = ("object", "number", "color", "activity", "place", "yes/no")
# The largest share of an answer among the questions with the same text. There are few numbers, so they get more.
SHARES = {"object": 0.2, "number": 0.4, "color": 0.2, "activity": 0.2, "place": 0.2}
MOST = 8  # questions about one picture
MOST_ALIKE = 1 / 30  # of the pictures have the same question and answer, so that no question is most of the data
SEED = 0


def questions_dataset(captions: Dataset) -> Dataset:
    """The questions that the captions of a dataset answer, each a sample of its own with its kind.

    Raises:
        DataError: the dataset has no captions, or they answer no question.
    """
    check_captions(captions, PREFIX)
    found = balanced([read_captions(sample.references) for sample in captions.samples])
    samples = [
        replace(vqa_sample(sample.images[0], question.text, question.answer), where=sample.where, kind=question.kind)
        for sample, own in zip(captions.samples, found, strict=True)
        for question in own
    ]
    needed = "several English captions of a picture, and pictures that differ in at least five answers"
    return made_dataset(captions, "questions", samples, KINDS, "questions from captions", needed)


def check_captions(captions: Dataset, prefix: str) -> None:
    if captions.task != "caption":
        raise DataError(f"{captions.name}: {prefix} needs captions, but these are questions and answers")


def made_dataset(
    captions: Dataset, name: str, samples: list[Sample], kinds: Sequence[str], title: str, needed: str
) -> Dataset:
    """Samples that were made of captions, with a note of how many of each kind there are. Raises DataError if there are none."""
    if not samples:
        raise DataError(
            f"{captions.name}: no {title}: those of its {len(captions.samples)} pictures give none; needed are {needed}"
        )
    counts = Counter(sample.kind for sample in samples)
    note = f"{len(samples)} {title}: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    return Dataset(f"{captions.name} {name}", "vqa", samples, captions.skipped, [*captions.notes, note])


# ---- balance


def balanced(pictures: Sequence[Facts]) -> list[list[Question]]:
    """At most MOST questions about each picture: see the head of this file."""
    rng, most_alike = random.Random(SEED), max(1, round(MOST_ALIKE * len(pictures)))
    chosen: list[list[Question]] = [[] for _ in pictures]
    groups: dict[tuple[str, str], dict[str, list[int]]] = {}  # (kind, text) -> answer -> pictures
    for number, facts in enumerate(pictures):
        for question in rng.sample(facts.questions, min(MOST, len(facts.questions))):
            groups.setdefault((question.kind, question.text), {}).setdefault(question.answer, []).append(number)
    for (kind, text), by_answer in groups.items():
        most = min(most_alike, cap([len(numbers) for numbers in by_answer.values()], SHARES[kind]))
        for answer, numbers in by_answer.items():
            rng.shuffle(numbers)
            for number in sorted(numbers, key=lambda number: len(chosen[number]))[:most]:
                chosen[number].append(Question(kind, text, answer))
    for noun in sorted(words.PRESENCE, key=lambda noun: sum(noun in facts.present for facts in pictures)):
        sides = {"yes": [], "no": []}
        for number in rng.sample(range(len(pictures)), len(pictures)):
            facts = pictures[number]
            if len(chosen[number]) < MOST and (noun in facts.present or noun in facts.absent):
                sides["yes" if noun in facts.present else "no"].append(number)
        least = min(most_alike, *map(len, sides.values()))
        for answer, numbers in sides.items():
            for number in sorted(numbers, key=lambda number: len(chosen[number]))[:least]:
                chosen[number].append(Question("yes/no", f"is there {noun}?", answer))
    return chosen


def cap(counts: Sequence[int], share: float) -> int:
    """The largest number m so that m <= share * sum(min(count, m)): of a question cut to m of each answer, no answer has more
    than the share. 0 if there are too few answers."""
    return max((m for m in range(1, max(counts) + 1) if m <= share * sum(min(c, m) for c in counts)), default=0)
