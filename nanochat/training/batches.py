"""From samples to tensors: conversations become padded rows, pictures become vision vectors, one pass for each picture
however many questions there are about it.

Which pictures, questions and augmentations a step gets is a function of (seed, step) alone, so a run that goes on after a
kill needs no saved random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.conversation import render
from nanochat.data import DataError, Sample, image_key
from nanochat.gpt import IGNORE_INDEX
from nanochat.multimodal_gpt import pool_to_tokens
from nanochat.vision.images import letterbox, open_image


@dataclass(frozen=True)
class Row:
    """One conversation: token ids, what is to be learnt of them, and the numbers of its pictures in `Rows.images`."""

    ids: list[int]
    mask: list[int]
    images: tuple[int, ...]


class Rows:
    """Rendered samples, grouped by their pictures. Raises DataError for a sample that does not fit the context."""

    def __init__(self, samples: Sequence[Sample], tokenizer, config):
        self.vision_token_id = config.vision_token_id
        self.images, numbers, groups = [], {}, {}
        for sample in samples:
            keys = tuple(image_key(image) for image in sample.images)
            for key, image in zip(keys, sample.images, strict=True):
                if key not in numbers:
                    numbers[key] = len(self.images)
                    self.images.append(image)
            rendered = render(tokenizer, sample.messages, config.vision_tokens_per_image)
            if len(rendered.ids) > config.sequence_len + 1:
                raise DataError(
                    f"a conversation of {len(rendered.ids)} tokens ({sample.question[:40]!r}...) does not fit the context "
                    f"of {config.sequence_len}: raise sequence_len or use fewer vision_tokens"
                )
            row = Row(rendered.ids, rendered.mask, tuple(numbers[key] for key in keys))
            groups.setdefault(keys or ("text", len(groups)), []).append(row)
        self.multi_turn = any(
            len(sample.messages) > 3 for sample in samples
        )  # a chat may go on: it was trained on turns
        self.groups = list(groups.values())  # rows about the same pictures, in the order of the data

    def step(self, step: int, n_groups: int, n_rows: int | None, seed: int) -> list[list[Row]]:
        """The groups of a training step, at most n_rows of each (None: all). Every epoch is another shuffle of all groups."""
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


@dataclass
class Batch:
    """idx, targets (R, T) int64 with -1 where nothing is learnt; images: the picture of every slot, row by row in order,
    as a position in `numbers`, the batch's distinct pictures; counts: pictures in each row."""

    idx: torch.Tensor
    targets: torch.Tensor
    numbers: list[int]
    slots: torch.Tensor
    counts: list[int]

    @property
    def n_learnt(self) -> int:
        return int((self.targets != IGNORE_INDEX).sum())

    def spread(self, vectors: torch.Tensor) -> torch.Tensor | list[torch.Tensor] | None:
        """(U, N, D) vectors of the distinct pictures -> the vision_embeddings of the rows."""
        if not self.numbers:
            return None
        per_slot = vectors[self.slots.to(vectors.device)]  # (S, N, D)
        if set(self.counts) == {1}:
            return per_slot
        return [part.flatten(0, 1) for part in per_slot.split(self.counts)]


def collate(rows: Sequence[Row], pad_id: int = 0) -> Batch:
    """Pad rows on the right. Targets are shifted: position t is to say what stands at t + 1."""
    length = max(len(row.ids) for row in rows) - 1
    idx = torch.full((len(rows), length), pad_id)
    targets = torch.full((len(rows), length), IGNORE_INDEX)
    for line, row in enumerate(rows):
        ids, mask = torch.tensor(row.ids), torch.tensor(row.mask, dtype=torch.bool)
        idx[line, : len(ids) - 1] = ids[:-1]
        targets[line, : len(ids) - 1] = ids[1:].masked_fill(~mask[1:], IGNORE_INDEX)
    numbers = sorted({n for row in rows for n in row.images})
    place = {number: i for i, number in enumerate(numbers)}
    slots = torch.tensor([place[n] for row in rows for n in row.images], dtype=torch.long)
    return Batch(idx, targets, numbers, slots, [len(row.images) for row in rows])


