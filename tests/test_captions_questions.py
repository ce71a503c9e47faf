"""Questions made from captions: what is asked, that it agrees with all captions, and that a blind rule cannot answer it."""

from collections import Counter, defaultdict

import pytest

from nanochat.data import load_dataset, own_splits
from nanochat.data.caption_facts import Question, mentions, read_captions
from nanochat.data.caption_questions import KINDS, MOST, SHARES, cap, questions_dataset
from nanochat.data.caption_words import PRESENCE, by_form
from nanochat.data.sample import Dataset, caption_sample
from nanochat.files import DataError
from tests.conftest import REAL_DATA, needs_data
from tests.data_files import write_lines, write_pictures


def asked(*captions: str) -> dict[str, str]:
    return {question.text: question.answer for question in read_captions(captions).questions}


# ---- one picture


def test_a_dog_and_its_ball():
    found = asked(
        "A brown dog is running in the snow with a red ball in its mouth .",
        "A dog runs through the snow carrying a ball .",
        "The brown dog is running in the snow .",
        "A brown dog with a red ball .",
        "A puppy plays in the snow .",
    )
    assert found == {
        "how many dogs are there?": "1",
        "what color is the dog?": "brown",
        "what color is the ball?": "red",
        "what animal is in the picture?": "dog",
        "where is the dog?": "in the snow",
        "what is the dog doing?": "running",
        "who is running?": "dog",
        "what is the dog carrying?": "ball",
    }


def test_what_a_person_wears_is_what_most_captions_say_of_the_only_person():
    texts = ["A woman in a bathing suit swims .", "A woman in a red swimsuit and a hat .", "A woman swims ."]
    assert asked(*texts)["what is the woman wearing?"] == "swimsuit"
    assert "what is the woman wearing?" not in asked(*texts[:1], *texts[2:])  # one caption alone
    assert not any("wearing" in text for text in asked(*texts, "A woman and a man in the water ."))


def test_persons_are_named_by_the_word_that_fits_all_captions():
    found = asked(
        "A boy in a cap rides a bike on the street .",
        "A child is riding his bicycle down the street .",
        "A young biker with a cap on the road .",
        "A boy rides his bike .",
    )
    assert found["what is the boy riding?"] == "bike" and found["what is the boy doing?"] == "riding"
    assert found["who is riding?"] == "boy" and found["where is the boy?"] == "on the street"
    assert found["what is on the boy's head?"] == "cap"
    assert found["what is the boy wearing?"] == "cap"
    assert found["how many people are there?"] == found["how many boys are there?"] == "1"
    assert not any("boy" in text for text in asked("A boy runs .", "A man is running .", "A boy runs ."))


def test_one_of_two_persons_and_a_group():
    found = asked(
        "A man holding a camera stands next to a woman .",
        "A man with a woman who is standing .",
        "A man is standing , a woman looks at him .",
        "Two people outside .",
    )
    assert found["what is the man doing?"] == "standing" and found["what is the man holding?"] == "camera"
    assert found["how many people are there?"] == "2" and "who is standing?" not in found
    found = asked("Three girls jump on a trampoline .", "Three girls jumping .", "Children jump on a trampoline .")
    assert found["what are the girls doing?"] == "jumping" and found["who is jumping?"] == "girls"
    assert found["how many girls are there?"] == "3" and found["where are the girls?"] == "on a trampoline"


