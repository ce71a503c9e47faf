"""Scores against hand-worked examples, pycocoevalcap and known distributions."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.evaluation import metrics
from nanochat.evaluation.metrics import (
    accuracy,
    bleu,
    bleu_interval,
    bleu_score,
    bleu_statistics,
    bootstrap,
    caption_tokens,
    cider,
    exact_match,
    normalize_answer,
    wilson,
)

captions = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "on", "grass", "."]), max_size=8).map(" ".join)


# ---- answers ----


@pytest.mark.parametrize(
    "text,expected",
    [
        ("  Two   Chairs. ", "two chairs"),
        ("YES", "yes"),
        ("yes ?!", "yes"),
        ("book , scissor", "book , scissor"),
        ("3.5", "3.5"),
        ("...", ""),
        ("", ""),
        ("a\tb\nc", "a b c"),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


@given(st.text())
def test_normalize_answer_is_settled_after_once(text):
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_exact_match():
    assert exact_match("Red.", ["blue", "red"])
    assert not exact_match("dark red", ["red"])
    assert not exact_match("", ["red"])
    assert not exact_match("red", [])


# ---- intervals ----


def test_accuracy_of_independent_answers_has_the_binomial_interval():
    n, p = 400, 0.7
    correct = np.arange(n) < n * p
    estimate = accuracy(correct, range(n))
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert estimate.value == pytest.approx(p)
    assert estimate.low == pytest.approx(p - half, abs=0.006) and estimate.high == pytest.approx(p + half, abs=0.006)


def test_answers_that_hang_together_widen_the_interval():
    """16 equal answers an image are worth one: the interval is that of the images, four times as wide."""
    one = np.random.default_rng(0).random(100) < 0.6
    images = accuracy(one, range(100))
    answers = accuracy(np.repeat(one, 16), np.repeat(np.arange(100), 16))
    assert answers.value == pytest.approx(images.value)
    assert (answers.low, answers.high) == pytest.approx((images.low, images.high))
    naive = accuracy(np.repeat(one, 16), range(1600))
    assert (answers.high - answers.low) / (naive.high - naive.low) == pytest.approx(4, rel=0.1)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):  # 60 images of 1 to 5 questions, whose difficulty is the image's own
        difficulty = np.repeat(rng.beta(3, 2, 60), rng.integers(1, 6, 60))
        images = np.cumsum(np.r_[0, np.diff(difficulty) != 0])
        estimate = accuracy(rng.random(len(difficulty)) < difficulty, images, seed=trial)
        covered += estimate.low <= 0.6 <= estimate.high  # the mean of Beta(3, 2)
    assert 0.89 <= covered / 200 <= 0.99


def test_interval_is_seeded_and_independent_of_the_batches():
    """Resamples of so many images do not fit one batch; drawn plainly, all at once, they give the same interval."""
    n = 1200
    scores, images = np.random.default_rng(2).random(n), [f"{i}.png" for i in range(n)]
    found = accuracy(scores, images, seed=5)
    assert found == accuracy(scores, images, seed=5) != accuracy(scores, images, seed=6)
    drawn = np.random.default_rng(5).integers(n, size=(metrics.RESAMPLES, n))
    assert drawn.size > 1_000_000  # of one batch
    assert [found.low, found.high] == pytest.approx(np.percentile(scores[drawn].mean(1), [2.5, 97.5]))


def test_bootstrap_keeps_an_images_rows_together():
    """Two rows of one image that cancel out cancel out in every resample."""
    statistics = np.array([[1.0], [-1.0], [5.0], [-5.0]])
    (estimate,) = bootstrap(statistics, ["a", "a", "b", "b"], lambda sums: sums)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_bootstrap_refuses_nothing_and_mismatches():
    with pytest.raises(ValueError, match="nothing to score"):
        accuracy([], [])
    with pytest.raises(ValueError, match="2 scored rows but 1 image keys"):
        accuracy([True, False], ["a"])


def test_wilson():
    assert wilson(80, 100) == pytest.approx(
        [0.711, 0.867], abs=2e-3
    )  # Newcombe 1998's form, by an independent calculator
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1 and wilson(10, 10)[0] > 0.6


# ---- captions ----


def test_caption_tokens():
    assert caption_tokens("A dog's well-lit TOY , snake_case .") == [
        "a",
        "dog",
        "s",
        "well",
        "lit",
        "toy",
        "snake",
        "case",
    ]
    assert caption_tokens(" . ") == []
    assert caption_tokens("Ein grüner Käfer 3") == ["ein", "grüner", "käfer", "3"]


def test_bleu_by_hand():
    """Papineni's own example: "the" occurs at most twice in one reference, so 2 of 7 unigrams count."""
    references = ["The cat is on the mat.", "There is a cat on the mat."]
    assert bleu_statistics("the the the the the the the", references) == [2, 0, 0, 0, 7, 6, 5, 4, 7, 7]
    assert bleu(["the the the the the the the"], [references])[0] == pytest.approx(2 / 7)
    # a b c d e against a b c d x y: 4/5, 3/4, 2/3, 1/2 of the n-grams; one word short: exp(1 - 6/5)
    brevity = math.exp(1 - 6 / 5)
    expected = [math.prod([4 / 5, 3 / 4, 2 / 3, 1 / 2][:n]) ** (1 / n) * brevity for n in range(1, 5)]
    assert bleu(["a b c d e"], [["a b c d x y"]]) == pytest.approx(expected)
    assert bleu_score(np.array(bleu_statistics("a b c d e", ["a b c d x y"]))) == pytest.approx(expected)


