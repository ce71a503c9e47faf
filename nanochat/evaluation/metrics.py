"""Scores of answers and captions, with 95 % intervals. This module does not import torch.

`accuracy` and `bootstrap` resample images, not questions: answers about one image are right or wrong together, so a
resample draws images with replacement, each with all its questions (cluster bootstrap; Efron & Tibshirani 1993). The
bounds are percentiles. The interval has no width if there is only one image or if every answer is right; this is a limit
of the method and does not mean that the score is certain. `wilson` gives the interval of a plain success rate.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.errors import UserError, install

RESAMPLES = 2000
MAX_N = 4  # BLEU-4
TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against 0/0


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


# ---- answers ----


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, no punctuation at the end: "  Two  Chairs. " -> "two chairs"."""
    return " ".join(text.lower().split()).rstrip(".,;:!? ")


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the normalised prediction equals one of the normalised references."""
    return normalize_answer(prediction) in {normalize_answer(reference) for reference in references}


# ---- intervals ----


def accuracy(correct: Sequence[bool] | np.ndarray, images: Sequence[Hashable], seed: int = 0) -> Estimate:
    """The mean of `correct` and its bootstrap interval over images. Any values do: 0/1, CIDEr, differences of two models.

    correct: (n,); images: (n,) the image of each, such as `data.image_key`.

    Raises:
        ValueError: see `bootstrap`.
    """
    correct = np.asarray(correct, dtype=np.float64)
    statistics = np.stack([correct, np.ones_like(correct)], axis=1)  # (n, 2): sum and count
    return bootstrap(statistics, images, lambda sums: sums[..., :1] / sums[..., 1:], seed)[0]


def bootstrap(
    statistics: np.ndarray,
    images: Sequence[Hashable],
    score: Callable[[np.ndarray], np.ndarray],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Estimate]:
    """m scores, each a function of summed statistics, with 95 % percentile intervals over resampled images.

    statistics: (n, k), one row for each question or caption; score: (..., k) sums -> (..., m).

    Raises:
        ValueError: there are no rows, or the number of images is not the number of rows.
    """
    if len(statistics) == 0:
        raise UserError("there is nothing to score: no predictions")
    if len(statistics) != len(images):
        raise UserError(f"found {len(statistics)} scored rows but {len(images)} image keys; each row needs one key")
    numbers: dict[Hashable, int] = {}
    cluster = np.array([numbers.setdefault(image, len(numbers)) for image in images])
    n = len(numbers)
    sums = np.zeros((n, statistics.shape[1]))
    np.add.at(sums, cluster, statistics)

    rng = np.random.default_rng(seed)
    resampled = np.empty((resamples, sums.shape[1]))
    step = max(1, 1_000_000 // n)  # bounds the memory: 8 MB of counts at a time
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)  # how often each image was drawn
        resampled[start : start + rows] = counts @ sums
    low, high = np.percentile(score(resampled), [2.5, 97.5], axis=0)
    return [Estimate(*map(float, row)) for row in zip(score(sums.sum(axis=0)), low, high, strict=True)]


def wilson(successes: int, n: int) -> list[float]:
    """[low, high], the 95 % interval of the rate successes / n (Wilson 1927). It is valid for small n and for rates 0 and 1."""
    z, rate = 1.96, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return [max(0.0, centre - half), min(1.0, centre + half)]


# ---- captions ----


def caption_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation, "A dog's toy." -> a, dog, s, toy.

    Most published numbers use the PTBTokenizer, which needs Java. The difference is small for plain captions: the
    PTBTokenizer keeps hyphens and the apostrophe of "'s".
    """
    return re.findall(r"[^\W_]+", text.lower())


def longest(captions: Sequence[str]) -> int:
    """The number of words of the longest caption."""
    return max(len(caption_tokens(caption)) for caption in captions)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus, 0..1 (Papineni et al. 2002), by pycocoevalcap.

    Raises:
        ImportError: pycocoevalcap is not installed.
        ValueError: there are no predictions, or a caption has no references.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
    except ImportError as error:
        raise _eval_missing() from error
    scores, _ = Bleu(MAX_N).compute_score(*_coco_form(predictions, references), verbose=0)
    return [float(score) for score in scores]


def bleu_interval(
    predictions: Sequence[str], references: Sequence[Sequence[str]], images: Sequence[Hashable], seed: int = 0
) -> list[Estimate]:
    """BLEU-1 to BLEU-4, 0..1, with intervals over images. Each resample has its own corpus BLEU, from its summed counts."""
    statistics = np.array([bleu_statistics(p, r) for p, r in zip(predictions, references, strict=True)])
    return bootstrap(statistics, images, bleu_score, seed)


def bleu_statistics(prediction: str, references: Sequence[str]) -> list[int]:
    """The counts that corpus BLEU sums over captions: 4 clipped n-gram matches, 4 n-gram counts, the length, and the
    length of the closest reference. Raises ValueError if there are no references."""
    words, reference_words = caption_tokens(prediction), [caption_tokens(reference) for reference in references]
    if not reference_words:
        raise UserError(f"the caption {prediction!r} has no references to compare with")
    matches, counts = [], []
    for n in range(1, MAX_N + 1):
        allowed: Counter = Counter()
        for reference in reference_words:
            allowed |= _ngrams(reference, n)  # the largest count in any one reference
        own = _ngrams(words, n)
        matches.append((own & allowed).total())
        counts.append(own.total())
    closest = min((abs(len(reference) - len(words)), len(reference)) for reference in reference_words)[1]
    return [*matches, *counts, len(words), closest]


def bleu_score(sums: np.ndarray) -> np.ndarray:
    """(..., 10) summed `bleu_statistics` -> (..., 4) BLEU-1 to BLEU-4."""
    matches, counts = sums[..., :MAX_N], sums[..., MAX_N : 2 * MAX_N]
    length, reference_length = sums[..., -2:-1], sums[..., -1:]
    precision = (matches + TINY) / (counts + SMALL)
    ratio = (length + TINY) / (reference_length + SMALL)
    means = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    return means * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each caption, (n,) in 0..10 (Vedantam et al. 2015), by pycocoevalcap; the mean is the corpus value.

    Rare words weigh more, and rarity is counted over the given references. So values of different subsets cannot be
    compared, and with one image all values are 0.

    Raises:
        ImportError: pycocoevalcap is not installed.
        ValueError: there are no predictions, or a caption has no references.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise _eval_missing() from error
    truths, results = _coco_form(predictions, references)
    if not any(any(captions) for captions in truths.values()):
        raise UserError("there is not one word in the references")
    return Cider().compute_score(truths, results)[1]


def _coco_form(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    """(references, predictions) as pycocoevalcap expects them: number -> list of texts, which it splits at spaces."""
    if not predictions:
        raise UserError("there is nothing to score: no predictions")
    if len(predictions) != len(references):
        raise UserError(f"found {len(predictions)} predictions but {len(references)} lists of references")
    for prediction, captions in zip(predictions, references, strict=True):
        if not captions or isinstance(captions, str):
            raise UserError(f"the caption {prediction!r} needs a list of references, found {captions!r}")
    truths = {i: [" ".join(caption_tokens(text)) for text in captions] for i, captions in enumerate(references)}
    return truths, {i: [" ".join(caption_tokens(text))] for i, text in enumerate(predictions)}


def _ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _eval_missing() -> ImportError:
    return ImportError(f"caption scores need pycocoevalcap: {install('eval')}")
