"""Questions about several photographs, made from their captions by the rules of caption_facts.py.

    which   which picture shows a dog?                      first, second, ... eighth; one of 2 to 8
    both    do both pictures show a dog?                    yes, no
    one     in the second picture, what is the man doing?   what that picture's captions say; of 2 to 4

Photographs are put into groups of eight by chance, and a question is about some of one group. The place of the answer is drawn
without looking at the pictures, and of "both" as many are answered with yes as with no for each word, so that a model that
does not see them is near chance. What is made depends on the captions alone.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanochat.data import caption_words as words
from nanochat.data.caption_facts import Facts, Question, read_captions
from nanochat.data.caption_questions import balanced, check_captions, made_dataset
from nanochat.data.sample import Dataset, Sample, question_sample

PREFIX = "captions-several:"
KINDS = ("which", "both", "one")
GROUP = 8  # photographs
WHICH, BOTH, ONE = 6, 2, 4  # questions of each kind about a group, at most
MOST_FOR_ONE = 4  # photographs beside a question about one of them, itself included
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
SEED = 0


@dataclass(frozen=True)
class Photo:
    """sample: of the caption data set. facts: of its captions; questions: those about it alone, balanced."""

    sample: Sample
    facts: Facts
    questions: list[Question]


Asked = tuple[str, list[Photo], str, str]  # kind, photographs, question, answer


def several_dataset(captions: Dataset) -> Dataset:
    """Questions about 2 to 8 photographs of a caption data set, each a sample of its own with its kind.

    Raises:
        DataError: the dataset has no captions, or they answer no question about several of its pictures.
    """
    check_captions(captions, PREFIX)
    facts = [read_captions(sample.references) for sample in captions.samples]
    photos = [Photo(*each) for each in zip(captions.samples, facts, balanced(facts), strict=True)]
    rng = random.Random(SEED)
    rng.shuffle(photos)
    groups = [photos[i : i + GROUP] for i in range(0, len(photos), GROUP)]
    asked = [question for group in groups for question in [*which(rng, group), *one(rng, group)]]
    asked += [question for group in groups for question in both(rng, group)]
    samples = [as_sample(*question) for question in even_answers(asked)]
    needed = "at least two pictures, each with three or more English captions that say what is there"
    return made_dataset(captions, "several", samples, KINDS, "questions about several pictures", needed)


def as_sample(kind: str, photos: Sequence[Photo], question: str, answer: str) -> Sample:
    images = [photo.sample.images[0] for photo in photos]
    return question_sample(images, question, answer, photos[0].sample.where, kind)


def sides(group: Sequence[Photo], noun: str) -> tuple[list[Photo], list[Photo]]:
    """The photographs that show it, and those that surely do not; captions leave the others open."""
    return [photo for photo in group if noun in photo.facts.present], [
        photo for photo in group if noun in photo.facts.absent
    ]


def which(rng: random.Random, group: Sequence[Photo]) -> Iterator[Asked]:
    """Exactly one of the photographs shows it. Half of the questions are about two."""
    nouns = [noun for noun in words.PRESENCE if all(sides(group, noun))]
    for noun in rng.sample(nouns, min(WHICH, len(nouns))):
        showing, others = sides(group, noun)
        n = 1 if rng.random() < 0.5 else rng.randint(min(2, len(others)), len(others))
        place, shown = rng.randint(0, n), rng.sample(others, n)
        shown.insert(place, rng.choice(showing))
        yield "which", shown, f"which picture shows {noun}?", PLACES[place]


def both(rng: random.Random, group: Sequence[Photo]) -> Iterator[Asked]:
    """Two photographs, of which both or one shows it."""
    nouns = [noun for noun in words.PRESENCE if sides(group, noun)[0]]
    for noun in rng.sample(nouns, min(BOTH, len(nouns))):
        showing, others = sides(group, noun)
        question = f"do both pictures show {noun}?"
        if len(showing) > 1:
            yield "both", rng.sample(showing, 2), question, "yes"
        if others:
            pair = [rng.choice(showing), rng.choice(others)]
            yield "both", rng.sample(pair, 2), question, "no"


def one(rng: random.Random, group: Sequence[Photo]) -> Iterator[Asked]:
    """A question about one of the photographs, which the others could answer otherwise."""
    askable = [photo for photo in group if photo.questions] if len(group) > 1 else []
    for photo in rng.sample(askable, min(ONE, len(askable))):
        question = rng.choice(photo.questions)
        n = rng.randint(1, min(MOST_FOR_ONE, len(group)) - 1)
        place, shown = rng.randint(0, n), rng.sample([other for other in group if other is not photo], n)
        shown.insert(place, photo)
        yield "one", shown, f"in the {PLACES[place]} picture, {question.text}", question.answer


def even_answers(asked: Sequence[Asked]) -> list[Asked]:
    """Of the questions "both", as many with yes as with no for each text; the others as they are."""
    counts = Counter((question, answer) for kind, _, question, answer in asked if kind == "both")
    kept, seen = [], Counter()
    for kind, photos, question, answer in asked:
        seen[question, answer] += 1
        least = min(counts[question, "yes"], counts[question, "no"])
        if kind != "both" or seen[question, answer] <= least:
            kept.append((kind, photos, question, answer))
    return kept
