"""From samples to tensors: conversations become padded rows, pictures become vision vectors, with one encoder pass per picture
however many questions there are about it.

Which pictures, questions and augmentations a step gets is a function of (seed, step) alone, so a resumed run needs no saved
random state.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochat.conversation import render
from nanochat.data import CAPTION_PROMPT, DataError, Sample, image_key, picture_groups
from nanochat.gpt import GPT, IGNORE_INDEX, Inputs, pad_rows
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.training.features import Features
from nanochat.training.squares import Squares, warp

MOST_PADDING = 2  # the longest row of a part, as a multiple of its shortest
TURNS = "clockwise|counterclockwise|anticlockwise"
SIDES = (  # what a text says that is wrong of a mirrored picture, and of one that stands upside down
    re.compile(rf"\b(left|right|{TURNS})", re.IGNORECASE),
    re.compile(rf"\b(up|down|above|below|beneath|under|over|top|bottom|lower|fall|rise|rising|{TURNS})", re.IGNORECASE),
)


@dataclass(frozen=True)
class Row:
    """One conversation: token ids, a mask that is 1 where the token is learnt, its pictures as indices of `Rows.images`, and
    whether it is a caption."""

    ids: list[int]
    mask: list[int]
    images: tuple[int, ...] = ()
    caption: bool = False


class Rows:
    """Rendered samples, grouped by their pictures. Raises DataError for a sample that does not fit the context.

    images: the distinct pictures. image_rows: the "file:row" where each is first. image_groups: the group of each: pictures that
    some row shows together are in one. groups: the rows of one dataset about the same pictures, captions apart, in the order of
    the data. mirrorable: (n_images, 2) bool, the pictures that may be mirrored, and put upside down: no text about a picture of
    their group says left or right; above or below. multi_turn: whether there are conversations of several turns.
    """

    def __init__(self, samples: Sequence[Sample], tokenizer, config, sources: Sequence[int] | None = None):
        """sources: the number of each sample's dataset; by default there is one."""
        self.images, self.image_rows, numbers, groups = [], [], {}, {}
        fixed: tuple[set, set] = set(), set()
        for sample, source in zip(samples, sources or [0] * len(samples), strict=True):
            keys = tuple(image_key(image) for image in sample.images)
            for key, image in zip(keys, sample.images, strict=True):
                if key not in numbers:
                    numbers[key] = len(self.images)
                    self.images.append(image)
                    self.image_rows.append(sample.where)
            rendered = render(tokenizer, sample.messages, config.places_per_image)
            if len(rendered.ids) > config.sequence_len + 1:
                longest = f"{sample.question[:40]!r} ... {sample.answer[:40]!r}"
                raise DataError(
                    f"{sample.where or 'the data'}: the conversation {longest} has {len(rendered.ids)} tokens, but the context "
                    f"has {config.sequence_len}, vision tokens included: use --sequence-len {len(rendered.ids) - 1}, "
                    "fewer --vision-tokens, or a shorter text"
                )
            if config.fusion == "cross" and len(keys) > config.max_images:
                raise DataError(
                    f"{sample.where or 'the data'}: the conversation has {len(keys)} pictures, but the model takes "
                    f"{config.max_images} at most with --fusion cross: leave some out, or use --fusion prefix"
                )
            row = Row(rendered.ids, rendered.mask, tuple(numbers[key] for key in keys), is_caption(sample))
            groups.setdefault((source, row.caption, keys or len(groups)), []).append(row)
            for side, of_side in zip(SIDES, fixed, strict=True):
                if any(map(side.search, texts_of(sample))):
                    of_side.update(keys)
        self.multi_turn = any(len(sample.messages) > 3 for sample in samples)
        self.groups = list(groups.values())
        together = picture_groups(samples)
        self.image_groups = [together[key] for key in numbers]
        fixed_groups = [{together[key] for key in of_side} for of_side in fixed]
        self.mirrorable = np.array([[group not in of for of in fixed_groups] for group in self.image_groups], bool)

    def step(self, step: int, n_groups: int, n_rows: int | None, seed: int) -> list[list[Row]]:
        """The groups of a training step, at most n_rows of each (None: all). Every epoch is another permutation of all groups."""
        total, chosen = len(self.groups), []
        rng = np.random.default_rng([seed, step, 0])
        orders = {}
        for position in range(step * n_groups, (step + 1) * n_groups):
            epoch = position // total
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([seed, epoch, 1]).permutation(total)
            group = self.groups[orders[epoch][position % total]]
            picks = rng.permutation(len(group))[:n_rows]
            chosen.append([group[i] for i in picks])
        return chosen


def is_caption(sample: Sample) -> bool:
    """Whether it is a description of one picture, and nothing else: what reward steps can sample and score."""
    answers = sum(message["role"] == "assistant" for message in sample.messages)
    return sample.question == CAPTION_PROMPT and len(sample.images) == 1 and answers == 1


