"""Questions about several photographs: that the captions answer them, and that rules without pictures do not."""

from collections import Counter, defaultdict

from nanochat.data import load_dataset, own_splits
from nanochat.data.caption_facts import read_captions
from nanochat.data.sample import Dataset, caption_sample
from nanochat.data.several_photos import GROUP, KINDS, MOST_FOR_ONE, PLACES, PREFIX, several_dataset
from nanochat.data.splits import picture_groups
from nanochat.evaluation.held_out import default_split
from nanochat.packing import without_paths
from tests.conftest import REAL_DATA, needs_data
from tests.data_files import write_lines, write_pictures

SCENES = (
    ("A brown dog runs .", "A dog is running in the snow .", "The dog runs ."),
    ("A man rides a horse on the beach .", "A man riding a horse .", "The man on his horse at the beach ."),
    ("A woman in a red dress is dancing .", "The woman is dancing .", "A woman dances on a stage ."),
    ("Two boys play with a ball .", "Two boys kick a ball .", "Two boys are playing ."),
    ("A cat sleeps on a bed .", "A cat on the bed .", "The cat is sleeping on a bed ."),
)


def captions(n: int) -> Dataset:
    return Dataset("scenes", "caption", [caption_sample(f"{i}.jpg", SCENES[i % len(SCENES)]) for i in range(n)])


def test_the_captions_answer_every_question():
    dataset = several_dataset(captions(400))
    facts = {f"{i}.jpg": read_captions(SCENES[i % len(SCENES)]) for i in range(400)}
    assert {sample.kind for sample in dataset.samples} == set(KINDS)
    for sample in dataset.samples:
        shown, n = [facts[image] for image in sample.images], len(sample.images)
        assert len(set(sample.images)) == n and [part["type"] for part in sample.messages[0]["content"]] == [
            *["image"] * n, "text",
        ]  # fmt: skip
        if sample.kind == "one":
            place, question = sample.question.removeprefix("in the ").split(" picture, ", 1)
            answers = {q.text: q.answer for q in shown[PLACES.index(place)].questions}
            own, noun = shown[PLACES.index(place)], question.removeprefix("is there ").rstrip("?")
            asked_for = (
                {True: "yes", False: "no"}.get(noun in own.present) if noun in own.present | own.absent else None
            )
            assert 2 <= n <= MOST_FOR_ONE and sample.answer == answers.get(question, asked_for)
            continue
        noun = sample.question.rstrip("?").split(" show")[1].removeprefix("s").strip()
        assert all((noun in own.present) != (noun in own.absent) for own in shown)
        having = [noun in own.present for own in shown]
        if sample.kind == "which":
            assert 2 <= n <= GROUP and having == [place == sample.answer for place in PLACES[:n]]
        else:
            assert n == 2 and any(having) and sample.answer == ("yes" if all(having) else "no")
    assert dataset.notes[-1].startswith(f"{len(dataset.samples)} questions about several pictures: ")


def test_photographs_are_compared_within_groups_only():
    """So that controls can exchange a question's photographs for those of another group."""
    groups = picture_groups(several_dataset(captions(400)).samples)
    assert max(Counter(groups.values()).values()) <= GROUP and len(set(groups.values())) >= 40


def test_guessing_is_near_chance():
    samples = several_dataset(captions(2000)).samples
    places, answers = defaultdict(Counter), defaultdict(Counter)
    for sample in samples:
        if sample.kind == "which":
            places[len(sample.images)][sample.answer] += 1
        elif sample.kind == "both":
            answers[sample.question][sample.answer] += 1
    assert places[2].total() > 300 and max(places[2].values()) < 0.58 * places[2].total()
    assert all(counts["yes"] == counts["no"] > 0 for counts in answers.values())
    assert [sample.images for sample in several_dataset(captions(2000)).samples] == [
        sample.images for sample in samples
    ]


def test_the_data_name_its_splits(tmp_path):
    folder = write_pictures(tmp_path)
    rows = [{"image": f"images/{i}.png", "captions": list(SCENES[i % len(SCENES)])} for i in range(20)]
    write_lines(folder / "train.jsonl", *rows[:12])
    write_lines(folder / "dev.jsonl", *rows[12:])
    source = f"{PREFIX}{folder}"
    assert own_splits(source) == ["dev", "train"]
    train, val = (
        {image.name for sample in load_dataset(source, split).samples for image in sample.images}
        for split in ("fit", "val")
    )
    assert train and val and not train & val
    assert (
        default_split(source, {"data": "pairs", "also": [source], "train_split": "fit", "val_split": "val"})[0] == "val"
    )
    assert without_paths({"also": [source]}) == {"also": [f"{PREFIX}{folder.name}"]}


@needs_data
def test_a_blind_rule_on_real_captions_is_near_chance():
    """The best rule without pictures: for each question, and number of pictures, the commonest answer."""
    samples = load_dataset(f"{PREFIX}{REAL_DATA / 'flickr8k'}", "val").samples
    by_question = defaultdict(Counter)
    for sample in samples:
        if sample.kind != "one":
            by_question[sample.kind, len(sample.images)][sample.answer] += 1
    for (kind, n), counts in by_question.items():
        if counts.total() > 60:
            assert max(counts.values()) / counts.total() <= (0.5 if kind == "both" else 1 / n + 0.12)