class FeatureEyes:
    """Vision vectors from features that were computed once (a frozen encoder)."""

    def __init__(self, features):
        self.features = features  # (n_images, N, D), indexable by lists

    def __call__(self, numbers: list[int], rng: np.random.Generator | None = None) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.features[numbers])).float()


class TrainedEyes:
    """Vision vectors through the encoder itself, with gradients while it is in training mode.

    Letterboxed pictures are kept in memory as bytes (64 x 64: 12 kB each, 224 x 224: 150 kB), since decoding
    them every epoch costs more than a small encoder does.
    """

    def __init__(
        self, encoder, images: Sequence, layer: str, n_tokens: int, dtype=torch.float32, flip: str = "none",
        jitter: float = 0.0,
    ):  # fmt: skip
        self.encoder, self.images, self.layer, self.n_tokens = encoder, images, layer, n_tokens
        self.dtype, self.flip, self.jitter = dtype, flip, jitter
        self.decoded: dict[int, torch.Tensor] = {}

    def pixels(self, number: int) -> torch.Tensor:
        """(3, S, S) uint8."""
        if number not in self.decoded:
            square, _ = letterbox(open_image(self.images[number]), self.encoder.image_size)
            self.decoded[number] = torch.from_numpy(square).permute(2, 0, 1).contiguous()
        return self.decoded[number]

    def __call__(self, numbers: list[int], rng: np.random.Generator | None = None) -> torch.Tensor:
        device = next(self.encoder.parameters()).device
        x = torch.stack([self.pixels(number) for number in numbers]).to(device).float() / 255  # (U, 3, S, S)
        if rng is not None:
            x = augment(x, rng, self.flip, self.jitter)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            maps = self.encoder(x.contiguous(memory_format=torch.channels_last), self.layer)
        return pool_to_tokens(maps.float(), self.n_tokens)


def augment(x: torch.Tensor, rng: np.random.Generator, flip: str, jitter: float) -> torch.Tensor:
    """Mirror, shift and zoom (B, 3, S, S) pictures, each in its own way."""
    if flip == "none" and jitter == 0:
        return x
    mirror = rng.choice([-1.0, 1.0], size=(len(x), 2))
    zoom = 1 + rng.uniform(-jitter, jitter, size=len(x))
    shift = rng.uniform(-2 * jitter, 2 * jitter, size=(len(x), 2))  # the picture is 2 wide in grid_sample's units
    theta = np.zeros((len(x), 2, 3), np.float32)
    theta[:, 0, 0] = zoom * (mirror[:, 0] if flip != "none" else 1)
    theta[:, 1, 1] = zoom * (mirror[:, 1] if flip == "both" else 1)
    theta[:, :, 2] = shift
    grid = F.affine_grid(torch.from_numpy(theta).to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def hide(vectors, rng: np.random.Generator, share: float):
    """Zero the vectors of a random share of the rows: the model learns what to guess where it sees nothing."""
    if vectors is None or share == 0:
        return vectors
    hidden = torch.from_numpy(rng.random(len(vectors)) < share)
    if isinstance(vectors, torch.Tensor):
        return vectors.masked_fill(hidden.to(vectors.device)[:, None, None], 0.0)
    return [torch.zeros_like(v) if h else v for v, h in zip(vectors, hidden, strict=True)]


def forget_words(
    idx: torch.Tensor, rng: np.random.Generator, share: float, special_ids, unknown_id: int
) -> torch.Tensor:
    """idx (R, T) with a random share of its words replaced by `unknown_id`; special tokens stay. What comes next must then be
    read off the picture, and not off a text that is known by heart (word dropout; Bowman et al. 2016, arXiv 1511.06349)."""
    if share == 0:
        return idx
    special = torch.isin(idx, torch.tensor(sorted(special_ids)))
    forgotten = torch.from_numpy(rng.random(idx.shape) < share)
    return idx.masked_fill(forgotten & ~special, unknown_id)