def texts_of(sample: Sample) -> list[str]:
    """All texts of a conversation, answers included."""
    contents = [message["content"] for message in sample.messages]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return [part["text"] for message in parts for part in message if "text" in part]


@dataclass
class Batch:
    """Rows as tensors.

    idx, targets: (R, T) int64, targets shifted and -1 where nothing is learnt. numbers: the distinct pictures of the batch, as
    indices of `Rows.images`. slots: (S,) for every picture of the rows, in reading order, its position in `numbers`.
    counts: pictures in each row. lengths: tokens in each row.
    """

    idx: torch.Tensor
    targets: torch.Tensor
    numbers: list[int]
    slots: torch.Tensor
    counts: list[int]
    lengths: list[int]

    @property
    def n_learnt(self) -> int:
        return int((self.targets != IGNORE_INDEX).sum())

    def by_length(self) -> Iterator["Batch"]:
        """The same rows in parts of similar length, each without the padding that it does not need: captions beside short answers
        would be mostly padding. `numbers` stays that of the whole."""
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        slots, parts = self.slots.split(self.counts), []
        for row in order:
            if not parts or self.lengths[row] > MOST_PADDING * self.lengths[parts[-1][0]]:
                parts.append([])
            parts[-1].append(row)
        for rows in parts:
            longest = self.lengths[rows[-1]]
            yield Batch(
                self.idx[rows, :longest], self.targets[rows, :longest], self.numbers, torch.cat([slots[row] for row in rows]),
                [self.counts[row] for row in rows], [self.lengths[row] for row in rows],
            )  # fmt: skip

    def in_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (U, N, D) of the distinct pictures -> (S, N, D) in the reading order of the rows."""
        return vectors[self.slots.to(vectors.device)]


def make_batch(rows: Sequence[Row]) -> Batch:
    """Rows -> tensors. The last token of a row predicts nothing, so T is one less than the longest row."""
    idx, targets = padded(rows)
    numbers = sorted({number for row in rows for number in row.images})
    position = {number: i for i, number in enumerate(numbers)}
    slots = torch.tensor([position[number] for row in rows for number in row.images], dtype=torch.long)
    counts, lengths = [len(row.images) for row in rows], [len(row.ids) - 1 for row in rows]
    return Batch(idx[:, :-1], targets[:, :-1], numbers, slots, counts, lengths)


def padded(rows: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with `ids` and `mask` -> idx and targets, (R, T) int64, padded on the right. targets[:, t] is the token after
    idx[:, t], or -1 where the mask is 0."""
    idx = pad_rows([row.ids for row in rows], 0)
    learnt = pad_rows([row.mask for row in rows], 0) == 1
    targets = torch.full_like(idx, IGNORE_INDEX)
    targets[:, :-1] = idx[:, 1:].masked_fill(~learnt[:, 1:], IGNORE_INDEX)
    return idx, targets


def row_inputs(model: MultimodalGPT, idx: torch.Tensor, vectors=None, states=None, shown=None) -> Inputs:
    """What the model reads of rows idx (R, T), on its device. vectors: (S, N, D) of all their pictures, in reading order; without
    them, add them later by `with_images`. states: (R, state_dim), normalised, of a robot. shown: see `with_images`."""
    idx = idx.to(model.device)
    inputs = Inputs(
        idx, idx == model.config.vision_token_id, states=None if states is None else states.to(model.device)
    )
    return inputs if vectors is None else with_images(inputs, vectors, shown)


def with_images(inputs: Inputs, vectors: torch.Tensor, shown: torch.Tensor | None = None) -> Inputs:
    """The same rows with the vectors (S, N, D) of their pictures; or with (U, N, D) of distinct ones, each projected once, and
    shown (S,): which of them each picture of the rows is, in reading order (`Batch.slots`)."""
    device = inputs.idx.device
    return replace(inputs, images=vectors.flatten(0, 1).to(device), shown=None if shown is None else shown.to(device))