@pytest.mark.parametrize(
    ("captions", "text"),
    [
        (("A red ball .", "A blue ball .", "A ball ."), "what color is the ball?"),
        (("A red and white striped ball .", "A red ball ."), "what color is the ball?"),
        (("A red ball .", "Two red balls ."), "what color is the ball?"),
        (("Two dogs run .", "Three dogs run .", "Two dogs ."), "how many dogs are there?"),
        (("A man in a crowd .", "A man .", "A man ."), "how many people are there?"),
        (("A dog runs .", "A dog is jumping .", "A dog runs and jumps .", "A dog jumps ."), "what is the dog doing?"),
        (("A dog carrying a ball .", "A dog with a stick in its mouth .", "A dog ."), "what is the dog carrying?"),
        (("A dog in the snow .", "A dog on the beach .", "A dog ."), "where is the dog?"),
        (("A boy jumps into a pool .", "A boy is jumping into a pool .", "A boy ."), "where is the boy?"),
        (("A man looks at the water .", "A man stares at the water .", "A man ."), "where is the man?"),
        (("A man at the swimming pool .", "A man by the swimming pool .", "A man ."), "what is the man doing?"),
        (("A black man runs .", "A black man is running .", "A black man runs ."), "what color is the man?"),
        (("A dog chases another dog .", "A dog chases a dog .", "A dog runs ."), "what is the dog doing?"),
        (("A man in a blue shirt and a woman .",) * 3, "what color is the shirt?"),  # whose?
        (("A man locks his bicycle .",) * 3, "what sport is this?"),
    ],
)
def test_what_captions_contradict_or_leave_open_is_not_asked(captions, text):
    assert text not in asked(*captions)


def test_words_before_a_noun_are_no_subjects():
    assert [(m.name, m.number) for m in mentions("a dog toy and two young boys near a soccer player".split())] == [
        ("boy", 2),
        ("person", 1),
    ]
    assert [m.number for m in mentions("a couple of dogs".split())] == [2]


def test_what_is_there_and_what_is_not():
    facts = read_captions(["A woman sits at a desk .", "A woman is sitting indoors .", "A woman at work ."])
    assert "a woman" in facts.present and {"a man", "a dog", "snow"} <= facts.absent
    facts = read_captions(["A person sits at a desk ."] * 3)
    assert not {"a man", "a woman", "a child"} & (facts.absent | facts.present)  # it may be any of them
    facts = read_captions(["A man is surfing .", "A man on a board .", "A surfer ."])
    assert not {"water", "a wave", "a beach"} & facts.absent  # not mentioned, but likely to be seen
    assert all(own.isdisjoint(related) for own, related in PRESENCE.values())


def test_word_lists_over_several_lines():
    assert by_form("""
        in the
        grass: grass lawn / dog: puppy
        pup / cat
    """) == {"grass": "in the grass", "lawn": "in the grass", "puppy": "dog", "pup": "dog", "dog": "dog", "cat": "cat"}


# ---- a whole data set

ANSWERS = ("red", "blue", "green", "white", "black", "yellow")


def captions(n: int, color=lambda i: ANSWERS[i % 6]) -> Dataset:
    who = ("man", "woman", "boy", "girl")
    texts = [
        [f"A {who[i % 4]} in a {color(i)} shirt .", f"The {who[i % 4]} is sitting .", f"A {who[i % 4]} sits ."]
        for i in range(n)
    ]
    return Dataset("toy", "caption", [caption_sample(f"{i}.png", own) for i, own in enumerate(texts)])


def test_samples_have_kinds_and_there_are_not_too_many_of_one_picture():
    data = questions_dataset(captions(120))
    assert data.task == "vqa" and {sample.kind for sample in data.samples} == {"color", "yes/no"}
    assert max(Counter(sample.images[0] for sample in data.samples).values()) <= MOST
    assert len({(sample.images, sample.question) for sample in data.samples}) == len(data.samples)
    assert data.notes[-1].startswith(f"{len(data.samples)} questions from captions: 0 object")
    assert questions_dataset(captions(120)).samples == data.samples


