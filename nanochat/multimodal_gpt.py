"""A GPT that sees: image placeholders in the token row are replaced by projected vision vectors.

Only the embedding step differs from GPT; attention, head, loss and cache are inherited as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.engine import Engine
from nanochat.gpt import GPT, IGNORE_INDEX, GPTConfig, Linear, norm
from nanochat.sampling import Sampling
from nanochat.vision import YOLOv9Plus


@dataclass
class MultimodalGPTConfig(GPTConfig):
    vision_embedding_dim: int = (
        84  # channels of the encoder's map: 4 box values + 80 class scores for the default layer
    )
    use_vision_projection: bool = True  # False: the vectors already have n_embd channels and go in as they are
    vision_tokens_per_image: int = 1  # 1 is the pooled vector; a square number is an h x h grid of the map
    vision_token_id: int | None = None  # placeholder in the token row; None is the last id of the vocabulary
    vision_layer: str = "head"  # which map of the encoder, see YOLOv9Plus
    vision_image_size: int = 640  # the encoder's square input, in pixels

    def __post_init__(self):
        super().__post_init__()
        if self.vision_token_id is None:
            self.vision_token_id = self.vocab_size - 1
        if not 0 <= self.vision_token_id < self.vocab_size:
            raise ValueError(f"vision_token_id {self.vision_token_id} is outside the vocabulary of {self.vocab_size}")
        if not isinstance(self.vision_embedding_dim, int) or self.vision_embedding_dim < 1:
            raise ValueError(f"vision_embedding_dim must be a positive integer, got {self.vision_embedding_dim!r}")
        if not self.use_vision_projection and self.vision_embedding_dim != self.n_embd:
            raise ValueError(
                f"without a projection the vision vectors ({self.vision_embedding_dim}) must be as wide as the model "
                f"({self.n_embd}): set use_vision_projection=True"
            )
        self.check_vision_tokens()
        if not isinstance(self.vision_image_size, int) or self.vision_image_size < 32 or self.vision_image_size % 32:
            raise ValueError(f"vision_image_size must be a positive multiple of 32, got {self.vision_image_size!r}")

    def check_vision_tokens(self) -> None:
        grid_side(self.vision_tokens_per_image)


def grid_side(n_tokens: int) -> int:
    """Side of the square grid with that many cells."""
    side = isqrt(max(0, n_tokens))
    if n_tokens < 1 or side * side != n_tokens:
        raise ValueError(
            f"vision_tokens_per_image must be a square number (1, 4, 9, 16, 25, ...): "
            f"the map is pooled to a square grid; got {n_tokens}"
        )
    return side


def pool_to_tokens(maps: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """(B, C, H, W) maps -> (B, n_tokens, C): averages over an h x h grid, row by row from the top left."""
    return F.adaptive_avg_pool2d(maps, grid_side(n_tokens)).flatten(2).transpose(1, 2)


class VisionProjector(nn.Module):
    """Two layers with ReLU², as in the GPT's MLP, from the encoder's channels to the model's: (..., D) -> (..., C).

    Vectors are RMS-normed first, since the scale of a detector's maps says nothing to a language model. Cells of a grid get a
    learnt position each, starting at zero: along the row of tokens, rotary positions tell left from right but not up.
    Kept and run in float32 whatever the input's dtype; the caller casts the result.
    """

    def __init__(self, vision_dim: int, n_embd: int, n_tokens: int = 1):
        super().__init__()
        self.c_fc = Linear(vision_dim, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)
        self.position = nn.Parameter(torch.zeros(n_tokens, n_embd)) if n_tokens > 1 else None

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        x = norm(vectors.to(self.c_fc.weight.dtype))
        x = self.c_proj(F.relu(self.c_fc(x)).square())
        if self.position is None:
            return x
        # vectors come as whole images, so the flat list is a multiple of the grid
        return (x.view(-1, *self.position.shape) + self.position).view(x.shape)


class MultimodalGPT(GPT):
    """GPT with a vision projector and, once attached or first needed, a YOLOv9 encoder inside the module tree."""

    def __init__(self, config: MultimodalGPTConfig):
        super().__init__(config)
        self.vision_projector = (
            VisionProjector(config.vision_embedding_dim, config.n_embd, config.vision_tokens_per_image)
            if config.use_vision_projection
            else nn.Identity()
        )
        self.vision_encoder: YOLOv9Plus | None = None

    @property
    def map_channels(self) -> int:
        """Of the encoder's map, before it is pooled."""
        return self.config.vision_embedding_dim

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) maps -> (B, vision_tokens_per_image, vision_embedding_dim)."""
        return pool_to_tokens(maps, self.config.vision_tokens_per_image)

    def attach_encoder(self, encoder: YOLOv9Plus) -> None:
        """Make `encoder` part of the model (state dict, `.to()`, training). Raises ValueError where its map does not have
        the channels that the projector was built for."""
        layer, expected = self.config.vision_layer, self.map_channels
        found = encoder.embedding_dim(layer)
        if found != expected:
            raise ValueError(
                f'the encoder\'s layer "{layer}" has {found} channels, but vision_embedding_dim is {expected}: '
                f"set vision_embedding_dim={found}, or choose another layer or encoder"
            )
        self.vision_encoder = encoder

    @torch.no_grad()
    def encode_images(self, images) -> torch.Tensor:
        """One image or a list of B -> (B, vision_tokens_per_image, vision_embedding_dim), on the encoder's device.

        Without an encoder, the default one (see YOLOv9Plus) is loaded onto the model's device first. Ask many questions
        of the result: it is what `forward`, `Engine.stream` and `generate_with_image` take as vision_embeddings.
        """
        if self.vision_encoder is None:
            self.attach_encoder(YOLOv9Plus(device=self.device, image_size=self.config.vision_image_size))
        maps = self.vision_encoder.extract_features(images, layer=self.config.vision_layer)
        return self.pool(maps)

    def forward(
        self, idx, vision_embeddings=None, vision_mask=None, targets=None, kv_cache=None, loss_reduction="mean"
    ):
        """GPT.forward with pictures.

        vision_embeddings: (B, D) one vector a row, (B, N, D) N vectors a row, or a list of B tensors (n_i, D).
        vision_mask: (B, T) bool, True where a vector replaces the token's embedding, row by row in reading order; without
        it, the places that hold `config.vision_token_id`. Positions of pictures are never learnt, neither as input nor as
        target, whatever `targets` says there. Raises ValueError where places and vectors do not match in number, for a
        vector width other than vision_embedding_dim, and for NaN or infinite vectors.
        """
        x = self.embed(idx, vision_embeddings, vision_mask)
        if targets is not None:
            self.check_targets(targets, idx.shape)
            targets = self.without_images(targets, self.image_places(idx, vision_mask))
        return self.head(self.trunk(x, kv_cache), targets, loss_reduction)

    def image_places(self, idx: torch.Tensor, vision_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T) bool: where a picture's vectors stand."""
        if vision_mask is None:
            return idx == self.config.vision_token_id
        if vision_mask.shape != idx.shape or vision_mask.dtype != torch.bool:
            raise ValueError(
                f"vision_mask must be a bool tensor of the shape of the tokens {tuple(idx.shape)}, "
                f"got {vision_mask.dtype} {tuple(vision_mask.shape)}"
            )
        return vision_mask.to(idx.device)

    @staticmethod
    def without_images(targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """targets (B, T) with -1 at every picture position and at every position whose next token is one."""
        unlearnt = places.clone()
        unlearnt[:, :-1] |= places[:, 1:]  # targets are shifted: targets[t] is the token at t + 1
        return targets.masked_fill(unlearnt, IGNORE_INDEX)

    def embed(self, idx, vision_embeddings=None, vision_mask=None) -> torch.Tensor:
        x = super().embed(idx)  # (B, T, C)
        if vision_embeddings is None:
            if vision_mask is not None and vision_mask.any():
                raise ValueError(
                    f"vision_mask marks {int(vision_mask.sum())} places, but no vision_embeddings were given"
                )
            return x
        places = self.image_places(idx, vision_mask)
        vectors = self.flat_vectors(vision_embeddings, places)  # (M, D)
        projected = self.vision_projector(vectors)  # float32
        # row-major on both sides, and the counts agree row by row: the i-th vector goes to the i-th place
        return x.masked_scatter(places[..., None], projected.to(x.dtype))

    def flat_vectors(self, vision_embeddings, places: torch.Tensor) -> torch.Tensor:
        """All vectors (M, D) of a batch in row order, checked against the places (B, T) that they are to fill."""
        width = self.config.vision_embedding_dim
        if isinstance(vision_embeddings, torch.Tensor) and vision_embeddings.dim() == 2:
            vision_embeddings = vision_embeddings[:, None]  # (B, D) -> (B, 1, D)
        rows = list(vision_embeddings)
        for row in rows:
            if row.dim() != 2 or row.size(-1) != width:
                raise ValueError(
                    f"vision_embeddings must be (B, {width}), (B, N, {width}) or a list of (n, {width}); "
                    f"got a row of shape {tuple(row.shape)}, and vision_embedding_dim is {width}"
                )
        wanted, found = places.sum(1).tolist(), [row.size(0) for row in rows]
        if wanted != found:
            raise ValueError(
                f"vision_mask marks {wanted} places in the rows of the batch, but vision_embeddings bring {found} vectors"
            )
        vectors = torch.cat(rows).to(places.device)
        if self.config.vision_tokens_per_image > 1 and len(vectors) % self.config.vision_tokens_per_image:
            raise ValueError(
                f"{len(vectors)} vision vectors are no whole number of images of {self.config.vision_tokens_per_image} each"
            )
        if not torch.isfinite(vectors).all():
            raise ValueError("vision_embeddings hold NaN or infinite values: check the encoder and its input")
        return vectors

    def generate_with_image(
        self,
        prompt_tokens: Sequence[int],
        image=None,
        max_new_tokens: int = 50,
        temperature: float = 0.8,
        *,
        vision_embeddings: torch.Tensor | None = None,
        stream: bool = False,
        stop_ids: Sequence[int] = (),
        **sampling,
    ) -> list[int] | Iterator[int]:
        """Continue a prompt about one picture (or a list of pictures).

        image: anything that `vision.images.open_image` takes; or give vision_embeddings (n_images, N, D) from
        `encode_images`, to ask again without looking again. Placeholders in prompt_tokens say where pictures stand; a
        prompt without any gets them in front. `sampling`: further fields of `sampling.Sampling`. Returns the new
        token ids as a list, or one by one with stream=True.
        """
        if vision_embeddings is None:
            if image is None:
                raise ValueError("generate_with_image needs an image, or vision_embeddings from encode_images")
            vision_embeddings = self.encode_images(image)
        prompt = list(prompt_tokens)
        if self.config.vision_token_id not in prompt:
            n_images = vision_embeddings.size(0)
            prompt = [self.config.vision_token_id] * (n_images * self.config.vision_tokens_per_image) + prompt
        engine = Engine(self)
        engine.check([prompt], max_new_tokens, [0])  # here, since a stream would complain only when it is read
        steps = engine.stream(
            [prompt],
            max_new_tokens,
            sampling=Sampling(temperature=temperature, **sampling),
            stop_ids=stop_ids,
            vision_embeddings=[vision_embeddings.flatten(0, 1)],
        )
        tokens = (step[0] for step in steps)
        return tokens if stream else list(tokens)


def create_multimodal_gpt(config: MultimodalGPTConfig, device="cpu") -> MultimodalGPT:
    """A MultimodalGPT on `device`. Call `init_weights()`, or load a state dict, before use."""
    return MultimodalGPT(config).to(device)
