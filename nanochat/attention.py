"""What an answer looked at: the attention of its words to the cells of the pictures, from one plain forward pass.

    vectors = agent.look("photo.jpg")
    prompt = agent.prompt([user_message("what is this?", 1)])
    for word in attention_of_words(agent.model, agent.tokenizer, prompt, "a red bus", vectors):
        word.text, word.weights                  # "bus", (n_layer, n_head, 1, N)

The layers attend in a fused kernel, which keeps no weights. So hooks record what goes into each layer during the pass, and the
weights are computed again from the same queries and keys; the model itself knows nothing of this.

With fusion="prefix" a cell is a token of the row, and the weights are those of self-attention: what is missing to 1 went to text.
With fusion="cross" they are those of cross-attention, and add up to 1 over the pictures that a position can see.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn

from nanochat.errors import UserError
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.robot_gpt import RobotGPT
from nanochat.tokenizer import Tokenizer
from nanochat.vision.pixels import evaluating


@dataclass(frozen=True)
class WordAttention:
    """A word of an answer. weights: (n_layer, n_head, P, N) float32, from where the word is said to the N cells of P pictures,
    row by row from the top left; the mean over its tokens."""

    text: str
    weights: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """(P, N): over all layers and heads."""
        return self.weights.mean((0, 1))


def check_has_cells(model: nn.Module) -> None:
    """Raises UserError for a model whose vision vectors are not the cells of a grid."""
    if not isinstance(model, MultimodalGPT):
        raise UserError("this model has no cells: it is a text model and sees no pictures")
    if isinstance(model, RobotGPT):
        raise UserError(
            "this model has no cells: each of its glances reads the whole picture, so its attention points nowhere"
        )
    if model.config.vision_tokens_per_image == 1:
        raise UserError(
            "this model has no cells: it sees a picture as one vector. Train one with a grid, such as --vision-tokens 16"
        )


@torch.no_grad()
def attention_to_images(model: MultimodalGPT, ids: Sequence[int], vectors: torch.Tensor) -> torch.Tensor:
    """(n_layer, n_head, T, P, N) float32 on the CPU: how much each of T positions attends to each cell of P pictures.

    ids: T token ids of one row with the placeholders of the pictures. vectors: (P, N, D) from `look`. A position before a
    picture has 0 for its cells. Raises UserError for a model without cells (see `check_has_cells`), and where ids and vectors do
    not match.
    """
    check_has_cells(model)
    idx = torch.tensor([list(ids)], device=model.device)
    inputs = model.inputs(idx, [vectors.flatten(0, 1)])
    with evaluating(model), recorded(model) as weights:
        model.hidden(inputs)
    if model.cross_attention is None:
        weights = [each[..., inputs.places[0]] for each in weights]
    cells = torch.stack(weights).float().cpu()  # (n_layer, n_head, T, P * N)
    return cells.unflatten(-1, (-1, model.config.vision_tokens_per_image))


@contextmanager
def recorded(model: MultimodalGPT) -> Iterator[list[torch.Tensor]]:
    """The weights of every layer in a pass over one row inside the block: a list that fills with (n_head, T, keys) tensors."""
    found: list[torch.Tensor] = []

    def self_attention(layer: nn.Module, arguments: tuple) -> None:
        x, cos, sin, *_ = arguments
        q, k = layer.queries_and_keys(x, cos, sin)
        may_see = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
        found.append(softmax_weights(q[0], k[0], may_see))

    def cross_attention(layer: nn.Module, arguments: tuple) -> None:
        x, keys, _, mask, blind, _ = arguments
        weights = softmax_weights(layer.queries(x)[0], keys[0], mask[0])
        found.append(weights.masked_fill(blind[0], 0.0))

    if model.cross_attention is None:
        hooks = [block.attn.register_forward_pre_hook(self_attention) for block in model.transformer.h]
    else:
        hooks = [layer.register_forward_pre_hook(cross_attention) for layer in model.cross_attention]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def softmax_weights(q: torch.Tensor, k: torch.Tensor, may_see: torch.Tensor) -> torch.Tensor:
    """q (T, H, D), k (S, H_kv, D), may_see: bool that broadcasts to (H, T, S) -> (H, T, S) float32 of rows that add up to 1."""
    q, k = q.float().transpose(0, 1), k.float().transpose(0, 1)
    k = k.repeat_interleave(len(q) // len(k), 0)  # grouped-query attention: several heads share one of the keys
    scores = q @ k.transpose(1, 2) / q.size(-1) ** 0.5
    return scores.masked_fill(~may_see, -torch.inf).softmax(-1)


def attention_of_words(
    model: MultimodalGPT, tokenizer: Tokenizer, prompt: Sequence[int], answer: str, vectors: torch.Tensor
) -> list[WordAttention]:
    """Each word of the answer, in its order, with the attention of the positions that say it: those before its tokens.

    prompt: the ids up to where the answer begins. vectors: (P, N, D). Raises UserError as `attention_to_images` does.
    """
    tokens = tokenizer.encode(answer)
    words = word_tokens(tokenizer, tokens)
    weights = attention_to_images(model, [*prompt, *tokens[:-1]], vectors)[:, :, len(prompt) - 1 :]
    return [WordAttention(text, weights[:, :, places].mean(2)) for text, places in words]


def word_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """(word, the indices of its tokens): words are what stands between spaces. A token with the end of one word and the begin of
    another belongs to the latter."""
    ends, text = [], b""
    for token in tokens:
        text += tokenizer.bytes_of(token)
        ends.append(len(text))
    words, start = [], 0
    for piece in text.split(b" "):
        end = start + len(piece)
        # a token belongs to the word that its last byte is in; one of a lone space to none
        places = [i for i, last in enumerate(ends) if start < last <= end]
        if piece.strip() and places:
            words.append((piece.decode("utf-8", errors="replace").strip(), places))
        start = end + 1
    return words