def test_the_closest_reference_gives_the_length_the_shorter_one_in_a_tie():
    assert bleu_statistics("a b c d", ["a b c d e f", "a b", "a b c d e f g"])[-2:] == [4, 2]


@settings(deadline=None)
@given(st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_own_bleu_is_pycocoevalcaps(pairs):
    pytest.importorskip("pycocoevalcap")
    predictions, references = zip(*pairs, strict=True)
    sums = np.sum([bleu_statistics(p, r) for p, r in pairs], axis=0)
    assert bleu_score(sums) == pytest.approx(bleu(predictions, references))


def test_bleu_interval_is_around_the_corpus_value():
    rng = np.random.default_rng(0)
    words = ["a", "dog", "cat", "runs", "on", "grass", "and", "sand"]
    references = [[" ".join(rng.choice(words, 8)) for _ in range(3)] for _ in range(100)]
    predictions = [r[0] if i % 2 else " ".join(rng.choice(words, 8)) for i, r in enumerate(references)]
    estimates = bleu_interval(predictions, references, range(100))
    assert [estimate.value for estimate in estimates] == pytest.approx(bleu(predictions, references), abs=1e-6)
    for estimate in estimates:
        assert estimate.low < estimate.value < estimate.high and 0.02 < estimate.high - estimate.low < 0.4


def test_cider_of_equal_and_of_unrelated_captions():
    references = [
        ["a dog runs on green grass", "the brown dog is running outside"],
        ["two children play in blue water", "kids splash at a beach"],
        ["an old man reads his newspaper", "someone sits with a paper"],
    ]
    same = cider([r[0] for r in references], references)
    assert same.shape == (3,) and (same > 4).all()  # 10 for the equal one of two references, about 0 for the other
    assert cider([r[0] for r in references], [r[:1] for r in references]) == pytest.approx([10, 10, 10])
    assert cider(["purple elephants fly"] * 3, references) == pytest.approx([0, 0, 0])
    shuffled = cider([r[0] for r in references[1:] + references[:1]], references)
    assert (shuffled < 0.5).all()
    assert accuracy(same, range(3)).value == pytest.approx(same.mean())


def test_scorers_print_nothing(capsys):
    bleu(["a dog"], [["a dog"]])
    cider(["a dog", "a cat"], [["a dog"], ["a cat"]])
    assert capsys.readouterr() == ("", "")


def test_punctuation_and_case_do_not_count():
    assert bleu(["A dog runs, fast."], [["a dog runs fast"]]) == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("score", [bleu, cider])
def test_captions_that_cannot_be_scored(score):
    for predictions, references, message in (
        ([], [], "nothing to score"),
        (["a"], [["a"], ["b"]], "1 predictions but 2 lists"),
        (["a"], [[]], "needs a list of references"),
        (["a"], ["a"], "needs a list of references"),
    ):
        with pytest.raises(ValueError, match=message):
            score(predictions, references)
    with pytest.raises(ValueError, match="not one word"):
        cider(["a"], [["."]])
    with pytest.raises(ValueError, match="no references"):
        bleu_statistics("a", [])


def test_pycocoevalcap_not_installed(monkeypatch):
    for name in ("pycocoevalcap.bleu.bleu", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    for score in (metrics.bleu, metrics.cider):
        with pytest.raises(ImportError, match=r'pip install "\.\[eval\]"'):
            score(["a"], [["a"]])
