"""A second, short way from the words to the encoder: guess which words the answers about a picture use from the average of
its vision vectors alone, by one linear layer (bag of words, as Joulin et al. 2016, arXiv 1511.02251, pretrain on captions).

An encoder that starts from random weights does not learn through the decoder: what comes back through it is mostly noise
until the decoder can read, and the decoder cannot read before there is something to see. The linear layer gives the
encoder a clean gradient from the first step. It is used in training only and is no part of the model.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn

COMMON = 0.5  # words in the answers about more than this share of the pictures ("yes", "a", ".") say little about one


def answer_words(rows) -> list[list[int]]:
    """For each picture of `Rows`, the ids of the telling words in all answers about it."""
    words = [set() for _ in rows.images]
    for group in rows.groups:
        for row in group:
            learnt = {token for token, mask in zip(row.ids, row.mask, strict=True) if mask}
            for number in row.images:
                words[number] |= learnt
    counts: dict[int, int] = {}
    for found in words:
        for token in found:
            counts[token] = counts.get(token, 0) + 1
    telling = {token for token, count in counts.items() if count <= COMMON * len(words)}
    return [sorted(found & telling) for found in words]


class WordHead(nn.Module):
    """Linear(D, vocab_size) on the mean vision vector of a picture."""

    def __init__(self, vision_dim: int, vocab_size: int, words: Sequence[list[int]]):
        super().__init__()
        self.linear = nn.Linear(vision_dim, vocab_size)
        self.words = words  # of each picture

    def loss(self, vectors: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """Sum over the pictures of the cross-entropy with their words, all alike likely. vectors: (U, N, D)."""
        target = torch.zeros(len(numbers), self.linear.out_features, device=vectors.device)
        for line, number in enumerate(numbers):
            if self.words[number]:
                target[line, self.words[number]] = 1 / len(self.words[number])
        return -(self.linear(vectors.mean(1)).log_softmax(-1) * target).sum()
