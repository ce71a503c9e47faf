"""Controls that every accuracy is reported with: the score with the right picture (aligned) means little without the score
with another picture (shuffled), with no picture (blind), and with the most common answer for everything (majority).

Items that belong together form a group: all questions about one photograph, all frames of one robot episode. Shuffled
always takes the picture of another group: two frames of one episode look alike, so swapping them would hide nothing.
This module does not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nanochat.errors import UserError
from nanochat.evaluation.metrics import normalize_answer

if TYPE_CHECKING:
    import torch

CONDITIONS = ("aligned", "shuffled", "blind")
SINGLE = "single"  # of questions about several pictures: see `single_picture`


def another_group(groups: Sequence[Hashable], seed: int = 0) -> list[int] | None:
    """For each of n items, the index of an item of another group; None if all items belong to one group.

    The groups form a random circle and each group takes its successor, so no group is its own partner and none is used
    twice. Item k of a group takes item k of the partner group, counted modulo the size of that group.

    groups: (n,) the group of each item. The result depends on `groups` and `seed` only.
    """
    members: dict[Hashable, list[int]] = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    if len(members) < 2:
        return None
    by_group = list(members.values())
    order = np.random.default_rng(seed).permutation(len(by_group))
    partner = [0] * len(groups)
    for here, there in zip(order, np.roll(order, -1), strict=True):
        for position, item in enumerate(by_group[here]):
            partner[item] = by_group[there][position % len(by_group[there])]
    return partner


def conditions(vectors: torch.Tensor, groups: Sequence[Hashable], seed: int = 0) -> dict[str, torch.Tensor]:
    """The vision vectors of each condition: {"aligned", "shuffled", "blind"}, each (n, N, D) like `vectors`.

    vectors: (n, N, D); groups: (n,), see `another_group`. "shuffled" is missing if there is only one group; "blind" is
    all zeros.

    Raises:
        ValueError: the number of groups is not n.
    """
    if len(vectors) != len(groups):
        raise UserError(f"found {len(vectors)} pictures but {len(groups)} groups; each picture needs one group")
    result = {"aligned": vectors}
    partner = another_group(groups, seed)
    if partner is not None:
        result["shuffled"] = vectors[partner]
    return result | {"blind": vectors.new_zeros(vectors.shape)}


def single_picture(vectors: torch.Tensor, row: int, seed: int = 0) -> torch.Tensor:
    """The vectors of one row's pictures, of which only one is shown, drawn at random; the others are zeros, as in "blind".

    vectors: (pictures of the row, N, D). An answer that needs all pictures of the row cannot be better than a guess.
    """
    shown = np.random.default_rng([seed, row]).integers(len(vectors))
    kept = vectors.new_zeros(vectors.shape)
    kept[shown] = vectors[shown]
    return kept


def commonest_answer(answers: Sequence[str]) -> str:
    """The most common normalised answer, which needs no look at the picture; ties go to the first in the alphabet.

    Raises:
        ValueError: `answers` is empty.
    """
    counts = Counter(map(normalize_answer, answers))
    if not counts:
        raise UserError("the most common answer needs at least one answer, found none")
    return min(counts, key=lambda answer: (-counts[answer], answer))  # independent of the order of the rows
