"""A GPT that reads pictures.

    images ── look ──> (B, N, D) vectors ── inputs ──> Inputs ── hidden ──> (B, T, C) ── logits or loss

fusion="prefix": projected vision vectors replace the embeddings of placeholders in the token row, N a picture. Only the
embedding step differs from GPT. fusion="cross": a picture takes one place in the row, and every layer looks at its N cells by
gated cross-attention before its self-attention; how many pictures a batch has depends on its values, so this does not compile
as one graph. Self-attention, MLP, head and loss are GPT's either way.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn

from nanochat.attention_weights import attention_weights
from nanochat.config import MultimodalGPTConfig
from nanochat.cross_attention import GatedCrossAttention
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.fusion import CellProjector, VisionProjector, pool_to_tokens
from nanochat.gpt import GPT, IGNORE_INDEX, Inputs
from nanochat.kv_cache import NEVER, KVCache, Pictures, Seen
from nanochat.sampling import Sampling
from nanochat.vision.encoder import Encoder, open_encoder
from nanochat.vision.inference import infer
from nanochat.vision.pixels import read_squares

TABLES = {f"vision_projector.{name}" for name in ("position", "cell", "picture")}  # learnt, of places and numbers


class MultimodalGPT(GPT):
    """GPT with a vision projector and, once attached or first needed, an encoder inside the module tree."""

    kind = "multimodal_gpt"
    config_class = MultimodalGPTConfig
    later_weights = ("vision_projector.change.c_fc.weight", "vision_projector.change.c_proj.weight")

    def __init__(self, config: MultimodalGPTConfig):
        super().__init__(config)
        vision_dim, n_tokens = config.vision_embedding_dim, config.vision_tokens_per_image
        self.cross_attention: nn.ModuleList | None = None  # one for each layer
        if config.fusion == "cross":
            self.vision_projector = CellProjector(vision_dim, config.n_embd, n_tokens, config.max_images)
            self.cross_attention = nn.ModuleList([GatedCrossAttention(config) for _ in range(config.n_layer)])
        else:
            projector = VisionProjector(vision_dim, config.n_embd, config.mlp_width, n_tokens)
            self.vision_projector = projector if config.use_vision_projection else nn.Identity()
        self.vision_encoder: Encoder | None = None

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT.init_weights; the tables of positions start at zero, and the gates of cross-attention, so that a new model says
        what the text model says."""
        super().init_weights()
        for module in (self.vision_projector, *(self.cross_attention or ())):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
        if self.cross_attention is not None:
            self.vision_projector.change.c_proj.weight.zero_()

    # ---- from pictures to vectors

    @property
    def map_channels(self) -> int:
        """Channels of the encoder's map, before it is pooled."""
        return self.config.vision_embedding_dim

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) maps -> (B, vision_tokens_per_image, vision_embedding_dim)."""
        return pool_to_tokens(maps, self.config.vision_tokens_per_image)

    def attach_encoder(self, encoder: Encoder) -> None:
        """Make `encoder` part of the model (state dict, `.to()`, training). Raises ValueError where its map does not have
        the channels that the projector was built for."""
        layer, expected = self.config.vision_layer, self.map_channels
        found = encoder.channels(layer)
        if found != expected:
            raise UserError(
                f'the encoder\'s layer "{layer}" has {found} channels, but vision_embedding_dim is {expected}: '
                f"set vision_embedding_dim={found}, or choose another layer or encoder"
            )
        self.vision_encoder = encoder

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) RGB in 0..1, on the encoder's device -> (B, N, D) float32 vectors. Differentiable: training uses it."""
        return self.pool(self.maps(pixels))

    def maps(self, pixels: torch.Tensor, encoder: Encoder | None = None) -> torch.Tensor:
        """(B, 3, S, S) -> the encoder's map (B, C, H, W) in float32. encoder: a copy of the model's own one that runs instead."""
        dtype, layer = self.compute_dtype, self.config.vision_layer
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            return (encoder or self.vision_encoder).maps(pixels, [layer])[layer].float()

    def inference_maps(self, squares) -> torch.Tensor:
        """`maps` of (B, S, S, 3) uint8 pictures, without gradients and faster, see `vision.inference`."""
        return infer(self.vision_encoder, squares, lambda fast, pixels: {"map": self.maps(pixels, fast)})["map"]

    @torch.no_grad()  # not inference_mode: its tensors cannot be used for training later
    def look(self, images) -> torch.Tensor:
        """One picture or a list of B -> (B, vision_tokens_per_image, vision_embedding_dim) float32, on the encoder's device.

        images: anything that `vision.images.open_image` takes. Without an encoder, the default one (see
        `vision.encoder.open_encoder`) is loaded first. Encode once and ask often: the result is what `forward`, `Engine.add`
        and `generate_with_image` take.
        """
        if self.vision_encoder is None:
            self.attach_encoder(open_encoder(device=self.device, image_size=self.config.vision_image_size))
        squares, _ = read_squares(self.vision_encoder, images)
        return self.pool(self.inference_maps(squares))

    # ---- from vectors to the token row

    def embed(self, inputs: Inputs) -> torch.Tensor:
        x = super().embed(inputs)  # (B, T, C)
        if inputs.images is None or self.cross_attention is not None:
            return x
        projected = self.vision_projector(inputs.images)  # (M, C) float32
        if inputs.shown is not None:
            projected = self.one_by_one(projected).index_select(0, inputs.shown).flatten(0, 1)
        # row-major on both sides: the i-th vector goes to the i-th place
        return x.masked_scatter(inputs.places[..., None], projected.to(x.dtype))

    def one_by_one(self, vectors: torch.Tensor) -> torch.Tensor:
        """(M, D) -> (M / N, N, D), picture by picture."""
        return vectors.unflatten(0, (-1, self.config.vision_tokens_per_image))

    def context(self, inputs: Inputs, positions, cache: KVCache | None = None) -> Seen | None:
        """The pictures that cross-attention sees: those of the inputs and those that the cache holds."""
        if self.cross_attention is None:
            return None
        query = positions
        if isinstance(positions, slice):
            query = torch.arange(positions.start, positions.stop, device=inputs.idx.device)[None]
        pictures = None if cache is None else cache.pictures
        if inputs.images is not None and len(inputs.images):
            new = self.pictures(inputs, query, pictures)
            pictures = new if pictures is None else pictures.extended(new)
            if cache is not None:
                cache.pictures = pictures
        if pictures is None or pictures.positions.size(1) == 0:
            return None
        return pictures.seen(query)

    def pictures(self, inputs: Inputs, query: torch.Tensor, held: Pictures | None) -> Pictures:
        """The pictures of the inputs. query: (B or 1, T), the position of each token in its row; held: the pictures that came
        before in each row. Raises UserError for more than max_images in a row."""
        spots = spots_of(inputs.places)
        number = spots.slot if held is None else spots.slot + held.counts[spots.row]  # among all pictures of its row
        self.config.check_images(int(number.max()) + 1)
        cells = self.vision_projector(self.one_by_one(inputs.images))  # (U, N, C) float32
        shown = torch.arange(len(number), device=number.device) if inputs.shown is None else inputs.shown
        before = torch.where(spots.slot > 0, shown.roll(1), shown)  # the picture in front of it in its row; else itself
        if held is not None:
            before = torch.where((spots.slot == 0) & (number > 0), len(cells) + spots.row, before)
            cells = torch.cat([cells, held.last()])
        made, made_of = self.make(cells, shown, before, number)
        index = spots.table(made_of, 0)  # where a row has fewer pictures, any one will do: no token sees it
        keys, values = (
            [part.index_select(0, index.flatten()).unflatten(0, index.shape) for part in parts]
            for parts in zip(*made, strict=True)
        )
        where = spots.table(query.expand(inputs.places.shape)[spots.row, spots.column], NEVER)
        return Pictures(keys, values, cells.detach()[spots.table(shown, 0)], where)

    def make(
        self, cells: torch.Tensor, shown: torch.Tensor, before: torch.Tensor, number: torch.Tensor
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """(each layer's keys and values of V pictures, which of them each of S spots has). shown, before: (S,) which of the cells
        a spot shows, and which the one in front of it; number: (S,) its number in its row. Where many rows show a picture alike,
        its keys and values are made once."""
        kinds, made_of = torch.stack([shown, before, number]).unique(dim=1, return_inverse=True)  # (3, V), (S,)
        made = self.vision_projector.in_row(cells[kinds[0]], cells[kinds[1]], kinds[2]).to(self.compute_dtype)
        return [layer.keys_and_values(made) for layer in self.cross_attention], made_of

    def layer(self, number: int, x: torch.Tensor, context: Seen | None, *rest) -> torch.Tensor:
        if context is not None:
            *_, dropout = rest
            keys, values = context.keys[number], context.values[number]
            x = self.cross_attention[number](x, keys, values, context.mask, context.blind, dropout)
        return super().layer(number, x, context, *rest)

    def is_projector(self, name: str) -> bool:
        """Whether the parameter is on the way from the encoder to the decoder."""
        return name.startswith(("vision_projector.", "cross_attention."))

    def param_group(self, name: str, parameter: nn.Parameter) -> str:
        if name.startswith("vision_encoder."):
            return "encoder"
        group = "outputs" if name in TABLES else super().param_group(name, parameter)
        return "projector" if group == "matrices" and self.is_projector(name) else group

    def forward(
        self, idx, vision_embeddings=None, vision_mask=None, targets=None, kv_cache=None, loss_reduction="mean"
    ):
        """GPT.forward with pictures.

        vision_embeddings: (B, D) one vector a row, (B, N, D) N vectors a row, or a list of B tensors (n_i, D).
        vision_mask: (B, T) bool, True where a vector replaces the token's embedding, row by row in reading order, or, with
        fusion="cross", at the one place of each picture; without it, the places that hold `config.vision_token_id`.
        Positions of pictures are never learnt, neither as input nor as target, whatever `targets` says there. Raises
        ValueError where places and vectors do not match in number, for a vector width other than vision_embedding_dim, for
        NaN or infinite vectors, and for more pictures in a row than max_images with fusion="cross".
        """
        inputs = self.inputs(idx, vision_embeddings, vision_mask)
        if targets is None:
            return self.logits(self.hidden(inputs, kv_cache))
        self.check_targets(targets, idx.shape)
        targets = without_images(targets, self.image_places(idx, vision_mask))
        return self.loss(self.hidden(inputs, kv_cache), targets, loss_reduction)

    def inputs(self, idx: torch.Tensor, vision_embeddings=None, vision_mask=None) -> Inputs:
        """The arguments of `forward`, checked, as `hidden` takes them."""
        self.check_ids(idx)
        places = self.image_places(idx, vision_mask)
        if vision_embeddings is None:
            if vision_mask is not None and vision_mask.any():
                raise UserError(
                    f"vision_mask marks {int(vision_mask.sum())} places, but no vision_embeddings were given"
                )
            return Inputs(idx)
        if isinstance(vision_embeddings, torch.Tensor) and vision_embeddings.dim() == 2:
            vision_embeddings = vision_embeddings[:, None]  # (B, D) -> (B, 1, D)
        wanted, found = places.sum(1).tolist(), [len(row) for row in vision_embeddings]
        each = self.config.vectors_per_place
        if [each * n for n in wanted] != found:
            raise UserError(
                f"vision_mask marks {wanted} places in the rows of the batch, but vision_embeddings bring {found} vectors"
                + (f", expected {each} for each place" if each > 1 else "")
            )
        images = torch.cat([self.checked_vectors(row, n) for row, n in zip(vision_embeddings, wanted, strict=True)])
        return Inputs(idx, places, images.to(idx.device))

    def inputs_of(self, rows: Sequence) -> Inputs:
        """GPT.inputs_of with the vision vectors of the rows that have some; an id of a placeholder in another row is a word."""
        inputs = super().inputs_of(rows)
        if any(row.images is not None for row in rows):
            shown = [len(row.tokens) if row.images is not None else 0 for row in rows]
            in_row = (
                torch.arange(inputs.idx.size(1), device=self.device) < torch.tensor(shown, device=self.device)[:, None]
            )
            inputs.places = (inputs.idx == self.config.vision_token_id) & in_row  # (B, T)
            inputs.images = torch.cat([row.images for row in rows if row.images is not None]).to(self.device)
        return inputs

    def image_places(self, idx: torch.Tensor, vision_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T) bool: the positions of vision vectors."""
        if vision_mask is None:
            return idx == self.config.vision_token_id
        if vision_mask.shape != idx.shape or vision_mask.dtype != torch.bool:
            raise UserError(
                f"vision_mask must be a bool tensor of the shape of the tokens {tuple(idx.shape)}, "
                f"got {vision_mask.dtype} {tuple(vision_mask.shape)}"
            )
        return vision_mask.to(idx.device)

    def checked_vectors(self, vectors, n_places: int, n_shown: int = 0) -> torch.Tensor:
        """Vision vectors of one row, (M, D) or (n, N, D) -> (M, D). n_shown: pictures that the row's cache holds. Raises
        ValueError where they do not fit the row's places or this model."""
        vectors = torch.as_tensor(vectors)
        vectors = vectors.flatten(0, -2) if vectors.dim() > 2 else vectors
        self.config.check_vectors(tuple(vectors.shape), n_places, n_shown)
        if not torch.isfinite(vectors).all():
            raise UserError("vision_embeddings hold NaN or infinite values: check the encoder and its input")
        return vectors

    def attention(self, ids: Sequence[int], vectors) -> torch.Tensor:
        """(n_layer, n_head, T, P, N) float32 on the CPU, see `attention.attention_to_images`."""
        inputs = self.inputs(torch.tensor([list(ids)], device=self.device), [torch.as_tensor(vectors).flatten(0, 1)])
        return attention_weights(self, inputs).unflatten(-1, (-1, self.config.vision_tokens_per_image))

    # ---- generation

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

        image: anything that `vision.images.open_image` takes; or give vision_embeddings (n_images, N, D) from `look`, to
        ask again without encoding again. Placeholders in prompt_tokens are the places of the pictures; a prompt without any
        gets them in front. `sampling`: further fields of `sampling.Sampling`. Returns the new token ids as a list, or one
        by one with stream=True.
        """
        if vision_embeddings is None:
            if image is None:
                raise UserError("generate_with_image needs an image, or vision_embeddings from look()")
            vision_embeddings = self.look(image)
        prompt = list(prompt_tokens)
        if self.config.vision_token_id not in prompt:
            n_images = vision_embeddings.size(0)
            prompt = [self.config.vision_token_id] * (n_images * self.config.places_per_image) + prompt
        steps = Engine(self).stream(
            [prompt],
            max_new_tokens,
            sampling=Sampling(temperature=temperature, **sampling),
            stop_ids=stop_ids,
            images=[vision_embeddings],
        )
        tokens = (step[0] for step in steps)
        return tokens if stream else list(tokens)


def without_images(targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """targets (B, T) with -1 at every vision position and at every position whose next token is one."""
    unlearnt = places.clone()
    unlearnt[:, :-1] |= places[:, 1:]  # targets are shifted: targets[t] is the token at t + 1
    return targets.masked_fill(unlearnt, IGNORE_INDEX)


def create_multimodal_gpt(config: MultimodalGPTConfig, device="cpu") -> MultimodalGPT:
    """A MultimodalGPT on `device`. Call `init_weights()`, or load a state dict, before use."""
    return MultimodalGPT(config).to(device)


class Spots(NamedTuple):
    """Where the S pictures of a batch stand, in reading order, (S,) each. slot: its number among those of its row in this batch;
    shape: (B, P), rows and the most pictures of one."""

    row: torch.Tensor
    column: torch.Tensor
    slot: torch.Tensor
    shape: tuple[int, int]

    def table(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """(S,) int64 -> (B, P), `fill` where a row has fewer pictures."""
        found = values.new_full(self.shape, fill)
        found[self.row, self.slot] = values
        return found


def spots_of(places: torch.Tensor) -> Spots:
    """places: (B, T) bool, where a picture stands."""
    row, column = places.nonzero(as_tuple=True)
    slot = places.cumsum(1)[row, column] - 1
    return Spots(row, column, slot, (len(places), int(slot.max()) + 1))
