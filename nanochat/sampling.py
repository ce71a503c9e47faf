"""From logits to the next token id, in plain numpy, so that every runtime chooses tokens with the same code."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Filters apply in the order of the fields.

    repetition_penalty: divide (or multiply, if negative) the logits of tokens already in the answer (CTRL, arXiv 1909.05858).
    temperature: 0 is greedy; else logits are divided by it.
    top_k: keep the k likeliest. top_p: keep the smallest set whose probability reaches p (nucleus, arXiv 1904.09751).
    min_p: keep tokens at least min_p times as likely as the likeliest (arXiv 2407.01082).
    allowed_ids: only these may be chosen (the bins of an action, for example). seed: same seed, same tokens.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    allowed_ids: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature}")
        if not (np.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty must be > 0 (1 is none), got {self.repetition_penalty}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} must lie in (0, 1], got {value}")
        if self.allowed_ids is not None and not self.allowed_ids:
            raise UserError("allowed_ids is empty: there is no token left to choose")

    def generator(self, row: int) -> np.random.Generator:
        """A stream of its own for each row, so that a row's tokens do not depend on its neighbours."""
        return np.random.default_rng([self.seed, row])


def choose(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator, history: Sequence[int] = ()) -> int:
    """logits (vocab_size,) float32 of one row -> a token id."""
    if not np.isfinite(logits).all():
        raise UserError("the model returned NaN or infinite logits: its weights or its input are broken")
    if sampling.allowed_ids is not None:
        masked = np.full_like(logits, -np.inf)
        allowed = list(sampling.allowed_ids)
        masked[allowed] = logits[allowed]
        logits = masked
    if sampling.repetition_penalty != 1.0 and len(history):
        logits = penalise(logits, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = softmax(logits.astype(np.float64) / sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < p.size:
        p = keep(p, np.argsort(-p, kind="stable")[: sampling.top_k])
    if sampling.top_p is not None:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]  # mass of the likelier tokens: the one that crosses top_p stays
        p = keep(p, order[before < sampling.top_p])
    if sampling.min_p is not None:
        p = keep(p, np.flatnonzero(p >= sampling.min_p * p.max()))
    return int(rng.choice(p.size, p=p))


def penalise(logits: np.ndarray, history: Sequence[int], penalty: float) -> np.ndarray:
    seen = np.unique(np.asarray(history))
    logits = logits.copy()
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def keep(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities (V,) with all but `ids` set to 0, summing to 1 again."""
    kept = np.zeros_like(p)
    kept[ids] = p[ids]
    return kept / kept.sum()
