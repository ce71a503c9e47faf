"""Beam search: the likeliest answer that is found by following several at once, where greedy follows one.

Each step keeps the `beams` likeliest unfinished answers. One that stops is finished if its stop token is among the `beams`
likeliest continuations; the search ends with `beams` finished answers, or at the maximum length. The best one has the highest
mean log probability of its tokens, the stop token included: log probabilities only add up, so without the mean short answers
would win (Wu et al. 2016, arXiv 1609.08144, section 7: division by |Y|^alpha, here with alpha = 1). This is what transformers
does with early_stopping=True, and one beam is greedy decoding.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from nanochat.engine import Engine, Model, Unread
from nanochat.errors import UserError

MAX_BEAMS = 64  # each has a cache of its own


def check_beams(beams: int) -> None:
    """Raises UserError for a number of beams outside of 1..MAX_BEAMS."""
    if not 1 <= beams <= MAX_BEAMS:
        raise UserError(f"the number of beams must be in 1..{MAX_BEAMS} (1 is greedy), got {beams}")


def beam_search(
    model: Model, prompt: Sequence[int], max_new_tokens: int, *, images=None, states=None, **options
) -> list[int]:
    """The best answer to one prompt, see `beam_search_all`. images, states: as `Engine.add` takes them."""
    return beam_search_all(model, [prompt], max_new_tokens, images=[images], states=[states], **options)[0]


def beam_search_all(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    beams: int = 3,
    stop_ids: Iterable[int] = (),
    images: Sequence | None = None,
    states: Sequence | None = None,
) -> list[list[int]]:
    """The best answer to each prompt, as token ids without the stop token. All prompts are searched at once.

    model: any that `Engine` runs. prompts, max_new_tokens, images, states: as `Engine.generate` takes them. Raises ValueError as
    `Engine.add` does, and for a number of beams outside of 1..MAX_BEAMS.
    """
    check_beams(beams)
    if not prompts:
        raise UserError("beam search needs at least one prompt, got an empty list of prompts")
    engine, nothing = Engine(model), [None] * len(prompts)
    rows = [
        engine.add(prompt, max_new_tokens, images=image, states=state)  # checks everything
        for prompt, image, state in zip(prompts, images or nothing, states or nothing, strict=True)
    ]
    searches = [Search(beams, frozenset(stop_ids), max_new_tokens) for _ in prompts]
    cache = engine.new_cache(len(rows), max(map(len, prompts)) + max_new_tokens)
    logits = np.stack(list(engine.read(rows, cache).values()))  # (lines of the cache, V)
    while True:
        if not np.isfinite(logits).all():
            raise UserError("the model returned NaN or infinite logits: its weights or its input are broken")
        parents, tokens, first = [], [], 0  # the lines of a search follow each other, from `first` on
        ends = np.cumsum([len(search.answers) for search in searches])[:-1]
        parts = np.split(log_softmax(logits.astype(np.float64)), ends)
        for search, scores in zip(searches, parts, strict=True):
            for line, token in search.extend(scores):
                parents.append(first + line)
                tokens.append(token)
            first += len(scores)
        if not tokens:
            return [max(search.finished)[1] for search in searches]
        cache.keep_rows(parents)
        logits = model.read([Unread([token]) for token in tokens], cache)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V) logits -> (..., V) log probabilities."""
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Search:
    """The answers to one prompt. answers: the unfinished ones, one for each line of the cache. finished: (mean log probability,
    answer)."""

    def __init__(self, beams: int, stop_ids: frozenset[int], max_new_tokens: int):
        self.beams, self.stop_ids, self.max_new_tokens = beams, stop_ids, max_new_tokens
        self.answers: list[list[int]] = [[]]
        self.totals = np.zeros(1)  # the sum of the log probabilities of each
        self.finished: list[tuple[float, list[int]]] = []

    def extend(self, scores: np.ndarray) -> list[tuple[int, int]]:
        """scores (len(answers), V): the log probability of each next token. Returns (answer, token) of those that go on; none
        if the search has ended."""
        if not self.answers:
            return []
        length = len(self.answers[0]) + 1
        totals = (self.totals[:, None] + scores).ravel()
        # each answer has at most len(stop_ids) continuations that stop, so `beams` others are among these
        most = min(totals.size, self.beams * (1 + len(self.stop_ids)))
        best = np.argpartition(-totals, most - 1)[:most]
        best = best[np.lexsort((best, -totals[best]))]
        kept: list[tuple[int, int, float]] = []  # (answer, token, sum)
        for rank, place in enumerate(best.tolist()):
            line, token = divmod(place, scores.shape[-1])
            total = float(totals[place])
            stops = token in self.stop_ids
            if rank < self.beams and (stops or length == self.max_new_tokens):
                self.finished.append((total / length, self.answers[line] + [token] * (not stops)))
            elif not stops and len(kept) < self.beams:
                kept.append((line, token, total))
        if len(self.finished) >= self.beams or length == self.max_new_tokens:
            kept = []
        self.answers = [[*self.answers[line], token] for line, token, _ in kept]
        self.totals = np.array([total for _, _, total in kept], float)
        return [(line, token) for line, token, _ in kept]
