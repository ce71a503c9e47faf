"""Auxiliary heads: one linear layer from vision vectors to a target with a loss of its own. Used in training only, and no part
of the model.

An encoder that starts from random weights does not learn through the decoder: the decoder's gradient is mostly noise until
it can read, and it cannot learn to read before the vision vectors mean something. The linear layer gives the encoder a
clean gradient from the first step.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.actions import Scale

COMMON = 0.5  # tokens in the answers about more than this share of the pictures ("yes", "a", ".") say little about one


class AuxiliaryHead(nn.Module):
    """linear: (width of the input) -> (numbers of the target)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def loss(self, vectors: torch.Tensor, items: Sequence[int]) -> torch.Tensor:
        """Sum of the losses of the pictures. vectors: (U, N, D); items: (U,) which picture (or frame) each of them is."""
        raise NotImplementedError


class AnswerTokensHead(AuxiliaryHead):
    """From the mean vision vector of a picture to the tokens of the answers about it: cross-entropy with a uniform distribution
    over them (a bag of words, as Joulin et al. 2016, arXiv 1511.02251, pretrain on captions)."""

    def __init__(self, vision_dim: int, vocab_size: int, tokens: Sequence[list[int]]):
        """tokens: of each picture, see `answer_tokens`."""
        super().__init__(vision_dim, vocab_size)
        self.tokens = tokens

    def loss(self, vectors: torch.Tensor, items: Sequence[int]) -> torch.Tensor:
        target = torch.zeros(len(items), self.linear.out_features, device=vectors.device)
        for line, item in enumerate(items):
            if self.tokens[item]:
                target[line, self.tokens[item]] = 1 / len(self.tokens[item])
        return -(self.linear(vectors.mean(1)).log_softmax(-1) * target).sum()


class PositionsHead(AuxiliaryHead):
    """From all vision vectors of a picture to positions of objects: L1 distance, averaged over the numbers of a picture. Each
    camera has rows of its own in the layer, and targets of its own."""

    def __init__(self, n_in: int, positions: Sequence[np.ndarray]):
        """n_in: N * D. positions: for each camera (n_frames, P), in metres."""
        super().__init__(n_in, sum(own.shape[1] for own in positions))
        self.targets = [Scale.fit(own).normalize(own) for own in positions]  # (n_frames, P) float32 each

    def loss(self, vectors: torch.Tensor, items: Sequence[int], camera: int = 0) -> torch.Tensor:
        """vectors: (U, N, D) of one camera's pictures."""
        targets = torch.from_numpy(self.targets[camera][items]).to(vectors.device)
        rows = [own.shape[1] for own in self.targets]
        weight, bias = self.linear.weight.split(rows)[camera], self.linear.bias.split(rows)[camera]
        return (F.linear(vectors.flatten(1), weight, bias) - targets).abs().mean(-1).sum()


class Components(nn.Module):
    """Principal components of a teacher's vectors: mean (C,), basis (C, K), variance () in them together. In resume.safetensors,
    since the same sums on another machine can give others, above all with other signs."""

    def __init__(self, mean: torch.Tensor, basis: torch.Tensor, variance: torch.Tensor):
        super().__init__()
        for name, value in (("mean", mean), ("basis", basis), ("variance", variance)):
            self.register_buffer(name, value)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., K)."""
        return (vectors - self.mean) @ self.basis


class TeacherHead(nn.Module):
    """How far the vectors of a student are from those of its teacher, cell by cell. See distill.py."""

    def __init__(self, components: Components):
        super().__init__()
        self.components = components

    def loss(self, vectors: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Sum over pictures, each the mean over its cells. vectors: (U, N, D) the student's; cells: (U, N, C) the teacher's."""
        raise NotImplementedError


class DirectionHead(TeacherHead):
    """A linear layer from the student's vector of a cell to the direction of the teacher's: 1 - cosine."""

    def __init__(self, n_in: int, components: Components):
        super().__init__(components)
        self.linear = nn.Linear(n_in, components.basis.size(1))

    def loss(self, vectors: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        return (1 - F.cosine_similarity(self.linear(vectors), self.components(cells), dim=-1)).mean(1).sum()


class EqualHead(TeacherHead):
    """The student's vectors shall be the teacher's, up to what lies outside of the principal components: squared error in units
    of the teacher's variance. Nothing in it learns."""

    def loss(self, vectors: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        error = (vectors - cells) @ self.components.basis
        return error.square().sum(-1).mean(1).sum() / self.components.variance


def answer_tokens(rows) -> list[list[int]]:
    """For each picture of `batches.Rows`, the tokens in all answers about it that are not common to most pictures."""
    tokens = [set() for _ in rows.images]
    for group in rows.groups:
        for row in group:
            learnt = {token for token, mask in zip(row.ids, row.mask, strict=True) if mask}
            for number in row.images:
                tokens[number] |= learnt
    counts: dict[int, int] = {}
    for found in tokens:
        for token in found:
            counts[token] = counts.get(token, 0) + 1
    specific = {token for token, count in counts.items() if count <= COMMON * len(tokens)}
    return [sorted(found & specific) for found in tokens]