def exactly_right(model: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(R,) bool: every learnt token of the row is the most likely one, so greedy generation would give exactly this answer.
    hidden: (R, T, C), targets: (R, T)."""
    learnt = targets != IGNORE_INDEX
    wrong = model.logits(hidden[learnt]).argmax(-1) != targets[learnt]
    return ~torch.zeros_like(learnt).masked_scatter(learnt, wrong).any(1)


class CachedVectors:
    """Vision vectors that were computed once (a frozen encoder): (U, N, D) of the given pictures. With an rng, half of the groups
    that have mirror images are replaced by them.

    groups: (n_images,) what belongs together, see `Rows.image_groups`. mirrored: vectors of mirrored pictures; mirror_of:
    (n_images,) for each picture its row there, or -1.
    """

    def __init__(
        self,
        features: Features,
        groups: Sequence[Hashable],
        mirrored: Features | None = None,
        mirror_of: np.ndarray | None = None,
    ):
        self.features, self.groups, self.mirrored, self.mirror_of = features, groups, mirrored, mirror_of

    def __call__(self, numbers: list[int], rng: np.random.Generator | None = None) -> torch.Tensor:
        found = self.features[numbers]
        if self.mirrored is not None and rng is not None:
            coins = coin_of_each_group([self.groups[number] for number in numbers], rng)
            rows = np.where(coins, self.mirror_of[numbers], -1)
            found[rows >= 0] = self.mirrored[rows[rows >= 0]]
        return torch.from_numpy(found)


class EncodedVectors(Squares):
    """Vision vectors through the model's encoder, differentiable: (U, N, D) of the given pictures, augmented
    if there is an rng."""

    def __init__(self, model: MultimodalGPT, rows: Rows, memory: float, flip: str = "none", jitter: float = 0.0):
        super().__init__(model.vision_encoder, rows.images, memory)
        self.model, self.rows, self.flip, self.jitter = model, rows, flip, jitter

    def pixels(self, numbers: list[int], rng: np.random.Generator | None = None) -> torch.Tensor:
        pixels = super().pixels(numbers)
        if rng is None:
            return pixels
        groups = [self.rows.image_groups[number] for number in numbers]
        pixels = augment(pixels, rng, self.flip, self.jitter, self.rows.mirrorable[numbers], groups)
        return pixels.contiguous(memory_format=torch.channels_last)

    def __call__(self, numbers: list[int], rng: np.random.Generator | None = None) -> torch.Tensor:
        return self.model.see(self.pixels(numbers, rng))


def coin_of_each_group(groups: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
    """(n,) bool, random: pictures of one group are mirrored together, so that what is compared stays comparable."""
    numbers = group_numbers(groups)
    return (rng.random(max(numbers) + 1) < 0.5)[numbers]


def group_numbers(groups: Sequence[Hashable]) -> list[int]:
    """(n,) the number of each item's group, from 0 on in the order in which the groups appear."""
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [number_of[group] for group in groups]


def augment(
    x: torch.Tensor,
    rng: np.random.Generator,
    flip: str,
    jitter: float,
    mirrorable: np.ndarray | bool = True,
    groups: Sequence[Hashable] | None = None,
) -> torch.Tensor:
    """Mirror pictures (B, 3, S, S), those of one group together, and shift and zoom each by its own random amount. mirrorable:
    (B, 2) bool, which may be mirrored and put upside down. groups: (B,), by default each picture is one."""
    if flip == "none" and jitter == 0:
        return x
    groups = range(len(x)) if groups is None else groups
    mirror = np.stack([np.where(coin_of_each_group(groups, rng), -1.0, 1.0) for _ in range(2)], axis=1)
    zoom = 1 + rng.uniform(-jitter, jitter, size=len(x))
    shift = rng.uniform(-2 * jitter, 2 * jitter, size=(len(x), 2))  # the picture is 2 wide in grid_sample's units
    theta = np.zeros((len(x), 2, 3), np.float32)
    mirror = np.where(np.array([flip != "none", flip == "both"]) & mirrorable, mirror, 1)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * mirror[:, 0], zoom * mirror[:, 1]
    theta[:, :, 2] = shift
    return warp(x, theta, x.size(-1))


def reduce_gradient(vectors: torch.Tensor, share: float) -> torch.Tensor:
    """The same values; only a share of the gradient passes back."""
    return share * vectors + (1 - share) * vectors.detach()


def mask_images(vectors: torch.Tensor, rng: np.random.Generator, share: float) -> torch.Tensor:
    """Vectors (S, N, D) with a random share of the pictures set to zero: the model learns what to answer without a picture."""
    if share == 0:
        return vectors
    masked = rng.random(len(vectors)) < share
    return vectors.masked_fill(torch.from_numpy(masked).to(vectors.device)[:, None, None], 0.0)


def mask_rows(
    vectors: torch.Tensor, batch: Batch, rng: np.random.Generator, share: float
) -> tuple[torch.Tensor, Batch]:
    """Vectors (U, N, D) of a batch's pictures -> the same and one of zeros (U + 1, N, D), and the batch with a random share
    of its rows showing that one for all of their pictures."""
    masked = np.repeat(rng.random(len(batch.counts)) < share, batch.counts)
    slots = batch.slots.masked_fill(torch.from_numpy(masked), len(vectors))
    return torch.cat([vectors, torch.zeros_like(vectors[:1])]), replace(batch, slots=slots)


def mask_tokens(
    idx: torch.Tensor, rng: np.random.Generator, share: float, special_ids, unknown_id: int
) -> torch.Tensor:
    """idx (R, T) with a random share of the tokens replaced by `unknown_id`, except special tokens. The next token must then be
    inferred from the picture and not from a text known by heart (word dropout; Bowman et al. 2016, arXiv 1511.06349)."""
    if share == 0:
        return idx
    special = torch.isin(idx, torch.tensor(sorted(special_ids)))
    dropped = torch.from_numpy(rng.random(idx.shape) < share)
    return idx.masked_fill(dropped & ~special, unknown_id)
