"""Self-critical sequence training: the model describes a picture several times, and what scores better than its own other
tries becomes likelier (Rennie et al. 2017, arXiv 1612.00563; the mean of the other tries as the baseline: Luo 2020,
arXiv 2003.09971).

Imitation teaches the next word after the words of a human. This teaches whole captions, in the words that the model itself
chooses when nobody corrects it. It comes after imitation: a model that cannot describe yet gets no reward to follow.
"""

from collections.abc import Sequence

import numpy as np
import torch

from nanochat.engine import Engine
from nanochat.evaluation.metrics import MAX_N, bleu_statistics, caption_tokens
from nanochat.sampling import Sampling
from nanochat.training.batches import Row

NEW_TOKENS = 32


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """BLEU-4 of one caption, 0..1, as a reward.

    One match is added to each n-gram count from n = 2 on (Lin & Och 2004): without it a caption with no right four words in a
    row is worth nothing, however good the rest. But that favours short captions (Nakov et al. 2012), all the more as a
    corpus' BLEU compares with the closest reference and some reference is always short. So the length to reach is
    the references' mean.
    """
    *counted, length, _ = bleu_statistics(prediction, references)
    if length == 0 or counted[0] == 0:
        return 0.0
    matches, counts = np.array(counted[:MAX_N], float), np.array(counted[MAX_N:], float)
    matches[1:] += 1
    counts[1:] += 1
    wanted = np.mean([len(caption_tokens(reference)) for reference in references])
    return float(min(1.0, np.exp(1 - wanted / length)) * np.exp(np.log(matches / counts).mean()))


def split_row(row: Row) -> tuple[list[int], list[int]]:
    """(prompt, answer with its end token) of a row with one answer."""
    start = row.mask.index(1)
    return row.ids[:start], row.ids[start:]


def tries(
    model, tokenizer, groups: Sequence[Sequence[Row]], vectors: torch.Tensor, n_tries: int, seed: int
) -> tuple[list[Row], torch.Tensor, float]:
    """Captions that the model samples for each picture, as rows to train on, and the advantage of each.

    groups: for each picture the rows of all its captions; vectors: (len(groups), N, D), what the model sees of each.
    Returns len(groups) * n_tries rows, picture by picture; (rows,) float32, the reward minus the mean reward of the
    picture's other tries; and the mean reward.
    """
    end = tokenizer.special("<|assistant_end|>")
    prompts = [split_row(rows[0])[0] for rows in groups]
    model.eval()
    sampled = Engine(model).generate(
        [prompt for prompt in prompts for _ in range(n_tries)],
        NEW_TOKENS,
        sampling=Sampling(temperature=1.0, seed=seed),
        stop_ids=tokenizer.special_ids,  # a picture or a new turn inside an answer would be none
        vision_embeddings=vectors.detach().repeat_interleave(n_tries, 0),
    )
    model.train()
    made, advantages, total = [], [], 0.0
    for i, (prompt, rows) in enumerate(zip(prompts, groups, strict=True)):
        references = [tokenizer.decode(split_row(row)[1]) for row in rows]
        said = sampled[i * n_tries : (i + 1) * n_tries]
        rewards = np.array([sentence_bleu(tokenizer.decode(ids), references) for ids in said])
        total += rewards.mean()
        advantages += list((rewards - rewards.mean()) * n_tries / (n_tries - 1))
        for ids in said:
            answer = ids if len(ids) == NEW_TOKENS else [*ids, end]  # an answer that was cut off has no end to learn
            made.append(Row([*prompt, *answer], [0] * len(prompt) + [1] * len(answer), rows[0].images))
    return made, torch.tensor(advantages, dtype=torch.float32), total / len(groups)
