"""Self-critical sequence training: the model samples several captions of a picture, and those that score better than the others
become more likely (Rennie et al. 2017, arXiv 1612.00563; the mean of the other samples as the baseline: Luo 2020,
arXiv 2003.09971).

Imitation teaches the next word of human captions. This teaches whole captions of the model's own. It comes after
imitation: the samples of an untrained model all have a reward of zero.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.training.batches import Row

NEW_TOKENS = 32


def split_row(row: Row) -> tuple[list[int], list[int]]:
    """(prompt, answer with its end token) of a row with one answer."""
    start = row.mask.index(1)
    return row.ids[:start], row.ids[start:]


def check_context(groups: Sequence[Sequence[Row]], sequence_len: int) -> None:
    """Raises UserError where the context is too short for a caption of NEW_TOKENS. groups: as for `sample_captions`."""
    needed = NEW_TOKENS + max(len(split_row(rows[0])[0]) for rows in groups)
    if needed > sequence_len:
        raise UserError(
            f"--reward-steps sample captions of up to {NEW_TOKENS} tokens, which take {needed} with their prompt, but the "
            f"context has {sequence_len}: use --sequence-len {needed}, fewer --vision-tokens, or --reward-steps 0"
        )


def sample_captions(
    model,
    tokenizer,
    groups: Sequence[Sequence[Row]],
    vectors: torch.Tensor,
    n_samples: int,
    seed: int,
    reward_of: Callable,
) -> tuple[list[Row], torch.Tensor, float]:
    """Captions that the model samples for each picture, as rows to train on, and the advantage of each.

    groups: for each picture the rows of all its captions; vectors: (len(groups), N, D), one picture each. reward_of: a caption
    and its references -> its reward, see caption_reward.py.
    Returns len(groups) * n_samples rows, picture by picture; (rows,) float32, the reward minus the mean reward of the
    picture's other samples; and the mean reward. Leaves the model in evaluation mode.
    """
    end = tokenizer.special("<|assistant_end|>")
    prompts = [split_row(rows[0])[0] for rows in groups]
    model.eval()
    sampled = Engine(model).generate(
        [prompt for prompt in prompts for _ in range(n_samples)],
        NEW_TOKENS,
        sampling=Sampling(temperature=1.0, seed=seed),
        stop_ids=tokenizer.special_ids,  # an answer holds no pictures and no further turns
        images=vectors.detach().repeat_interleave(n_samples, 0),
    )
    made, advantages, total = [], [], 0.0
    for i, (prompt, rows) in enumerate(zip(prompts, groups, strict=True)):
        references = [tokenizer.decode(split_row(row)[1]) for row in rows]
        captions = sampled[i * n_samples : (i + 1) * n_samples]
        rewards = np.array([reward_of(tokenizer.decode(ids), references) for ids in captions])
        total += rewards.mean()
        advantages += list((rewards - rewards.mean()) * n_samples / (n_samples - 1))
        for ids in captions:
            answer = ids if len(ids) == NEW_TOKENS else [*ids, end]  # a caption that was cut off has no end to learn
            made.append(Row([*prompt, *answer], [0] * len(prompt) + [1] * len(answer), rows[0].images))
    return made, torch.tensor(advantages, dtype=torch.float32), total / len(groups)
