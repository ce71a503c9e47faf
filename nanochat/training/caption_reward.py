"""The reward of a caption: smoothed BLEU-4, and CIDEr-D with the statistics of the training captions.

BLEU counts every phrase alike, so "a man in a" is worth as much as "riding a horse"; CIDEr weighs phrases by how few pictures
they are said of. Together they reward sentences that are well formed and about this picture.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nanochat.evaluation.metrics import MAX_N, bleu_statistics, caption_tokens

SIGMA = 6.0  # of CIDEr-D's penalty for another length, in words
CIDER_SHARE = 0.5  # of CIDEr (about 0.5 for a good model) beside BLEU (about 0.3)


class CaptionReward:
    """Call it with a caption and its references."""

    def __init__(self, references: Sequence[Sequence[str]]):
        """references: the captions of each training picture."""
        self.cider = Cider(references)

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        return sentence_bleu(prediction, references) + CIDER_SHARE * self.cider(prediction, references)


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """BLEU-4 of one caption, 0..1, as a reward.

    One match is added to each n-gram count from n = 2 on (Lin & Och 2004): without it a caption without four matching words in
    a row scores zero. That favours short captions (Nakov et al. 2012), and so does corpus BLEU, which compares with the
    closest reference length. The length to reach is therefore the mean of the references.
    """
    *counted, length, _ = bleu_statistics(prediction, references)
    if length == 0 or counted[0] == 0:
        return 0.0
    matches, counts = np.array(counted[:MAX_N], float), np.array(counted[MAX_N:], float)
    matches[1:] += 1
    counts[1:] += 1
    expected = np.mean([len(caption_tokens(reference)) for reference in references])
    return float(min(1.0, np.exp(1 - expected / length)) * np.exp(np.log(matches / counts).mean()))


class Cider:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) of one caption, 0..10, given how many training pictures each n-gram is said
    of. The library for scores, pycocoevalcap, counts that on the captions that it scores, so it cannot reward."""

    def __init__(self, references: Sequence[Sequence[str]]):
        self.log_pictures = np.log(max(1, len(references)))
        self.pictures_with: Counter = Counter()
        for captions in references:
            self.pictures_with.update({gram for caption in captions for gram in ngrams(caption)})

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        said = self.vectors(prediction)
        return 10 * float(np.mean([self.similarity(said, self.vectors(reference)) for reference in references]))

    def vectors(self, caption: str) -> tuple[list[dict], int]:
        """({n-gram: weight} for n = 1..4, number of words): counts, weighted by rarity."""
        weights: list[dict] = [{} for _ in range(MAX_N)]
        for gram, count in ngrams(caption).items():
            weights[len(gram) - 1][gram] = count * (self.log_pictures - np.log(max(1, self.pictures_with[gram])))
        return weights, len(caption_tokens(caption))

    def similarity(self, said: tuple[list[dict], int], reference: tuple[list[dict], int]) -> float:
        """The mean of the cosines for n = 1..4. A phrase that is repeated counts as often as the reference has it."""
        (mine, n_mine), (theirs, n_theirs) = said, reference
        cosines = [
            sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b)
            / (length(a) * length(b) or 1.0)
            for a, b in zip(mine, theirs, strict=True)
        ]
        return float(np.mean(cosines) * np.exp(-((n_mine - n_theirs) ** 2) / (2 * SIGMA**2)))


def ngrams(caption: str) -> Counter:
    words = caption_tokens(caption)
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def length(weights: dict) -> float:
    return sum(weight**2 for weight in weights.values()) ** 0.5
