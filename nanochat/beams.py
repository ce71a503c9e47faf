"""Beam search: the likeliest answer that is found by following several at once, where greedy follows one.

Each step keeps the `beams` likeliest unfinished answers. One that stops is finished if its stop token is among the `beams`
likeliest continuations; the search ends with `beams` finished answers, or at the maximum length. The best one has the highest
mean log probability of its tokens, the stop token included: log probabilities only add up, so without the mean short answers
would win (Wu et al. 2016, arXiv 1609.08144, section 7: division by |Y|^alpha, here with alpha = 1). This is what transformers
does with early_stopping=True, and one beam is greedy decoding.
"""

from collections.abc import Iterable, Sequence

import torch

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import Inputs

MAX_BEAMS = 64  # each has a cache of its own


def check_beams(beams: int) -> None:
    """Raises UserError for a number of beams outside of 1..MAX_BEAMS."""
    if not 1 <= beams <= MAX_BEAMS:
        raise UserError(f"the number of beams must be in 1..{MAX_BEAMS} (1 is greedy), got {beams}")


@torch.inference_mode()
def beam_search(
    model,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    beams: int = 3,
    stop_ids: Iterable[int] = (),
    images: torch.Tensor | None = None,
    states: torch.Tensor | None = None,
) -> list[int]:
    """The best answer to one prompt, as token ids without the stop token.

    model: any that `Engine` runs. prompt, max_new_tokens, stop_ids, images, states: as `Engine.add` takes them. Raises ValueError
    as `Engine.add` does, and for a number of beams outside of 1..MAX_BEAMS.
    """
    check_beams(beams)
    stop_ids, engine = frozenset(stop_ids), Engine(model)
    row = engine.add(prompt, max_new_tokens, images=images, states=states)  # checks everything
    cache = engine.new_cache(1, len(prompt) + max_new_tokens)
    logits = torch.from_numpy(engine.read([row], cache)[row])[None]  # (1, V)
    answers, totals = [[]], torch.zeros(1, dtype=torch.float64)  # unfinished; the sum of each one's log probabilities
    finished: list[tuple[float, list[int]]] = []  # (mean log probability, answer)
    for length in range(1, max_new_tokens + 1):
        if not torch.isfinite(logits).all():
            raise UserError("the model returned NaN or infinite logits: its weights or its input are broken")
        scores = (totals[:, None] + logits.double().log_softmax(-1)).flatten()  # (beams * V,)
        # each answer has at most len(stop_ids) continuations that stop, so `beams` others are among these
        best = scores.topk(min(len(scores), beams * (1 + len(stop_ids))))
        kept: list[tuple[int, int, float]] = []  # (line of the cache, token, sum)
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            line, token = divmod(place, logits.size(-1))
            if rank < beams and (token in stop_ids or length == max_new_tokens):
                finished.append((total / length, answers[line] + [token] * (token not in stop_ids)))
            elif token not in stop_ids and len(kept) < beams:
                kept.append((line, token, total))
        if len(finished) >= beams or not kept:
            break
        answers = [[*answers[line], token] for line, token, _ in kept]
        totals = torch.tensor([total for _, _, total in kept], dtype=torch.float64)
        cache.keep_rows([line for line, _, _ in kept])
        new = torch.tensor([[token] for _, token, _ in kept], device=model.device)
        logits = model.logits(model.hidden(Inputs(new), cache)[:, -1]).cpu()
    return max(finished)[1]