def test_a_common_answer_is_cut_and_a_question_with_few_answers_is_not_asked():
    data = questions_dataset(captions(900, lambda i: ANSWERS[i // 10 % 6] if i % 10 == 0 else "red"))
    counts = Counter(sample.answer for sample in data.samples if sample.kind == "color")
    assert counts["red"] == max(counts.values()) <= SHARES["color"] * counts.total() + 1e-9
    data = questions_dataset(captions(120, lambda i: ANSWERS[i % 4]))
    assert {sample.kind for sample in data.samples} == {"yes/no"}


@pytest.mark.parametrize("counts", [(900, 20, 20, 20, 20, 1), (5, 5, 5, 5, 5), (3, 2), (1,), (50, 40, 30, 20, 10)])
def test_cap_is_the_largest_that_keeps_the_share(counts):
    def fits(m):
        return m <= 0.2 * sum(min(m, count) for count in counts)

    m = cap(counts, 0.2)
    assert (m == 0 or fits(m)) and not any(fits(more) for more in range(m + 1, max(counts) + 1))


def test_yes_is_as_frequent_as_no_for_each_word():
    by_text = defaultdict(Counter)
    for sample in questions_dataset(captions(300)).samples:
        if sample.kind == "yes/no":
            by_text[sample.question][sample.answer] += 1
    assert set(by_text) == {f"is there {noun}?" for noun in ("a man", "a woman", "a boy", "a girl", "a child")}
    assert all(counts["yes"] == counts["no"] > 0 for counts in by_text.values())


def test_the_data_name_its_splits_and_errors(tmp_path):
    folder = write_pictures(tmp_path)
    for name, start in (("train", 0), ("dev", 12)):
        rows = [
            {"image": f"images/{i}.png", "captions": list(captions(20).samples[i].references)}
            for i in range(start, 12 if name == "train" else 20)
        ]
        write_lines(folder / f"{name}.jsonl", *rows)
    source = f"captions-questions:{folder}"
    assert own_splits(source) == own_splits(folder) == ["dev", "train"]
    train, val = ({sample.images[0].name for sample in load_dataset(source, split).samples} for split in ("fit", "val"))
    assert train and val and not train & val
    assert load_dataset(source, "val").samples[0].where.startswith(str(folder / "dev.jsonl"))
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_dataset("captions-questions:nowhere")


@pytest.mark.parametrize(
    ("prefix", "texts", "reason"),
    [
        ("captions-questions", ["Ein Hund ."],
         "from captions: those of its 1 pictures give none; needed are several English captions"),
        ("captions-several", ["A dog runs .", "A dog is running .", "The dog runs ."],
         "about several pictures: those of its 1 pictures give none; needed are at least two pictures"),
    ],
)  # fmt: skip
def test_data_that_answer_no_question_are_refused(tmp_path, prefix, texts, reason):
    folder = write_pictures(tmp_path)
    write_lines(folder / "dev.jsonl", {"image": "images/0.png", "captions": texts})
    with pytest.raises(DataError, match=f"no questions {reason}"):
        load_dataset(f"{prefix}:{folder}", "val")
    write_lines(folder / "dev.jsonl", {"image": "images/0.png", "question": "q", "answer": "a"})
    with pytest.raises(DataError, match=f"{prefix}: needs captions, but these are questions"):
        load_dataset(f"{prefix}:{folder}", "val")


@needs_data
def test_a_blind_rule_on_real_captions_is_near_chance():
    """The best rule without pictures: for each question the commonest answer, here even fitted on the questions themselves."""
    samples = load_dataset(f"captions-questions:{REAL_DATA / 'flickr8k'}", "val").samples
    by_question = defaultdict(Counter)
    for sample in samples:
        by_question[sample.kind, sample.question][sample.answer] += 1
    for kind in KINDS:
        counts = [count for (own, _), count in by_question.items() if own == kind]
        share = sum(max(count.values()) for count in counts) / sum(count.total() for count in counts)
        assert share <= SHARES.get(kind, 0.5) + 1e-9 and sum(count.total() for count in counts) > 100
    given_away = [s for s in samples if s.kind != "yes/no" and s.answer in s.question.rstrip("?").split()]
    assert not given_away
    assert max(len(sample.answer.split()) for sample in samples) <= 3
    assert Question("yes/no", "is there a dog?", "yes") in {Question(s.kind, s.question, s.answer) for s in samples}
